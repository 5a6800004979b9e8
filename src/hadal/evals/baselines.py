"""What can be had without a network: a random command, the nearest demonstration, rules by hand.

None of them is meant to be used; they say how much of a score is skill.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hadal.chat import AssistantMessage, Message, ToolCall, ToolMessage, UserMessage
from hadal.errors import InputError
from hadal.evals.policy_backend import Seen

__all__ = ["Heuristic", "NearestDemonstration", "RandomCommand"]

_WORD = re.compile(r"[\w./-]*\w|\S")
_COMMON = 12
"""Demonstrations with a word, from which on it belongs to the language and is no name."""
_LONG = 40
"""Words from which on a text does not count there: in those to be remembered every name comes up."""


def _answer() -> AssistantMessage:
    return AssistantMessage("Done.", reasoning_content="That is done.")


def _bash(command: str) -> AssistantMessage:
    call = ToolCall("bash", json.dumps({"command": command}), id="call")
    return AssistantMessage("", reasoning_content="I try this.", tool_calls=(call,))


@dataclass(frozen=True)
class _Turn:
    """What a user said in a demonstration, and how it was done."""

    asked: str
    replies: tuple[AssistantMessage, ...]


def _turns(demonstrations: Iterable[Sequence[Message]]) -> list[_Turn]:
    found: list[_Turn] = []
    for messages in demonstrations:
        asked, replies = "", list[AssistantMessage]()
        for message in messages:
            if isinstance(message, UserMessage):
                if asked:
                    found.append(_Turn(asked, tuple(replies)))
                asked, replies = str(message.content), []
            elif isinstance(message, AssistantMessage):
                replies.append(message)
            else:
                assert isinstance(message, ToolMessage)
        found.append(_Turn(asked, tuple(replies)))
    if not found:
        raise InputError("there is no demonstration")
    return found


class _Names:
    """Tells the words of the language from the names that tasks make up."""

    def __init__(self, texts: Iterable[str]) -> None:
        found = [_WORD.findall(text) for text in texts]
        counts = Counter(w.lower() for words in found if len(words) < _LONG for w in set(words))
        self._common = {w for w, n in counts.items() if n >= _COMMON and "." not in w[:-1]}

    def of(self, text: str) -> list[str]:
        return [w for w in _WORD.findall(text) if w.lower() not in self._common]

    def shape(self, text: str) -> frozenset[str]:
        """Return pairs of neighbours, names left out."""
        words = [w.lower() if w.lower() in self._common else "_" for w in _WORD.findall(text)]
        return frozenset(map(" ".join, zip(["", *words], [*words, ""], strict=True)))


def _renamed(reply: AssistantMessage, names: dict[str, str]) -> AssistantMessage:
    """Return a reply with other names in it."""
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "$^")

    def rename(text: str) -> str:
        return pattern.sub(lambda m: json.dumps(names[m.group()])[1:-1], text)

    calls = tuple(ToolCall(c.name, rename(c.arguments), id=c.id) for c in reply.tool_calls)
    return AssistantMessage(
        str(reply.content), reasoning_content=reply.reasoning_content, tool_calls=calls
    )


class NearestDemonstration:
    """Does what was done when somebody asked for something alike, with the names of now.

    Args:
        demonstrations: To look among.

    Raises:
        InputError: There is none.
    """

    def __init__(self, demonstrations: Iterable[Sequence[Message]]) -> None:
        self._turns = _turns(demonstrations)
        self._names = _Names(turn.asked for turn in self._turns)
        self._shapes = [self._names.shape(turn.asked) for turn in self._turns]
        self._found: dict[str, _Turn] = {}

    def __call__(self, seen: Seen) -> AssistantMessage:
        """Return the next step of it."""
        if seen.asked not in self._found:
            shape = self._names.shape(seen.asked)
            likeness = [len(shape & other) / len(shape | other) for other in self._shapes]
            best = max(range(len(likeness)), key=likeness.__getitem__)
            self._found[seen.asked] = self._turns[best]
        turn = self._found[seen.asked]
        if len(seen.results) >= len(turn.replies):
            return _answer()
        old, new = self._names.of(turn.asked), self._names.of(seen.asked)
        return _renamed(turn.replies[len(seen.results)], dict(zip(old, new, strict=False)))


class RandomCommand:
    """Runs a command that was right somewhere, with the names of now, and calls it done.

    Args:
        demonstrations: To take commands from.
        seed: Of the choices.

    Raises:
        InputError: There is none.
    """

    def __init__(self, demonstrations: Iterable[Sequence[Message]], seed: int = 0) -> None:
        turns = _turns(demonstrations)
        self._names = _Names(turn.asked for turn in turns)
        self._turns = [turn for turn in turns if turn.replies[0].tool_calls]
        self._random = random.Random(seed)

    def __call__(self, seen: Seen) -> AssistantMessage:
        """Return a command, then an answer."""
        if seen.results:
            return _answer()
        turn = self._random.choice(self._turns)
        names = zip(self._names.of(turn.asked), self._names.of(seen.asked), strict=False)
        return _renamed(turn.replies[0], dict(names))


_FILE = r"(?:[\w-]+/)*[\w-]+\.\w+"
_RULES: tuple[tuple[str, str], ...] = (
    (r"(?:this command|exactly this|the command|this line|the shell line)s?:? (?P<a>.+)", "{a}"),
    (r"number of lines|how many lines|line count|count of the lines", "wc -l < {f0} > {f1}"),
    (r"number of words|how many words|word count|count of the words", "wc -w < {f0} > {f1}"),
    (r"lines? .*(?:with|contain\w*|have|has) (?P<a>\w+)", "grep {a} {f0} > {f1}"),
    (r"first (?P<a>\d+) lines?|(?P<b>\d+) lines? .*first", "head -n {a} {f0} > {f1}"),
    (r"last (?P<a>\d+) lines?|(?P<b>\d+) lines? .*last", "tail -n {a} {f0} > {f1}"),
    (r"unique|distinct|duplicates|each once", "sort -u {f0} > {f1}"),
    (r"column (?P<a>\d+)", "cut -d , -f {a} {f0} | sort > {f1}"),
    (r"most (?:common|frequent)", "sort {f0} | uniq -c | sort -rn | head -n 1 | tr -s ' ' | cut -d ' ' -f 3 > {f1}"),
    (r"(?P<a>\d+) .*(?:largest|highest)|top (?P<b>\d+)", "sort -t , -k 2 -rn {f0} | head -n {a} > {f1}"),
    (r"sorted|sort|order", "sort {f0} > {f1}"),
    (r"reverse", "tac {f0} > {f1}"),
    (r"executable", "chmod +x {f0}"),
    (r"copy|duplicate", "cp {f0} {f1}"),
    (r"rename|move", "mv {f0} {f1}"),
    (r"empty|nothing in it|touch", "touch {f0}"),
    (r"delete|remove", "rm {f0}"),
    (r"(?:folder|directory) (?:called |named )?(?P<a>[\w/-]+)", "mkdir -p {a}"),
)  # fmt: skip
"""What a sentence looks like, and what to do then; the first that fits."""


class Heuristic:
    """Rules that somebody wrote by hand after reading some tasks."""

    def __call__(self, seen: Seen) -> AssistantMessage:
        """Return the command of the first rule that fits, then an answer."""
        files = re.findall(_FILE, seen.asked)
        # "into b, write the lines of a": the first file is the result
        if re.match(rf"(?i)(?:into )?{_FILE}(?:,| must| should)|(?:make|need) (?:a file )?{_FILE} with", seen.asked):  # fmt: skip
            files = [*files[1:], *files[:1]]
        for pattern, command in _RULES:
            found = re.search(pattern, seen.asked, re.IGNORECASE)
            if seen.results or found is None or len(files) < command.count("{f"):
                continue
            value = next((v for v in found.groupdict().values() if v), "")
            names = {f"f{i}": name for i, name in enumerate(files)}
            return _bash(command.format(a=value, **names))
        return _answer()
