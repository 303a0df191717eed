"""Fixtures that several tests share. Functions come as fixtures, since tests is not a package to import from."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

# Triton reads it where a kernel is defined, so before any test imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from posmask.kernels.masked_lm_loss import NUM_BINS
from posmask.prep.pos import MASKABLE, NUM_UPOS, WORD_START


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def assert_within_budget():
    """In each element our error may exceed that of torch in the same dtype by `budget`, both against an fp32 truth."""

    def check(ours: torch.Tensor, peer: torch.Tensor, truth: torch.Tensor, budget: float) -> None:
        excess = (ours.float() - truth).abs() - (peer.float() - truth).abs()
        assert not excess.isnan().any()
        assert (excess <= budget).all(), f"error above torch's: {float(excess.max()):.3g}, allowed: {budget:.3g}"

    return check


RECORDER = """
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
            torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8"}
compiled = set()

class Recorder:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps=4, num_stages=3, **named):
        given = dict(zip(self.kernel.arg_names, args)) | named
        assert list(sorted(given)) == sorted(self.kernel.arg_names), "an argument is missing or unknown"
        constants = {p.name: given[p.name] for p in self.kernel.params if p.is_constexpr}
        types = {}
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                types[name] = POINTERS[value.dtype]
            elif name in constants:
                types[name] = "constexpr"
            elif isinstance(value, float):
                types[name] = "fp32"
            else:
                types[name] = "i32" if -2**31 <= value < 2**31 else "i64"
        key = (self.kernel.fn.__name__, *sorted(types.items()), *sorted(constants.items(), key=str), num_warps)
        if key not in compiled:
            source = ASTSource(self.kernel, types, {(self.kernel.arg_names.index(n),): v for n, v in constants.items()})
            options = {"num_warps": num_warps, "num_stages": num_stages}
            done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            assert ".entry" in done.asm["ptx"]
            compiled.add(key)

def record(module):
    for name in dir(module):
        if name.endswith("_kernel"):
            setattr(module, name, Recorder(getattr(module, name)))

"""


@pytest.fixture
def compile_for_gpu(tmp_path):
    """compile_for_gpu(script, *arguments) → the kernels that a script's launches compile for a GPU, without one.

    The script calls record(module) and then the module's functions. It is a process of its own, since Triton either
    interprets or compiles all kernels of one. What the interpreter lets pass may still be no Triton.
    """

    def run(script: str, *arguments: object) -> int:
        path = tmp_path / "compile_all.py"
        path.write_text(RECORDER + script + "\nprint(len(compiled))\n")
        env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, str(path), *map(str, arguments)], capture_output=True, text=True, check=False,
            env=env | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return int(done.stdout.split()[-1])

    return run


@pytest.fixture
def poisoned_memory():
    """torch.empty and its kin give NaN (or the largest integer), so that reading what nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def make_rows():
    """make_rows((M, D, V), num_live, dtype, seed) → the arguments of `masked_lm_loss`, bins included."""

    def make(shape, num_live, dtype=torch.float32, seed=0):
        rows, width, vocabulary = shape
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(vocabulary, width, generator=generator).mul(width**-0.5).to(dtype).requires_grad_()
        bias = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_()
        targets = torch.randint(vocabulary, (rows,), generator=generator, dtype=torch.int32)
        targets[num_live:] = -100
        bins = torch.randint(-1, NUM_BINS, (rows,), generator=generator, dtype=torch.int32)
        return hidden, weight, bias, targets, torch.tensor(num_live, dtype=torch.int32), bins

    return make


@pytest.fixture(scope="session")
def plain_loss():
    """Loss, gradients of factor · loss, and logits of the live rows alone, by autograd in the arguments' dtype."""

    def plain(hidden, weight, bias, targets, num_live, factor=1.0):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
        logits = F.linear(leaves[0][:num_live], *leaves[1:])
        loss = F.cross_entropy(logits, targets[:num_live].long(), reduction="sum")
        return loss.detach(), torch.autograd.grad(loss * factor, leaves), logits.detach()

    return plain


@pytest.fixture(scope="session")
def make_text():
    """Packed captions of made-up tokens: make_text(num_captions, seed) → an object of (T,), (T, 2), (C+1,), (C, 3).

    Some captions have no maskable token, words have 1 to 4 pieces, and now and then one piece of a word has another tag
    than its neighbours or is not maskable.
    """

    def make(num_captions: int, seed: int = 0, max_words: int = 12) -> SimpleNamespace:
        rng = np.random.default_rng(seed)
        tags, starts = [], [0]
        for _ in range(num_captions):
            tags.append(0)
            for _ in range(rng.integers(0, max_words + 1)):
                upos = rng.integers(NUM_UPOS)
                for piece in range(rng.choice(4, p=(0.6, 0.2, 0.1, 0.1)) + 1):
                    own = rng.integers(NUM_UPOS) if rng.random() < 0.05 else upos
                    maskable = MASKABLE if rng.random() < 0.97 else 0
                    tags.append(1 << own | maskable | (WORD_START if piece == 0 else 0))
            tags.append(0)
            starts.append(len(tags))
        ids = rng.integers(0, 2**64, num_captions, dtype=np.uint64)
        first = rng.integers(0, 5, num_captions) | rng.integers(0, 3, num_captions) << 16
        key = np.stack([first, ids & np.uint64(0xFFFFFFFF), ids >> np.uint64(32)], 1).astype(np.uint32).view(np.int32)
        tokens = rng.integers(10, 1000, len(tags)).astype(np.int32)
        return SimpleNamespace(
            tokens=torch.from_numpy(tokens),
            tags=torch.tensor(tags, dtype=torch.int32),
            scores=torch.from_numpy(rng.choice((0, 0, 80, 81, 200, 255), (len(tags), 2)).astype(np.uint8)),
            caption_starts=torch.tensor(starts, dtype=torch.int32),
            caption_key=torch.from_numpy(key),
        )

    return make


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A small build of the default source: train (300 images), val (30) and eval."""
    from posmask.prep.build_shards import main

    out = tmp_path_factory.mktemp("data") / "scenes"
    assert main(["--num-scenes", "300", "--tokenizer", "train:500", "--workers", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def question_shards(scenes, tmp_path_factory):
    """Shards of the questions about the 50 scenes of `scenes`/eval."""
    from posmask.prep.build_shards import main

    files, out = scenes / "eval", tmp_path_factory.mktemp("data") / "questions"
    argv = ["vqa", "--questions", str(files / "v2_OpenEnded_questions.json"), "--annotations"]
    argv += [str(files / "v2_annotations.json"), "--images", str(files / "val2017"), "--out", str(out)]
    assert main([*argv, "--tokenizer", str(scenes / "train" / "tokenizer"), "--workers", "1"]) == 0
    return out


@pytest.fixture(scope="session")
def small_run(scenes, tmp_path_factory):
    """A run folder of a very small model with random weights, in the vocabulary of `scenes`."""
    import dataclasses
    import json
    import shutil

    from safetensors.torch import save_file

    from posmask.prep.shards import Manifest
    from posmask.train.config import PRESETS
    from posmask.train.model import PosMaskModel

    run = tmp_path_factory.mktemp("runs") / "small"
    shutil.copytree(scenes / "train" / "tokenizer", run / "tokenizer")
    config = dataclasses.replace(
        PRESETS["laptop"], vocab_size=Manifest.load(scenes / "train").tokenizer.vocab_size, width=32, num_heads=4,
        image_width=8, image_layers=(1, 1), image_size=32, max_positions=64,
    )  # fmt: skip
    torch.manual_seed(0)
    config.save(run / "model_config.json")
    weights = PosMaskModel(config).state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, run / "model.safetensors")
    settings = {"mask": "noun", "decode": "cpu", "blank_rate": 0.1, "val": None, "steps": 7, "seed": 0, "out": str(run)}
    (run / "config.json").write_text(json.dumps(settings))
    return run


@pytest.fixture(scope="session")
def untrained_run(tmp_path_factory):
    """A run folder of a small model with random weights, whose vocabulary spells most words in several pieces."""
    import dataclasses
    import json
    import string

    from safetensors.torch import save_file

    from posmask.prep import wordpiece
    from posmask.train.config import PRESETS
    from posmask.train.model import PosMaskModel

    run = tmp_path_factory.mktemp("runs") / "untrained"
    run.mkdir()
    letters = string.ascii_lowercase + string.digits
    words = ("the", "is", "red", "ball", "dog", "cat", "on", "under", "two", ".", "'", ",")
    entries = [*wordpiece.SPECIAL, *letters, *("##" + c for c in letters), *words]
    wordpiece.save(wordpiece.from_vocab(entries, "test"), run / "tokenizer")
    config = dataclasses.replace(
        PRESETS["laptop"], vocab_size=len(entries), width=32, num_heads=4, image_width=8, image_layers=(1, 1),
        image_size=32, max_positions=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = PosMaskModel(config)
    for name, param in model.named_parameters():  # strong enough for images and words to matter
        if name.startswith(("fusion", "text", "head")) and param.dim() > 1:
            param.data.mul_(3)
    config.save(run / "model_config.json")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, run / "model.safetensors")
    settings = {"mask": "noun", "decode": "cpu", "blank_rate": 0.1, "val": None, "steps": 7, "seed": 0, "out": str(run)}
    (run / "config.json").write_text(json.dumps(settings))
    return run


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of six small JPEGs named like COCO's, numbers 1 to 6."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(1, 7):
        pixels = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 64), Image.Resampling.NEAREST).save(folder / f"{number:012d}.jpg")
    return folder


class ObjectStore:
    """An S3 server in this process. fault(method, path) spoils an answer: error, truncate, drop, or stall."""

    def __init__(self) -> None:
        import boto3
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *args) -> None:
                pass

        self.backend = DomainDispatcherApplication(create_backend_app)
        self.requests: list[tuple[str, str]] = []
        self.fault = lambda method, path: None
        self.server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.variables = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        os.environ.update(self.variables)
        self.client = boto3.client("s3")
        self.client.create_bucket(Bucket="bucket")

    def _answer(self, environ, start_response):
        request = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append(request)
        fault = self.fault(*request)
        if fault == "drop":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        if fault == "error":
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        content = b"".join(self.backend(environ, start_response))
        if fault == "stall":
            return self._stalled(content[:-1])
        return [content[: len(content) // 2] if fault == "truncate" else content]

    @staticmethod
    def _stalled(content: bytes) -> Iterator[bytes]:
        yield content
        time.sleep(20)

    def put(self, folder: Path, url: str) -> None:
        """Copy the files below `folder` to below `url`."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        for path in folder.rglob("*"):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(folder).as_posix()}"
                self.client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())


@pytest.fixture(scope="session")
def object_store_process():
    for module in ("moto.server", "s3fs", "upath"):
        pytest.importorskip(module)
    before = dict(os.environ)
    store = ObjectStore()
    yield store
    store.server.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def object_store(object_store_process):
    """An empty bucket s3://bucket on an S3 server of ours, which answers all that this process and its children ask."""
    objects = object_store_process.client.list_objects_v2(Bucket="bucket").get("Contents", ())
    for entry in objects:
        object_store_process.client.delete_object(Bucket="bucket", Key=entry["Key"])
    object_store_process.requests.clear()
    yield object_store_process
    object_store_process.fault = lambda method, path: None
