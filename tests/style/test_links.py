"""Links in the documents: code links name the line of their symbol, all others an existing file."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "link_lines.py"
DOCUMENTS = [
    p
    for p in (ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md")))
    if p.is_file()
]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`[^`\n]*`")
TARGET = re.compile(r"\]\(([^)\s]+)\)")


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=False
    )


def test_code_links_are_up_to_date():
    result = run(SCRIPT, "--check")
    assert result.returncode == 0, f"run scripts/link_lines.py\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_relative_links_exist(path):
    text = INLINE_CODE.sub("", FENCE.sub("", path.read_text(encoding="utf-8")))
    targets = [t for t in TARGET.findall(text) if not re.match(r"\w+:|#", t)]
    assert not [t for t in targets if not (path.parent / t.split("#")[0]).exists()]


@pytest.fixture
def tree(tmp_path):
    """A project of one document and one module, beside a copy of the script."""
    for folder in ("docs", "scripts"):
        (tmp_path / folder).mkdir()
    (tmp_path / "scripts" / "link_lines.py").write_text(SCRIPT.read_text(encoding="utf-8"))
    (tmp_path / "code.py").write_text("A = 1\n\n\nclass B:\n    c: int\n\n    def d(self): ...\n")
    return tmp_path


def write(tree, *symbols, path="../code.py"):
    text = "\n".join(f"see [`{s}`]({path}#L99)" for s in symbols)
    (tree / "docs" / "page.md").write_text(text)


def test_numbers_are_rewritten(tree):
    write(tree, "A", "B", "B.c", "B.d")
    script = tree / "scripts" / "link_lines.py"
    stale = run(script, "--check")
    assert stale.returncode == 1
    assert "docs/page.md:3: `B.c` in ../code.py: expected line 5, got 99" in stale.stdout
    assert run(script).returncode == 0
    lines = [t.split("#L")[1][:-1] for t in (tree / "docs" / "page.md").read_text().splitlines()]
    assert lines == ["1", "4", "5", "7"]
    assert run(script, "--check").returncode == 0


@pytest.mark.parametrize(
    ("symbol", "path", "message"),
    [
        ("B.e", "../code.py", "no such symbol"),
        ("A.x", "../code.py", "no such symbol"),
        ("A", "../gone.py", "no such file"),
    ],
)
def test_what_is_gone_is_an_error(tree, symbol, path, message):
    write(tree, symbol, path=path)
    for arguments in ((), ("--check",)):
        result = run(tree / "scripts" / "link_lines.py", *arguments)
        assert result.returncode == 1
        assert message in result.stdout
