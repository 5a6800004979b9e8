"""Bring the line numbers of code links in the docs up to date.

    python scripts/link_lines.py          rewrite the links
    python scripts/link_lines.py --check  list stale and broken ones, change nothing

A code link is a Markdown link whose text is a symbol in backticks and whose target is a relative
.py file: the symbol is a function, a class, a module-level constant, or `Class.member`. It is looked
up in the file's syntax tree, so nothing is imported. Exit code 1 if a symbol or file is not found,
or, with --check, if a number is stale.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE_LINK = re.compile(
    r"\[`(?P<symbol>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)`\]"
    r"\((?P<path>(?!\w+:)[^)#\s]+\.py)(?:#L(?P<line>\d+))?\)"
)


@dataclass(frozen=True)
class Update:
    """What became of one document.

    Attributes:
        text: The document with the right line numbers.
        stale: One message for each number that was wrong or missing.
        broken: One message for each link whose file or symbol does not exist.
    """

    text: str
    stale: list[str]
    broken: list[str]


def documents(root: Path) -> list[Path]:
    """Return the documents whose links are kept."""
    named = [root / "README.md", root / "ARCHITECTURE.md"]
    return [p for p in (*named, *sorted((root / "docs").glob("*.md"))) if p.is_file()]


def _definitions(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the names that statements define, each with its statement."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign):
            yield from ((t.id, node) for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node


def find_line(tree: ast.Module, symbol: str) -> int | None:
    """Return the line on which a dotted symbol is defined, or None."""
    body, node = tree.body, None
    for name in symbol.split("."):
        node = dict(_definitions(body)).get(name)
        body = node.body if isinstance(node, ast.ClassDef) else []
    return node.lineno if node is not None else None


def update(text: str, folder: Path, name: str) -> Update:
    """Return a document with its line numbers set.

    Args:
        text: The document.
        folder: Where it lies: targets are relative to it.
        name: What messages call it.
    """
    stale: list[str] = []
    broken: list[str] = []

    def relink(match: re.Match[str]) -> str:
        symbol, path, line = match["symbol"], match["path"], match["line"]
        where = f"{name}:{text.count(chr(10), 0, match.start()) + 1}: `{symbol}` in {path}"
        if not (folder / path).is_file():
            broken.append(f"{where}: no such file")
            return match[0]
        found = find_line(ast.parse((folder / path).read_text(encoding="utf-8")), symbol)
        if found is None:
            broken.append(f"{where}: no such symbol")
            return match[0]
        if line != str(found):
            stale.append(f"{where}: expected line {found}, got {line or 'none'}")
        return f"[`{symbol}`]({path}#L{found})"

    return Update(CODE_LINK.sub(relink, text), stale, broken)


def main() -> int:
    """Update or check all documents."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    failed = False
    for path in documents(ROOT):
        text = path.read_text(encoding="utf-8")
        result = update(text, path.parent, str(path.relative_to(ROOT)))
        if not check and result.text != text:
            path.write_text(result.text, encoding="utf-8")
        for message in (*result.stale, *result.broken):
            print(message)
        failed |= bool(result.broken) or (check and bool(result.stale))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
