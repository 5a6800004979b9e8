"""Whole agents on a trivial task: the model's calls run, their results come back to it."""

import pytest

from tests.clients.fixtures import prompts, run_dsh, run_program
from tests.serve.fixtures import answer, call, scripted, serving

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_mini_swe_agent(tmp_path, provider):
    """It makes a file, is told off for a turn without a call, and hands in."""
    front = scripted(
        call("echo hello > made.txt; cat made.txt", thought="Make it.", tool="bash"),
        answer("Is that all?", thought="Talk."),
        call(
            "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; cat made.txt",
            thought="Hand it in.",
            tool="bash",
        ),
    )
    front.memory = None  # what it does not send is lost
    home, workspace = tmp_path / "home", tmp_path / "workspace"
    home.mkdir()
    workspace.mkdir()
    with serving(front) as url:
        ended = run_program(
            "mini_swe_agent.py",
            home,
            model=f"{provider}/hadal",
            api_base=url + ("/v1" if provider == "openai" else ""),
            cwd=str(workspace),
            task="Make made.txt.",
        )
    assert (workspace / "made.txt").read_text() == "hello\n"
    assert (ended["exit_status"], ended["submission"]) == ("Submitted", "hello\n")
    # "Is that all?" is kept by nobody: the agent forgets a turn that it could not use
    assert ended["roles"] == ["system", "user", "assistant", "tool", "user", "assistant", "exit"]
    seen = prompts(front)
    assert "Make made.txt." in seen[0]
    assert seen[1].startswith(seen[0] + "Make it.</think>")
    assert seen[2].startswith(seen[1].removesuffix("<｜Assistant｜><think>"))
    assert '"output": "hello\\n"' in seen[1][len(seen[0]) :]
    assert "No tool calls found" in seen[2][len(seen[1]) :]


def test_dsh(tmp_path):
    """DeepSeek's own harness, one task without a terminal: two steps, reasoning sent back."""
    front = scripted(
        call(
            "echo hello > made.txt; cat made.txt",
            thought="Make it.",
            said="Making it.",
            tool="bash",
            description="Make the file",
        ),
        answer("It is made."),
    )
    front.memory = None  # what it does not send is lost
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    patch = tmp_path / "patch.yml"
    # a title would be asked for meanwhile, and the script answers in order
    patch.write_text("- id: session-title-llm\n  disabled: true\n")
    with serving(front) as url:
        result = run_dsh(
            ["--profile", "headless", "--patch", str(patch), "Make made.txt."],
            home=tmp_path,
            cwd=workspace,
            DEEPSEEK_BASE_URL=f"{url}/v1",
        )
    assert (result.returncode, result.stdout) == (0, "It is made.\n"), result.stderr[-4000:]
    assert (workspace / "made.txt").read_text() == "hello\n"
    first, second = prompts(front)
    assert "Make made.txt." in first
    assert second.startswith(first + "Make it.</think>Making it.")
    assert "<tool_result>hello" in second[len(first) :]
