"""Questions about drawn scenes with their answers, yes/no questions balanced string by string."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from posmask.prep.scene_captions import NounPhrase, Phrase, Statement, text
from posmask.prep.scene_pairs import Claim, Pair, mirrored, relation_of
from posmask.prep.scene_world import NUMBERS, Scene, relations


@dataclass(frozen=True)
class Question:
    """A question as VQA v2 has it; `kind` is its question type, the answer's type follows from the answer."""

    text: str
    kind: str
    answer: str

    @property
    def answer_type(self) -> str:
        return "yes/no" if self.answer in ("yes", "no") else "number" if self.answer.isdigit() else "other"


def _open_questions(scene: Scene, i: int) -> Iterator[Question]:
    """Questions about group i with one right answer."""
    group = scene.groups[i]
    plural = group.count > 1
    noun = text(Phrase(group.noun).words(plural))
    be, kind = ("are", "what are the") if plural else ("is", "what is the")
    same = [other for other in scene.groups if other.noun == group.noun]
    number = sum(other.count for other in same)
    yield Question(f"How many {text(Phrase(group.noun).words(True))} are there?", "how many", str(number))
    if len(same) == 1:
        yield Question(f"What color {be} the {noun}?", f"what color {be} the", group.color)
        place = {"centre": "middle"}.get(scene.places[i], scene.places[i])
        yield Question(f"Where {be} the {noun}?", f"where {be} the", place)
        if group.verb:
            yield Question(f"What {be} the {noun} doing?", kind, group.verb)
    if len(scene.groups) == 2 and len(same) == 1:
        for word in relations(scene, 1 - i, i)[:1]:
            yield Question(f"What is {word} the {noun}?", "what is", scene.groups[1 - i].noun)


def _yes_no(scene: Scene, i: int, rng: random.Random) -> Iterator[Pair]:
    """Claims whose text is the question: the claim is the answer "yes", its foil the answer "no" to it."""
    group = scene.groups[i]
    plural, nouns = group.count > 1, text(Phrase(group.noun).words(True))
    start = f"Are the {nouns}" if plural else f"Is the {group.noun}"
    the = Statement(NounPhrase("the-plural" if plural else "the", Phrase(group.noun)))
    # "Is the ball red?" is only asked where there is one ball.
    number = NounPhrase("several", the.subject.phrase) if plural else NounPhrase("exactly", the.subject.phrase, 1)
    given = Statement(number)
    colored = Phrase(group.noun, group.color)
    asked = [
        (f"{start} {group.color}?", replace(the, traits=Phrase(color=group.color)), (given,)),
        (f"{start} {group.size}?", replace(the, traits=Phrase(size=group.size)), (given,)),
        (f"Is there a {text(colored.words())}?", Statement(NounPhrase("a", colored)), ()),
    ]
    if plural:
        counted = Statement(NounPhrase("exactly", Phrase(group.noun), group.count))
        asked.append((f"Are there {NUMBERS[group.count]} {nouns}?", counted, ()))
    if group.verb:
        asked.append((f"{start} {group.verb}?", replace(the, verb=group.verb), (given,)))
    related = relation_of(scene, i)
    if related:
        question = f"{start} {related.relation} {text(related.object.words())}?"
        asked.append((question, replace(related, subject=the.subject), (given,)))
    for question, statement, first in rng.sample(asked, len(asked)):
        yield Pair(Claim(question, (statement, *first)), Claim(question, first, (statement,)), "yes", "no")


YES_NO_TYPES = ("is there a", "are there", "is the", "are the")


def questions(scenes: list[Scene], rng: random.Random) -> Iterator[tuple[int, Question]]:
    """(scene index, question), two open ones a scene, and as many with "yes" as with "no" for each yes/no string."""
    for k, scene in enumerate(scenes):
        every = list(dict.fromkeys(q for i in range(len(scene.groups)) for q in _open_questions(scene, i)))
        for question in rng.sample(every, min(2, len(every))):
            yield k, question
    for k, pair in mirrored(scenes, _yes_no, len(scenes), rng):
        kind = next(kind for kind in YES_NO_TYPES if pair.claim.text.lower().startswith(kind))
        yield k, Question(pair.claim.text, kind, str(pair.word))
