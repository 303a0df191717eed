"""Two ranks with accumulation under ZeRO 1 and 2 have the gradients of one large batch in one process."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

# One launch for all cases: each rank runs a step of two micro-batches, the main one also the whole batch without
# DeepSpeed. The image encoder is in evaluation mode, since BatchNorm's statistics depend on the micro-batch.
SCRIPT = """
import copy
import sys

import torch
from safetensors.torch import save_file

from posmask.train.config import parse_args
from posmask.train.engine import deepspeed_settings, make_engine, start_processes
from posmask.train.loader import Collator, Loader, Shards, View
from posmask.train.model import PosMaskModel
from posmask.train.objectives import mask_batch, masked_lm
from posmask.train.pretrain import make_masking, make_model_config

out, data = sys.argv[1:]
base = ["--mask", "noun", "--data", data, "--batch-size", "16", "--micro-batch-size", "4", "--steps", "1"]
world = start_processes()
config = parse_args(base, False)
shards = Shards(config.data)
plan, model_config = make_masking(config, shards).at(0.0), make_model_config(config, shards)
view = View(0, model_config.image_size, model_config.image_mean, model_config.image_std, captions_per_image=1)
torch.manual_seed(0)
start = PosMaskModel(model_config)

def batches(micro_batch_size, rank, world_size, dtype):
    collate = Collator(view, 0, micro_batch_size, "cpu", world.device)
    loader = Loader(shards, collate, seed=0, batch_size=16, micro_batch_size=micro_batch_size, rank=rank,
                    world_size=world_size, num_steps=1)
    found = [batch.to(world.device, dtype) for batch in loader]
    loader.close()
    return found

for dtype in ("fp32", "bf16"):
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    if world.is_main:
        model = copy.deepcopy(start).train()
        if dtype == "bf16":
            for param in model.parameters():
                param.data = param.data.bfloat16()
        model.image.eval()
        (batch,) = batches(16, 0, 1, kind)
        masked = mask_batch(batch, plan, 0)
        (masked_lm(model, batch, masked).loss_sum / masked.num_masked).backward()
        save_file({name: p.grad.float() for name, p in model.named_parameters()}, f"{out}/plain-{dtype}")
    for stage in (1, 2):
        from deepspeed.utils import safe_get_full_grad

        config = parse_args([*base, "--dtype", dtype, "--zero-stage", str(stage)], False)
        engine = make_engine(copy.deepcopy(start), config, deepspeed_settings(config, 4, 2), world.device)
        engine.module.image.eval()
        micro = batches(4, world.rank, 2, kind)
        masked = [mask_batch(batch, plan, 0) for batch in micro]
        counts = torch.zeros(2, 2)
        counts[world.rank] = torch.stack([m.num_masked for m in masked]).float()
        world.sum(counts)
        for i, (batch, mask) in enumerate(zip(micro, masked)):
            engine.backward(masked_lm(engine, batch, mask).loss_sum * (4 / counts.sum()))
            if i == 0:
                engine.step()
        found = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
        found = {name: grad.float().reshape(start.get_parameter(name).shape) for name, grad in found.items()}
        engine.step()
        if world.is_main:
            save_file(found | {"counts": counts}, f"{out}/zero{stage}-{dtype}")
"""


@pytest.fixture(scope="module")
def gradients(scenes, tmp_path_factory):
    """{"plain-fp32": {name: gradient}, "zero1-fp32": …}; the latter with (2, 2) "counts" by rank and micro-batch."""
    out = tmp_path_factory.mktemp("gradients")
    (out / "script.py").write_text(SCRIPT)
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in launcher} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(out / "script.py"), str(out), f"{scenes}/train"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [f"{kind}-{dtype}" for kind in ("plain", "zero1", "zero2") for dtype in ("fp32", "bf16")]
    return {case: load_file(out / case) for case in cases}


def errors(found, truth):
    """Relative error of the whole gradient, and the largest of one parameter relative to the whole."""
    norm = torch.stack([grad.norm() for grad in truth.values()]).norm()
    each = torch.stack([(found[name] - grad).norm() for name, grad in truth.items()])
    return float(each.norm() / norm), float(each.max() / norm)


@pytest.mark.parametrize("stage", [1, 2])
def test_fp32_gradients_equal_one_large_batch(gradients, stage):
    found, truth = gradients[f"zero{stage}-fp32"], gradients["plain-fp32"]
    assert len(found["counts"].unique()) > 1, "the micro-batches have unequal numbers of masked tokens"
    for name, grad in truth.items():
        budget = 1e-5 * float(grad.abs().max()) + 1e-8
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=budget, msg=lambda text, n=name: f"{n}: {text}")
    assert errors(found, truth)[0] < 1e-5


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_gradients_are_as_near_as_those_of_plain_torch(gradients, stage):
    truth = gradients["plain-fp32"]
    found, plain = errors(gradients[f"zero{stage}-bf16"], truth), errors(gradients["plain-bf16"], truth)
    assert 1e-4 < plain[0] < 0.1
    assert found[0] < 1.25 * plain[0] and found[1] < 1.25 * plain[1]
