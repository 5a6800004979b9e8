"""A task: files, what the user says, how it is solved, and what must be there afterwards."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hadal.errors import CommandRefusedError, SandboxFileError
from hadal.sandbox import AsyncSandbox, ContainerSpec

__all__ = ["FOLDER", "Answer", "Call", "Outcome", "Solution", "Split", "Task", "check", "prepare"]

FOLDER = "/work"
"""Where tasks take place in a box."""

Split = Literal["train", "test"]
"""Test tasks have phrasings that no training task of their family has (`hadal.tasks.draw.pairs`), and names and
contents of other seeds: made of the same syllables and words, and nearly never the same."""


@dataclass(frozen=True)
class Call:
    """A step of a solution: a tool, and the thought before it."""

    thought: str
    tool: str
    arguments: Mapping[str, Any]

    @classmethod
    def bash(cls, thought: str, command: str) -> "Call":
        """Return a command."""
        return cls(thought, "bash", {"command": command})

    @classmethod
    def edit(cls, thought: str, command: str, name: str, **arguments: Any) -> "Call":
        """Return a use of the editor."""
        path = {"command": command, "path": f"{FOLDER}/{name}"}
        return cls(thought, "str_replace_editor", path | arguments)


@dataclass(frozen=True)
class Answer:
    """The last step of a turn: what the user is told, and the thought before it."""

    thought: str
    text: str


Solution = Generator[Call | Answer, str, None]
"""Yields steps, and is sent what each call returned."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task.

    Attributes:
        family: Its kind.
        level: Of the curriculum, 0 to 6.
        seed: With the family and the split it names the task.
        split: Whether it may be trained on.
        files: Content by name, in `FOLDER`.
        executable: Those of them that can be run.
        messages: What the user says, each after the answer to the last.
        after: Content of the files that are to be new or other afterwards; None: it is to be gone.
            All others are to be as they were. White space at the end does not count. New ones do not matter.
        words: Those of `after` of which only the words count, however they are separated.
        unordered: And those of which the order of the words does not count either.
        changed: Files that may have any content afterwards.
        prints: What commands print afterwards, by command.
        modes: Permission bits that files are to have afterwards, beside others.
        folders: Directories that are to be there afterwards.
        solve: Begins a solution.
    """

    family: str
    level: int
    seed: int
    split: Split
    files: Mapping[str, str]
    messages: tuple[str, ...]
    solve: Callable[[], Solution]
    executable: frozenset[str] = frozenset()
    after: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    words: frozenset[str] = frozenset()
    unordered: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()
    prints: Mapping[str, str] = field(default_factory=dict[str, str])
    modes: Mapping[str, int] = field(default_factory=dict[str, int])
    folders: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Return what it is called."""
        return f"{self.family}/{self.split}/{self.seed}"

    @property
    def spec(self) -> ContainerSpec:
        """Return the box that it wants."""
        return ContainerSpec(
            memory_mb=256, disk_mb=64, inodes=2048, pids=64, working_dir=FOLDER,
            labels={"task": self.name},
        )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Whether a task was done, and why not."""

    solved: bool
    reason: str = ""


async def prepare(task: Task, box: AsyncSandbox) -> None:
    """Put the files of a task into a box.

    Raises:
        SandboxError: The box failed.
    """
    await box.files.mkdir(FOLDER, parents=True)
    for name, content in task.files.items():
        mode = 0o755 if name in task.executable else 0o644
        await box.files.write(f"{FOLDER}/{name}", content, parents=True, mode=mode)


async def check(task: Task, box: AsyncSandbox) -> Outcome:
    """Look at what is in a box: the files and what commands print, whatever was said.

    Raises:
        SandboxError: The box failed; that says nothing about the task.
    """
    try:
        return await _look(task, box)
    except (SandboxFileError, CommandRefusedError) as error:  # the agent moved the folder away, say
        return Outcome(False, f"what should be there cannot be looked at: {error}")


async def _look(task: Task, box: AsyncSandbox) -> Outcome:
    found = {f.path: f for f in await box.files.list(FOLDER, depth=8)}
    expected: dict[str, str | None] = {**task.files, **task.after}
    for name, content in sorted(expected.items()):
        if name in task.changed:
            continue
        if content is None:
            if name in found:
                return Outcome(False, f"{name} is still there")
        elif name not in found or found[name].kind != "file":
            return Outcome(False, f"{name} is not there")
        else:
            text = (await box.files.read(f"{FOLDER}/{name}")).decode(errors="replace")
            if _essence(task, name, text) != _essence(task, name, content):
                return Outcome(False, f"{name}: expected {content[:80]!r}, got {text[:80]!r}")
    for name, mode in task.modes.items():
        if found[name].mode & mode != mode:
            return Outcome(False, f"{name}: expected mode {mode:o}, got {found[name].mode:o}")
    for name in task.folders:
        if name not in found or found[name].kind != "directory":
            return Outcome(False, f"{name} is no directory")
    for command, expected_output in task.prints.items():
        ended = await box.run(command, timeout_s=20)
        if ended.stdout.strip() != expected_output:
            return Outcome(
                False, f"{command}: expected {expected_output[:80]}, got {ended.stdout[:80]!r}"
            )
    return Outcome(True)


def _essence(task: Task, name: str, text: str) -> str | list[str]:
    """Return what of a text counts."""
    if name in task.unordered:
        return sorted(text.split())
    return text.split() if name in task.words else text.rstrip()
