"""The objectives: masked language modelling, image-text matching (itm) and contrast (itc), question answering (vqa).

Matching shows each caption its own image and a wrong one: that of a caption of the batch which shares many words with
it, so that telling them apart takes more than a glance (hard negatives as in ALBEF, arXiv 2107.07651, whose similarity
needs a contrast head; shared words need none). It also shows each image its caption with one word replaced by another
of the same part of speech (as NegCLIP does by swapping, arXiv 2210.01936): a wrong image differs in most words, so that
one wrong word alone would be learned late.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posmask.kernels import philox
from posmask.kernels.mask_plan import MaskMix, MaskPlan
from posmask.kernels.mask_tokens import MaskedTokens, mask_tokens
from posmask.kernels.masked_lm_loss import NUM_BINS, MaskedLMLoss, lowest_bit
from posmask.kernels.race import WEIGHT_BITS, race_keys
from posmask.prep.pos import MASKABLE, UPOS_BIT, WORD_START
from posmask.train.capacity import capacity
from posmask.train.config import RunConfig
from posmask.train.loader import Batch
from posmask.train.model import MatchLoss

# What a wrong word may stand for. A determiner or pronoun in place of another is seldom wrong, and an adverb seldom
# reads well, so that the text would tell what the image should.
FOILED = sum(UPOS_BIT[tag] for tag in ("NOUN", "PROPN", "VERB", "ADJ", "ADP", "NUM"))
# Log odds of a caption with all words in common against one with none. At 10 a run was at chance after 500 steps.
HARDNESS = 3.0
NEVER = torch.iinfo(torch.int64).max  # the key of what takes no part in a race


class Pairs(NamedTuple):
    """Which wrong image each of C captions is shown, and how it reads with a wrong word; B images, T tokens."""

    negative_image: Tensor  # (C,) int32
    weight: Tensor  # (C,) float32: 0 where the image is blank or no other image can be told from it
    foil: Tensor  # (T,) int32: the captions, one word of each replaced
    foil_weight: Tensor  # (C,) float32: 0 where the image is blank or no word was replaced
    shown: Tensor  # (B,) bool: false for a blank image
    num_shown: Tensor  # () float32, captions whose image is not blank


class MicroBatch(NamedTuple):
    """What one forward learns from."""

    batches: tuple[Batch, ...]  # questions, then what is masked; one where both are the same, or there are no questions
    masked: MaskedTokens  # of the last
    pairs: Pairs | None  # of the last; None without itm and itc

    @property
    def questions(self) -> Batch | None:
        return self.batches[0] if self.batches[0].answer_scores is not None else None


class Losses(NamedTuple):
    """Of one micro-batch; None for an objective without a head."""

    mlm: MaskedLMLoss
    itm: MatchLoss | None = None
    itc: MatchLoss | None = None
    vqa: MatchLoss | None = None
    reward: Tensor | None = None  # (17,) float32, see `PosMaskModel.forward`

    def scaled_sum(self, counts: Tensor, factor: float) -> Tensor:
        """The sum of the objectives' means: each loss_sum over its global count (4,), times `factor`."""
        parts = zip(self[:4], counts, strict=True)
        return sum(losses.loss_sum * (factor / count) for losses, count in parts if losses is not None)


def mask_batch(
    batch: Batch, plan: MaskPlan | MaskMix, seed: int, bit_weights: Tensor | None = None
) -> MaskedTokens:
    """Masks the batch's captions on its device; nothing waits for the result. bit_weights as in `mask_tokens`."""
    rows = capacity(plan, batch.host_tags, batch.host_caption_starts)
    return mask_tokens(
        batch.tokens, batch.tags, batch.scores, batch.caption_starts, batch.caption_key, plan, seed, batch.epoch, rows,
        bit_weights=bit_weights,
    )  # fmt: skip


def masked_lm(model: torch.nn.Module, batch: Batch, masked: MaskedTokens) -> MaskedLMLoss:
    """Loss of the masked tokens of `batch`, with loss, hits and counts per part of speech."""
    return model(batch, masked, lowest_bit(batch.tags.index_select(0, masked.index)))


def prepare(
    batches: Sequence[Batch], plan: MaskPlan | MaskMix, config: RunConfig, vocab_size: int,
    bit_weights: Tensor | None = None,
) -> MicroBatch:  # fmt: skip
    """Draws what is masked and what is paired; batches as in `MicroBatch`."""
    *_, batch = batches
    has_pairs = bool({"itm", "itc"} & set(config.objectives))
    return MicroBatch(
        tuple(batches),
        mask_batch(batch, plan, config.seed, bit_weights),
        pair_batch(batch, vocab_size, config.seed) if has_pairs else None,
    )


def all_losses(model: torch.nn.Module, micro: MicroBatch, with_reward: bool = False) -> Losses:
    """Losses of every objective."""
    *_, batch = micro.batches
    if micro.pairs is None and micro.questions is None and not with_reward:
        return Losses(masked_lm(model, batch, micro.masked))
    bins = lowest_bit(batch.tags.index_select(0, micro.masked.index))
    return Losses(*model(batch, micro.masked, bins, micro.pairs, with_reward, micro.questions))


def pair_batch(batch: Batch, vocab_size: int, seed: int) -> Pairs:
    """Draws a wrong image for each caption, with odds exp(HARDNESS * Jaccard index of the captions' sets of tokens).

    An image that has a caption reading the same is no wrong one. Draws are keyed by the caption, the candidates are
    those of the batch (one rank's micro-batch). Nothing waits for the device.
    """
    device, num_captions = batch.tokens.device, batch.caption_image.numel()
    starts, image = batch.caption_starts.long(), batch.caption_image.long()
    token = torch.arange(batch.tokens.numel(), device=device)
    caption = torch.searchsorted(starts[1:], token, right=True)
    bags = torch.zeros(num_captions, vocab_size, device=device)
    bags[caption, batch.tokens.long()] = 1.0
    common, sizes = bags @ bags.T, bags.sum(1)
    jaccard = common / (sizes[:, None] + sizes - common)
    # Equal texts have equal sums of tokens times powers of an odd number, modulo 2^64; others practically never.
    powers = torch.full((batch.max_caption_tokens,), 6364136223846793005, device=device).cumprod(0)
    term = batch.tokens.long() * powers[token - starts[caption]]
    reading = torch.zeros(num_captions, dtype=torch.int64, device=device).index_add_(0, caption, term)

    shown = batch.images.flatten(1).ne(0).any(1)
    reads_same = (reading[:, None] == reading).float()
    fits = torch.zeros(num_captions, len(shown), device=device).index_add_(1, image, reads_same) > 0  # its own too
    barred = fits[:, image] | ~shown[image]
    odds = (HARDNESS * jaccard).exp().masked_fill(barred, 0.0)
    running = odds.double().cumsum(1)
    total = running[:, -1]
    row = torch.arange(num_captions, device=device)
    draw = philox.draw_words(philox.NEGATIVE, torch.zeros_like(row), row, batch.caption_key, seed, batch.epoch)[0]
    # The first place where the running sum exceeds a uniform share of the total; never a barred one.
    point = (draw.double() / 2**32 * total)[:, None]
    chosen = torch.searchsorted(running, point, right=True).squeeze(1).clamp_(max=num_captions - 1)
    weight = (shown[image] & (total > 0)).float()
    foil, is_foil = foil_captions(batch, caption, token - starts[caption], seed)
    return Pairs(
        image[chosen].int(), weight, foil, (shown[image] & is_foil).float(), shown, shown[image].sum().float()
    )  # fmt: skip


def foil_captions(batch: Batch, caption: Tensor, position: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Replaces a word of each caption by one of the same part of speech, drawn from all in the batch.

    A word is drawn with odds 1 / (words of its part of speech in the batch): else nearly all foils would be nouns and
    adjectives, and what an adposition says would be learned late.
    caption, position (T,) int64: of each token. Returns the tokens (T,) int32, and (C,) bool: whether a caption now
    reads otherwise. Words of several pieces stay, so that lengths do. Nothing waits for the device.
    """
    tags, num_captions = batch.tags, batch.caption_image.numel()
    continues = ((tags & MASKABLE) != 0) & ((tags & WORD_START) == 0)
    is_word = ((tags & MASKABLE) != 0) & ((tags & WORD_START) != 0) & ((tags & FOILED) != 0)
    is_word[:-1] &= ~continues[1:]
    # Words by part of speech; the n-th of one's own takes its place.
    kind = torch.where(is_word, lowest_bit(tags & FOILED), NUM_BINS).long()
    count = (kind == torch.arange(NUM_BINS + 1, device=kind.device)[:, None]).sum(1)
    which, nth, *_ = philox.draw_words(philox.FOIL, position, caption, batch.caption_key, seed, batch.epoch)
    key = race_keys(which, (1 << WEIGHT_BITS) // count[kind]) * batch.max_caption_tokens + position
    key = torch.where(is_word, key, NEVER)
    smallest = torch.full((num_captions,), NEVER, device=key.device).scatter_reduce_(0, caption, key, "amin")
    replaced = is_word & (key == smallest[caption])
    place = (count.cumsum(0) - count)[kind] + (nth * count[kind] >> 32)
    foil = torch.where(replaced, batch.tokens[kind.argsort(stable=True)[place]], batch.tokens)
    is_foil = torch.zeros(num_captions, dtype=torch.int32, device=key.device)
    return foil, is_foil.scatter_reduce_(0, caption, (foil != batch.tokens).int(), "amax") > 0


def counts(micro: list[MicroBatch]) -> Tensor:
    """(4,) float32: what the losses of these micro-batches are to be divided by, once summed over the ranks."""
    num_masked = torch.stack([one.masked.num_masked for one in micro]).sum().float()
    paired = [one.pairs for one in micro if one.pairs is not None]
    found = [torch.stack([2 * (p.weight + p.foil_weight).sum(), p.num_shown]) for p in paired]
    num_questions = sum(q.caption_image.numel() for one in micro if (q := one.questions) is not None)
    pairs = torch.stack(found).sum(0) if found else num_masked.new_zeros(2)
    return torch.cat([num_masked[None], pairs, num_masked.new_full((1,), float(num_questions))])
