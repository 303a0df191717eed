"""The mask kernels compile for a GPU, for every arm, on a machine that has none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own: Triton either interprets or compiles all kernels of one.
COMPILE = """
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from posmask.kernels import mask_tokens_triton as kernels
from posmask.prep.pos import BITS
from posmask.train.masking import ARMS, parse_mask

POINTERS = {torch.int32: "*i32", torch.int64: "*i64", torch.int8: "*i8", torch.uint8: "*u8"}
compiled = set()

class Recorder:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps=4, **named):
        given = dict(zip(self.kernel.arg_names, args)) | named
        assert list(sorted(given)) == sorted(self.kernel.arg_names), "an argument is missing or unknown"
        constants = {p.name: given[p.name] for p in self.kernel.params if p.is_constexpr}
        types = {}
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                types[name] = POINTERS[value.dtype]
            elif name not in constants:
                types[name] = "i32" if -2**31 <= value < 2**31 else "i64"
            else:
                types[name] = "constexpr"
        key = (self.kernel.fn.__name__, *sorted(types.items()), *sorted(constants.items()), num_warps)
        if key not in compiled:
            source = ASTSource(self.kernel, types, {(self.kernel.arg_names.index(n),): v for n, v in constants.items()})
            done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
            assert ".entry" in done.asm["ptx"]
            compiled.add(key)

for name in ("_select_kernel", "_match_kernel", "_emit_kernel"):
    setattr(kernels, name, Recorder(getattr(kernels, name)))

i32 = {"dtype": torch.int32}
vocabulary = {"mask_id": 4, "vocab_size": 1000, "never_drawn": [0, 1, 2, 3, 4]}
for spec in (*ARMS, "matched:noun", "matched:random", "shuffled:noun", "decay:random", "noun@0.5+span@0.5"):
    if spec in ("adj", "verb", "x"):
        continue
    masking = parse_mask(spec, tokenizer=vocabulary, bits_computed=tuple(BITS), scores=("concreteness", "difference"),
                         max_tokens=int(sys.argv[1]))
    kernels.mask_tokens_triton(
        torch.zeros(9, **i32), torch.zeros(9, **i32), torch.zeros(9, 2, dtype=torch.uint8), torch.tensor([0, 9], **i32),
        torch.zeros(1, 3, **i32), masking.at(0.1), 0, 0, 128, torch.ones(17, **i32))
print(len(compiled))
"""


@pytest.mark.parametrize("max_tokens", [48])
def test_every_arm_compiles_without_a_gpu(max_tokens, tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = tmp_path / "compile_all.py"
    script.write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, str(script), str(max_tokens)], capture_output=True, text=True, check=False,
        env=env | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) >= 15
