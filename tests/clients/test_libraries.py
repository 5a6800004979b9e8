"""Libraries in two turns with a tool, streamed and whole, reasoning kept and dropped.

The `openai` SDK before version 3 (tests/serve/test_sdks.py has version 3), and `litellm` by each of
its providers that speaks a language of ours.
"""

import itertools

import pytest

from tests.clients.fixtures import prompts, run_program
from tests.serve.fixtures import answer, call, scripted, serving

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(
    ("program", "version", "apis"),
    [
        ("openai_sdk.py", "2.", ["chat", "responses"]),
        ("litellm_client.py", "1.", ["openai", "hosted_vllm", "deepseek", "anthropic"]),
    ],
    ids=["openai-2", "litellm"],
)
def test_two_turns_with_a_tool(tmp_path, program, version, apis, keeps):
    """The second prompt is the first and what was said, whether the client or we remember it."""
    cases = [
        {"api": api, "streamed": streamed, "keeps": keeps}
        for api, streamed in itertools.product(apis, (True, False))
    ]
    turns = [
        (call(f"ls {n}", thought=f"It is {n}.", said=f"Looking {n}."), answer(f"Done {n}."))
        for n in range(len(cases))
    ]
    front = scripted(*itertools.chain.from_iterable(turns))
    if keeps:
        front.memory = None
    with serving(front) as url:
        found = run_program(program, tmp_path, url=url, cases=cases)
    assert found["version"].startswith(version)
    for n, (case, seen) in enumerate(zip(cases, found["seen"], strict=True)):
        expected = {
            "finish": ["tool_calls", "stop"],
            "reasoning": [f"It is {n}.", "Easy."],
            "content": [f"Looking {n}.", f"Done {n}."],
            "call": ["run", {"command": f"ls {n}"}],
        }
        assert seen == expected, case
        first, second = prompts(front)[2 * n : 2 * n + 2]
        assert second.startswith(f"{first}It is {n}.</think>Looking {n}."), case
        assert "<tool_result>a.txt</tool_result>" in second[len(first) :], case
