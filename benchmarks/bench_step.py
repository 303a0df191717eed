"""A training step from JPEG bytes to updated weights: ours, the usual pipeline, and what several captions an image buy.

    python benchmarks/bench_step.py
    python benchmarks/bench_step.py --presets laptop base --data data/scenes/train

The usual pipeline has the same sizes, weights and precision: open_clip's trunk, Hugging Face's BERT layers over padded
captions, a head over every token, a DataLoader of open_clip's transform, a BERT tokenizer and Hugging Face's collator.
It runs at the best of its settings, which are all listed. Both use torch's fused AdamW, without DeepSpeed. Loss and
gradients of both must agree on the same masked batches, or no speed is printed.
"""

from __future__ import annotations

import argparse
import io
import math
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, product
from types import SimpleNamespace

import numpy as np
import torch
from open_clip.transform import image_transform
from peer_model import PeerModel, pad, place
from PIL import Image
from timing import interleave, quantiles, ratio, write_result
from torch.utils.data import DataLoader, Dataset
from transformers import BertTokenizerFast, DataCollatorForLanguageModeling

from posmask.train.config import parse_args
from posmask.train.engine import tune_cpu
from posmask.train.loader import Batch, Collator, Loader, Shards, View
from posmask.train.model import PosMaskModel
from posmask.train.objectives import mask_batch, masked_lm
from posmask.train.pretrain import make_masking, make_model_config

PADDED_TOKENS = 30
PRESET = {"cpu": "laptop", "cuda": "base"}
# The dtype in which both models must agree, and by how much loss and gradients may differ, ‖difference‖ / ‖peer's‖. In
# fp32 rounding moves a gradient by 0.5 %, through ReLUs that open or close; the peer's cross entropy is in fp32 all the
# same. On a GPU Triton's kernels take no fp64, but the image encoders are the same.
AGREE_IN = {"cpu": (torch.float64, 1e-6), "cuda": (torch.float32, 1e-3)}
# In the dtype of the step ours may be so many times as far from that as the peer is, and so much further. In bf16 each
# is 0.5 % off in the text encoder, 10 % in the stem's norms: on average alike, in one batch up to 2.1 times, hence the
# errors of several are put together.
MOST_ROUNDING = 1.5
ROUNDING_BUDGET = 1e-3
CHECKED_BATCHES, CHECKED_IMAGES = 4, 16
ROWS = ("parts", "usual", "captions")
BATCH_SIZE = {("laptop", "cpu"): 128, ("base", "cpu"): 16, ("laptop", "cuda"): 512, ("base", "cuda"): 512}
# Batches that the worker processes of the usual pipeline may have ready. Those of `base` on a CPU take a hundredth of a
# step to load. On a GPU, whose minutes are few, loaders, ours too, work in the turns of others: the share of data in
# memory is an upper bound there.
STEPS_AHEAD = {("laptop", "cpu"): 4}
COUNTED_EPOCHS = 100  # over which masked tokens are averaged: of 16 captions, one draw is off by a quarter


class Setup:
    """What all rows of a preset share: shards, a plan (15 % of the tokens, 80/10/10), a model and where it runs."""

    def __init__(self, preset: str, data: list[str], device: torch.device, dtype: str):
        self.device = device
        self.batch_size = BATCH_SIZE[preset, device.type]
        self.steps_ahead = STEPS_AHEAD.get((preset, device.type), 0)
        flags = [word for folder in data for word in ("--data", folder)]
        fixed = ["--mask", "random", "--preset", preset, "--dtype", dtype]
        self.config = parse_args([*fixed, *flags], device.type == "cuda")
        self.dtype = self.config.torch_dtype
        self.shards = Shards(self.config.data)
        self.plan = make_masking(self.config, self.shards).at(0.0)
        self.model_config = make_model_config(self.config, self.shards)
        torch.manual_seed(0)
        with device:  # where it is faster to draw weights
            self.model = PosMaskModel(self.model_config)
        for name, parameter in self.model.named_parameters():
            if name.endswith("bn3.weight"):  # open_clip's 0 leaves no gradient to compare in the rest of the block
                parameter.data.fill_(0.1)
            parameter.data = parameter.data.to(self.dtype).float()  # the same weights in each dtype

    def new_model(self, dtype: torch.dtype | None = None) -> PosMaskModel:
        with self.device:
            model = PosMaskModel(self.model_config)
        model.load_state_dict(self.model.state_dict())
        return place(model, self.device, dtype or self.dtype)

    def new_peer(self, attention: str, dtype: torch.dtype | None = None) -> PeerModel:
        with self.device:
            peer = PeerModel(self.model, attention)
        return place(peer, self.device, dtype or self.dtype)

    def view(self, **changes) -> View:
        config = self.model_config
        seen = {"captions_per_image": 1, "crop_scale": (0.9, 1.0)} | changes
        return View(0, config.image_size, config.image_mean, config.image_std, **seen)

    def collate(self, view: View) -> Collator:
        return Collator(view, len(self.shards.manifest.scores), self.batch_size, "auto", self.device)

    def samples(self) -> list[dict]:
        return [self.shards[i] for i in range(self.batch_size)]


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def stepper(optimizer: torch.optim.Optimizer, loss_of: Callable, batches: Iterator) -> Callable[[], None]:
    """A function that takes the next batch and makes one step of it."""

    def step() -> None:
        loss_of(next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_loss(setup: Setup, model: PosMaskModel) -> Callable[[Batch], torch.Tensor]:
    def loss(batch: Batch) -> torch.Tensor:
        batch = batch.to(setup.device, setup.dtype)
        masked = mask_batch(batch, setup.plan, 0)
        return masked_lm(model, batch, masked).loss_sum / masked.num_masked

    return loss


class Captioned(Dataset):
    """Image bytes and a caption, as the usual pipeline has them: transformed and tokenized in `__getitem__`."""

    def __init__(self, setup: Setup, tokenizer: BertTokenizerFast, pad_to_longest: bool):
        self.samples = [setup.shards[i] for i in range(min(len(setup.shards), 16 * setup.batch_size))]
        self.transform = image_transform(setup.model_config.image_size, is_train=True)
        self.tokenizer = tokenizer
        self.padding = {} if pad_to_longest else {"padding": "max_length"}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict:
        image = self.transform(Image.open(io.BytesIO(self.samples[i]["image"])))
        text = self.samples[i]["captions"][0]
        encoded = self.tokenizer(text, truncation=True, max_length=PADDED_TOKENS, **self.padding)
        return {"image": image, "text": encoded}


def usual_batches(setup: Setup, pad_to_longest: bool, num_workers: int) -> Iterator[SimpleNamespace]:
    tokenizer = BertTokenizerFast(vocab_file=f"{setup.shards.folders[0]}/tokenizer/vocab.txt")
    masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)

    def collate(items: list[dict]) -> SimpleNamespace:
        text = masking([item["text"] for item in items])
        images = torch.stack([item["image"] for item in items])
        valid = text["attention_mask"].bool()
        return SimpleNamespace(images=images, tokens=text["input_ids"], valid=valid, labels=text["labels"])

    data = Captioned(setup, tokenizer, pad_to_longest)
    loader = DataLoader(
        data, setup.batch_size, shuffle=True, drop_last=True, num_workers=num_workers, collate_fn=collate,
        persistent_workers=num_workers > 0, pin_memory=setup.device.type == "cuda",
    )  # fmt: skip
    while True:
        yield from loader


def usual_loss(setup: Setup, model: PeerModel, channels_last: bool) -> Callable[[SimpleNamespace], torch.Tensor]:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def loss(batch: SimpleNamespace) -> torch.Tensor:
        images = batch.images.to(setup.device, setup.dtype, non_blocking=True, memory_format=layout)
        text = (x.to(setup.device, non_blocking=True) for x in (batch.tokens, batch.valid, batch.labels))
        caption_image = torch.arange(len(images), device=setup.device)
        return model(images, *text, caption_image) / int((batch.labels >= 0).sum())

    return loss


def loss_and_gradients(setup: Setup, model: PosMaskModel | PeerModel, batch: Batch) -> dict[str, torch.Tensor]:
    """The loss and, by its name, the gradient of each parameter on one batch masked by us."""
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32
    batch = batch.to(setup.device, dtype)
    masked = mask_batch(batch, setup.plan, 0)
    if isinstance(model, PosMaskModel):
        loss = masked_lm(model, batch, masked).loss_sum
    else:
        labels = torch.full_like(batch.tokens, -100)
        live = masked.targets >= 0
        labels[masked.index[live].long()] = masked.targets[live]
        starts = batch.caption_starts.cpu()
        text = (masked.tokens, 0), (torch.ones_like(batch.tokens), 0), (labels, -100)
        tokens, valid, labels = (pad(x.cpu(), starts, PADDED_TOKENS, fill).to(setup.device) for x, fill in text)
        loss = model(batch.images, tokens, valid.bool(), labels, batch.caption_image)
    loss.backward()
    # By our names. The key's bias has no gradient but rounding, and the position's vector holds ours of the segment.
    gradients = {name.replace("head.transform.", "head."): p.grad for name, p in model.named_parameters()
                 if "key.bias" not in name and "token_type" not in name}  # fmt: skip
    return {"loss": loss.detach()} | gradients


def check_equal(setup: Setup) -> dict[str, float]:
    """The largest relative errors of loss and gradients: in a wide dtype, where the two models must agree, and of both
    in the dtype of the step, where ours may be little further from the wide one than the other. Else SystemExit."""
    exact, largest = AGREE_IN[setup.device.type]
    true_model = setup.new_peer("sdpa", exact)
    models = {
        f"{exact}, ours against usual": setup.new_model(exact),
        f"{setup.dtype}, ours": setup.new_model(),
        f"{setup.dtype}, usual": setup.new_peer("sdpa"),
    }
    collate = setup.collate(setup.view())
    squares = {which: Counter() for which in ("truth", *models)}
    for first in range(0, CHECKED_BATCHES * CHECKED_IMAGES, CHECKED_IMAGES):
        batch = collate([setup.shards[first + i] for i in range(CHECKED_IMAGES)], 0)
        truth = loss_and_gradients(setup, true_model, batch)
        squares["truth"].update({name: float(true.double().square().sum()) for name, true in truth.items()})
        for which, model in models.items():
            found = loss_and_gradients(setup, model, batch)
            assert found.keys() == truth.keys(), found.keys() ^ truth.keys()
            squares[which].update(
                {name: float((found[name].double() - true.double()).square().sum()) for name, true in truth.items()}
            )
    wide, ours, theirs = errors = [
        {name: math.sqrt(square / (squares["truth"][name] or math.nan)) for name, square in squares[which].items()}
        for which in models
    ]
    most = {name: MOST_ROUNDING * error + ROUNDING_BUDGET for name, error in theirs.items()}
    apart = [f"{name} by {error:.1e} in {exact}" for name, error in wide.items() if not error < largest]
    apart += [f"{name} by {error:.3f} in {setup.dtype}, where {most[name]:.3f} is rounding"
              for name, error in ours.items() if not error <= most[name]]  # fmt: skip
    if apart:
        raise SystemExit(f"{setup.config.preset}: the models differ, so no speed is measured: {'; '.join(apart)}")
    return {which.replace("torch.", ""): max(found.values()) for which, found in zip(models, errors, strict=True)}


def bench_usual(setup: Setup, repeats: int) -> dict:
    collate = setup.collate(setup.view())
    batch = collate(setup.samples(), 0)
    errors = check_equal(setup)
    # First the model's settings, on one batch in memory; then, with the best of them, the loader's.
    drawn = next(usual_batches(setup, False, 0))
    longest_tokens = int(drawn.valid.sum(1).max())
    text = {name: getattr(drawn, name)[:, :longest_tokens] for name in ("tokens", "valid", "labels")}
    given = {False: drawn, True: SimpleNamespace(images=drawn.images, **text)}
    settings = {}
    for attention in ("sdpa", "eager"):  # settings share a model: one each of `base` would not fit into 24 GB
        model = setup.new_peer(attention)
        optimizer = adamw(model)
        for channels_last, longest in product((True, False), (True, False)):
            step = stepper(optimizer, usual_loss(setup, model, channels_last), cycle([given[longest]]))
            settings[attention, channels_last, longest] = step
    trial = interleave(settings, repeats=max(2, repeats // 2), warmup=1)
    fastest = min(trial, key=lambda key: np.median(trial[key]))
    settings.clear()
    steps = {}
    model = setup.new_peer(fastest[0])
    optimizer = adamw(model)
    for workers in (8, 14) if setup.device.type == "cuda" else (0, 1, 2):
        loss, batches = usual_loss(setup, model, fastest[1]), usual_batches(setup, fastest[2], workers)
        steps[f"usual, {workers} workers"] = stepper(optimizer, loss, batches)
    model = setup.new_model()
    with_loader, in_memory = our_steps(setup, model, batch, (setup.steps_ahead + 1) * (repeats + 2))
    ours = {"ours": with_loader, "ours, data in memory": in_memory}
    times = interleave(steps | ours, repeats, untimed=setup.steps_ahead)
    best = min((times[name] for name in steps), key=np.median)
    length = {True: "the longest", False: str(PADDED_TOKENS)}
    return {
        "row": "full step", **describe(setup), "largest_relative_errors": errors,
        "usual_settings_p50_ms": {
            f"{attention}, {'channels last' if last else 'NCHW'}, padded to {length[longest]}": round(np.median(ms), 1)
            for (attention, last, longest), ms in trial.items()
        },
        "times": {name: quantiles(values) for name, values in times.items()},
        "ratio": ratio(best, times["ours"]),
        "share_of_data_in_memory": ratio(times["ours, data in memory"], times["ours"]),
    }  # fmt: skip


def bench_parts(setup: Setup, repeats: int) -> dict:
    """Where a step's time goes: the image encoder, everything after it, and the optimizer, each by itself."""
    model = setup.new_model()
    batch = setup.collate(setup.view())(setup.samples(), 0).to(setup.device, setup.dtype)
    masked = mask_batch(batch, setup.plan, 0)
    encode_image = model.image
    image_BND = encode_image(batch.images).detach()
    gradient = torch.randn_like(image_BND)
    usual_encoder = setup.new_peer("sdpa").image

    def after_the_image() -> None:
        model.image = lambda images: image_BND.detach().requires_grad_()
        masked_lm(model, batch, masked).loss_sum.backward()

    def tuned() -> None:
        torch.backends.cudnn.benchmark = True
        encode_image(batch.images).backward(gradient)
        torch.backends.cudnn.benchmark = False

    calls = {
        "image encoder": lambda: encode_image(batch.images).backward(gradient),
        "image encoder, torch's batch norm": lambda: usual_encoder(batch.images).backward(gradient),
        "masking": lambda: mask_batch(batch, setup.plan, 0),
        "text, fusion and loss": after_the_image,
    }
    if setup.device.type == "cuda":
        compiled = torch.compile(encode_image)
        calls["image encoder, compiled"] = lambda: compiled(batch.images).backward(gradient)
        calls["image encoder, cudnn.benchmark"] = tuned
    del model.image  # a module; what takes its place is a function
    calls["text, fusion and loss"]()
    optimizer = torch.optim.AdamW([*model.parameters(), *encode_image.parameters()], lr=0.0, fused=True)
    calls["optimizer"] = optimizer.step
    times = interleave(calls, repeats)
    return {"row": "parts", **describe(setup), "times": {name: quantiles(values) for name, values in times.items()}}


def our_steps(setup: Setup, model: PosMaskModel, batch: Batch, num_steps: int) -> tuple[Callable, Callable]:
    """One step with the loader of a run, one with the same batch again and again."""
    loader = Loader(
        setup.shards, setup.collate(setup.view()), seed=0, batch_size=setup.batch_size,
        micro_batch_size=setup.batch_size, rank=0, world_size=1, num_steps=num_steps + 100,
    )  # fmt: skip
    loss = our_loss(setup, model)
    optimizer = adamw(model)
    return stepper(optimizer, loss, iter(loader)), stepper(optimizer, loss, cycle([batch]))


def bench_captions(setup: Setup, repeats: int) -> dict:
    """Masked tokens per second with one caption an image, with five, and with five maskings of one."""

    def five(sample: dict) -> dict:
        """The sample with five captions: its own, the first ones again where it has fewer."""
        lengths = sample["caption_lengths"]
        ends = np.cumsum(lengths, dtype=np.int64)
        again = [i % len(lengths) for i in range(5)]
        parts = {key: np.concatenate([sample[key][ends[i] - lengths[i] : ends[i]] for i in again])
                 for key in ("tokens", "tags")}  # fmt: skip
        return sample | parts | {"caption_lengths": lengths[again]}

    samples = [five(sample) for sample in setup.samples()]
    steps, masked_tokens = {}, {}
    views = {"1 caption": {}, "5 captions": {"captions_per_image": 5}, "5 maskings": {"maskings_per_caption": 5}}
    for name, changes in views.items():
        model = setup.new_model()
        batch = setup.collate(setup.view(**changes))(samples, 0)
        draws = (mask_batch(replace(batch, epoch=epoch), setup.plan, 0) for epoch in range(COUNTED_EPOCHS))
        masked_tokens[name] = sum(int(masked.num_masked) for masked in draws) / COUNTED_EPOCHS
        steps[name] = stepper(adamw(model), our_loss(setup, model), cycle([batch]))
    times = interleave(steps, repeats)
    gain = {name: ratio(times["1 caption"], times[name]) * masked_tokens[name] / masked_tokens["1 caption"]
            for name in views}  # fmt: skip
    return {
        "row": "captions per image", **describe(setup), "masked_tokens": masked_tokens,
        "times": {name: quantiles(values) for name, values in times.items()},
        "masked_tokens_per_s_ratio": {name: round(value, 3) for name, value in gain.items()},
    }  # fmt: skip


def describe(setup: Setup) -> dict:
    dtype = str(setup.dtype).removeprefix("torch.")
    sizes = {"image_size": setup.model_config.image_size, "vocabulary": setup.model_config.vocab_size}
    return {"preset": setup.config.preset, "images": setup.batch_size, "dtype": dtype, **sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--presets", nargs="+", choices=("laptop", "base"), help="default: base on a GPU, else laptop")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="as in train/pretrain.py")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--data", nargs="+", help="shards (2,000 scenes are drawn if none are given)")
    parser.add_argument("--name", help="of the result: results/step_NAME.json (default: the device)")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        tune_cpu()  # as a run does; both sides gain
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            command = [sys.executable, "-m", "posmask.prep.build_shards", "--num-scenes", "2000", "--out", folder]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for preset in args.presets or [PRESET[device.type]]:
            setup = Setup(preset, args.data or [f"{folder}/train"], device, args.dtype)
            bench = {"parts": bench_parts, "usual": bench_usual, "captions": bench_captions}
            rows += [bench[row](setup, args.repeats) for row in args.rows]
    write_result(f"step_{args.name or device.type}", rows, "transformers", "open_clip_torch", "pillow")


if __name__ == "__main__":
    main()
