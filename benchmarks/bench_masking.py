"""Masking a batch: ours on packed captions with stored tags, against Hugging Face's collators and spaCy while training.

    python benchmarks/bench_masking.py --data data/scenes/train

512 captions of the shards (2,048 on a GPU, where ours is also recorded into a CUDA graph, to time its kernels alone).
Peers: DataCollatorForLanguageModeling (whole: pad and mask; its mask step alone, on a batch that is padded already,
once as the collator calls it by default and once with the special tokens marked beforehand, its best setting),
DataCollatorForWholeWordMask, and a collate function that tags with spaCy (batches of 256, the components that tags
don't need left out) and masks nouns. Before any timing, rates and the nouns found are compared. A sample is CALLS calls
in a row, of each side in turn; ratios "of single calls" take one call at a time, each into the caches that the other
side has left behind. Without spaCy its rows are left out, and said to be.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from timing import graphed, interleave, quantiles, ratio, write_result
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, DataCollatorForWholeWordMask

from posmask.kernels.mask_tokens import MaskedTokens, mask_tokens
from posmask.prep.pos import MASKABLE, UPOS_BIT
from posmask.train.capacity import capacity
from posmask.train.loader import Shards, caption_keys
from posmask.train.masking import parse_mask

NUM_CAPTIONS = {"cpu": 512, "cuda": 2048}
CALLS = {"cpu": 10, "cuda": 1}
ARMS = ("noun", "random", "whole-word", "matched:noun", "span")


def make_batch(shards: Shards, device: torch.device) -> SimpleNamespace:
    """The first captions of the shards (again from the start where they end), packed as by the loader, and as texts."""
    num_captions = NUM_CAPTIONS[device.type]
    columns: dict[str, list] = {name: [] for name in ("tokens", "tags", "lengths", "ids", "captions", "texts")}
    for i in cycle(range(len(shards))):
        sample = shards[i]
        for name in ("tokens", "tags"):
            columns[name].append(sample[name])
        columns["lengths"] += sample["caption_lengths"].tolist()
        columns["ids"] += [sample["id"]] * len(sample["captions"])
        columns["captions"] += range(len(sample["captions"]))
        columns["texts"] += sample["captions"]
        if len(columns["lengths"]) >= num_captions:
            break
    starts = np.concatenate([[0], np.cumsum(columns["lengths"][:num_captions])]).astype(np.int32)
    tags = np.concatenate(columns["tags"])[: starts[-1]]
    tokens = np.concatenate(columns["tokens"])[: starts[-1]].astype(np.int32)
    ids, captions = (np.array(columns[name][:num_captions]) for name in ("ids", "captions"))
    key = caption_keys(ids.astype(np.uint64), captions)
    return SimpleNamespace(
        tokens=torch.from_numpy(tokens).to(device), tags=torch.from_numpy(tags.view(np.int32)).to(device),
        starts=torch.from_numpy(starts).to(device), key=key.to(device), host_tags=tags, host_starts=starts,
        texts=columns["texts"][:num_captions],
    )  # fmt: skip


def our_step(shards: Shards, batch: SimpleNamespace, arm: str) -> Callable[[int], MaskedTokens]:
    manifest, tokenizer = shards.manifest, shards.manifest.tokenizer
    vocabulary = {
        "mask_id": tokenizer.mask_id,
        "vocab_size": tokenizer.vocab_size,
        "never_drawn": tokenizer.reserved_ids,
    }
    plan = parse_mask(
        arm, tokenizer=vocabulary, bits_computed=manifest.bits_computed, max_tokens=manifest.max_tokens
    ).at(0.0)  # fmt: skip
    rows = capacity(plan, batch.host_tags, batch.host_starts)
    return lambda seed: mask_tokens(
        batch.tokens, batch.tags, None, batch.starts, batch.key, plan, seed, 0, rows
    )  # fmt: skip


class SpacyCollator:
    """What a training loop without stored tags does with every batch: tag, tokenise, align, mask the nouns."""

    def __init__(self, tokenizer):
        from posmask.prep.tagging import find_tagger, load_tagger

        self.nlp, self.tokenizer = load_tagger(find_tagger("auto")), tokenizer

    def __call__(self, texts: list[str]) -> torch.Tensor:
        batch = self.tokenizer(texts, padding=True, return_offsets_mapping=True, return_tensors="pt")
        ids, offsets = batch["input_ids"], batch["offset_mapping"].tolist()
        chosen = torch.zeros_like(ids, dtype=torch.bool)
        for row, doc in enumerate(self.nlp.pipe(texts, batch_size=256)):
            nouns = np.zeros(len(doc.text) + 1, bool)
            for token in doc:
                if token.pos_ == "NOUN":
                    nouns[token.idx : token.idx + len(token)] = True
            for column, (start, end) in enumerate(offsets[row]):
                chosen[row, column] = end > start and bool(nouns[start:end].any())
        ids[chosen] = self.tokenizer.mask_token_id
        return chosen


def check(
    ours: dict, batch: SimpleNamespace, collator, examples, spacy_collator: SpacyCollator | None
) -> dict[str, float]:  # fmt: skip
    """Raises ValueError unless both sides mask the same share (random) and the same pieces (noun)."""
    maskable = int((batch.host_tags & MASKABLE != 0).sum())
    num_ours = sum(int(ours["random"](seed).num_masked) for seed in range(20)) / 20
    labels = [collator(examples)["labels"] for _ in range(20)]
    num_theirs = sum(int((label != -100).sum()) for label in labels) / 20
    sigma = (maskable * 0.15 * 0.85 / 20) ** 0.5
    if max(abs(num_ours - 0.15 * maskable), abs(num_theirs - 0.15 * maskable)) > 4 * sigma:
        raise ValueError(f"random masks {num_ours} pieces here and {num_theirs} there of {maskable}: rates differ")
    shares = {"random_ours": num_ours / maskable, "random_theirs": num_theirs / maskable}
    if spacy_collator is None:
        return shares
    lengths = np.diff(batch.host_starts)
    theirs = spacy_collator(batch.texts).numpy()
    theirs = np.concatenate([row[:length] for row, length in zip(theirs, lengths, strict=True)])
    nouns = ours["noun"](0)
    mine = np.zeros(len(theirs), bool)
    mine[nouns.index[: nouns.num_masked].cpu().numpy()] = True
    agreement = float((mine == theirs).mean())
    if agreement < 0.999 or not np.array_equal(mine, (batch.host_tags & UPOS_BIT["NOUN"] != 0)):
        raise ValueError(f"the nouns masked here and by spaCy in the collator agree on {agreement:.2%} of the pieces")
    return shares | {"noun_agreement": agreement}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/scenes/train"))
    parser.add_argument("--name", help="of the result: results/masking_NAME.json (default: the device)")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shards = Shards((str(args.data),))
    batch = make_batch(shards, device)
    tokenizer = AutoTokenizer.from_pretrained(args.data / "tokenizer")
    examples = [{"input_ids": ids} for ids in tokenizer(batch.texts)["input_ids"]]
    # The whole-word collator of transformers 5 finds words by offsets, and cannot pad these.
    encoded = tokenizer(batch.texts, return_offsets_mapping=True, padding=transformers.__version__ >= "5")
    whole = [{"input_ids": ids, "offset_mapping": places}
             for ids, places in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]  # fmt: skip
    random_collator = DataCollatorForLanguageModeling(tokenizer)
    warnings.filterwarnings("ignore", message="DataCollatorForWholeWordMask")  # it replaces all words by [MASK]
    word_collator = DataCollatorForWholeWordMask(tokenizer)
    spacy_collator = SpacyCollator(tokenizer) if find_spec("spacy") else None
    padded = tokenizer.pad(examples, return_tensors="pt")["input_ids"]
    special = padded <= max(tokenizer.all_special_ids)
    ours = {arm: our_step(shards, batch, arm) for arm in ARMS}
    checked = check(ours, batch, random_collator, examples, spacy_collator)

    timed = {arm: (lambda arm=arm: ours[arm](1)) for arm in ARMS}
    timed["hf mask step"] = lambda: random_collator.torch_mask_tokens(padded.clone(), None)
    timed["hf mask step, special tokens given"] = lambda: random_collator.torch_mask_tokens(padded.clone(), special)
    timed["hf collator"] = lambda: random_collator(examples)
    timed["hf whole-word collator"] = lambda: word_collator(whole)
    calls = CALLS[device.type]
    in_a_row = {name: (lambda fn=fn: [fn() for _ in range(calls)]) for name, fn in timed.items()}
    samples = {name: [ms / calls for ms in all_ms] for name, all_ms in interleave(in_a_row, args.repeats).items()}
    single = interleave(timed, args.repeats) if calls > 1 else samples
    graphs = {f"{arm}, kernels alone": graphed(timed[arm]) for arm in ARMS} if device.type == "cuda" else {}
    samples |= interleave(graphs, args.repeats)
    rows = [{"what": name, "tokens": len(batch.host_tags), **quantiles(ms)} for name, ms in samples.items()]
    language_model = ("hf mask step", "hf mask step, special tokens given", "hf collator")
    peers = {"noun": language_model, "random": language_model, "whole-word": ("hf whole-word collator",)}
    for arm, names in peers.items():
        for name in names:
            rows.append({"ratio": f"{name} / {arm}", "value": ratio(samples[name], samples[arm])})
            rows.append({"ratio": f"{name} / {arm}, of single calls", "value": ratio(single[name], single[arm])})
    if spacy_collator is None:
        rows.append({"what": "spacy collator", "not_timed": "spaCy is not installed"})
    else:
        few = interleave({"noun": timed["noun"], "spacy": lambda: spacy_collator(batch.texts)}, repeats=20)
        rows.append({"what": "spacy collator", "tokens": len(batch.host_tags), **quantiles(few["spacy"])})
        rows.append({"ratio": "spacy collator / noun", "value": ratio(few["spacy"], few["noun"])})
    rows.append({"checked": {name: round(value, 5) for name, value in checked.items()}})
    for row in rows:
        print(row, file=sys.stderr)
    write_result(f"masking_{args.name or device.type}", rows, "transformers", "spacy", "numpy")


if __name__ == "__main__":
    main()
