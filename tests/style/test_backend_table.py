"""The table of what each kind of box supports is that of the suite."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DASH = "\N{EN DASH}"


def test_the_table_is_up_to_date():
    script = [sys.executable, ROOT / "scripts/backend_table.py", "--check"]
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_kind_of_box_has_a_column_and_a_dash_where_it_cannot():
    text = (ROOT / "docs/backends.md").read_text(encoding="utf-8")
    (call,) = [line for line in text.splitlines() if line.startswith("| `call` |")]
    assert [cell.strip() for cell in call.strip("|").split("|")][2:] == [DASH, "yes", DASH, DASH]
