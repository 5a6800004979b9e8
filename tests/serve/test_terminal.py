"""`hadal chat` as a user has it: typed lines in, reasoning, calls and answers out."""

import json
import subprocess
import sys
from pathlib import Path

from tests.golden.data import tokenizer_file
from tests.serve.fixtures import TOOLS, answer, call, encoding, scripted, serving

HADAL = str(Path(sys.executable).parent / "hadal")


def test_a_conversation_with_a_tool(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    front = scripted(call("ls", thought="I look."), answer("One \x1b[2J[red]file."), answer("Bye."))
    with serving(front) as url:
        result = subprocess.run(
            [
                HADAL, "chat", "--upstream", url, "--tokenizer", str(tokenizer_file()),
                "--generation", "v4", "--tools", str(tmp_path / "tools.json"), "--system", "Be brief.",
            ],
            input="List the files.\na.txt\n\nThanks.\n",
            capture_output=True,
            text=True,
            timeout=60,
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for shown in (
        "I look.",
        'run {"command": "ls"}',
        "result of run>",
        "[red]file.",
        "Bye.",
        "stop]",
    ):
        assert shown in result.stdout
    assert "\x1b" not in result.stdout
    prompts = [encoding().decode(ids) for ids in front.backend.inner.prompts]
    assert "Be brief." in prompts[0]
    assert "<tool_result>a.txt</tool_result>" in prompts[1]
    assert prompts[2].endswith("<｜User｜>Thanks.<｜Assistant｜><think>")


def test_wrong_tools_file(tmp_path):
    (tmp_path / "tools.json").write_text("{")
    command = [HADAL, "chat", "x", "--tools", str(tmp_path / "tools.json")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "--tools" in result.stderr
    assert "Traceback" not in result.stderr
