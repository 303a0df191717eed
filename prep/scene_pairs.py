"""Pairs of a true string and a false one about drawn scenes, each pair mirrored on another scene.

Where one scene has caption c and foil f, another has caption f and foil c. So each string is as often right as wrong,
and a scorer that does not look at the picture gets exactly half of the pairs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from posmask.prep.scene_captions import NounPhrase, Phrase, Statement, is_true, text, words
from posmask.prep.scene_world import COLORS, MAX_COUNT, NOUNS, NUMBERS, SIZES, VERBS, Group, Scene, relations

PREPOSITIONS = ("above", "below", "beside", "behind", "between", "among", "around")


@dataclass(frozen=True)
class Claim:
    """A string and what makes it true: all of `said` hold, none of `denied` does."""

    text: str
    said: tuple[Statement, ...]
    denied: tuple[Statement, ...] = ()

    def holds(self, scene: Scene) -> bool:
        return all(is_true(scene, s) for s in self.said) and not any(is_true(scene, s) for s in self.denied)

    @cached_property
    def nouns(self) -> frozenset[str]:
        """Nouns without which it cannot be true; only to search faster."""
        phrases = [p for s in self.said for p in (s.subject, s.also, s.object) if p]
        return frozenset(p.phrase.noun for p in phrases if p.quantifier != "no" and p.number != 0)


@dataclass(frozen=True)
class Pair:
    """A claim and its foil, with the words (or numbers) that differ."""

    claim: Claim
    foil: Claim
    word: str | int
    foil_word: str | int


def claim(statement: Statement, form: str = "plain") -> Claim:
    return Claim(text(words(statement, form)), (statement,))


def _one(group: Group, **said: str | None) -> NounPhrase:
    """ "a red ball" or "some red balls", whichever the group's count asks for."""
    return NounPhrase("a" if group.count == 1 else "some", Phrase(group.noun, **said))


def _others(values: tuple, value, rng: random.Random) -> list:
    rest = [other for other in values if other != value]
    return rng.sample(rest, len(rest))


# ---- proposals: the pairs that scene's group i suggests, any of which may turn out unusable

Proposal = Callable[[Scene, int, random.Random], Iterator[Pair]]


def _existence(scene: Scene, i: int, rng: random.Random) -> Iterator[Pair]:
    phrase = Phrase(scene.groups[i].noun, scene.groups[i].color)
    there, absent = (claim(Statement(NounPhrase(quantifier, phrase)), "there") for quantifier in ("a", "no"))
    yield Pair(there, absent, 1, 0)


def _plurals(scene: Scene, i: int, rng: random.Random) -> Iterator[Pair]:
    phrase = Phrase(scene.groups[i].noun, scene.groups[i].color)
    one = claim(Statement(NounPhrase("exactly", phrase, 1)), "there")
    more = claim(Statement(NounPhrase("several", phrase)), "there")
    yield Pair(one, more, text(phrase.words()), text(phrase.words(plural=True)))


def _counting(allowed: Callable[[int, int], bool]) -> Proposal:
    def propose(scene: Scene, i: int, rng: random.Random) -> Iterator[Pair]:
        phrase = Phrase(scene.groups[i].noun)
        n = sum(group.count for group in scene.groups if group.noun == phrase.noun)
        for m in _others(tuple(range(MAX_COUNT + 1)), n, rng):
            if n < len(NUMBERS) and allowed(n, m):
                right, wrong = (claim(Statement(NounPhrase("exactly", phrase, k)), "there") for k in (n, m))
                yield Pair(right, wrong, n, m)

    return propose


def relation_of(scene: Scene, i: int) -> Statement | None:
    """ "Some balls are above a star" of group i, if there is a word for how it stands to another noun's group."""
    if len(scene.groups) == 1 or not relations(scene, i, 1 - i):
        return None
    a, b = scene.groups[i], scene.groups[1 - i]
    if a.noun == b.noun:
        return None
    return Statement(_one(a), relation=relations(scene, i, 1 - i)[0], object=_one(b))


def _relations(scene: Scene, i: int, rng: random.Random) -> Iterator[Pair]:
    right = relation_of(scene, i)
    for other in _others(PREPOSITIONS, right.relation, rng) if right else ():
        yield Pair(claim(right), claim(replace(right, relation=other)), right.relation, other)


def _swapped(scene: Scene, i: int, rng: random.Random) -> Iterator[Pair]:
    right = relation_of(scene, i)
    if right:
        wrong = replace(right, subject=right.object, object=right.subject)
        yield Pair(claim(right), claim(wrong), right.subject.phrase.noun, right.object.phrase.noun)


def _action(scene: Scene, i: int, rng: random.Random) -> Iterator[Pair]:
    group = scene.groups[i]
    for verb in _others(VERBS, group.verb, rng) if group.verb else ():
        right = Statement(_one(group), verb=group.verb)
        yield Pair(claim(right), claim(replace(right, verb=verb)), group.verb, verb)


def _noun(scene: Scene, i: int, rng: random.Random) -> Iterator[Pair]:
    group = scene.groups[i]
    for noun in _others(NOUNS, group.noun, rng):
        right = Statement(_one(group, color=group.color), verb=group.verb if rng.random() < 0.3 else None)
        phrase = replace(right.subject.phrase, noun=noun)
        wrong = replace(right, subject=replace(right.subject, phrase=phrase))
        plural = right.subject.plural
        yield Pair(claim(right), claim(wrong), *(p.words(plural)[-1][0] for p in (right.subject.phrase, phrase)))


def _adjective(scene: Scene, i: int, rng: random.Random) -> Iterator[Pair]:
    group = scene.groups[i]
    field, values = rng.choice((("color", COLORS), ("color", COLORS), ("size", SIZES)))
    word = getattr(group, field)
    for other in _others(values, word, rng):
        right, wrong = (Statement(_one(group, **{field: value})) for value in (word, other))
        yield Pair(claim(right), claim(wrong), word, other)


def _swapped_nouns(scene: Scene, i: int, rng: random.Random) -> Iterator[Pair]:
    if len(scene.groups) == 2:
        a, b = scene.groups[i], scene.groups[1 - i]
        c, d = replace(a, noun=b.noun), replace(b, noun=a.noun)
        right = Statement(_one(a, color=a.color), also=_one(b, color=b.color))
        wrong = Statement(_one(c, color=a.color), also=_one(d, color=b.color))
        yield Pair(claim(right), claim(wrong), a.noun, b.noun)


def _swapped_adjectives(scene: Scene, i: int, rng: random.Random) -> Iterator[Pair]:
    if len(scene.groups) == 2:
        a, b = scene.groups[i], scene.groups[1 - i]
        for field in rng.sample(("color", "size"), 2):
            one, other = getattr(a, field), getattr(b, field)
            right = Statement(_one(a, **{field: one}), also=_one(b, **{field: other}))
            wrong = Statement(_one(a, **{field: other}), also=_one(b, **{field: one}))
            yield Pair(claim(right), claim(wrong), one, other)


# An added object or attribute can only be balanced where it does not merely narrow the claim: "only" and exact numbers.


def _added_noun(scene: Scene, i: int, rng: random.Random) -> Iterator[Pair]:
    group = scene.groups[i]
    only = NounPhrase("only-a" if group.count == 1 else "only-plural", Phrase(group.noun))
    others = [scene.groups[1 - i]] if len(scene.groups) == 2 else [replace(group, noun=n) for n in NOUNS]
    for other in rng.sample(others, len(others)):
        alone, joined = (claim(Statement(only, also=also), "there") for also in (None, _one(other)))
        pair = (alone, joined) if len(scene.groups) == 1 else (joined, alone)
        yield Pair(*pair, group.noun, other.noun)


def _added_adjective(scene: Scene, i: int, rng: random.Random) -> Iterator[Pair]:
    group = scene.groups[i]
    for field in rng.sample(("color", "size"), 2):
        word = getattr(group, field)
        plain, narrow = (
            claim(Statement(NounPhrase("exactly", Phrase(group.noun, **said), group.count)), "there")
            for said in ({}, {field: word})
        )
        yield Pair(narrow, plain, word, group.noun)


def _dialogue(description: Statement, question: str, answer: Statement, yes: bool) -> Claim:
    said = text([*words(description), *[(f"{question}?", "X"), ("Yes" if yes else "No", "X"), (".", "PUNCT")]])
    return Claim(said, (description, answer), ()) if yes else Claim(said, (description,), (answer,))


def _coreference(scene: Scene, i: int, rng: random.Random) -> Iterator[Pair]:
    """ "Exactly one ball. Is it red? Yes." """
    group = scene.groups[i]
    about = Phrase(group.noun)
    description = Statement(NounPhrase("exactly", about, group.count))
    pronoun = "Is it" if group.count == 1 else "Are they"
    yes = rng.random() < 0.5
    for color in [group.color] if yes else _others(COLORS, group.color, rng):
        answer = Statement(NounPhrase("exactly", replace(about, color=color), group.count))
        right, wrong = (_dialogue(description, f"{pronoun} {color}", answer, said) for said in (yes, not yes))
        yield Pair(right, wrong, *(("yes", "no") if yes else ("no", "yes")))


def _coreference_hard(scene: Scene, i: int, rng: random.Random) -> Iterator[Pair]:
    """ "A ball is above a star. Is the ball big? Yes.": two things are mentioned, the question is about one."""
    description = relation_of(scene, i)
    if description:
        group, size = scene.groups[i], rng.choice(SIZES)
        answer = replace(description, traits=Phrase(size=size))
        question = f"{'Is it' if group.count == 1 else 'Are they'} {size}"
        yes = group.size == size
        right, wrong = (_dialogue(description, question, answer, said) for said in (yes, not yes))
        yield Pair(right, wrong, *(("yes", "no") if yes else ("no", "yes")))


VALSE: dict[str, tuple[str, Proposal]] = {
    "existence": ("existence", _existence),
    "plurals": ("plurals", _plurals),
    "counting-hard": ("counting", _counting(lambda n, m: abs(n - m) == 1)),
    "counting-small-quant": ("counting", _counting(lambda n, m: max(n, m) <= 3)),
    "counting-adversarial": ("counting", _counting(lambda n, m: (n >= 4) != (m >= 4))),
    "relations": ("relations", _relations),
    "action-replacement": ("actions", _action),
    "actant-swap": ("actions", _swapped),
    "coreference-standard": ("coreference", _coreference),
    "coreference-hard": ("coreference", _coreference_hard),
    "foil-it": ("noun phrases", _noun),
}
SUGARCREPE: dict[str, Proposal] = {
    "replace_obj": _noun,
    "replace_att": _adjective,
    "replace_rel": _relations,
    "swap_obj": _swapped_nouns,
    "swap_att": _swapped_adjectives,
    "add_obj": _added_noun,
    "add_att": _added_adjective,
}


def mirrored(scenes: list[Scene], propose: Proposal, num_pairs: int, rng: random.Random) -> Iterator[tuple[int, Pair]]:
    """(scene index, pair): each pair is followed by its mirror image on another scene. At most `num_pairs` of both.

    Each scene starts at most one pair, so that the scenes are used evenly.
    """
    by_noun = {noun: {k for k, s in enumerate(scenes) if noun in {g.noun for g in s.groups}} for noun in NOUNS}
    found = 0
    for k in rng.sample(range(len(scenes)), len(scenes)):
        match = next(_mirrors(scenes, k, propose, by_noun, rng), None)
        if match:
            pair, other = match
            yield k, pair
            yield other, Pair(pair.foil, pair.claim, pair.foil_word, pair.word)
            found += 1
            if found == num_pairs:
                return


def _mirrors(
    scenes: list[Scene], k: int, propose: Proposal, by_noun: dict[str, set[int]], rng: random.Random
) -> Iterator[tuple[Pair, int]]:
    for pair in propose(scenes[k], rng.randrange(len(scenes[k].groups)), rng):
        if not pair.claim.holds(scenes[k]) or pair.foil.holds(scenes[k]):
            continue
        candidates = sorted(set.intersection(set(range(len(scenes))), *(by_noun[noun] for noun in pair.foil.nouns)))
        for other in rng.sample(candidates, len(candidates)):
            if other != k and pair.foil.holds(scenes[other]) and not pair.claim.holds(scenes[other]):
                yield pair, other
