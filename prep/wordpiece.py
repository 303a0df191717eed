"""WordPiece tokenizers: train one on captions, or take an existing one; save it; encode captions with offsets.

Normalisation and word splitting are BERT's (uncased unless the vocabulary is cased).
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from posmask.prep.shards import MAX_VOCAB, temporary_path

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUES = "##"
MIN_TRAINED_VOCAB = 64
MAX_ALPHABET = 1000  # characters; rarer ones become [UNK], as in BERT's own vocabulary
MIN_COUNT = 2  # a merge seen once is no regularity


@dataclass(frozen=True)
class Encoded:
    """A caption as L tokens, [CLS] and [SEP] included."""

    ids: list[int]
    pieces: list[tuple[int, int]]  # (L - 2) character spans [start, end) of what stands between [CLS] and [SEP]
    word_starts: list[bool]  # (L - 2)
    is_cut: bool

    def words(self, caption: str) -> list[str]:
        """The caption's words in lower case: the pieces from one word start to the next."""
        borders = [i for i, starts in enumerate(self.word_starts) if starts] + [len(self.pieces)]
        return [caption[self.pieces[i][0] : self.pieces[j - 1][1]].lower() for i, j in pairwise(borders)]


class CaptionEncoder:
    """Encodes captions with the tokenizer saved in `folder`, to at most `max_tokens` tokens."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        self.tokenizer = load(folder)
        vocab = self.tokenizer.get_vocab()
        self.cls_id, self.sep_id, self.unk_id = vocab["[CLS]"], vocab["[SEP]"], vocab["[UNK]"]
        self.continuing = {i for piece, i in vocab.items() if piece.startswith(CONTINUES) and piece != CONTINUES}
        self.max_pieces = max_tokens - 2

    def __call__(self, captions: Sequence[str]) -> list[Encoded]:
        """Encode; a caption over the limit is cut at the end of a word (inside it only if it is longer than that)."""
        return [self._cut(e.ids, e.offsets) for e in self.tokenizer.encode_batch(captions, add_special_tokens=False)]

    def _cut(self, ids: list[int], pieces: list[tuple[int, int]]) -> Encoded:
        end = len(ids)
        if end > self.max_pieces:
            end = self.max_pieces
            while end and ids[end] in self.continuing:
                end -= 1
            end = end or self.max_pieces
        starts = [n == 0 or i not in self.continuing for n, i in enumerate(ids[:end])]
        return Encoded([self.cls_id, *ids[:end], self.sep_id], pieces[:end], starts, end < len(ids))


def load(folder: Path) -> Tokenizer:
    """The tokenizer saved in `folder`; a literal "[MASK]" in a text is ordinary text to it."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `folder` atomically, such that transformers.AutoTokenizer loads it without a network."""
    temporary = temporary_path(folder)
    temporary.mkdir(parents=True)
    try:
        tokenizer.save(str(temporary / "tokenizer.json"))
        (temporary / "vocab.txt").write_text("".join(f"{entry}\n" for entry in _entries(tokenizer)), encoding="utf-8")
        config = {
            "tokenizer_class": "BertTokenizerFast",
            "do_lower_case": not _is_cased(_entries(tokenizer)),
            **{f"{entry[1:-1].lower()}_token": entry for entry in SPECIAL},
        }
        (temporary / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        try:
            temporary.replace(folder)
        except OSError:
            if not folder.is_dir():  # else another job of the same build wrote the same a moment before
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_spec(spec: str) -> None:
    """Raise ValueError when `spec` can be seen to be wrong before any caption is read."""
    if match := re.fullmatch(r"train:(.*)", spec):
        number = match[1]
        if not number.isdecimal() or not MIN_TRAINED_VOCAB <= int(number) <= MAX_VOCAB:
            raise ValueError(
                f"--tokenizer {spec}: the size of a trained vocabulary must be {MIN_TRAINED_VOCAB} to {MAX_VOCAB}, "
                "for example train:8192"
            )
    elif not Path(spec).exists() and (spec.endswith((".txt", ".json")) or spec.startswith((".", "/", "~"))):
        raise ValueError(f"--tokenizer {spec}: no such file or folder")


def make(spec: str, captions: Iterable[str]) -> Tokenizer:
    """The tokenizer that --tokenizer means: train:N, a vocab.txt, a tokenizer's folder, or a name on the hub.

    `captions` is read only for train:N. Raises ValueError for anything but a WordPiece tokenizer that fits uint16.
    """
    check_spec(spec)
    path = Path(spec)
    if spec.startswith("train:"):
        return train(captions, int(spec.removeprefix("train:")))
    if path.is_file():
        return from_vocab(_read_vocab(path), spec)
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        elif (path / "vocab.txt").is_file():
            return from_vocab(_read_vocab(path / "vocab.txt"), spec)
        else:
            raise ValueError(f"--tokenizer {spec}: the folder has neither tokenizer.json nor vocab.txt")
    else:
        tokenizer = _from_hub(spec)
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] != "WordPiece" or model["continuing_subword_prefix"] != CONTINUES:
        raise ValueError(f"--tokenizer {spec} is {model['type']}; only WordPiece with {CONTINUES} marks word starts")
    _check(_entries(tokenizer), spec)
    return tokenizer


def train(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """A WordPiece vocabulary of at most `vocab_size` entries (fewer if the text has no more), always the same.

    The trainer numbers characters in hash order, which decides ties between merges and so changes the vocabulary from
    run to run. Given the sorted alphabet as special tokens it has nothing left to number.
    """
    normalizer = _normalizer(cased=False)
    words: Counter[str] = Counter()
    for caption in captions:
        words.update(normalizer.normalize_str(caption).split())
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    ranked = sorted(characters, key=lambda c: (-characters[c], c))
    alphabet = sorted(ranked[: min(MAX_ALPHABET, (vocab_size - len(SPECIAL)) // 2)])
    # A word with a character outside the alphabet will be [UNK], so the trainer should not see that character.
    rare = str.maketrans(dict.fromkeys(set(ranked) - set(alphabet), " "))
    scratch = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    scratch.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_COUNT,
        special_tokens=[*SPECIAL, *alphabet, *(CONTINUES + c for c in alphabet)],
        continuing_subword_prefix=CONTINUES,
        show_progress=False,
    )
    scratch.train_from_iterator((word.translate(rare) for word in words.elements()), trainer)
    return from_vocab(_entries(scratch), f"train:{vocab_size}")


def from_vocab(entries: Sequence[str], spec: str) -> Tokenizer:
    """BERT's tokenizer over `entries`; `spec` is only named in errors."""
    _check(entries, spec)
    vocab = {entry: i for i, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", continuing_subword_prefix=CONTINUES))
    tokenizer.normalizer = _normalizer(_is_cased(entries))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def _normalizer(cased: bool) -> normalizers.BertNormalizer:
    return normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, lowercase=not cased)


def _is_cased(entries: Sequence[str]) -> bool:
    return any(entry != entry.lower() for entry in entries if not entry.startswith("["))


def _entries(tokenizer: Tokenizer) -> list[str]:
    vocab = tokenizer.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)


def _check(entries: Sequence[str], spec: str) -> None:
    if missing := [entry for entry in SPECIAL if entry not in entries]:
        raise ValueError(f"--tokenizer {spec}: the vocabulary lacks {' '.join(missing)}")
    if len(set(entries)) != len(entries):
        raise ValueError(f"--tokenizer {spec}: the vocabulary has an entry twice")
    if len(entries) > MAX_VOCAB:
        raise ValueError(f"--tokenizer {spec}: {len(entries)} entries, the shards hold at most {MAX_VOCAB}")


def _read_vocab(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"--tokenizer {path}: not a UTF-8 text with one entry a line") from None


def _from_hub(name: str) -> Tokenizer:
    from transformers import AutoTokenizer  # takes seconds, and only this case needs it

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--tokenizer {name}: no such file or folder, and the hub gave none ({reason})") from None
    return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
