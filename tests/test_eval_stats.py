"""Bootstrap, Holm's correction, and the comparison of runs."""

import json

import numpy as np
import pytest

from posmask.eval import run as evaluate
from posmask.eval import stats


def test_interval_of_a_mean_covers_at_its_level():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = stats.mean_interval(rng.normal(2, 1, 60))
        covered += low < 2 < high
    assert 0.88 < covered / 200 < 0.99
    assert stats.mean_interval(np.ones(5)) == [1, 1] and stats.mean_interval(np.zeros(0)) is None


def test_seeds_are_resampled_too():
    """Items alone have no spread here, seeds have: the interval must show it."""
    values = np.repeat(np.array([[0.1], [0.5], [0.9]]), 400, axis=1)
    low, high = stats.interval(stats.bootstrap_means(values))
    assert low < 0.3 and high > 0.7
    assert np.ptp(stats.bootstrap_means(values[:1])) < 1e-9
    spread = stats.bootstrap_means(values).std()
    assert spread == pytest.approx(values[:, 0].std() / 3**0.5, rel=0.1)


def test_equal_streams_are_paired():
    rng = np.random.default_rng(1)
    a = rng.normal(0, 5, (2, 300))
    difference = stats.bootstrap_means(a + 0.2) - stats.bootstrap_means(a)
    assert difference == pytest.approx(np.full(len(difference), 0.2))
    other = stats.bootstrap_means(a, item_stream=1, seed_stream=1)
    assert abs(np.corrcoef(stats.bootstrap_means(a), other)[0, 1]) < 0.1


def test_p_value():
    rng = np.random.default_rng(2)
    assert stats.p_value(rng.normal(5, 1, 2000)) < 0.01
    assert stats.p_value(rng.normal(0, 1, 2000)) > 0.5
    assert stats.p_value(np.zeros(2000)) == 1
    assert stats.p_value(rng.normal(1.96, 1, 200_000)) == pytest.approx(0.05, rel=0.05)


def test_holm():
    """The example worked by hand: sorted p times 4, 3, 2, 1, never falling, at most 1."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert stats.holm([0.02]) == pytest.approx([0.02])


@pytest.fixture
def make_run(tmp_path):
    """A run folder with predictions of sugarcrepe: make_run(name, mask, seed, share right by group)."""

    def make(name, mask, seed, shares, num_items=200):
        folder = tmp_path / name / "eval" / "sugarcrepe"
        folder.mkdir(parents=True)
        config = {"mask": mask, "seed": seed, "out": name, "resume": "auto", "lr": 1}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        rng = np.random.default_rng(3)
        with (folder / "predictions.jsonl").open("w") as file:
            for group, share in shares.items():
                difficulty = rng.permutation(num_items) / num_items  # the same items are hard for all
                for i in range(num_items):
                    line = {"id": str(i), "group": group, "right": float(difficulty[i] < share)}
                    file.write(json.dumps(line) + "\n")
        return str(tmp_path / name)

    return make


def test_compare(make_run, capsys):
    runs = [
        make_run("matched", "matched:noun", 0, {"swap": 0.50, "add": 0.5}),
        make_run("matched1", "matched:noun", 1, {"swap": 0.50, "add": 0.5}),
        make_run("noun", "noun", 0, {"swap": 0.80, "add": 0.52}),
        make_run("noun1", "noun", 1, {"swap": 0.70, "add": 0.48}),
    ]
    assert evaluate.main(["compare", *runs, "--task", "sugarcrepe"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    results = json.loads(last)
    noun, matched = f"{runs[2]} (+1)", f"{runs[0]} (+1)"
    assert list(results["arms"]) == [matched, noun] and results["baseline"] == matched
    assert results["arms"][noun]["seeds"] == [0, 1]
    found = results["differences"][noun]
    assert found["swap"]["difference"] == pytest.approx(0.25) and found["swap"]["p_holm"] < 0.01
    low, high = found["swap"]["interval"]
    assert 0.13 < low < 0.25 < high < 0.37
    assert found["add"]["difference"] == pytest.approx(0) and found["add"]["p_holm"] == 1
    assert found["macro"]["difference"] == pytest.approx(0.125)
    assert results["num_contrasts"] == 3 and results["num_items"] == 400
    assert any("2 seeds" in line for line in table) and any("swap" in line and "+0.250" in line for line in table)


def test_pairing_narrows_the_interval_of_a_difference(make_run, capsys):
    runs = [make_run("a", "random", 0, {"swap": 0.5}), make_run("b", "noun", 0, {"swap": 0.53})]
    assert evaluate.main(["compare", *runs, "--task", "sugarcrepe"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    low, high = results["differences"][runs[1]]["swap"]["interval"]
    own_low, own_high = results["arms"][runs[0]]["groups"]["swap"]["interval"]
    assert high - low < (own_high - own_low) / 2
    assert "macro" not in results["arms"][runs[0]]["groups"], "one group is its own mean"


def test_items_not_in_all_runs_are_counted(make_run, capsys):
    runs = [make_run("a", "random", 0, {"swap": 0.5}), make_run("b", "noun", 0, {"swap": 0.5}, num_items=150)]
    assert evaluate.main(["compare", *runs, "--task", "sugarcrepe"]) == 0
    output = capsys.readouterr().out
    assert json.loads(output.splitlines()[-1])["num_not_common"] == 50 and "50 items are not in all runs" in output


def test_bad_input(make_run, tmp_path, capsys):
    one = make_run("a", "random", 0, {"swap": 0.5})
    other = make_run("b", "noun", 0, {"add": 0.5})
    for argv, says in (
        ([one, other, "--task", "sugarcrepe"], "no item of sugarcrepe in common"),
        ([one, other, "--task", "valse"], "posmask-eval valse --checkpoint"),
        ([one, other, "--task", "snli"], "--task snli: must be one of probe"),
        ([one, one, "--task", "sugarcrepe"], "name it once"),
        ([one, str(tmp_path / "absent"), "--task", "sugarcrepe"], "no such run folder"),
    ):
        assert evaluate.main(["compare", *argv]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and says in lines[0], lines
