"""Starting from published weights: BERT for the text and fusion layers, an open_clip ResNet for the image trunk."""

from __future__ import annotations

import struct
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from posmask.train.model import PosMaskModel

# What posmask has beyond BERT or the CLIP trunk, and therefore starts at random.
OURS = ("crossattention.", "image.proj.", "image.position.", "image.norm.")
# What the readers raise for a damaged file, or one of another kind.
UNREADABLE = (SafetensorError, UnpicklingError, EOFError, RuntimeError, struct.error)


def load_text_weights(model: PosMaskModel, name: str) -> None:
    """BERT weights from a .safetensors or .bin file, a folder holding one, or a hub name; in place.

    BERT's first layers become the text encoder, the next ones the fusion encoder (its cross-attention stays random).
    Raises ValueError where a shape or the vocabulary differs.
    """
    bert = {key.removeprefix("bert."): value for key, value in _read(name, "--text-weights").items()}
    # Checkpoints converted from TensorFlow call LayerNorm's parameters gamma and beta.
    bert = {key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): value
            for key, value in bert.items()}  # fmt: skip
    num_text = len(model.text)
    renamed = {}
    for key, value in bert.items():
        if key.startswith("encoder.layer."):
            number, rest = key.removeprefix("encoder.layer.").split(".", 1)
            stack, index = ("text", int(number)) if int(number) < num_text else ("fusion", int(number) - num_text)
            if index < len(getattr(model, stack)):
                renamed[f"{stack}.{index}.{rest}"] = value
        elif key.startswith("embeddings."):
            renamed[key] = value
        elif key.startswith("cls.predictions.transform."):
            renamed["head." + key.removeprefix("cls.predictions.transform.")] = value
        elif key == "cls.predictions.bias":
            renamed["head.bias"] = value
    # Every token is of segment 0: its vector is part of the position's.
    segment = renamed.pop("embeddings.token_type_embeddings.weight", None)
    if segment is not None:
        positions = renamed["embeddings.position_embeddings.weight"]
        renamed["embeddings.position_embeddings.weight"] = positions + segment[0]
    renamed.pop("embeddings.position_ids", None)
    optional = tuple(key for key, _ in model.named_parameters() if key.startswith("head."))
    wanted = {k: v for k, v in model.named_parameters() if k.startswith(("embeddings.", "text.", "fusion.", "head."))}
    _copy(wanted, renamed, f"--text-weights {name}", optional=optional)


def load_image_weights(model: PosMaskModel, name: str) -> None:
    """The trunk of an open_clip ModifiedResNet checkpoint, without text tower and attention pool; in place."""
    weights = _read(name, "--image-weights")
    weights = weights.get("state_dict", weights)
    visual = {key.removeprefix("module.").removeprefix("visual."): value for key, value in weights.items()
              if key.removeprefix("module.").startswith("visual.")} or weights  # fmt: skip
    stem = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6, "bn3": 7}
    renamed = {}
    for key, value in visual.items():
        first, _, rest = key.partition(".")
        if first in stem:
            renamed[f"image.stem.{stem[first]}.{rest}"] = value
        elif first.startswith("layer") and first[5:].isdigit():
            renamed[f"image.stages.{int(first[5:]) - 1}.{rest}"] = value
    trunk = ("image.stem.", "image.stages.")
    wanted = {key: value for key, value in model.state_dict(keep_vars=True).items() if key.startswith(trunk)}
    _copy(wanted, renamed, f"--image-weights {name}")


def _read(name: str, flag: str) -> dict[str, Tensor]:
    path = Path(name)
    if path.is_dir():
        found = [path / file for file in ("model.safetensors", "pytorch_model.bin") if (path / file).is_file()]
        if not found:
            raise ValueError(f"{flag} {name}: the folder has no model.safetensors and no pytorch_model.bin")
        path = found[0]
    if not path.is_file():
        if flag == "--image-weights" or name.startswith((".", "/")) or path.suffix:
            raise ValueError(f"{flag} {name}: no such file")
        from transformers import AutoModelForMaskedLM

        try:
            return AutoModelForMaskedLM.from_pretrained(name).state_dict()
        except OSError as error:
            raise ValueError(f"{flag} {name}: neither a file nor a model of the hub ({error})") from None
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE:
        raise ValueError(f"{flag} {name}: not a .safetensors file, nor one that torch.load reads as weights") from None
    return loaded.state_dict() if isinstance(loaded, nn.Module) else loaded


def _copy(wanted: dict[str, Tensor], given: dict[str, Tensor], source: str, optional: tuple[str, ...] = ()) -> None:
    missing = [key for key in wanted if key not in given and key not in optional and not any(o in key for o in OURS)]
    if missing:
        raise ValueError(f"{source}: lacks {missing[0]} and {len(missing) - 1} more; not a model of this --preset")
    with torch.no_grad():
        for key, value in given.items():
            if key not in wanted:
                continue
            if wanted[key].shape != value.shape:
                raise ValueError(
                    f"{source}: {key} is {tuple(value.shape)} there, {tuple(wanted[key].shape)} here; use the --preset "
                    "(and, when building the shards, the --tokenizer) that belong to these weights"
                )
            wanted[key].copy_(value)
