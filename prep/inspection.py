"""What is in finished shards: a table for the terminal and a self-contained page of HTML.

    python prep/build_shards.py inspect data/scenes/train
"""

from __future__ import annotations

from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from posmask.prep import pos
from posmask.prep.shards import Manifest, read_json
from posmask.prep.wordpiece import CONTINUES

NUM_SAMPLES = 20  # pictures on the page
NUM_WORDS = 12  # most frequent ones of a part of speech
NUM_BARS = 12  # of a histogram of sizes
COLOUR_ORDER = (
    "NOUN", "ADP", "VERB", "DET", "ADJ", "PUNCT", "ADV", "AUX", "NUM",
    "CCONJ", "PRON", "PROPN", "PART", "SCONJ", "INTJ", "SYM", "X",
)  # fmt: skip
MAX_SAMPLES = 100_000  # looked at, spread over the shards: enough for every share to four digits


@dataclass
class Inspection:
    """Counts over the samples that were looked at."""

    folder: Path
    manifest: Manifest
    num_images: int = 0
    num_captions: int = 0
    num_pieces: int = 0
    upos_pieces: Counter[str] = field(default_factory=Counter)
    captions_with: Counter[str] = field(default_factory=Counter)
    words: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    caption_tokens: Counter[int] = field(default_factory=Counter)
    captions_per_image: Counter[int] = field(default_factory=Counter)
    short_sides: list[int] = field(default_factory=list)  # pixels
    long_sides: list[int] = field(default_factory=list)
    image_bytes: list[int] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


def inspect(folder: Path) -> Inspection:
    """Look at the samples of finished shards. Raises ValueError when there are none."""
    from streaming.base.format import reader_from_json

    found = Inspection(folder, Manifest.load(folder))
    vocabulary = read_vocabulary(folder)
    index = read_json(folder / "index.json")
    readers = [reader_from_json(str(folder), None, shard) for shard in index["shards"]]
    places = [(reader, i) for reader in readers for i in range(reader.samples)]
    places = [places[i] for i in evenly(len(places), MAX_SAMPLES)]
    shown = set(evenly(len(places), NUM_SAMPLES))
    for number, (reader, i) in enumerate(places):
        sample = reader[i]
        _add(found, sample, vocabulary)
        if number in shown:
            found.samples.append(sample)
    return found


def evenly(num: int, at_most: int) -> list[int]:
    """At most `at_most` of the numbers below `num`, evenly spread."""
    return [i * num // min(num, at_most) for i in range(min(num, at_most))]


def read_vocabulary(folder: Path) -> list[str]:
    return (folder / "tokenizer" / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")


def words_of(sample: dict[str, Any], vocabulary: Sequence[str]) -> Iterator[list[tuple[str, int]]]:
    """For each caption its words as (text, bits of the first piece)."""
    ends = np.cumsum(sample["caption_lengths"], dtype=np.int64)
    for start, end in zip(ends - sample["caption_lengths"], ends, strict=True):
        words: list[tuple[str, int]] = []
        inside = slice(start + 1, end - 1)
        for token, bits in zip(sample["tokens"][inside].tolist(), sample["tags"][inside].tolist(), strict=True):
            piece = vocabulary[token]
            if bits & pos.WORD_START or not words:
                words.append((piece, bits))
            else:
                words[-1] = (words[-1][0] + piece.removeprefix(CONTINUES), words[-1][1])
        yield words


def upos_of(bits: int) -> list[str]:
    return [tag for tag, bit in pos.UPOS_BIT.items() if bits & bit]


def _add(found: Inspection, sample: dict[str, Any], vocabulary: Sequence[str]) -> None:
    width, height = Image.open(BytesIO(sample["image"])).size
    found.num_images += 1
    found.short_sides.append(min(width, height))
    found.long_sides.append(max(width, height))
    found.image_bytes.append(len(sample["image"]))
    found.captions_per_image[len(sample["captions"])] += 1
    found.num_captions += len(sample["captions"])
    found.caption_tokens.update(sample["caption_lengths"].tolist())
    pieces = sample["tags"][sample["tags"] != 0]
    found.num_pieces += len(pieces)
    for tag, bit in pos.UPOS_BIT.items():
        found.upos_pieces[tag] += int(np.count_nonzero(pieces & np.uint32(bit)))
    for words in words_of(sample, vocabulary):
        there = set()
        for word, bits in words:
            for tag in upos_of(bits):
                there.add(tag)
                found.words[tag][word] += 1
        found.captions_with.update(there)


def rows_by_upos(found: Inspection) -> list[tuple[str, float, float, list[str]]]:
    """(UPOS, share of the pieces, share of the captions without it, most frequent words), the frequent ones first."""
    return [
        (
            tag,
            count / max(1, found.num_pieces),
            1 - found.captions_with[tag] / max(1, found.num_captions),
            [word for word, _ in found.words[tag].most_common(NUM_WORDS)],
        )
        for tag, count in sorted(found.upos_pieces.items(), key=lambda item: -item[1])
    ]


def facts(found: Inspection) -> dict[str, str]:
    """What is said in one line each."""
    manifest = found.manifest
    lengths = np.repeat(*np.array(sorted(found.caption_tokens.items())).T) - 2
    facts = {
        "images": f"{manifest.counts['images']:,}",
        "captions": f"{manifest.counts['captions']:,}, {found.num_captions / found.num_images:.2f} per image",
        "word pieces per caption": f"{lengths.mean():.1f} on average, {_range(lengths.tolist(), 'pieces')}",
        "short side of the images": _range(found.short_sides, "px"),
        "long side": _range(found.long_sides, "px"),
        "bytes of an image": _range(found.image_bytes, "bytes"),
        "dropped records": ", ".join(f"{n:,} {reason}" for reason, n in manifest.dropped.items()) or "none",
        "tokenizer": f"{manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} entries",
        "tagger": f"{manifest.tagger['name']} {manifest.tagger['version']}",
        "bits": " ".join(manifest.bits_computed),
        "scores": " ".join(manifest.scores) or "none",
        "licence": ", ".join(source["licence"] for source in manifest.sources),
        "command": "; ".join(source["command"] for source in manifest.sources),
    }
    if found.num_images < manifest.counts["images"]:
        facts["looked at"] = f"{found.num_images:,} images, evenly spread"
    return facts


def _range(values: Sequence[int], unit: str) -> str:
    return f"{min(values):,} to {max(values):,} {unit}, {np.median(values):,.0f} median"


def tables(found: Inspection) -> list[Table]:
    """For the terminal."""
    about = Table("", "", show_header=False, title=str(found.folder))
    for name, value in facts(found).items():
        about.add_row(name, value)
    by_upos = Table("UPOS", "pieces", "captions without", "most frequent words")
    for tag, share, without, words in rows_by_upos(found):
        by_upos.add_row(tag, f"{share:.1%}", f"{without:.1%}", " ".join(words))
    return [about, by_upos]


def page(found: Inspection) -> str:
    """A page of HTML that needs no other file."""
    rows = "".join(
        f"<tr><td>{_mark(tag, tag)}<td class=n>{share:.1%}<td class=bars>{_bar(share, _hue(tag))}"
        f"<td class=n>{without:.1%}<td>{escape(' '.join(words))}"
        for tag, share, without, words in rows_by_upos(found)
    )
    about = "".join(f"<tr><th>{escape(name)}<td>{escape(value)}" for name, value in facts(found).items())
    vocabulary = read_vocabulary(found.folder)
    lengths = {number - 2: count for number, count in found.caption_tokens.items()}
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(found.folder.name)}</title><style>{STYLE}</style>
<h1>{escape(str(found.folder))}</h1><table class=about>{about}</table>
<h2>Parts of speech</h2>
<table><tr><th>UPOS<th>pieces<th><th>captions without<th>most frequent words{rows}</table>
<div class=plots>
{_histogram("Word pieces per caption", lengths)}
{_histogram("Captions per image", found.captions_per_image)}
{_histogram("Short side of the images, px", _binned(found.short_sides))}
{_histogram("Long side of the images, px", _binned(found.long_sides))}
</div>
<h2>Samples</h2><p>Colour: part of speech. Underlined together: one phrase. Hover over a word for its bits.
<div class=samples>{"".join(_sample(sample, vocabulary) for sample in found.samples)}</div>
</html>
"""


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222 }
h1 { font-size: 1.4em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top }
.about th { font-weight: 600; white-space: nowrap } .n { text-align: right; font-variant-numeric: tabular-nums }
.bars { width: 200px } .bar { height: .8em; margin-top: .35em; border-radius: 2px }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 1.5em; margin-top: 2em }
.plot svg { width: 100%; height: 150px } .plot text { fill: #555; font-size: 11px }
.plot h3 { font-size: 1em; margin: 0 }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 1.2em }
figure { margin: 0 } img { width: 100%; image-rendering: auto; border-radius: 4px }
figcaption p { margin: .3em 0 } .phrase { border-bottom: 2px solid #888; padding-bottom: 1px }
.word { border-radius: 3px; padding: 0 .15em } .key { color: #777; font-size: .8em; overflow-wrap: anywhere }
"""


def _hue(tag: str) -> int:
    """A colour for each part of speech, those of frequent ones far apart."""
    return COLOUR_ORDER.index(tag) * 7 * 360 // len(COLOUR_ORDER) % 360


def _mark(text: str, tag: str, title: str = "") -> str:
    return f'<span class=word style="background:hsl({_hue(tag)} 70% 86%)" title="{escape(title)}">{escape(text)}</span>'


def _bar(share: float, hue: int) -> str:
    return f'<div class=bar style="width:{share:.2%};background:hsl({hue} 55% 60%)"></div>'


def _binned(values: Sequence[int]) -> dict[int, int]:
    """How many values from each of NUM_BARS equal steps on, by the first value of the step."""
    low, high = min(values), max(values)
    step = max(1, -(-(high - low + 1) // NUM_BARS))
    bins = Counter((value - low) // step * step + low for value in values)
    return {start: bins[start] for start in range(low, high + 1, step)}


def _histogram(title: str, counts: dict[int, int]) -> str:
    """A bar for each key, in SVG."""
    keys, top = sorted(counts), max(counts.values())
    width = 460 / max(1, len(keys))
    every = -(-len(keys) // 12)  # so many labels fit side by side
    bars = []
    for i, key in enumerate(keys):
        height = 105 * counts[key] / top
        x = i * width
        label = f'<text x="{x + width / 2:.1f}" y="132" text-anchor="middle">{key}</text>' if i % every == 0 else ""
        bars.append(
            f'<rect x="{x + 0.5:.1f}" y="{115 - height:.1f}" width="{max(1.0, width - 1):.1f}" height="{height:.1f}">'
            f"<title>{key}: {counts[key]:,}</title></rect>{label}"
        )
    return (
        f'<div class=plot><h3>{escape(title)}</h3><svg viewBox="0 0 460 140" fill="#5b8cc4">'
        f'{"".join(bars)}</svg></div>'
    )


def _sample(sample: dict[str, Any], vocabulary: Sequence[str]) -> str:
    captions = "".join(f"<p>{_caption(words)}" for words in words_of(sample, vocabulary))
    image = b64encode(sample["image"]).decode()
    return (
        f'<figure><img alt="" src="data:image/jpeg;base64,{image}"><figcaption>{captions}'
        f"<p class=key>{escape(sample['key'])}</figcaption></figure>"
    )


def _caption(words: Sequence[tuple[str, int]]) -> str:
    phrases: list[list[str]] = []
    for word, bits in words:
        tags = upos_of(bits)
        names = tags + [name for name, bit in pos.BITS.items() if name != "upos" and bits & bit]
        marked = _mark(word, tags[0], " ".join(names)) if tags else escape(word)
        if bits & pos.PHRASE_START or not phrases:
            phrases.append([])
        phrases[-1].append(marked)
    return " ".join(f"<span class=phrase>{' '.join(p)}</span>" if len(p) > 1 else p[0] for p in phrases)
