"""The model as it is usually written: Hugging Face's BERT layers over padded captions, a head over every token.

It has the weights of a `PosMaskModel`, so that a benchmark can check that both compute the same thing.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer, BertLMPredictionHead

from posmask.train.batch_norm import BatchNorm2d
from posmask.train.model import PosMaskModel


class TorchBatchNorm2d(nn.BatchNorm2d):
    """torch's batch norm. Its weight and bias are fp32 in a bf16 model too, as under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)


class PeerModel(nn.Module):
    """B images, C captions of L tokens each, padding included; N image tokens, D width, V vocabulary."""

    def __init__(self, model: PosMaskModel, attention: str):
        """attention: "sdpa" or "eager", as in `attn_implementation` of transformers."""
        super().__init__()
        sizes = model.config
        settings = {
            "vocab_size": sizes.vocab_size, "hidden_size": sizes.width, "num_attention_heads": sizes.num_heads,
            "intermediate_size": 4 * sizes.width, "max_position_embeddings": sizes.max_positions,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": attention,
        }  # fmt: skip
        text, fusion = BertConfig(**settings), BertConfig(**settings, is_decoder=True, add_cross_attention=True)
        self.image = copy.deepcopy(model.image)
        for module in self.image.modules():
            if isinstance(module, BatchNorm2d):
                module.__class__ = TorchBatchNorm2d
        self.embeddings = BertEmbeddings(text)
        self.text = nn.ModuleList(BertLayer(text) for _ in model.text)
        self.fusion = nn.ModuleList(BertLayer(fusion) for _ in model.fusion)
        self.head = BertLMPredictionHead(text)
        self.head.decoder.weight = self.embeddings.word_embeddings.weight
        self.head.decoder.bias = self.head.bias  # transformers 5 ties them only inside its own models
        renamed = {}
        for key, value in model.state_dict().items():
            is_transform = key.startswith(("head.dense", "head.LayerNorm"))
            renamed[key.replace("head.", "head.transform.") if is_transform else key] = value
        renamed["head.decoder.weight"] = renamed["embeddings.word_embeddings.weight"]
        renamed["head.decoder.bias"] = renamed["head.bias"]
        renamed["embeddings.token_type_embeddings.weight"] = torch.zeros(2, sizes.width)
        self.load_state_dict(renamed, strict=True)

    def hidden(self, tokens: Tensor, valid: Tensor, image_BND: Tensor, caption_image: Tensor) -> Tensor:
        """tokens (C, L) int64, valid (C, L) bool -> (C, L, D)."""
        x = self.embeddings(tokens)
        # As good as -inf, and a number in each dtype.
        mask = torch.where(valid[:, None, None], 0.0, torch.finfo(torch.bfloat16).min).to(x.dtype)
        for layer in self.text:
            x = _hidden(layer(x, attention_mask=mask))
        image = image_BND[caption_image.long()]
        for layer in self.fusion:
            x = _hidden(layer(x, attention_mask=mask, encoder_hidden_states=image))
        return x

    def forward(self, images: Tensor, tokens: Tensor, valid: Tensor, labels: Tensor, caption_image: Tensor) -> Tensor:
        """The summed masked-LM loss; labels (C, L) int64, -100 where nothing is masked."""
        logits = self.head(self.hidden(tokens, valid, self.image(images), caption_image))
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def _hidden(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What a BertLayer returns: its hidden states (transformers 5), or a tuple that begins with them (4)."""
    return output if isinstance(output, Tensor) else output[0]


def place(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model on `device`, its parameters in `dtype`, its statistics (BatchNorm's) in fp32, as DeepSpeed has them.

    In fp64 all of it is.
    """
    if dtype == torch.float64:
        return model.to(device, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to(device)


def pad(packed: Tensor, caption_starts: Tensor, length: int, fill: int = 0) -> Tensor:
    """(T,) -> (C, length) int64, or to the longest caption where `length` is 0."""
    parts = packed.long().split(caption_starts.diff().tolist())
    padded = nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)
    return F.pad(padded, (0, max(0, length - padded.shape[1])), value=fill)
