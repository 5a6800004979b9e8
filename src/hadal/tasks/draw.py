"""Random choices of a task: names, words, numbers and phrasings, all from its seed."""

import random
import re
import zlib
from collections.abc import Sequence
from typing import Any, TypeVar

from hadal.tasks.task import Split, Task

__all__ = ["Draw", "pairs"]

_T = TypeVar("_T")

_CONSONANTS = "b c d f g h k l m n p r s t v w z br dr fl gr kl pl st tr".split()
_VOWELS = "a e i o u ai ea oo".split()
_ENDINGS = ["", "", "n", "r", "l", "s", "x", "t"]
_WORDS = """
amber apple arrow basil beach birch bird boat bread bridge brook cedar chalk cloud clover coral crane daisy
delta dune eagle ember fern field flint forest fox frost garden grape harbor hazel heron honey island ivory
jade juniper kettle lake lamp lantern leaf lemon lily lime linen lotus maple marble meadow mint moon moss
nectar oak oasis ocean olive onyx orchid otter palm paper pearl pebble pepper pine plum pond poppy quartz
rain raven reed ridge river robin rose ruby sage salt sand shell silver snow spark spring stone storm straw
sun swan tea thistle thyme tide tiger tulip valley velvet violet walnut water wave wheat willow wind wolf
""".split()
_EXTENSIONS = ["txt", "txt", "log", "csv", "md", "dat"]
_WANTED = (
    "write {core} (into|in|to) $b(.|)",
    "put {core} (into|in) $b(.|)",
    "save {core} (to|in) $b(.|)",
    "I need {core} in $b(.|)",
    "$b (must|should) contain {core}(.|)",
    "please (write|store) {core} in $b(.|)",
    "find {core} and (write|save) the result to $b(.|)",
    "make a file $b with {core}(.|)",
    "into $b, write {core}(.|)",
    "(give me|I want) {core} in a file $b(.|)",
    "store {core} as $b(.|)",
    "get {core} and put that into $b(.|)",
)
_ORDERED = (
    "{core}(.|)",
    "please {core}(.|)",
    "(can|could) you {core}?",
    "I want you to {core}(.|)",
    "{core}, please(.|)",
    "your task: {core}(.|)",
    "you (should|must) {core}(.|)",
    "now {core}(.|)",
    "I need you to {core}(.|)",
    "next, {core}(.|)",
    "would you {core}?",
    "(go on and|do this:) {core}(.|)",
)
"""What a sentence is, around what it is about."""
_ALTERNATIVES = re.compile(r"\(([^()]*\|[^()]*)\)")


class Draw:
    """Choices of one task.

    Args:
        family: Its kind.
        split: Of which split it is.
        seed: Its number.
    """

    def __init__(self, family: str, split: Split, seed: int) -> None:
        self.family = family
        self.split: Split = split
        self.seed = seed
        self._random = random.Random(f"{family}/{split}/{seed}")
        self._used: set[str] = set()

    def task(self, level: int, **fields: Any) -> Task:
        """Return a task of this family, seed and split; fields are those of `Task`."""
        return Task(family=self.family, level=level, seed=self.seed, split=self.split, **fields)

    def number(self, low: int, high: int) -> int:
        """Return a whole number, both ends included."""
        return self._random.randint(low, high)

    def magnitude(self, low: int, high: int) -> int:
        """Return a whole number; all orders of magnitude are equally probable."""
        return round(low * (high / low) ** self._random.random())

    def one_of(self, values: Sequence[_T]) -> _T:
        """Return one of some values."""
        return self._random.choice(values)

    def some(self, values: Sequence[_T], count: int) -> list[_T]:
        """Return different ones of some values."""
        return self._random.sample(values, count)

    def shuffled(self, values: Sequence[_T]) -> list[_T]:
        """Return values in another order."""
        return self._random.sample(values, len(values))

    def chance(self, probability: float) -> bool:
        """Return whether something happens."""
        return self._random.random() < probability

    def word(self) -> str:
        """Return a word that this task has not had yet: a real one, or one that nobody has seen."""
        while True:
            word = self.one_of(_WORDS) if self.chance(0.4) else self._invented()
            if word not in self._used:
                self._used.add(word)
                return word

    def _invented(self) -> str:
        syllables = range(self.number(2, 3))
        return "".join(
            self.one_of(_CONSONANTS) + self.one_of(_VOWELS) for _ in syllables
        ) + self.one_of(_ENDINGS)

    def words(self, count: int) -> list[str]:
        """Return different words."""
        return [self.word() for _ in range(count)]

    def file(self, extension: str | None = None) -> str:
        """Return the name of a file."""
        return f"{self.word()}.{extension or self.one_of(_EXTENSIONS)}"

    def lines(self, low: int, high: int) -> list[str]:
        """Return lines of a few words each."""
        return [
            " ".join(self._free_words(self.number(1, 4))) for _ in range(self.number(low, high))
        ]

    def _free_words(self, count: int) -> list[str]:
        return [self.one_of(_WORDS) if self.chance(0.5) else self._invented() for _ in range(count)]

    def prose(self, count: int) -> str:
        """Return so many words in a row, which may be the same."""
        return " ".join(self._free_words(count))

    def text(self, low: int, high: int) -> str:
        """Return the content of a file of so many lines."""
        return "".join(f"{line}\n" for line in self.lines(low, high))

    def wanted(self, things: Sequence[str], **names: object) -> str:
        """Return a sentence that wants something in the file `$b`.

        Args:
            things: Names for what is wanted, with `(a|b)` for alternatives and names as `$name`.
            **names: What the names stand for.
        """
        return self._say(_WANTED, things, names)

    def ordered(self, actions: Sequence[str], **names: object) -> str:
        """Return a sentence that wants something done; arguments as those of `wanted`."""
        return self._say(_ORDERED, actions, names)

    def literally(self, actions: Sequence[str], text: str, **names: object) -> str:
        """Return a sentence that wants something done with a text, which stands at its end as it is."""
        return f"{self.ordered(actions, **names).rstrip('?.')}: {text}"

    def _say(self, frames: Sequence[str], cores: Sequence[str], names: dict[str, object]) -> str:
        """Put a core into a frame."""
        frame, core = self.one_of(pairs(self.family, self.split, frames, cores))
        text = self._alternatives(frame).replace("{core}", self._alternatives(core))
        text = text[0].upper() + text[1:]
        for name in sorted(names, key=len, reverse=True):
            text = text.replace(f"${name}", str(names[name]))
        return text

    def _alternatives(self, text: str) -> str:
        while found := _ALTERNATIVES.search(text):
            choice = self.one_of(found.group(1).split("|"))
            text = text[: found.start()] + choice + text[found.end() :]
        return text

    def distractors(self) -> dict[str, str]:
        """Return files that have nothing to do with the task."""
        return {self.file(): self.text(1, 4) for _ in range(self.number(1, 2))}


def pairs(
    family: str, split: Split, frames: Sequence[str], cores: Sequence[str]
) -> list[tuple[str, str]]:
    """Return the pairs of a frame and a core that tasks of a split may have.

    A quarter of a family's pairs is in no training task of it; every frame and every core is in some.
    """
    shift = zlib.crc32(family.encode())
    return [
        (frame, core)
        for f, frame in enumerate(frames)
        for c, core in enumerate(cores)
        if ((f + 3 * c + shift) % 4 == 0) == (split == "test")
    ]
