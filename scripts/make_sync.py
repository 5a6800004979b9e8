"""Write src/hadal/sandbox/sync.py: the classes of the SDK without await, made from the asynchronous ones.

    python scripts/make_sync.py [--check]

Every public method of an `Async…` class becomes one of the same name, arguments and description that runs it
on the loop of `hadal.sandbox.portal`. A test sees that the file is up to date.
"""

import ast
import sys
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "src/hadal/sandbox"
TARGET = SOURCES / "sync.py"
CLASSES = [
    ("process.py", "AsyncProcess"),
    ("files.py", "AsyncFiles"),
    ("screen.py", "AsyncConsole"),
    ("screen.py", "AsyncKeyboard"),
    ("screen.py", "AsyncMouse"),
    ("box.py", "AsyncSandbox"),
]
HEADER = '''"""The SDK without await: made by scripts/make_sync.py from the asynchronous classes; do not edit.

Works everywhere, inside a running event loop and in notebooks too: the work is done on a loop of its own.
"""

import signal as signals
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from hadal.errors import CommandFailedError
from hadal.sandbox.box import AsyncSandbox, command_body
from hadal.sandbox.files import AsyncFiles
from hadal.sandbox.network_policy import NetworkPolicy
from hadal.sandbox.portal import call, iterate
from hadal.sandbox.process import AsyncProcess, StreamName
from hadal.sandbox.protocol import MouseButton, SnapshotKind
from hadal.sandbox.replay import ReplayReport
from hadal.sandbox.results import BoxInfo, CallResult, Change, Event, ExecResult, FileEvent, FileStat, Usage
from hadal.sandbox.screen import AsyncConsole, AsyncKeyboard, AsyncMouse
from hadal.sandbox.specs import Spec

__all__ = ["Console", "Files", "Keyboard", "Mouse", "Process", "Sandbox"]

Command = str | Sequence[str]
'''
# Bodies that are not simply the call of the other one.
BODIES = {
    # A recorded command is answered here and now: no other thread takes part.
    ("AsyncSandbox", "run"): """
body = command_body(command, timeout_s, quiet_s, stdin, env, cwd, user, output_limit)
result = self.wrapped.recorded_command(body)
if result is None:
    result = call(self.wrapped.perform(body, request_id))
if check and not result.ok:
    raise CommandFailedError(f"{command!r}: {result.describe()}", result=result)
return result
""",
}
SPECIAL = {"__aenter__": "__enter__", "__aexit__": "__exit__", "__aiter__": "__iter__"}
SKIPPED = {("AsyncSandbox", "perform"), ("AsyncSandbox", "recorded_command"),
           ("AsyncFiles", "repeat"), ("AsyncSandbox", "recorded"), ("AsyncSandbox", "recorded_write")}  # fmt: skip


def plain(text: str) -> str:
    """Return a type or description with the names of the synchronous classes."""
    for _, name in CLASSES:
        text = text.replace(name, name.removeprefix("Async"))
    return text.replace("AsyncIterator", "Iterator").replace("async with", "with")


def forwarded(arguments: ast.arguments, is_class_method: bool) -> str:
    """Return the arguments as they are passed on."""
    positional = [a.arg for a in arguments.args[1:]]
    return ", ".join(positional + [f"{a.arg}={a.arg}" for a in arguments.kwonlyargs])


def method(owner: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return one method as text."""
    decorators = [ast.unparse(d) for d in node.decorator_list]
    name = SPECIAL.get(node.name, node.name)
    returns = plain(ast.unparse(node.returns)) if node.returns else "None"
    signature = plain(ast.unparse(node.args))
    passed = forwarded(node.args, "classmethod" in decorators)
    wrapped = returns == "Process"
    if "classmethod" in decorators:
        body = f"return cls(call({owner}.{node.name}({passed})))"
    elif node.name == "__aenter__":
        body = "return self"
    elif node.name == "__aiter__":
        body = "return iterate(aiter(self.wrapped))"
    elif "property" in decorators:
        body = f"return self.wrapped.{node.name}"
    elif returns == "list[Self]":
        body = f"return [type(self)(other) for other in call(self.wrapped.{node.name}({passed}))]"
    elif (owner, node.name) in BODIES:
        body = BODIES[owner, node.name].strip()
    elif returns.startswith("Iterator"):
        body = f"return iterate(self.wrapped.{node.name}({passed}))"
    elif isinstance(node, ast.AsyncFunctionDef):
        inner = f"call(self.wrapped.{node.name}({passed}))"
        body = f"return {returns}({inner})" if wrapped else f"return {inner}"
    else:
        body = f"return self.wrapped.{node.name}({passed})"
    lines = [f"    @{d}" for d in decorators]
    lines.append(f"    def {name}({signature}) -> {returns}:")
    doc = ast.get_docstring(node, clean=False)
    if doc:
        lines.append(f'        """{plain(doc)}"""')
    lines += [f"        {line}" for line in body.splitlines()]
    return "\n".join(lines)


def render(file: str, name: str) -> str:
    """Return one class as text."""
    tree = ast.parse((SOURCES / file).read_text(encoding="utf-8"))
    found = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    sync = name.removeprefix("Async")
    doc = plain(ast.get_docstring(found, clean=False) or "")
    parts = ("console", "files", "keyboard", "mouse")
    extra = "".join(f"\n        self.{p} = {p.capitalize()}(wrapped.{p})" for p in parts)
    extra += "\n        self.id = wrapped.id"
    extra = (
        extra
        if name == "AsyncSandbox"
        else "\n        self.id = wrapped.id"
        if name == "AsyncProcess"
        else ""
    )
    parts = [
        f'class {sync}:\n    """{doc}"""\n',
        f"    def __init__(self, wrapped: {name}) -> None:\n        self.wrapped = wrapped{extra}\n",
    ]
    for node in found.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        private = node.name.startswith("_") and node.name not in SPECIAL
        if not private and (name, node.name) not in SKIPPED:
            parts.append(method(name, node) + "\n")
    return "\n".join(parts)


def main() -> int:
    """Write the file, or compare."""
    import subprocess

    text = HEADER + "\n\n" + "\n\n".join(render(*c) for c in CLASSES)
    ruff = Path(sys.executable).with_name("ruff")
    for command in (["check", "--fix-only", "--quiet", "--stdin-filename", TARGET, "-"],
                    ["format", "--quiet", "--stdin-filename", TARGET, "-"]):  # fmt: skip
        text = subprocess.run(
            [ruff, *command], input=text, capture_output=True, text=True, check=True
        ).stdout
    if "--check" in sys.argv:
        return int(TARGET.read_text(encoding="utf-8") != text)
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
