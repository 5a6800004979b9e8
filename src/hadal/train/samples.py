"""Samples of training: conversations of several tasks, and which of their tokens are learned."""

import hashlib
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hadal.agent import SYSTEM_PROMPT
from hadal.chat import Message, SystemMessage, Tool
from hadal.encoding import Encoding
from hadal.encoding.tokens import EOS, THINK_START
from hadal.errors import InputError
from hadal.model.training import IGNORED
from hadal.tasks import TOOLS
from hadal.train.demonstrations import read

__all__ = ["Batch", "Conversations", "Tokens"]

_LONG = 4096
"""Tokens that samples have to have more than; shorter ones lose too many tasks to one (dev/LOG.md)."""


@dataclass(frozen=True)
class Tokens:
    """A task as token ids, without what comes before it.

    Attributes:
        ids: From the user's turn on.
        said: Which of them the model says.
    """

    ids: list[int]
    said: list[bool]


@dataclass(frozen=True)
class Batch:
    """A worker's part of a step: samples one after another.

    Attributes:
        ids_T: Token ids.
        labels_T: The next one where the model says it, -100 elsewhere.
        lengths: Tokens of each sample.
    """

    ids_T: Tensor
    labels_T: Tensor
    lengths: list[int]


class Conversations:
    """Makes batches of tasks; the same seed, step and worker make the same batch.

    Args:
        encoding: With the tokenizer.
        tools: That are declared.
        tasks: What was said, each from the user's turn on.
        seed: Of the order.
        longest: Tokens of a sample that every task has to fit; those that do not are left out. Default: all are in.

    Attributes:
        digest: Of all that batches are made of.

    Raises:
        InputError: There is no task.
    """

    def __init__(
        self,
        encoding: Encoding,
        tools: Sequence[Tool],
        tasks: Sequence[Sequence[Message]],
        seed: int,
        longest: int | None = None,
    ) -> None:
        self._seed = seed
        self._system = SystemMessage(SYSTEM_PROMPT, tools=tuple(tools))
        self._encoding = encoding
        tokenizer = encoding.tokenizer
        self._start, self._end = tokenizer.control_id(THINK_START), tokenizer.control_id(EOS)
        self._prefix = self._encode([])
        encoded = [self._tokens(self._encode(task)[len(self._prefix) :]) for task in tasks]
        if longest is not None:
            encoded = [task for task in encoded if len(self._prefix) + len(task.ids) <= longest]
        if not encoded:
            raise InputError("there is no task to train on")
        self._tasks = sorted(encoded, key=lambda task: len(task.ids))
        self._sizes = [len(task.ids) for task in self._tasks]
        parts = hashlib.sha256(repr((seed, self._prefix)).encode())
        for task in self._tasks:
            parts.update(repr(task).encode())
        self.digest = parts.hexdigest()

    @classmethod
    def demonstrated(
        cls, *demonstrations: Path, tokenizer: Path, seed: int = 1, longest: int | None = None
    ) -> "Conversations":
        """Return what was demonstrated, as tokens; `seed` and `longest` are as in the class.

        Raises:
            StorageError: The demonstrations cannot be read.
            ConfigError: The tokenizer cannot.
        """
        encoding = Encoding.load("v4", tokenizer=tokenizer)
        tasks = [shown.messages for path in demonstrations for shown in read(path)]
        return cls(encoding, TOOLS, tasks, seed, longest)

    def _encode(self, task: Sequence[Message]) -> list[int]:
        return self._encoding.encode(
            [self._system, *task], mode="thinking", drop_thinking=False, generation_prompt=False
        )

    def _tokens(self, ids: list[int]) -> Tokens:
        """Mark what the model says: from behind the start of its thought to the end of its turn."""
        said: list[bool] = []
        speaking = False
        for token in ids:
            said.append(speaking)
            if token == self._start:
                speaking = True
            elif token == self._end:
                speaking = False
        return Tokens(ids, said)

    @property
    def shortest(self) -> int:
        """Tokens of a sample with the shortest task alone."""
        return len(self._prefix) + self._sizes[0]

    @property
    def longest(self) -> int:
        """Tokens of a sample with the longest task alone."""
        return len(self._prefix) + self._sizes[-1]

    def batch(self, step: int, worker: int, *, tokens: int, length: int) -> Batch:
        """Return samples of up to `length` tokens each, `tokens` in all at most."""
        draw = random.Random(f"{self._seed}/{step}/{worker}")
        samples = [self._sample(draw, length) for _ in range(max(1, tokens // length))]
        labels = [
            [
                n if s else IGNORED
                for n, s in zip([*t.ids[1:], 0], [*t.said[1:], False], strict=True)
            ]
            for t in samples
        ]
        return Batch(
            torch.tensor([i for t in samples for i in t.ids]),
            torch.tensor([n for row in labels for n in row]),
            [len(t.ids) for t in samples],
        )

    def _sample(self, draw: random.Random, length: int) -> Tokens:
        """Return as many tasks as fit, each drawn from those that do; none is cut.

        Every other long sample begins with a task of half its room or more, where there is one: most tasks
        are short, and a long sample of short tasks teaches nothing about what lies far back.
        """
        ids, said = list(self._prefix), [False] * len(self._prefix)
        half = (length - len(ids)) // 2
        first = bisect_right(self._sizes, half) if length > _LONG and draw.random() < 0.5 else 0
        while fitting := bisect_right(self._sizes, length - len(ids)):
            task = self._tasks[draw.randrange(first if first < fitting else 0, fitting)]
            first = 0
            ids += task.ids
            said += task.said
        return Tokens(ids, said)
