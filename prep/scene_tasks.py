"""Held-out scenes as evaluation sets in public file formats: VALSE, FOIL, SugarCrepe, VQA v2, COCO captions."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

from posmask.prep.scene_captions import captions, text
from posmask.prep.scene_drawing import draw, encode
from posmask.prep.scene_pairs import SUGARCREPE, VALSE, mirrored
from posmask.prep.scene_questions import questions
from posmask.prep.scene_world import LAYOUTS, Scene, sample_group
from posmask.prep.scenes import belongs, scene_at

MAX_PAIRS = 60  # mirrored pairs of one VALSE or SugarCrepe file: twice as many items
SAME_NOUN_SHARE = 0.2  # of twins: "exactly one red ball" says more than "one ball" only where there are other balls
FOIL_FILE = "foilv1.0_test_2017.json"


def _twin(scene: Scene, seed: int, index: int) -> Scene:
    """A held-out scene of the same nouns and counts in which colours, order and layout may have changed places.

    Without it two scenes that differ in one relation or swap would hardly ever meet among a few hundred.
    """
    rng = random.Random(f"twin/{seed}/{index}")
    while True:
        groups = [replace(sample_group(rng), noun=g.noun, count=g.count, color=g.color) for g in scene.groups]
        layout = scene.layout
        if len(groups) == 2:
            a, b = scene.groups
            if rng.random() < 0.5:
                groups = [replace(groups[0], color=b.color), replace(groups[1], color=a.color)]
            if a.size != b.size:
                groups = [replace(groups[0], size=b.size), replace(groups[1], size=a.size)]
            groups = groups[::-1] if rng.random() < 0.5 else groups
            if rng.random() < SAME_NOUN_SHARE:
                groups[1] = replace(groups[1], noun=groups[0].noun)
            layout = rng.choice(LAYOUTS)
        twin = Scene(tuple(groups), layout)
        distinct = len({(group.noun, group.color) for group in groups}) == len(groups)
        if distinct and twin != scene and belongs(twin, "eval"):
            return twin


def held_out(num_scenes: int, seed: int) -> list[Scene]:
    """`num_scenes` scenes of the split "eval", every second one a twin of the one before it."""
    scenes = [scene_at("eval", seed, k // 2) for k in range(num_scenes)]
    return [_twin(scene, seed, k) if k % 2 else scene for k, scene in enumerate(scenes)]


def file_name(index: int) -> str:
    return f"{index + 1:012d}.jpg"


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def valse_items(scenes: list[Scene], piece: str, rng: random.Random) -> dict[str, dict]:
    phenomenon, propose = VALSE[piece]
    items = {}
    for number, (k, pair) in enumerate(mirrored(scenes, propose, MAX_PAIRS, rng)):
        items[f"{piece}_{number}"] = {
            "dataset": "scenes",
            "original_split": "eval",
            "dataset_idx": number,
            "linguistic_phenomena": phenomenon,
            "image_file": file_name(k),
            "caption": pair.claim.text,
            "foil": pair.foil.text,
            "classes": pair.word,
            "classes_foil": pair.foil_word,
            "mturk": {"foil": 0, "caption": 3, "other": 0},  # the scene itself is the annotator
        }
    return items


def foil_annotations(scenes: list[Scene], rng: random.Random) -> list[dict]:
    """A correct and a foiled annotation for each item, with the caption's id in common."""
    annotations = []
    for number, (k, pair) in enumerate(mirrored(scenes, SUGARCREPE["replace_obj"], 2 * MAX_PAIRS, rng)):
        common = {"id": number + 1, "image_id": k + 1}
        right = {"caption": pair.claim.text, "foil_id": 0, "foil": False, "target_word": "ORIG", "foil_word": "ORIG"}
        wrong = {"caption": pair.foil.text, "foil_id": number + 1, "foil": True}
        annotations += [
            {**common, **right},
            {**common, **wrong, "target_word": pair.word, "foil_word": pair.foil_word},
        ]
    return annotations


def _write_vqa(out: Path, scenes: list[Scene], rng: random.Random) -> None:
    asked, annotations, per_image = [], [], [0] * len(scenes)
    for k, question in questions(scenes, rng):
        question_id = 1000 * (k + 1) + per_image[k]
        per_image[k] += 1
        asked.append({"image_id": k + 1, "question": question.text, "question_id": question_id})
        annotations.append({
            "question_type": question.kind,
            "multiple_choice_answer": question.answer,
            "answers": [
                {"answer": question.answer, "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)
            ],
            "image_id": k + 1,
            "answer_type": question.answer_type,
            "question_id": question_id,
        })  # fmt: skip
    head = {"info": {}, "data_type": "mscoco", "data_subtype": "val2017", "license": {}}
    _write(out / "v2_OpenEnded_questions.json", {**head, "task_type": "Open-Ended", "questions": asked})
    _write(out / "v2_annotations.json", {**head, "annotations": annotations})


def _write_images_and_captions(out: Path, scenes: list[Scene], seed: int) -> None:
    folder = out / "val2017"
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for k, scene in enumerate(scenes):
        picture = draw(scene, random.Random(f"eval-picture/{seed}/{k}"))
        (folder / file_name(k)).write_bytes(encode(picture))
        width, height = picture.size
        images.append({"id": k + 1, "file_name": file_name(k), "width": width, "height": height, "license": 1})
        strings: dict[str, None] = {}
        for caption in captions(scene, random.Random(f"eval-captions/{seed}/{k}")):
            strings[text(caption)] = None
            if len(strings) == 5:
                break
        annotations += [
            {"id": 5 * k + n + 1, "image_id": k + 1, "caption": caption} for n, caption in enumerate(strings)
        ]
    licence = {"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}
    content = {"info": {"description": "drawn scenes"}, "licenses": [licence], "images": images}
    _write(out / "captions_val2017.json", {**content, "annotations": annotations})


def write_eval_sets(out: Path, num_scenes: int, seed: int) -> None:
    """Draw `num_scenes` held-out scenes into `out`/val2017 and write every evaluation set beside them.

    The files are `captions_val2017.json`, `v2_OpenEnded_questions.json`, `v2_annotations.json`, `valse/PIECE.json`,
    `sugarcrepe/CATEGORY.json` and `foil/foilv1.0_test_2017.json`. Same arguments, same bytes. Raises ValueError for
    fewer than 50 scenes, among which mirrored pairs are not found.
    """
    if num_scenes < 50:
        raise ValueError(f"{num_scenes} evaluation scenes asked for: give at least 50, so that pairs can be mirrored")
    out = Path(out)
    scenes = held_out(num_scenes, seed)
    _write_images_and_captions(out, scenes, seed)
    for piece in VALSE:
        _write(out / "valse" / f"{piece}.json", valse_items(scenes, piece, random.Random(f"{piece}/{seed}")))
    for category, propose in SUGARCREPE.items():
        found = mirrored(scenes, propose, MAX_PAIRS, random.Random(f"{category}/{seed}"))
        items = {
            str(n): {"filename": file_name(k), "caption": pair.claim.text, "negative_caption": pair.foil.text}
            for n, (k, pair) in enumerate(found)
        }
        _write(out / "sugarcrepe" / f"{category}.json", items)
    foil = {"images": [{"id": k + 1, "file_name": file_name(k)} for k in range(num_scenes)]}
    foil["annotations"] = foil_annotations(scenes, random.Random(f"foil/{seed}"))
    _write(out / "foil" / FOIL_FILE, foil)
    _write_vqa(out, scenes, random.Random(f"vqa/{seed}"))
