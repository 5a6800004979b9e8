"""The examples of every command, below its options: cyclopts leaves that part of a docstring out."""

import inspect
from collections.abc import Iterator

import docstring_parser
from cyclopts import App
from docstring_parser import DocstringStyle

__all__ = ["commands", "examples", "show_examples"]


def show_examples(app: App) -> None:
    """Let `--help` of every command below an app end with the examples of its docstring."""
    for _, command in commands(app):
        if text := examples(command):
            command.help_epilogue = f"**Examples**\n\n```text\n{text}\n```"


def commands(app: App, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], App]]:
    """Yield the commands below an app that do something, each with the words that call it."""
    for name in app:
        below = app[name]
        if name.startswith("-"):
            continue  # --help and --version
        if below.default_command is not None:
            yield (*path, name), below
        yield from commands(below, (*path, name))


def examples(command: App) -> str:
    """Return the examples that a command's docstring has, as they stand there; empty without."""
    doc = inspect.getdoc(command.default_command) or ""
    found = docstring_parser.parse(doc, DocstringStyle.GOOGLE).examples
    return "\n\n".join(example.description or "" for example in found)
