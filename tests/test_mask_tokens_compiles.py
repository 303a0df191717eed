"""The mask kernels compile for a GPU, for every arm, on a machine that has none."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

EVERY_ARM = """
from posmask.kernels import mask_tokens_triton as kernels
from posmask.prep.pos import BITS
from posmask.train.masking import ARMS, parse_mask

record(kernels)
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
"""


@pytest.mark.parametrize("max_tokens", [48])
def test_every_arm_compiles_without_a_gpu(max_tokens, compile_for_gpu):
    assert compile_for_gpu(EVERY_ARM, max_tokens) >= 15
