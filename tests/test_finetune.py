"""Fine-tuning: what it begins with, what it learns from, and that it resumes like pre-training, whose loop it is."""

import json
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from posmask.eval import run as evaluate
from posmask.prep.answers import accuracy
from posmask.train import finetune, pretrain
from posmask.train.checkpoint import checkpoints, load_model
from posmask.train.config import ModelConfig
from posmask.train.loader import Collator, Shards, View
from posmask.train.model import AnswerHead, Packing, PosMaskModel

CPU = torch.device("cpu")


def flags(small_run, out, *data, task="vqa", steps=4):
    argv = ["--task", task, "--init", str(small_run), "--out", str(out), "--steps", str(steps), "--batch-size", "16"]
    argv += [word for folder in data for word in ("--data", str(folder))]
    return [*argv, "--log-every", "1", "--checkpoint-every", "2", "--eval-images", "16", "--snapshots", "0",
            "--min-answers", "1", "--lr", "1e-3", "--warmup-steps", "0", "--captions-per-image", "2",
            "--dtype", "fp32"]  # fmt: skip


def lines_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "lr" in line]


def weights_of(run):
    return load_file(run / "model.safetensors")


@pytest.fixture(scope="module")
def task_only(small_run, question_shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "task-only"
    argv = flags(small_run, out, question_shards)
    assert finetune.main([*argv, "--val", str(question_shards), "--captions-per-image", "2"]) == 0
    return out


@pytest.fixture(scope="module")
def with_captions(small_run, question_shards, scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "with-captions"
    assert finetune.main([*flags(small_run, out, question_shards, scenes / "train"), "--mask", "noun"]) == 0
    return out


def test_targets_are_the_evaluators_accuracy(scenes, question_shards):
    entries = json.loads((scenes / "eval" / "v2_annotations.json").read_text())["annotations"]
    humans = {entry["question_id"]: [answer["answer"] for answer in entry["answers"]] for entry in entries}
    shards = Shards((str(question_shards),))
    samples = [shards[i] for i in range(16)]
    vocabulary = finetune.vocabulary(shards, 5)
    counts = shards.manifest.counts["answers"]
    assert set(vocabulary) == {answer for answer, count in counts.items() if count >= 5} != set(counts)
    view = View(0, 32, (0.5,) * 3, (0.2,) * 3, captions_per_image=2)
    batch = Collator(view, 0, 16, "cpu", CPU, answers=vocabulary)(samples, epoch=0)
    assert batch.answer_scores.shape == (len(batch.caption_image), len(vocabulary))
    keys = zip(batch.caption_image.tolist(), batch.caption_key[:, 0].tolist(), batch.answer_scores, strict=True)
    for image, caption, scores in keys:
        given = humans[samples[image]["question_ids"][caption]]
        assert torch.allclose(scores, torch.tensor([accuracy(answer, given) for answer in vocabulary]))


def test_loss_of_the_answer_head():
    generator = torch.Generator().manual_seed(0)
    logit = torch.randn(5, 7, generator=generator)
    scores = torch.tensor([0.0, 0.3, 0.6, 0.9, 1.0])[torch.randint(5, (5, 7), generator=generator)]
    found = AnswerHead.loss(logit, scores)
    wanted = -sum(
        float(s * F.logsigmoid(x) + (1 - s) * F.logsigmoid(-x))
        for x, s in zip(logit.flatten(), scores.flatten(), strict=True)
    )
    assert float(found.loss_sum) == pytest.approx(wanted, rel=1e-5)
    assert float(found.hits) == pytest.approx(sum(float(s[x.argmax()]) for x, s in zip(logit, scores, strict=True)))
    assert float(found.count) == 5


def test_it_begins_with_all_weights_but_the_head(small_run, question_shards, task_only, tmp_path):
    config = finetune.parse_args(flags(small_run, tmp_path, question_shards), False)
    start = finetune.begin(config)
    model = PosMaskModel(start.model_config)
    fresh = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("vqa.")}
    start.load_weights(model)
    saved = weights_of(small_run)
    assert model.state_dict().keys() - saved.keys() == fresh.keys() != set()
    assert all(torch.equal(model.state_dict()[name], (saved | fresh)[name]) for name in model.state_dict())
    # A run with a head for the same answers hands that on too; for other answers it does not.
    for least, is_kept in ((1, True), (9, False)):
        argv = [*flags(task_only, tmp_path, question_shards), "--min-answers", str(least)]
        start = finetune.begin(finetune.parse_args(argv, False))
        model = PosMaskModel(start.model_config)
        start.load_weights(model)
        there = weights_of(task_only)["vqa.0.weight"]
        assert torch.equal(model.state_dict()["vqa.0.weight"], there) == is_kept


def test_pre_training_goes_on_with_another_objective(small_run, task_only, scenes, tmp_path):
    """The new head is new, an answer head is left behind, all else is the run's."""
    for run in (small_run, task_only):
        argv = [*flags(run, tmp_path, scenes / "train", task="none"), "--mask", "verb", "--objectives", "mlm,itm"]
        start = finetune.begin(finetune.parse_args(argv, False))
        model = PosMaskModel(start.model_config)
        fresh = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("itm.")}
        start.load_weights(model)
        wanted = {name: value for name, value in weights_of(run).items() if not name.startswith("vqa.")} | fresh
        assert model.state_dict().keys() == wanted.keys() > fresh.keys() > set()
        assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_a_run_learns_and_validates(task_only, small_run):
    lines = lines_of(task_only)
    assert [line["vqa"]["loss"] for line in lines][-1] < lines[0]["vqa"]["loss"]
    assert all(line["loss"] is None and line["masked_tokens"] == 0 for line in lines), "nothing is masked"
    values = json.loads((task_only / "metrics.jsonl").read_text().splitlines()[-1])["val"]
    assert set(values) == {"image", "blank"} and 0 <= values["image"]["vqa"]["accuracy"] <= 1
    before, after = weights_of(small_run), weights_of(task_only)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert {"image.proj.weight", "text.0.attention.self.query.weight", "fusion.1.crossattention.self.key.weight"} <= {
        *moved
    }
    config = ModelConfig.load(task_only / "model_config.json")
    assert len(config.answers) > 5 and config.objectives == ()


def test_the_arm_masks_the_questions(small_run, question_shards, task_only, tmp_path):
    """The answers are learned from the same batches, without masks: their first loss is that of the task alone."""
    first = lines_of(task_only)[0]["vqa"]
    seen = {}
    for weight in ("1", "100"):
        out = tmp_path / weight
        more = ["--mask", "noun", "--mask-weight", weight, "--captions-per-image", "2"]
        assert finetune.main([*flags(small_run, out, question_shards, steps=2), *more]) == 0
        line = lines_of(out)[0]
        assert line["vqa"] == pytest.approx(first, rel=1e-6)
        assert set(line["pos"]) == {"noun"} and line["loss"] > 0
        seen[weight] = (line["loss"], line["grad_norm"], weights_of(out)["head.dense.weight"])
    assert seen["1"][0] == seen["100"][0] and seen["100"][1] > 3 * seen["1"][1]
    assert not torch.equal(seen["1"][2], seen["100"][2])


def test_the_arm_masks_captions_of_a_second_folder(small_run, question_shards, scenes, with_captions, tmp_path):
    """In the first step both losses are those of runs that learn one of the two."""
    alone = flags(small_run, tmp_path / "none", scenes / "train", task="none", steps=2)
    assert finetune.main([*alone, "--mask", "noun"]) == 0
    masked, line = lines_of(tmp_path / "none")[0], lines_of(with_captions)[0]
    assert line["loss"] == pytest.approx(masked["loss"], rel=1e-6)
    assert line["pos"]["noun"] == pytest.approx(masked["pos"]["noun"])
    assert line["images"] == 32 and "vqa" not in masked
    assert "vqa.0.weight" not in weights_of(tmp_path / "none")
    assert finetune.main(flags(small_run, tmp_path / "task", question_shards, steps=2)) == 0
    assert line["vqa"] == pytest.approx(lines_of(tmp_path / "task")[0]["vqa"], rel=1e-6)


def test_sigterm_saves_and_the_same_command_continues(
    small_run, question_shards, scenes, with_captions, tmp_path, monkeypatch
):
    argv = [*flags(small_run, tmp_path / "stopped", question_shards, scenes / "train"), "--mask", "noun"]
    all_losses, calls = pretrain.all_losses, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return all_losses(*args)

    monkeypatch.setattr(pretrain, "all_losses", interrupted)
    assert finetune.main(argv) == 0
    monkeypatch.undo()
    assert checkpoints(tmp_path / "stopped")[-1][0] == 3 and not (tmp_path / "stopped" / "model.safetensors").exists()
    assert finetune.main(argv) == 0
    whole, stopped = weights_of(with_captions), weights_of(tmp_path / "stopped")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert [line["grad_norm"] for line in lines_of(with_captions)] == [
        line["grad_norm"] for line in lines_of(tmp_path / "stopped")
    ]


@pytest.mark.parametrize(("stage", "dtype"), [("0", "bf16"), ("3", "fp32")])
def test_zero_stages(small_run, question_shards, scenes, with_captions, tmp_path, stage, dtype):
    argv = [*flags(small_run, tmp_path / "run", question_shards, scenes / "train", steps=4), "--mask", "noun"]
    assert finetune.main([*argv, "--zero-stage", stage, "--dtype", dtype]) == 0
    for line, other in zip(lines_of(tmp_path / "run"), lines_of(with_captions), strict=True):
        tolerance = 1e-4 if dtype == "fp32" else 0.03
        assert line["vqa"]["loss"] == pytest.approx(other["vqa"]["loss"], rel=tolerance)
        assert line["loss"] == pytest.approx(other["loss"], rel=tolerance)


def test_the_head_has_a_learning_rate_of_its_own(small_run, question_shards, tmp_path):
    """With Adam's first step each weight moves by about its learning rate."""
    argv = [*flags(small_run, tmp_path / "run", question_shards, steps=1), "--lr", "1e-4", "--head-lr", "1e-2"]
    assert finetune.main([*argv, "--weight-decay", "0"]) == 0
    begin = finetune.begin(finetune.parse_args(argv, False))
    torch.manual_seed(0)
    model = PosMaskModel(begin.model_config)
    begin.load_weights(model)
    after, before = weights_of(tmp_path / "run"), model.state_dict()
    for name, lr in (("vqa.3.weight", 1e-2), ("text.0.attention.self.value.weight", 1e-4)):
        assert float((after[name] - before[name]).abs().max()) == pytest.approx(lr, rel=0.01)


def ask(run, scenes, out, *more):
    files = scenes / "eval"
    argv = ["vqa", "--checkpoint", str(run), "--annotations", str(files / "v2_annotations.json"), "--out", str(out)]
    return [*argv, "--questions", str(files / "v2_OpenEnded_questions.json"), *more]


def test_answers_equal_a_plain_loop(task_only, scenes, question_shards, tmp_path, capsys):
    images = ["--images", str(scenes / "eval" / "val2017")]
    assert evaluate.main(ask(task_only, scenes, tmp_path / "own", *images)) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    predictions = [json.loads(line) for line in (tmp_path / "own" / "predictions.jsonl").read_text().splitlines()]
    model, _ = load_model(str(task_only), CPU)
    config = model.config
    shards = Shards((str(question_shards),))
    collate = Collator(
        View(0, config.image_size, config.image_mean, config.image_std), 0, 1, "cpu", CPU, answers=config.answers
    )
    found = {item["id"]: item for item in predictions}
    checked = []
    for i in range(0, len(shards), 8):
        sample = shards[i]
        batch = collate([sample], epoch=0)
        for picture, images in (("image", batch.images), ("blank", torch.zeros_like(batch.images))):
            for j, number in enumerate(sample["question_ids"]):
                tokens = batch.tokens[batch.caption_starts[j] : batch.caption_starts[j + 1]]
                packing = Packing.of(torch.tensor([0, len(tokens)]), len(tokens), len(tokens))
                with torch.inference_mode():
                    text_TD = model.encode_text(tokens, packing)
                    fused_TD = model.fuse(text_TD, packing, model.image(images), torch.zeros(1, dtype=torch.int32))
                    best = int(model.vqa(fused_TD[:1]).argmax())
                assert found[number]["answer"][picture] == config.answers[best]
                assert found[number]["accuracy"][picture] == pytest.approx(float(batch.answer_scores[j, best]))
                checked.append((number, picture))
    assert len(set(checked)) > 30
    assert results["num_items"] == len(found) == sum(len(shards[i]["captions"]) for i in range(len(shards)))
    mean = np.mean([item["accuracy"]["image"] for item in predictions])
    assert results["overall"]["image"]["accuracy"] == pytest.approx(mean)

    files = [str(tmp_path / "own" / name) for name in ("official_results.json", "official_results_blank.json")]
    again = ask(task_only, scenes, tmp_path / "read", "--predictions", files[0], "--blank-predictions", files[1])
    assert evaluate.main(again) == 0
    read = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert read["overall"] == results["overall"] and read["groups"] == results["groups"]
    assert not (tmp_path / "read" / "official_results.json").exists()


def test_evaluation_refuses(task_only, small_run, scenes, tmp_path, capsys):
    images = ["--images", str(scenes / "eval" / "val2017")]
    (tmp_path / "one").mkdir()
    for run, more, says in (
        (small_run, images, ["no answer head", "train/finetune.py --task vqa --init"]),
        (task_only, [], ["--images DIR", "--predictions"]),
        (task_only, ["--images", str(tmp_path / "one")], ["50 of 50 photos", "name their folder"]),
        (task_only, ["--images", str(tmp_path / "absent")], ["no such folder"]),
    ):
        assert evaluate.main(ask(run, scenes, tmp_path / "out", *more)) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and all(word in lines[0] for word in says), lines
        assert not (tmp_path / "out").exists()
    assert evaluate.main(["probe", "--checkpoint", str(task_only), "--data", f"{scenes}/val"]) == 2
    assert "trained without" in capsys.readouterr().err
    some = tmp_path / "one" / "000000000001.jpg"
    some.write_bytes((scenes / "eval" / "val2017" / some.name).read_bytes())
    argv = ask(task_only, scenes, tmp_path / "out", "--images", str(some.parent), "--allow-missing")
    assert evaluate.main(argv) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < results["num_items"] < 20 and results["num_missing"] > 100


@pytest.mark.parametrize(
    ("data", "more", "says"),
    [
        ("train", [], ["holds captions", "prep/build_shards.py vqa"]),
        ("questions+train", [], ["--mask none leaves unused", "choose an arm"]),
        ("questions", ["--init", "absent"], ["absent", "no such run"]),
        ("questions", ["--init", "{scenes}"], ["--init", "not a run folder"]),
        ("questions", ["--preset", "base"], ["base contradicts --init"]),
        ("questions", ["--min-answers", "1000"], ["--min-answers 1000", "take fewer"]),
        ("questions", ["--mask-weight", "0"], ["--mask-weight 0", "above 0"]),
        ("questions", ["--mask", "nouns"], ["'nouns' is unknown"]),
        ("questions", ["--val", "{scenes}/val"], ["holds captions, not questions"]),
        ("train", ["--task", "none"], ["only objective"]),
    ],
)
def test_finetune_refuses(small_run, question_shards, scenes, tmp_path, capsys, data, more, says):
    folders = {"train": [scenes / "train"], "questions": [question_shards]}
    folders["questions+train"] = [question_shards, scenes / "train"]
    argv = [*flags(small_run, tmp_path / "run", *folders[data]), *(word.format(scenes=scenes) for word in more)]
    assert finetune.main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in says), lines
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_tokenizer(untrained_run, question_shards, tmp_path, capsys):
    assert finetune.main(flags(untrained_run, tmp_path / "run", question_shards)) == 2
    assert "another tokenizer than --init" in capsys.readouterr().err
