"""Rules that the tree keeps: sizes, docstrings, no side effects, layers, markers."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
ALL_PYTHON = [
    *SOURCES,
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *sorted((ROOT / "scripts").glob("*.py")),
]
MADE = {"sync.py": "scripts/make_sync.py"}
"""Files that a script writes, and nobody reads from end to end."""
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 70


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", ALL_PYTHON, ids=relative)
def test_sizes_and_module_docstring(path):
    text = path.read_text(encoding="utf-8")
    if f"made by {MADE.get(path.name)}" not in text:
        assert len(text.splitlines()) <= MAX_FILE_LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_public_names_are_declared_and_exist(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assigned = [
        n
        for n in tree.body
        if isinstance(n, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id == "__all__" for t in n.targets)
    ]
    if path.name in ("__init__.py", "__main__.py") and not assigned:
        return
    assert assigned, "no __all__"
    names = ast.literal_eval(assigned[0].value)
    defined = {n.name for n in tree.body if hasattr(n, "name")}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        defined |= {t.id for t in targets if isinstance(t, ast.Name)}
        if isinstance(node, ast.ImportFrom):
            defined |= {a.asname or a.name for a in node.names}
    assert set(names) <= defined


def test_no_folder_without_a_meaning():
    forbidden = {"utils", "common", "core", "helpers", "misc"}
    names = {p.stem for p in SOURCES} | {p.name for p in (ROOT / "src").rglob("*") if p.is_dir()}
    assert not names & forbidden


def test_import_prints_nothing_and_does_not_load_torch():
    code = (
        "import sys, hadal, hadal.config, hadal.cost, hadal.errors, hadal.cli.main\n"
        "import hadal.chat, hadal.encoding\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "assert 'transformers' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""


def test_every_import_is_declared():
    """What the sources import is what an extra installs: jaxtyping was once forgotten."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [
        *project["dependencies"],
        *extras["engine"],
        *extras["serve"],
        *extras["sandbox"],
        *extras["node"],
        *extras["mcp"],
        *extras["plot"],
        *extras["parity"],
    ]
    names = {re.match(r"[A-Za-z0-9_-]+", d)[0].lower().replace("-", "_") for d in declared}
    names |= {"dns"} if "dnspython" in names else set()
    imported = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    newer = {"compression"}  # of the standard library since 3.14
    assert imported - set(sys.stdlib_module_names) - newer - {"hadal"} <= names


def test_layers_point_one_way():
    tool = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([tool], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout
    assert "3 kept, 0 broken" in result.stdout


def test_nothing_names_the_workplace():
    """No paths of a machine, no hosts of a registry."""
    # assembled here, so that this file does not contain them
    forbidden = [
        "/wo" + "rk/",
        "/ro" + "ot/",
        "pypi" + ".org",
        "files.python" + "hosted",
        "deb.deb" + "ian.org",
        "registry.npm" + "js",
    ]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.stat().st_size < 2_000_000:
            text = path.read_bytes().decode("utf-8", errors="ignore")
            assert not [w for w in forbidden if w in text], name
