"""The text guard: decides whether two prompts may share a picture.

Cosine alone cannot tell a red potion from a blue one.

The guard extracts facts from both texts and requires all of them to be equal: numbers and colours with the words they
belong to, negations with the words they deny, quoted words, and the values of the word groups in the pipeline's
manifest (`icons`: object, colour, background, each modifier). If the manifest declares its vocabulary closed, all other
words must be equal too, except those that it ignores.

Invariants: the guard is symmetric, and a text agrees with itself. Words that it does not understand
can only make it stricter: it prefers a miss to a wrong picture. All functions are pure.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from safelight_server.catalog.manifest import GuardWords

_COLOUR_WORDS = (
    "red orange yellow green cyan teal blue navy indigo purple magenta pink brown tan beige cream white black grey"
    " gold silver bronze copper crimson scarlet maroon olive lime amber ivory"
)
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen twenty"
)
_NEGATION_WORDS = "no not n't cannot non without never none neither nor except minus lacking free excluding nothing"
_FILLER_WORDS = "a an the of and with on in at to is are any"
COLOURS = {word: word for word in _COLOUR_WORDS.split()} | {
    "gray": "grey",
    "golden": "gold",
    "violet": "purple",
    "turquoise": "cyan",
}
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())} | {
    "both": "2",
    "pair": "2",
    "couple": "2",
    "single": "1",
    "triple": "3",
    "dozen": "12",
    "hundred": "100",
}
NEGATIONS = frozenset(_NEGATION_WORDS.split())
FILLERS = frozenset(_FILLER_WORDS.split())
"""Words to skip between a negation, colour or number and the word it belongs to."""

_QUOTED = re.compile(r"\"([^\"]*)\"|“([^“”]*)”|„([^„“”]*)[“”]|«([^«»]*)»|‘([^‘’]*)’|(?<!\w)'([^']*)'(?!\w)")
_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+?(?=n't\b)|n't\b|[^\W\d_]+")

Meaning = tuple[str, int]


@dataclass(frozen=True, slots=True)
class TextFacts:
    """The facts of a text that must be equal for the guard to let a picture pass.

    Attributes:
        numbers: each with the word it counts, in the order of the text.
        colours: each with the word it belongs to, in the order of the text; without the colours in word groups.
        negations: the denied words, sorted.
        quoted: the quoted parts, unchanged, in the order of the text.
        meanings: (group, value), sorted; in the order of the text if a group occurs twice, because then it matters
            which values belong together.
        others: the other words if the vocabulary is closed, sorted; else empty.
    """

    numbers: tuple[tuple[str, str], ...]
    colours: tuple[tuple[str, str], ...]
    negations: tuple[str, ...]
    quoted: tuple[str, ...]
    meanings: tuple[Meaning, ...]
    others: tuple[str, ...]


class Guard:
    """Compares texts by one pipeline's word groups; None: the pipeline has none."""

    def __init__(self, words_of_pipeline: GuardWords | None = None) -> None:
        own = words_of_pipeline or GuardWords(groups={})
        self._closed = own.closed
        self._ignored = frozenset(word for phrase in own.ignored for word in words(phrase))
        self._phrases: dict[tuple[str, ...], Meaning] = {
            tuple(words(phrase)): (name, value)
            for name, values in own.groups.items()
            for value, phrases in enumerate(values)
            for phrase in phrases
        }
        self._longest = max(map(len, self._phrases), default=0)

    def agree(self, one: str, other: str) -> bool:
        """Whether a picture made for one of the texts may answer the other."""
        return self.facts(one) == self.facts(other)

    def facts(self, text: str) -> TextFacts:
        """Extracts the facts of a text."""
        found = words(text)
        meanings, rest = self._meanings(found)
        counts = Counter(group for group, _ in meanings)
        in_order = any(count > 1 for count in counts.values())
        numbers, colours = [], []
        for index in rest:
            word = found[index]
            if word in NUMBERS or word[0].isdigit():
                numbers.append((NUMBERS.get(word, word), _next(found, index)))
            elif word in COLOURS:
                colours.append((COLOURS[word], _next(found, index)))
        return TextFacts(
            numbers=tuple(numbers),
            colours=tuple(colours),
            negations=tuple(sorted(_denied(found))),
            quoted=tuple(part for match in _QUOTED.findall(text) for part in match if part),
            meanings=tuple(meanings if in_order else sorted(meanings)),
            others=tuple(sorted({found[i] for i in rest} - self._ignored)) if self._closed else (),
        )

    def _meanings(self, found: Sequence[str]) -> tuple[list[Meaning], list[int]]:
        """Returns the word groups' values in the order of the text, and the indices of all other words."""
        meanings: list[Meaning] = []
        rest: list[int] = []
        index = 0
        while index < len(found):
            length, meaning = self._longest_phrase(found, index)
            if meaning is None:
                rest.append(index)
            else:
                meanings.append(meaning)
            index += length
        return meanings, rest

    def _longest_phrase(self, found: Sequence[str], index: int) -> tuple[int, Meaning | None]:
        for length in range(min(self._longest, len(found) - index), 0, -1):
            if (meaning := self._phrases.get(tuple(found[index : index + length]))) is not None:
                return length, meaning
        return 1, None


def words(text: str) -> list[str]:
    """Splits a text into words and numbers, case folded; "don't" becomes "do", "n't"."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold().replace("’", "'"))


def _next(found: Sequence[str], index: int) -> str:
    """Returns the first word after `index` that is not a filler; empty if there is none."""
    return next((word for word in found[index + 1 :] if word not in FILLERS), "")


def _denied(found: Sequence[str]) -> list[str]:
    """Returns the denied words: "smoke" of "without any smoke", "cloud" of "cloudless"."""
    denied = [_next(found, index) for index, word in enumerate(found) if word in NEGATIONS]
    return denied + [word.removesuffix("less") for word in found if word.endswith("less") and len(word) > 6]
