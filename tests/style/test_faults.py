"""Planted faults stand in the sources as they are: a change of a line is seen at once, and not by the run of an hour."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from faults.engine import ENGINE  # noqa: E402
from faults.model import MODEL  # noqa: E402


@pytest.mark.parametrize("fault", [*MODEL, *ENGINE], ids=lambda f: f.name)
def test_its_text_occurs_once(fault):
    text = (ROOT / "src" / "hadal" / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1
    assert all((ROOT / test.split("::")[0]).exists() for test in fault.tests)
