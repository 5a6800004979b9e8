"""The loop against models that behave, and against models that do not: always a reason, or a recovery."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from hadal.agent import Agent, AgentConfig, Journal, Limits, Outcome, StopReason, patience
from hadal.backends.scripted_backend import ScriptedBackend
from hadal.chat import AssistantMessage, ToolMessage, UserMessage
from hadal.encoding.tokens import DSML, EOS, THINK_END
from hadal.errors import ConfigError, NodeError, UpstreamError, UpstreamRefusedError
from hadal.tools import Toolbox, tool
from tests.agent.conftest import add, answer, calls


def texts(trajectory, kind):
    return [m.content for m in trajectory.messages if isinstance(m, kind)]


def test_a_call_and_an_answer(run):
    ending, trajectory = run([calls({"a": 2, "b": 3}), answer("5")])
    assert (ending.reason, ending.text, ending.outcome) == (StopReason.DONE, "5", Outcome.SCORED)
    assert texts(trajectory, ToolMessage) == ["5"]
    assert [m.reasoning_content for m in trajectory.messages if isinstance(m, AssistantMessage)] == [
        "I add.", "That is done.",
    ]  # fmt: skip


def test_the_second_prompt_begins_with_all_ids_before_it(run):
    _, trajectory = run([calls({"a": 2, "b": 3}), answer("5"), answer("6")], ["Add.", "And now?"])
    first, second, third = run.backend.prompts
    assert second[: len(first)] == first
    assert third[: len(second)] == second
    assert trajectory.ids[: len(third)] == third
    text = run.encoding.decode(third)
    assert "<think>I add.</think>" in text
    assert text.endswith("<｜User｜>And now?<｜Assistant｜><think>")
    said = [i for i, own in zip(trajectory.ids, trajectory.said, strict=True) if own]
    assert run.encoding.decode(said).count(EOS) == 3


def test_calls_of_one_reply_run_side_by_side(run):
    barrier = asyncio.Barrier(2)

    @tool
    async def wait(n: int) -> str:
        """Wait until both run."""
        async with asyncio.timeout(5):
            await barrier.wait()
        return str(n)

    _, trajectory = run([calls({"n": 1}, {"n": 2}, name="wait"), answer("ok")], tools=[wait])
    assert texts(trajectory, ToolMessage) == ["1", "2"]


def test_wrong_calls_are_told(run):
    ending, trajectory = run(
        [calls({"a": "x", "b": 3}), calls({"q": 1}, name="nothing"), answer("I give up.")]
    )
    first, second = texts(trajectory, ToolMessage)
    assert first.startswith("Error: The call of add was not run: its arguments do not fit.\n- a: ")
    assert second == 'Error: The call was not run: there is no tool "nothing"; the tools are: add.'
    assert ending.reason is StopReason.DONE


BROKEN = ["I add.", THINK_END, "\n\n<", DSML, "tool_calls>\n<", DSML, 'invoke nome="add">\n</', DSML, "tool_calls>", EOS]  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "reason", "told"),
    [
        (BROKEN, StopReason.MALFORMED, "could not be read"),
        (["hm", THINK_END, EOS], StopReason.EMPTY, "was empty"),
        (["hm", THINK_END, " \n", EOS], StopReason.EMPTY, "was empty"),
        (["so " * 500], StopReason.ENDLESS_REASONING, "while you were thinking"),
        (["hm", THINK_END, "word " * 500], StopReason.CUT_OFF, "was cut off"),
        (calls({"a": 1, "b": 10**300}), StopReason.CUT_OFF, "was cut off"),
    ],
    ids=["malformed", "empty", "blank", "endless", "answer", "call"],
)
def test_replies_that_lead_to_nothing(run, reply, reason, told):
    limits = Limits(reply=200, bad_turns=3)
    ending, trajectory = run([reply] * 3, limits=limits)
    assert ending.reason is reason
    assert ending.outcome is Outcome.FAILED
    assert told in texts(trajectory, UserMessage)[1]
    assert len(run.backend.prompts) == 3

    run.path.unlink()
    ending, trajectory = run([reply, calls({"a": 1, "b": 2}), answer("3")], limits=limits)
    assert ending.reason is StopReason.DONE
    assert trajectory.bad_turns == 0


def test_equal_calls_end(run):
    ending, _ = run([calls({"a": 2, "b": 3})] * 9, limits=Limits(same_calls=4))
    assert ending.reason is StopReason.REPETITION
    assert len(run.backend.prompts) == 4


def test_turns_end(run):
    ending, _ = run([calls({"a": n, "b": 3}) for n in range(9)], limits=Limits(turns=5))
    assert ending.reason is StopReason.MAX_TURNS
    assert len(run.backend.prompts) == 5


def test_the_window_ends(run):
    @tool
    def more() -> str:
        """Say much."""
        return "word " * 400

    ending, trajectory = run([calls({}, name="more")] * 9, tools=[more], max_model_len=4000)
    assert ending.reason is StopReason.CONTEXT_FULL
    assert len(trajectory.ids) < 4000
    assert len(run.backend.prompts) < 5


def test_ten_megabytes_of_output_do_not_break_it(run):
    @tool
    def much() -> str:
        """Say too much."""
        return "x" * (10 << 20)

    ending, _ = run([calls({}, name="much"), answer("ok")], tools=[much])
    assert ending.reason is StopReason.DONE
    [shown] = [e["text"] for e in run.events if e["kind"] == "result"]
    assert len(shown) < 100_000
    assert "10,485,760" in shown


@pytest.mark.parametrize(
    ("rest", "closes"),
    [(["<", DSML, 'invoke name="add">\nnonsense</', DSML, "invoke>\n"], True),
     (["<", DSML, 'invoke name="add">\n<', DSML, 'parameter name="a" string="false">1'], False)],
)  # fmt: skip
def test_what_could_not_be_read_beside_a_good_call_is_told(run, rest, closes):
    whole = calls({"a": 1, "b": 2})
    good, close = whole[:-4], whole[-4:]
    first = [*good, *rest, *(close if closes else [])]
    ending, trajectory = run([first, answer("3")])
    assert ending.reason is StopReason.DONE
    results = [e["text"] for e in run.events if e["kind"] == "result"]
    assert results[0] == "3"
    told = [e for e in run.events if e["kind"] == "user" and e.get("by") == "harness"]
    assert len(told) == 1, [e for e in run.events if e["kind"] == "reply"]
    assert "could not be read" in told[0]["text"]
    assert trajectory.lost == ""


class Late:
    """A server that is not up at first, and says how much it takes only then."""

    follows_grammars = False

    def __init__(self, backend, failures):
        self.backend, self.failures = backend, failures
        self.max_model_len = 1 << 20

    async def ready(self):
        if self.failures:
            raise self.failures.pop()
        self.max_model_len = 3000

    def generate(self, generation):
        assert len(generation.prompt_ids) + generation.sampling["max_tokens"] <= 3000
        return self.backend.generate(generation)


def test_the_window_is_known_before_the_first_prompt(run, monkeypatch):
    monkeypatch.setattr(patience, "_PAUSES_S", (0.01, 0.02))
    gone = [UpstreamError("nobody listens")] * 2
    ending, _ = run([answer("3")], wrap=lambda backend: Late(backend, gone))
    assert ending.reason is StopReason.DONE
    assert [e["kind"] for e in run.events][:3] == ["retry", "retry", "start"]
    assert next(e for e in run.events if e["kind"] == "start")["window"] == 3000


def test_a_server_that_never_comes_up_is_our_failure(run, monkeypatch):
    monkeypatch.setattr(patience, "_PAUSES_S", (0.01, 0.02))
    gone = [UpstreamError("nobody listens")] * 1000
    limits = Limits(patience_s=0.05)
    ending, _ = run([answer("3")], wrap=lambda backend: Late(backend, gone), limits=limits)
    assert (ending.reason, ending.outcome) == (StopReason.MODEL_FAILED, Outcome.VOID)
    ending, _ = run([answer("3")], wrap=lambda backend: Late(backend, []))
    assert ending.reason is StopReason.DONE


def test_an_effort_that_the_format_does_not_have(run):
    with pytest.raises(ConfigError, match="effort"):
        run([answer("3")], effort="banana")
    assert run.events == []


def test_our_failures_are_void(run):
    @tool
    def fine() -> str:
        """Work."""
        return "ok"

    class Broken:
        declaration = fine.declaration

        async def call(self, arguments, request_id, said):
            raise NodeError("the node is gone")

    ending, _ = run([calls({}, name="fine")], tools=[Broken()])
    assert (ending.reason, ending.outcome) == (StopReason.SANDBOX_FAILED, Outcome.VOID)
    assert "the node is gone" in ending.text

    run.path.unlink()
    ending, _ = run([])  # the script is empty: an error of the backend
    assert (ending.reason, ending.outcome) == (StopReason.MODEL_FAILED, Outcome.VOID)


def test_reasoning_of_earlier_turns_can_be_dropped(run):
    run([answer("1", "SECRET"), answer("2")], ["One.", "Two."], keep_reasoning=False)
    assert "SECRET" not in run.encoding.decode(run.backend.prompts[1])


def test_calls_are_held_to_their_grammar_where_that_can_be(run, encoding, tmp_path):
    class Following(ScriptedBackend):
        """Notes what it should follow."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.follows_grammars = True
            self.grammars = []

        def generate(self, generation):
            self.grammars.append(generation.grammar)
            return super().generate(generation)

    def agent(backend, journal, **settings):
        return Agent(
            backend, encoding, Toolbox([add]), journal, AgentConfig(hold_calls=True, **settings)
        )

    script = [calls({"a": 1, "b": 2}), answer("3")]
    for mode, after in (("thinking", encoding.tokenizer.control_id(THINK_END)), ("chat", None)):
        backend = Following(encoding.tokenizer, script if mode == "thinking" else [["3", EOS]])
        with Journal(tmp_path / f"{mode}.jsonl") as journal:
            asyncio.run(agent(backend, journal, mode=mode).run(["Add."]))
        assert {g.after for g in backend.grammars} == {after}
        assert all(g.structural_tag for g in backend.grammars)
    with (
        Journal(tmp_path / "not.jsonl") as journal,
        pytest.raises(ConfigError, match="cannot hold"),
    ):
        agent(ScriptedBackend(encoding.tokenizer, script), journal)


class Gone:
    """A backend that cannot be reached for some tries, and then is one that can."""

    def __init__(self, backend, failures, error):
        self._backend, self.left, self._error = backend, failures, error
        self.max_model_len, self.follows_grammars = backend.max_model_len, False

    async def ready(self):
        """It is known how much it takes."""

    @asynccontextmanager
    async def generate(self, generation):
        if self.left:
            self.left -= 1
            raise self._error
        async with self._backend.generate(generation) as events:
            yield events


def test_a_model_that_is_gone_for_a_while_is_waited_for(run, monkeypatch):
    monkeypatch.setattr(patience, "_PAUSES_S", (0.01, 0.02))
    limits = Limits(patience_s=0.2)
    gone = UpstreamError("nobody answers")
    ending, _ = run([answer("1")], wrap=lambda b: Gone(b, 5, gone), limits=limits)
    assert ending.reason is StopReason.DONE
    assert [e["kind"] for e in run.events].count("retry") == 5

    run.path.unlink()
    ending, _ = run([answer("1")], wrap=lambda b: Gone(b, 1000, gone), limits=limits)
    assert (ending.reason, ending.outcome) == (StopReason.MODEL_FAILED, Outcome.VOID)

    run.path.unlink()
    refused = UpstreamRefusedError("wrong key")
    ending, _ = run([answer("1")], wrap=lambda b: Gone(b, 1, refused), limits=limits)
    assert "wrong key" in ending.text
    assert "retry" not in [e["kind"] for e in run.events]
