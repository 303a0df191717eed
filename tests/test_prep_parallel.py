"""However a build is cut up, and whenever it is killed, the bytes are the same."""

import io
import multiprocessing
import os
import random
import sys
import time

import pytest
from PIL import Image

from posmask.prep.build_shards import main
from posmask.prep.samples import Preparer

NUM_KILLS = 25
NUM_PICTURES = 60


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel") / "pictures"
    folder.mkdir()
    rng = random.Random(0)
    for i in range(NUM_PICTURES):
        buffer = io.BytesIO()
        Image.new("RGB", (300 + i, 280), (i * 4, 90, 120)).save(buffer, "PNG")
        (folder / f"{i}.png").write_bytes(buffer.getvalue())
        captions = [f"A {rng.choice(('red', 'blue'))} {rng.choice(('cat', 'dog'))} sleeps near a hot dog stand."] * 2
        (folder / f"{i}.txt").write_text("\n".join(captions))
    (folder / "7.txt").write_text("")  # dropped
    return folder


def arguments(pictures, out, *more):
    shared = ["--records-per-part", "4", "--tokenizer", "train:64", "--max-dropped", "0.1", "--workers", "1"]
    return ["folder", "--images", str(pictures), "--out", str(out), *shared, *more]


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert main(arguments(pictures, out)) == 0
    return files(out)


@pytest.fixture(scope="module")
def fork():
    """Starts processes that have everything imported, and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["posmask.prep.build_shards", "spacy", "streaming"])
    return context


def test_shares_and_merge_give_the_same_bytes(pictures, uninterrupted, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(pictures, out, "--part", "3/3")) == 0
    assert "share 3 of 3 is written; when all are, run build_shards.py merge" in capsys.readouterr().out
    assert [path.name for path in sorted(out.glob("part-*.json"))] == [f"part-{i:05d}.json" for i in range(2, 15, 3)]
    assert main(["merge", str(out)]) == 2
    assert "lacks part-00000, part-00001, part-00003 and 7 more" in capsys.readouterr().err
    for share in ("1/3", "3/3", "2/3"):  # one of them again
        assert main(arguments(pictures, out, "--part", share)) == 0
    assert main(["merge", str(out)]) == 1
    assert "1 of 60 records dropped (1 no caption), more than --max-dropped 0.01" in capsys.readouterr().err
    for _ in range(2):
        assert main(["merge", str(out), "--max-dropped", "0.1"]) == 0
        assert files(out) == uninterrupted
    assert main(arguments(pictures, out, "--part", "1/3")) == 0
    assert "already complete" in capsys.readouterr().out


@pytest.mark.slow
def test_jobs_that_start_at_once_share_a_folder(pictures, uninterrupted, fork, tmp_path):
    out = tmp_path / "out"
    jobs = [fork.Process(target=main, args=(arguments(pictures, out, "--part", f"{i}/3"),)) for i in (1, 2, 3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert main(["merge", str(out), "--max-dropped", "0.1"]) == 0
    assert files(out) == uninterrupted


@pytest.mark.parametrize("share", ["0/3", "4/3", "1", "1/2/3", "a/b"])
def test_a_wrong_share_is_refused(pictures, tmp_path, capsys, share):
    assert main(arguments(pictures, tmp_path / "out", "--part", share)) == 2
    assert f"{share} is not I/N with I from 1 to N, such as 3/8" in capsys.readouterr().err


@pytest.mark.slow
def test_three_processes_give_the_same_bytes(pictures, uninterrupted, tmp_path):
    assert main(arguments(pictures, tmp_path / "out", "--workers", "3")) == 0
    assert files(tmp_path / "out") == uninterrupted


@pytest.mark.slow
def test_ray_gives_the_same_bytes_even_if_it_loses_an_actor(pictures, uninterrupted, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    died = tmp_path / "died"
    prepare_records = Preparer.__call__

    def die_once(self, records):
        if not died.exists():
            died.write_text("")
            os._exit(1)
        return prepare_records(self, records)

    monkeypatch.setattr(Preparer, "__call__", die_once)
    assert main(arguments(pictures, tmp_path / "out", "--engine", "ray")) == 0
    assert died.exists()
    assert not ray.is_initialized()
    assert files(tmp_path / "out") == uninterrupted


def test_without_ray_its_engine_is_refused(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(arguments(pictures, tmp_path / "out", "--engine", "ray")) == 2
    assert "--engine ray needs Ray: pip install 'posmask[ray]'" in capsys.readouterr().err


@pytest.mark.slow
def test_builds_killed_25_times_give_the_same_bytes(pictures, uninterrupted, fork, tmp_path):
    """Half of the kills come at a random time, half when a random number of files is there."""
    rng = random.Random(0)
    kills = builds = 0
    seen = set()
    slowest = 2.0  # seconds from start to end
    while kills < NUM_KILLS:
        out = tmp_path / f"out-{builds}"
        while kills < NUM_KILLS and not (out / "manifest.json").exists():
            process = fork.Process(target=main, args=(arguments(pictures, out),))
            start = time.monotonic()
            process.start()
            by_files, there = rng.random() < 0.5, len(list(out.glob("*")))
            until_s, until_files = rng.uniform(0, slowest), rng.randrange(there + 1, there + 8)
            while process.is_alive():
                elapsed_s = time.monotonic() - start
                if len(list(out.glob("*"))) >= until_files if by_files else elapsed_s > until_s:
                    time.sleep(rng.uniform(0, 0.02))
                    break
                time.sleep(0.0005)
            process.kill()
            process.join()
            if process.exitcode == 0:
                slowest = max(slowest, elapsed_s)
            elif not (out / "manifest.json").exists():
                kills += 1
                seen.add(len(list(out.glob("*"))))
        assert main(arguments(pictures, out)) == 0
        assert files(out) == uninterrupted
        builds += 1
    assert len(seen) > 4, "the kills all came at the same moment"
    print(f"{kills} kills in {builds} builds, with {sorted(seen)} entries in the folder")
