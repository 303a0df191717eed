"""What can be said about a scene: statements, whether they are true, and how they read with the UPOS of each word.

One truth function serves captions, foils and answers, so that "everything said is true" and "every foil is false" mean
the same thing. Wording is chosen where spaCy's small English model agrees with the grammar: "is spinning" rather than
"spins", "striped red" rather than "red striped".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from posmask.prep.scene_world import (
    COLORS,
    NOUNS,
    NUMBERS,
    PLURALS,
    VERBS,
    Group,
    Scene,
    relations,
)

Word = tuple[str, str]  # as written, and its UPOS


@dataclass(frozen=True)
class Phrase:
    """A noun with what is said about it, or with `noun` None only that. What is None is not said."""

    noun: str | None = None
    color: str | None = None
    texture: str | None = None
    size: str | None = None
    side: str | None = None  # "left" or "right", of two groups in a row

    def fits(self, scene: Scene, i: int) -> bool:
        group = scene.groups[i]
        said = (self.noun, self.color, self.texture, self.size, self.side)
        side = scene.places[i] if scene.layout == "row" else None
        facts = (group.noun, group.color, group.texture, group.size, side)
        return all(word is None or word == fact for word, fact in zip(said, facts, strict=True))

    def words(self, plural: bool = False) -> list[Word]:
        adjectives = (self.side, self.size, self.texture, self.color)
        said = [(word, "ADJ") for word in adjectives if word]
        return [*said, (PLURALS[self.noun] if plural else self.noun, "NOUN")] if self.noun else said


@dataclass(frozen=True)
class NounPhrase:
    """A phrase under a quantifier, one of QUANTIFIERS; `number` is for "number" and "exactly" only."""

    quantifier: str
    phrase: Phrase
    number: int | None = None

    @property
    def plural(self) -> bool:
        return self.quantifier in PLURAL or (self.number is not None and self.number != 1)

    def words(self) -> list[Word]:
        before = [(NUMBERS[self.number], "NUM") if word == "#" else (word, tag) for word, tag in WORDS[self.quantifier]]
        return before + self.phrase.words(self.plural)


# Of `num` objects that the phrase fits, the predicate holds for `hits`; the picture has `total` objects.
QUANTIFIERS: dict[str, Callable[[int, int, int, int | None], bool]] = {
    "a": lambda num, hits, total, number: hits >= 1,
    "the": lambda num, hits, total, number: num == hits == 1,
    "no": lambda num, hits, total, number: hits == 0,
    "every": lambda num, hits, total, number: num == hits >= 2,
    "each": lambda num, hits, total, number: num == hits >= 2,
    "number": lambda num, hits, total, number: hits == number,
    "exactly": lambda num, hits, total, number: hits == number,
    "some": lambda num, hits, total, number: hits >= 2,
    "several": lambda num, hits, total, number: hits >= 2,
    "the-plural": lambda num, hits, total, number: num == hits >= 2,
    "all": lambda num, hits, total, number: num == hits >= 2,
    "both": lambda num, hits, total, number: num == hits == 2,
    "only-a": lambda num, hits, total, number: num == hits == total == 1,
    "only-plural": lambda num, hits, total, number: num == hits == total >= 2,
}
PLURAL = {"some", "several", "the-plural", "all", "both", "only-plural"}
WORDS: dict[str, tuple[Word, ...]] = {
    "a": (("a", "DET"),),
    "the": (("the", "DET"),),
    "no": (("no", "DET"),),
    "every": (("every", "DET"),),
    "each": (("each", "DET"),),
    "number": (("#", "NUM"),),
    "exactly": (("exactly", "ADV"), ("#", "NUM")),
    "some": (("some", "DET"),),
    "several": (("several", "ADJ"),),
    "the-plural": (("the", "DET"),),
    "all": (("all", "DET"), ("the", "DET")),
    "both": (("both", "DET"),),
    "only-a": (("only", "ADV"), ("a", "DET")),
    "only-plural": (("only", "ADV"),),
}


@dataclass(frozen=True)
class Statement:
    """`subject` exists and has every property that is not None: traits, an action, a relation to `object`.

    `also` is a second subject ("a ball and two stars"), allowed where no property is given.
    """

    subject: NounPhrase
    also: NounPhrase | None = None
    traits: Phrase | None = None
    verb: str | None = None
    manner: str | None = None
    relation: str | None = None
    object: NounPhrase | None = None

    @property
    def bare(self) -> bool:
        return self.traits is None and self.verb is None and self.relation is None


def _count(scene: Scene, fits: Callable[[int], bool]) -> int:
    return sum(group.count for i, group in enumerate(scene.groups) if fits(i))


def _is_object(scene: Scene, i: int, phrase: NounPhrase) -> bool:
    """Whether group i is what `phrase` speaks of after a preposition: its own count matters, not that of the scene."""
    if not phrase.phrase.fits(scene, i):
        return False
    num = _count(scene, lambda j: phrase.phrase.fits(scene, j))
    return QUANTIFIERS[phrase.quantifier](num, scene.groups[i].count, scene.num_objects, phrase.number)


def _holds(scene: Scene, i: int, statement: Statement) -> bool:
    """Whether every property of `statement` holds for group i."""
    group = scene.groups[i]
    if statement.traits is not None and not statement.traits.fits(scene, i):
        return False
    if statement.verb is not None and statement.verb != group.verb:
        return False
    if statement.manner is not None and statement.manner != group.manner:
        return False
    if statement.relation is None:
        return True
    others = [j for j in range(len(scene.groups)) if j != i and _is_object(scene, j, statement.object)]
    return any(statement.relation in relations(scene, i, j) for j in others)


def is_true(scene: Scene, statement: Statement) -> bool:
    """Whether `statement` is true of `scene`. Numbers are exact: "two balls" is false of three balls."""
    assert statement.also is None or statement.bare, statement
    subjects = [statement.subject] + ([statement.also] if statement.also else [])
    # "only" speaks of all objects that are not named by the other subject.
    total = scene.num_objects
    for subject in subjects:
        num = _count(scene, lambda i, p=subject.phrase: p.fits(scene, i))
        hits = _count(scene, lambda i, p=subject.phrase: p.fits(scene, i) and _holds(scene, i, statement))
        if statement.also and subject.quantifier.startswith("only"):
            rest = statement.also.phrase
            total = _count(scene, lambda i, p=subject.phrase, r=rest: p.fits(scene, i) or not r.fits(scene, i))
        if not QUANTIFIERS[subject.quantifier](num, hits, total, subject.number):
            return False
    return True


def words(statement: Statement, form: str = "plain") -> list[Word]:
    """`statement` as words with their UPOS, full stop included.

    `form`: "plain" (a noun phrase, or a sentence where it has a property), "phrase" (no "is" before a relation), "here"
    (Here is ...), "there" (There is ...), "that" (Here is ... that is burning) or "is-here" (... is here).
    """
    subject = statement.subject.words()
    be = ("are" if statement.subject.plural else "is", "AUX")
    if statement.also:
        subject += [("and", "CCONJ"), *statement.also.words()]
    properties: list[Word] = []
    if statement.traits:
        traits = statement.traits.words()
        properties += traits[:1] if len(traits) == 1 else [traits[0], ("and", "CCONJ"), *traits[1:]]
    if statement.verb:
        properties += [(statement.verb, "VERB")] + ([(statement.manner, "ADV")] if statement.manner else [])
    if statement.relation:
        properties += [(statement.relation, "ADP"), *statement.object.words()]
    if form == "there":
        sentence = [("there", "PRON"), (be[0], "VERB"), *subject, *properties]
    elif form == "here":
        sentence = [("here", "ADV"), be, *subject, *properties]
    elif form == "that":
        sentence = [("here", "ADV"), be, *subject, ("that", "PRON"), be, *properties]
    elif form == "is-here":
        sentence = [*subject, be, ("here", "ADV")]
    elif form == "phrase" or statement.bare:
        sentence = subject + properties
    else:
        sentence = [*subject, be, *properties]
    return [(sentence[0][0].capitalize(), sentence[0][1]), *sentence[1:], (".", "PUNCT")]


def text(sentence: list[Word]) -> str:
    """The words as one string, punctuation attached."""
    return "".join(word if tag == "PUNCT" else " " + word for word, tag in sentence).strip()


# ---- saying something true of a scene


def phrase_of(group: Group, rng: random.Random, color: float = 0.6, size: float = 0.3, texture: float = 0.5) -> Phrase:
    """A phrase that fits `group`; each attribute is said with the given probability where the group has it."""
    return Phrase(
        noun=group.noun,
        color=group.color if rng.random() < color else None,
        texture=group.texture if rng.random() < texture else None,
        size=group.size if rng.random() < size else None,
    )


# spaCy calls the "is" of "there is" a verb, one that needs no picture: rare, so that VERB stays a matter of actions.
INTRODUCTIONS = ("plain",) * 10 + ("here",) * 8 + ("there",)
SINGULAR_CHOICE = ("a", "a", "a", "the", "the")
PLURAL_CHOICE = ("number", "number", "number", "number", "some", "the-plural", "all", "both", "every", "each")


def _quantified(scene: Scene, i: int, phrase: Phrase, rng: random.Random, statement: Statement) -> Statement:
    """`statement` about `phrase` under a random quantifier that keeps it true."""
    group = scene.groups[i]
    while True:
        quantifier = rng.choice(SINGULAR_CHOICE if group.count == 1 else PLURAL_CHOICE)
        if statement.bare and quantifier in ("the", "the-plural", "all", "both", "every", "each"):
            quantifier = "a" if group.count == 1 else "number"
        if statement.relation == "around" and quantifier in ("every", "each"):
            quantifier = "all"  # no single one is around anything
        number = group.count if quantifier == "number" else None
        said = replace(statement, subject=NounPhrase(quantifier, phrase, number))
        if is_true(scene, said):
            return said
        if quantifier == "number":
            return replace(statement, subject=NounPhrase("a" if group.count == 1 else "some", phrase))


def _object_of(scene: Scene, j: int, rng: random.Random) -> NounPhrase:
    group, phrase = scene.groups[j], phrase_of(scene.groups[j], rng, size=0.15)
    if group.count > 1:
        return NounPhrase("number", phrase, group.count) if rng.random() < 0.5 else NounPhrase("some", phrase)
    unique = _count(scene, lambda i: phrase.fits(scene, i)) == 1
    return NounPhrase("the" if unique and rng.random() < 0.4 else "a", phrase)


def _say_what(scene: Scene, i: int, rng: random.Random) -> list[Word]:
    phrase = phrase_of(scene.groups[i], rng, color=0.85, size=0.45, texture=0.6)
    return words(_quantified(scene, i, phrase, rng, Statement(NounPhrase("a", phrase))), rng.choice(INTRODUCTIONS))


def _say_both(scene: Scene, i: int, rng: random.Random) -> list[Word]:
    if len(scene.groups) == 1:
        return _say_what(scene, i, rng)
    nouns = []
    for group in (scene.groups[i], scene.groups[1 - i]):
        phrase = phrase_of(group, rng, size=0.2)
        statement = Statement(NounPhrase("a", phrase))
        nouns.append(_quantified(scene, scene.groups.index(group), phrase, rng, statement).subject)
    return words(Statement(nouns[0], also=nouns[1]))


def _say_action(scene: Scene, i: int, rng: random.Random) -> list[Word]:
    group = scene.groups[i]
    if group.verb is None:
        return _say_what(scene, i, rng)
    manner = group.manner if rng.random() < 0.6 else None
    phrase = phrase_of(group, rng, size=0.15, texture=0.3)
    said = _quantified(scene, i, phrase, rng, Statement(NounPhrase("a", phrase), verb=group.verb, manner=manner))
    that = said.subject.quantifier in ("a", "some", "number") and rng.random() < 0.3
    return words(said, "that" if that else "plain")


def _say_relation(scene: Scene, i: int, rng: random.Random) -> list[Word]:
    if len(scene.groups) == 1:
        return _say_action(scene, i, rng)
    i = i if relations(scene, i, 1 - i) else 1 - i
    group, prepositions = scene.groups[i], relations(scene, i, 1 - i)
    verb = group.verb if rng.random() < 0.35 else None
    phrase = phrase_of(group, rng, size=0.15, texture=0.3)
    statement = Statement(
        NounPhrase("a", phrase),
        verb=verb,
        relation=prepositions[0] if rng.random() < 0.7 else prepositions[-1],
        object=_object_of(scene, 1 - i, rng),
    )
    said = _quantified(scene, i, phrase, rng, statement)
    form = rng.choice(("plain", "plain", "here", "phrase")) if verb is None else "plain"
    if said.subject.quantifier not in ("a", "some", "number"):
        form = "plain"
    return words(said, form)


def _say_number(scene: Scene, i: int, rng: random.Random) -> list[Word]:
    phrase = phrase_of(scene.groups[i], rng, size=0.1, texture=0.2)
    number = _count(scene, lambda j: phrase.fits(scene, j))
    # A singular noun gives "one" away, so it is rare, that NUM stays a matter of counting.
    if number >= len(NUMBERS) or (number == 1 and rng.random() < 0.6):
        return _say_what(scene, i, rng)
    return words(Statement(NounPhrase("exactly", phrase, number)), rng.choice(INTRODUCTIONS))


def _say_trait(scene: Scene, i: int, rng: random.Random) -> list[Word]:
    group = scene.groups[i]
    by_side = scene.layout == "row" and rng.random() < 0.5
    subject = Phrase(group.noun, side=scene.places[i] if by_side else None)
    traits = Phrase(color=group.color, size=group.size if rng.random() < 0.4 else None)
    if rng.random() < 0.15:
        traits = Phrase(size=group.size)
    return words(_quantified(scene, i, subject, rng, Statement(NounPhrase("a", subject), traits=traits)))


def _say_not(scene: Scene, i: int, rng: random.Random) -> list[Word]:
    """What is not there, close to what is: one factor of a group is replaced."""
    group = scene.groups[i]
    while True:
        phrase = Phrase(group.noun, group.color)
        if rng.random() < 0.3 and group.verb:
            statement = Statement(NounPhrase("no", replace(phrase, color=None)), verb=rng.choice(VERBS))
        elif rng.random() < 0.5:
            statement = Statement(NounPhrase("no", replace(phrase, color=rng.choice(COLORS))))
        else:
            statement = Statement(NounPhrase("no", replace(phrase, noun=rng.choice(NOUNS))))
        if is_true(scene, statement):
            return words(statement, rng.choice(("is-here", "is-here", "there")) if statement.bare else "plain")


def _say_only(scene: Scene, i: int, rng: random.Random) -> list[Word]:
    group = scene.groups[i]
    phrase = phrase_of(group, rng, size=0.1, texture=0.1)
    only = NounPhrase("only-a" if group.count == 1 else "only-plural", phrase)
    if len(scene.groups) == 1:
        return words(Statement(only), "there")
    also = _object_of(scene, 1 - i, rng)
    also = replace(also, quantifier="a") if also.quantifier == "the" else also
    statement = Statement(only, also=also)
    return words(statement, "there") if is_true(scene, statement) else _say_what(scene, i, rng)


# Weights put each part of speech in a good share of the captions; negation is rare, as a picture says little about it.
KINDS: dict[Callable[[Scene, int, random.Random], list[Word]], int] = {
    _say_what: 16, _say_both: 5, _say_action: 30, _say_relation: 32, _say_number: 8, _say_trait: 6, _say_not: 3,
    _say_only: 2,
}  # fmt: skip


def captions(scene: Scene, rng: random.Random) -> Iterator[list[Word]]:
    """Endless true captions of `scene`, each a list of (word, gold UPOS)."""
    kinds, weights = list(KINDS), list(KINDS.values())
    while True:
        yield rng.choices(kinds, weights)[0](scene, rng.randrange(len(scene.groups)), rng)
