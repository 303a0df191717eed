"""The meaning of every bit of the `tags` column, in one place. Standard library only, so training can import it.

A word piece carries one 32-bit set of bits. Bits are append-only: a shard written today must mean the same tomorrow.
Bit 31 stays 0, so that the set survives as a signed int32 on a device.
"""

from __future__ import annotations

# Universal POS tags (universaldependencies.org/u/pos), alphabetical: the bit of a tag is its place in this tuple.
UPOS = (
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM",
    "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X",
)  # fmt: skip
NUM_UPOS = len(UPOS)
UPOS_BIT = {tag: 1 << i for i, tag in enumerate(UPOS)}
UPOS_MASK = (1 << NUM_UPOS) - 1

TOKEN_START = 1 << 17  # first piece of a token of the tagger
WORD_START = 1 << 18  # a piece that does not continue a word ("##")
PHRASE_START = 1 << 19  # noun chunk or named entity
COLLOCATION_START = 1 << 20  # n-gram of the PMI vocabulary
FUNCTION_WORD = 1 << 21  # stop word or punctuation
OBJECT = 1 << 22
ATTRIBUTE = 1 << 23
RELATION = 1 << 24
MASKABLE = 1 << 25  # false on [CLS], [SEP], [PAD] and [UNK]

# What a build may declare in the manifest's `bits_computed`.
BITS = {
    "upos": UPOS_MASK,
    "token_start": TOKEN_START,
    "word_start": WORD_START,
    "phrase_start": PHRASE_START,
    "collocation_start": COLLOCATION_START,
    "function_word": FUNCTION_WORD,
    "object": OBJECT,
    "attribute": ATTRIBUTE,
    "relation": RELATION,
    "maskable": MASKABLE,
}

CONTENT_UPOS = ("ADJ", "ADV", "NOUN", "PROPN", "VERB")
FUNCTION_UPOS = tuple(tag for tag in UPOS if tag not in CONTENT_UPOS)


def upos_bits(tags: tuple[str, ...]) -> int:
    """The union of the bits of UPOS `tags` (upper case). Raises KeyError for a name that is not a UPOS tag."""
    bits = 0
    for tag in tags:
        bits |= UPOS_BIT[tag]
    return bits
