"""What inspect says agrees with the shards, and its page needs nothing else."""

import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from posmask.prep import inspection, pos
from posmask.prep.build_shards import main

CAPTIONS = ["A red cat sleeps.", "The dog & the <script>alert(1)</script> bird", "Two dogs run quickly."]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """30 pictures of 3 captions; names and captions that would break a careless page."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "pictures").mkdir()
    for i in range(30):
        buffer = io.BytesIO()
        Image.new("RGB", (40 + i, 32), (i * 8, 90, 120)).save(buffer, "JPEG")
        (folder / "pictures" / f"<b>{i}.jpg").write_bytes(buffer.getvalue())
        (folder / "pictures" / f"<b>{i}.txt").write_text("\n".join(CAPTIONS))
    command = ["folder", "--images", str(folder / "pictures"), "--out", str(folder / "out"), "--workers", "1"]
    assert main([*command, "--records-per-part", "8", "--tokenizer", "train:300"]) == 0
    return folder / "out"


def test_the_numbers_are_those_of_the_shards(built):
    found = inspection.inspect(built)
    counts = found.manifest.counts
    assert (found.num_images, found.num_captions) == (counts["images"], counts["captions"]) == (30, 90)
    assert dict(found.upos_pieces) == counts["per_upos"]
    assert found.num_pieces == counts["tokens"] - 2 * counts["captions"]
    rows = {tag: (share, without, words) for tag, share, without, words in inspection.rows_by_upos(found)}
    assert rows["NUM"][1:] == (pytest.approx(2 / 3), ["two"])
    assert rows["ADV"][2] == ["quickly"]
    assert {"cat", "dog", "dogs", "bird"} <= set(rows["NOUN"][2])
    assert sum(share for share, _, _ in rows.values()) == pytest.approx(1, abs=0.02)
    facts = inspection.facts(found)
    assert facts["long side"] == "40 to 69 px, 54 median"
    assert facts["captions"] == "90, 3.00 per image"
    assert len(found.samples) == inspection.NUM_SAMPLES


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_harmless(built, capsys):
    assert main(["inspect", str(built)]) == 0
    printed = capsys.readouterr().out
    assert "captions without" in printed
    assert "inspect.html: plots and samples" in printed
    page = Page((built / "inspect.html").read_text())
    assert page.tags.count("img") == len(page.links) == inspection.NUM_SAMPLES
    assert all(re.fullmatch(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", link) for link in page.links)
    assert page.tags.count("svg") == 4
    assert not {"script", "link", "iframe", "b"} & set(page.tags)
    assert any("<b>0.jpg" in text for text in page.text)
    # 20 samples of 3 captions, one coloured word each for 4 + 14 + 4 … words, and one for each row of the table.
    words = sum(len(list(words)) for sample in inspection.inspect(built).samples for words in
                inspection.words_of(sample, inspection.read_vocabulary(built)))  # fmt: skip
    classes = (built / "inspect.html").read_text().count("<span class=word ")
    assert classes == words + pos.NUM_UPOS


def test_another_page_and_an_unfinished_build(built, tmp_path, capsys):
    assert main(["inspect", str(built), "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file()
    assert main(["inspect", str(tmp_path)]) == 2
    assert "holds no posmask shards" in capsys.readouterr().err


def test_evenly():
    assert inspection.evenly(3, 5) == [0, 1, 2]
    assert inspection.evenly(10, 5) == [0, 2, 4, 6, 8]
    assert inspection.evenly(0, 5) == []


def test_every_part_of_speech_has_its_colour():
    assert len({inspection._hue(tag) for tag in pos.UPOS}) == pos.NUM_UPOS
