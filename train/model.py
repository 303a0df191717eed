"""The model: a ResNet looks at the image, a BERT-like encoder reads the masked caption, a fusion encoder joins them.

Shapes: B images, C captions, T packed tokens of all captions, L tokens of the longest caption, N image tokens,
M rows of masked tokens (the static capacity), D width, H heads, V vocabulary. Text is packed: captions lie end to end
without padding, so that everything but attention works on (T, D).

Parameters of the text and fusion layers carry BERT's names, so that `bert-base-uncased` loads into them: its first
layers are the text encoder, the next ones the fusion encoder (the split of ALBEF, arXiv 2107.07651).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from posmask.kernels.backend import padded_rows
from posmask.kernels.masked_lm_loss import NUM_BINS, MaskedLMLoss, masked_lm_loss
from posmask.train.attention import Ragged
from posmask.train.batch_norm import BatchNorm2d
from posmask.train.config import ModelConfig

TOP_KEYS = 8  # image tokens that count in `Attention.looks`


class ImageEncoder(nn.Module):
    """open_clip's ModifiedResNet without its attention pool: (B, 3, S, S) -> (B, N, D), one token a grid cell."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        stages = len(config.image_layers)
        trunk = ModifiedResNet([*config.image_layers, 1, 1][:4], 1, 1, config.image_size, config.image_width)
        self.stem = nn.Sequential(
            trunk.conv1, trunk.bn1, nn.ReLU(), trunk.conv2, trunk.bn2, nn.ReLU(), trunk.conv3, trunk.bn3, nn.ReLU(),
            trunk.avgpool,
        )  # fmt: skip
        self.stages = nn.Sequential(*[getattr(trunk, f"layer{i + 1}") for i in range(stages)])
        self.proj = nn.Linear(config.image_channels, config.width)
        self.position = nn.Embedding(config.num_image_tokens, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        _replace_batch_norm(self)

    def forward(self, images: Tensor) -> Tensor:
        grid = self.stages(self.stem(images))  # (B, channels, h, w)
        tokens = self.proj(grid.flatten(2).transpose(1, 2))
        return self.norm(tokens + self.position.weight)


@dataclass(frozen=True)
class Packing:
    """Where captions lie in their packed tokens, and which tokens attend to which.

    Behind them may lie padding, up to T rows: each a caption of its own, number C and up, that nothing reads.
    """

    starts: Tensor  # (C+1,) int32
    max_length: int
    caption: Tensor  # (T,) int64: caption of each token
    position: Tensor  # (T,) int64: place inside the caption
    within_captions: Ragged
    num_padding: int

    @staticmethod
    def of(caption_starts: Tensor, num_tokens: int, max_length: int, num_padding: int = 0) -> Packing:
        """From caption_starts (C+1,); `max_length` is known on the host, so that nothing waits for the device.

        num_padding: rows behind the tokens.
        """
        starts = caption_starts.long()
        token = torch.arange(num_tokens + num_padding, device=starts.device)
        if num_padding:
            starts = torch.cat([starts, token[num_tokens:] + 1])
        caption = torch.searchsorted(starts[1:], token, right=True)
        within_captions = Ragged(caption, starts.int(), max_length, max_length, is_sorted=True)
        return Packing(caption_starts.int(), max_length, caption, token - starts[caption], within_captions, num_padding)

    def rows_within_captions(self, index: Tensor, live: Tensor | None) -> Ragged:
        """Rows `index` (M,), ascending where they are live, attend to all tokens of their caption."""
        starts = self.within_captions.key_starts
        return Ragged(self.caption[index], starts, self.max_length, self.max_length, is_sorted=True, live=live)

    def owners(self, caption_image: Tensor, num_images: int) -> Tensor:
        """(T,) int64: the image that each token looks at, from those of the captions (C,); padding at one each."""
        num_tokens = len(self.caption) - self.num_padding
        owner = caption_image.long()[self.caption[:num_tokens]]
        if not self.num_padding:
            return owner
        return torch.cat([owner, torch.arange(self.num_padding, device=owner.device) % num_images])


class SelfOutput(nn.Module):
    """BERT's dense + residual + LayerNorm after attention and after the feed-forward."""

    def __init__(self, in_features: int, width: int):
        super().__init__()
        self.dense = nn.Linear(in_features, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x_TD) + residual_TD)


class QueryKeyValue(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)


class Attention(nn.Module):
    """Multi-head attention with BERT's parameter names; over the caption itself, or over its image's tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.self = QueryKeyValue(config)
        self.output = SelfOutput(config.width, config.width)

    def forward(self, query_QD: Tensor, key_KD: Tensor, attend: Ragged) -> Tensor:
        query, key, value = self.self.query(query_QD), self.self.key(key_KD), self.self.value(key_KD)
        return self.output(attend(query, key, value, self.num_heads), query_QD)

    @torch.no_grad()
    def looks(self, query_QD: Tensor, key_KD: Tensor, num_sequences: int, owner: Tensor) -> Tensor:
        """(Q,) float32: how much each row takes from the keys of its sequence `owner` (Q,), all of one length.

        The weight of a key times the norm of its value (arXiv 2004.10102), mean over heads and the TOP_KEYS largest.
        """
        heads = (self.num_heads, -1)
        query = self.self.query(query_QD).unflatten(-1, heads)
        key, value = (
            layer(key_KD).unflatten(-1, heads).unflatten(0, (num_sequences, -1))
            for layer in (self.self.key, self.self.value)
        )
        scores = torch.einsum("qhd,qnhd->qhn", query, key[owner]).float() / query.shape[-1] ** 0.5
        taken = scores.softmax(-1) * value.float().norm(dim=-1).transpose(1, 2)[owner]
        return taken.mean(1).topk(min(TOP_KEYS, taken.shape[-1])).values.mean(-1)


class Intermediate(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.width, 4 * config.width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """One BERT layer (post-LayerNorm), with cross-attention to the image between its two halves if it fuses."""

    def __init__(self, config: ModelConfig, fuses: bool):
        super().__init__()
        self.attention = Attention(config)
        if fuses:
            self.crossattention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = SelfOutput(4 * config.width, config.width)

    def forward(self, x_TD: Tensor, attend: Ragged, image_KD=None, attend_image=None, index=None, looks=None) -> Tensor:
        """(T, D), or the rows `index` (M,) of it; all tokens are keys of its self-attention in either case.

        looks: a list that receives `Attention.looks` of the cross-attention.
        """
        rows = x_TD if index is None else x_TD.index_select(0, index)
        rows = self.attention(rows, x_TD, attend)
        if image_KD is not None:
            if looks is not None:
                num_images = attend_image.key_starts.numel() - 1
                looks.append(self.crossattention.looks(rows, image_KD, num_images, attend_image.owner))
            rows = self.crossattention(rows, image_KD, attend_image)
        return self.output(self.intermediate(rows), rows)


class Embeddings(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=1e-12)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        return self.LayerNorm(self.word_embeddings(tokens) + self.position_embeddings(position))


class MLMHead(nn.Module):
    """BERT's prediction head; its decoder is the word embedding."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def transform(self, rows_MD: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(rows_MD)))

    def forward(self, rows_MD: Tensor, weight_VD: Tensor, targets, num_masked, bins) -> MaskedLMLoss:
        return masked_lm_loss(self.transform(rows_MD), weight_VD, self.bias, targets, num_masked, bins)


class MatchLoss(NamedTuple):
    """Sums over a batch; only loss_sum has a gradient. For itc `hits` are captions that find their image."""

    loss_sum: Tensor  # () float32, nats
    hits: Tensor  # () float32
    count: Tensor  # () float32


class MatchHead(nn.Linear):
    """Whether a caption and an image belong together: the mean over the caption's tokens of what each says.

    ALBEF asks the fused [CLS] alone; every token learns sooner whether the image shows what it says.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config.width, 1)

    def forward(self, fused_TD: Tensor, packing: Packing) -> Tensor:
        """(T, D) -> (C,) fp32 logits."""
        logit = super().forward(fused_TD).squeeze(1).float()
        lengths = packing.starts.diff()
        # A sum over rows, since a scatter on a GPU would add in any order.
        member = packing.caption == torch.arange(len(lengths), device=logit.device)[:, None]
        return torch.where(member, logit, 0).sum(1) / lengths

    def loss(self, logit: Tensor, is_match: Tensor, weight: Tensor) -> MatchLoss:
        """P pairs: logit, is_match, weight (P,) float; pairs of weight 0 do not count."""
        loss = F.binary_cross_entropy_with_logits(logit, is_match, weight, reduction="sum")
        hits = weight * ((logit > 0) == (is_match > 0.5))
        return MatchLoss(loss, hits.sum().detach(), weight.sum())


class ContrastHead(nn.Module):
    """Image and text as unit vectors of one space (the ITC of ALBEF, within the batch, without a queue)."""

    WIDTH = 256
    TEMPERATURE = 0.07  # at the start

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.image = nn.Linear(config.width, self.WIDTH)
        self.text = nn.Linear(config.width, self.WIDTH)
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(self.TEMPERATURE)))

    def embed_image(self, image_BND: Tensor) -> Tensor:
        """(B, N, D) image tokens -> (B, 256)."""
        return F.normalize(self.image(image_BND.mean(1)).float(), dim=-1)

    def embed_text(self, cls_CD: Tensor) -> Tensor:
        """(C, D) [CLS] of the text encoder -> (C, 256)."""
        return F.normalize(self.text(cls_CD).float(), dim=-1)

    def loss(self, image_BND: Tensor, cls_CD: Tensor, caption_image: Tensor, shown: Tensor) -> MatchLoss:
        """shown (B,) bool is false for blank images, which belong to no caption and no caption to them."""
        caption_image = caption_image.long()
        scores = self.embed_text(cls_CD) @ self.embed_image(image_BND).T * self.log_scale.float().exp()  # (C, B)
        weight = shown[caption_image].float()
        least = -1e4  # in fp32 as good as -inf, but finite: a weight of 0 makes nothing of it
        to_image = F.cross_entropy(scores.masked_fill(~shown, least), caption_image, reduction="none")
        # Of the captions, those of other images stand against each caption; its image's other captions are as true.
        of_image = scores[:, caption_image].T  # (C, C): row i, every caption with the image of caption i
        same = caption_image[:, None] == caption_image
        other = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
        target = torch.arange(len(same), device=same.device)
        to_text = F.cross_entropy(of_image.masked_fill(other | ~shown[caption_image], least), target, reduction="none")
        hits = weight * (scores.masked_fill(~shown, least).argmax(1) == caption_image)
        return MatchLoss((weight * (to_image + to_text)).sum() / 2, hits.sum().detach(), weight.sum())


class AnswerHead(nn.Sequential):
    """Scores the answers of a vocabulary from the fused [CLS] of a question: (C, D) -> (C, A)."""

    def __init__(self, config: ModelConfig):
        hidden = 2 * config.width
        super().__init__(
            nn.Linear(config.width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, len(config.answers))
        )

    @staticmethod
    def loss(logit: Tensor, scores: Tensor) -> MatchLoss:
        """Binary cross-entropy to soft targets, summed over questions and answers; logit, scores (C, A).

        Its hits are the scores of the best answers: VQA accuracy.
        """
        best = scores.gather(1, logit.argmax(1, keepdim=True))
        loss = F.binary_cross_entropy_with_logits(logit, scores, reduction="sum")
        return MatchLoss(loss, best.sum().detach(), scores.new_tensor(float(len(scores))))


class PosMaskModel(nn.Module):
    """Image encoder, text encoder, fusion encoder, MLM head, and the heads of other objectives and of fine-tuning."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.vocab_size > 0, "the vocabulary comes from the shards"
        self.config = config
        self.image = ImageEncoder(config)
        self.embeddings = Embeddings(config)
        self.text = nn.ModuleList(Layer(config, fuses=False) for _ in range(config.num_text_layers))
        self.fusion = nn.ModuleList(Layer(config, fuses=True) for _ in range(config.num_fusion_layers))
        self.head = MLMHead(config)
        self.itm = MatchHead(config) if "itm" in config.objectives else None
        self.itc = ContrastHead(config) if "itc" in config.objectives else None
        self.vqa = AnswerHead(config) if config.answers else None
        # BERT's 0.02 at its width of 768; a narrower model needs more, or its attention begins as a plain average.
        std = 0.02 * (768 / config.width) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and not name.startswith(("image.stem", "image.stages")):
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        if self.vqa is not None:
            # One answer of A is right: the head begins there (arXiv 1708.02002, section 4.1), not at every second one.
            nn.init.constant_(self.vqa[-1].bias, -math.log(len(config.answers)))

    def pack(self, batch) -> Packing:
        """Of the captions of a `loader.Batch`."""
        num_tokens = batch.tokens.numel()
        num_padding = self.padded_rows(num_tokens) - num_tokens
        return Packing.of(batch.caption_starts, num_tokens, batch.max_caption_tokens, num_padding)

    def padded_rows(self, num_rows: int) -> int:
        """How many rows of text, or of masked tokens, products of this model's dtype like."""
        return padded_rows(num_rows, self.embeddings.word_embeddings.weight)

    def encode_text(self, tokens: Tensor, packing: Packing) -> Tensor:
        """tokens int32, without the padding of `packing` -> (T, D), before any image is seen."""
        if packing.num_padding:
            tokens = F.pad(tokens, (0, packing.num_padding))
        x_TD = self.embeddings(tokens, packing.position)
        for layer in self.text:
            x_TD = layer(x_TD, packing.within_captions)
        return x_TD

    def fuse(
        self, text_TD: Tensor, packing: Packing, image_BND: Tensor, caption_image: Tensor,
        index: Tensor | None = None, live: Tensor | None = None, max_image_tokens: int | None = None,
        looks: list | None = None, in_order: bool = False,
    ) -> Tensor:  # fmt: skip
        """(T, D) x (B, N, D) -> (T, D), or its rows `index` (M,) alone, which the last layer then works out alone.

        caption_image (C,) int32 says which image each caption belongs to. live (M,) bool, as in `Ragged`: spare rows of
        the result mean nothing. max_image_tokens bounds the text tokens of one image (by default: all of them). looks:
        a list that receives how much each row takes from its image in the last layer. in_order: caption_image is known
        to ascend, as in a `loader.Batch`.
        """
        num_images, num_image_tokens = image_BND.shape[:2]
        image_KD = image_BND.flatten(0, 1)
        owner = packing.owners(caption_image, num_images)  # (T,)
        starts = torch.arange(num_images + 1, dtype=torch.int32, device=owner.device) * num_image_tokens
        most = (max_image_tokens or len(text_TD)) + packing.num_padding
        is_sorted = in_order and packing.num_padding == 0
        attend_image = Ragged(owner, starts, most, num_image_tokens, is_sorted=is_sorted)
        *layers, last = self.fusion
        for layer in layers:
            text_TD = layer(text_TD, packing.within_captions, image_KD, attend_image)
        if index is None:
            return last(text_TD, packing.within_captions, image_KD, attend_image, looks=looks)
        attend_image = Ragged(owner[index], starts, most, num_image_tokens, is_sorted=in_order, live=live)
        return last(text_TD, packing.rows_within_captions(index, live), image_KD, attend_image, index, looks)

    def predict(self, rows_MD: Tensor, targets: Tensor, num_masked: Tensor, bins=None) -> MaskedLMLoss:
        """The masked-LM loss of fused rows (M, D); see `masked_lm_loss` for the rest."""
        return self.head(rows_MD, self.embeddings.word_embeddings.weight, targets, num_masked, bins)

    def logits(self, rows_MD: Tensor) -> Tensor:
        """(M, D) of fused text -> (M, V), for evaluations that want more than the loss."""
        return F.linear(self.head.transform(rows_MD), self.embeddings.word_embeddings.weight, self.head.bias)

    def answer(
        self, text_TD: Tensor, packing: Packing, image_BND: Tensor, caption_image: Tensor,
        max_image_tokens: int | None = None,
    ) -> Tensor:  # fmt: skip
        """(C, A) fp32 logits of the answers to C questions, whose tokens are (T, D); the rest as in `fuse`."""
        first = packing.starts[:-1].long()
        cls_CD = self.fuse(text_TD, packing, image_BND, caption_image, first, max_image_tokens=max_image_tokens)
        return self.vqa(cls_CD).float()

    def forward(self, batch, masked, bins: Tensor | None, pairs=None, with_reward: bool = False, questions=None):
        """The masked-LM loss; with more to learn (mlm, itm, itc, vqa, reward), None for what there is none of.

        batch: `loader.Batch` on the device; masked: `MaskedTokens` of it; bins (M,): POS of each masked row;
        pairs: `objectives.Pairs` of it; questions: a batch to answer, this one or another. The reward (17,) float32 is
        the sum over the masked tokens of each bin of how much they take from the image, relative to the most in their
        caption.
        """
        index, targets = masked.index, masked.targets
        packing = self.pack(batch)
        if not index.is_cuda:  # the host knows the count: leave spare rows out, as many as it can, but one row stays
            num_masked = max(1, int(masked.num_masked))
            num_rows = min(len(index), self.padded_rows(num_masked))
            bins = None if bins is None else bins[:num_rows]
            # Each in another caption: those in a rectangle of attention are padded to the most rows that one has.
            spare = torch.linspace(0, batch.tokens.numel() - 1, num_rows - num_masked)
            index, targets = torch.cat([index[:num_masked], spare.to(index.dtype)]), targets[:num_rows]
        image_BND = self.image(batch.images)
        vqa = None
        if questions is batch:
            vqa = self.answer_loss(batch, packing, image_BND)
        elif questions is not None:
            vqa = self.answer_loss(questions, self.pack(questions), self.image(questions.images))
        looks = [] if with_reward else None
        if "mlm" in self.config.objectives:
            text_TD = self.encode_text(masked.tokens, packing)
            rows_MD = self.fuse(
                text_TD, packing, image_BND, batch.caption_image, index, targets >= 0, batch.max_image_tokens, looks,
                in_order=True,
            )  # fmt: skip
        else:  # one spare row: the masked text need not pass, and the MLM head has its gradient of zero
            rows_MD, targets, bins = image_BND[0, :1], targets[:1], bins[:1]
        mlm = self.predict(rows_MD, targets, masked.num_masked, bins)
        if pairs is None and vqa is None and not with_reward:
            return mlm
        itm, itc = (None, None) if pairs is None else self.match(batch, packing, image_BND, pairs)
        num_captions = packing.starts.numel() - 1
        reward = _reward(looks[0], packing.caption[index], num_captions, targets >= 0, bins) if with_reward else None
        return mlm, itm, itc, vqa, reward

    def answer_loss(self, batch, packing: Packing, image_BND: Tensor) -> MatchLoss:
        """The loss of the answers to questions without masks."""
        text_TD = self.encode_text(batch.tokens, packing)
        logit = self.answer(text_TD, packing, image_BND, batch.caption_image, batch.max_image_tokens)
        return self.vqa.loss(logit, batch.answer_scores)

    def match(self, batch, packing: Packing, image_BND: Tensor, pairs) -> tuple[MatchLoss | None, MatchLoss | None]:
        """The losses of itm and itc, on captions without masks."""
        text_TD = self.encode_text(batch.tokens, packing)
        first = batch.caption_starts[:-1].long()
        itm = itc = None
        if self.itc is not None:
            itc = self.itc.loss(image_BND, text_TD[first], batch.caption_image, pairs.shown)
        if self.itm is not None:
            foil_TD = self.encode_text(pairs.foil, packing)
            own, weight, foil_weight = batch.caption_image, pairs.weight, pairs.foil_weight
            shown = ((text_TD, own), (text_TD, pairs.negative_image), (foil_TD, own))
            logit = torch.cat([self.itm(self.fuse(text, packing, image_BND, i), packing) for text, i in shown])
            is_match = torch.cat([torch.ones_like(weight), torch.zeros_like(weight), torch.zeros_like(weight)])
            itm = self.itm.loss(logit, is_match, torch.cat([weight + foil_weight, weight, foil_weight]))
        return itm, itc


def _reward(looks: Tensor, caption: Tensor, num_captions: int, live: Tensor, bins: Tensor) -> Tensor:
    """(17,) sums per bin of looks (M,) over the largest among the live rows of the same caption (M,) int64."""
    looks = torch.where(live, looks, 0)
    most = looks.new_zeros(num_captions).scatter_reduce_(0, caption, looks, "amax")
    share = looks / most[caption].clamp(min=1e-12)
    member = (bins == torch.arange(NUM_BINS, device=bins.device)[:, None]) & live
    return torch.where(member, share, 0).sum(dim=1)


def _replace_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            ours = BatchNorm2d(child.num_features, eps=child.eps, momentum=child.momentum)
            ours.load_state_dict(child.state_dict())
            setattr(module, name, ours)
        else:
            _replace_batch_norm(child)
