"""The official SDKs against a running server (issue: line 5): chat and messages, streamed and whole."""

import json

import anthropic
import openai
import pytest

from tests.serve.fixtures import TOOLS, answer, call, encoding, engine_front, scripted, serving

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUESTION = [{"role": "user", "content": "List the files."}]


def client(url, **settings):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, **settings)


def test_chat_with_tools_whole():
    with serving(scripted(call("ls -a", said="Looking."))) as url, client(url) as api:
        reply = api.chat.completions.create(model="hadal", messages=QUESTION, tools=TOOLS)
    [choice] = reply.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content.strip() == "Looking."
    assert choice.message.reasoning_content == "Look."
    [made] = choice.message.tool_calls
    assert (made.function.name, json.loads(made.function.arguments)) == (
        "run",
        {"command": "ls -a"},
    )
    assert reply.usage.completion_tokens_details.reasoning_tokens == 2


def test_chat_with_tools_streamed():
    with serving(scripted(call("ls -a", said="Looking."))) as url, client(url) as api:
        chunks = list(
            api.chat.completions.create(
                model="hadal",
                messages=QUESTION,
                tools=TOOLS,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert "".join(d.content or "" for d in deltas).strip() == "Looking."
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "Look."
    [made] = [t for d in deltas for t in d.tool_calls or ()]
    assert json.loads(made.function.arguments) == {"command": "ls -a"}
    assert chunks[-1].usage.completion_tokens > 10
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "tool_calls"


@pytest.mark.parametrize("keeps", [True, False])
def test_reasoning_survives_a_client_that_drops_it(keeps):
    """The prompt of the second turn has the reasoning of the first, whichever the client does."""
    front = scripted(call("ls", thought="The answer is 42."), answer("Done."))
    with serving(front) as url, client(url) as api:
        first = api.chat.completions.create(model="hadal", messages=QUESTION, tools=TOOLS)
        message = first.choices[0].message
        turn = message.model_dump(exclude_none=True)
        if not keeps:
            turn = {k: turn[k] for k in ("role", "tool_calls")}
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "a.txt"}
        raw = api.chat.completions.with_raw_response.create(
            model="hadal", messages=[*QUESTION, turn, result], tools=TOOLS
        )
    restored = raw.headers.get("x-hadal-reasoning-restored")
    assert restored == (None if keeps else "1")
    assert raw.parse().choices[0].message.content == "Done."
    prompt = encoding().decode(front.backend.inner.prompts[1])
    assert "The answer is 42.</think>" in prompt
    assert prompt.startswith(encoding().decode(front.backend.inner.prompts[0]))


def test_n_choices_and_seeds_on_the_engine():
    with serving(engine_front()) as url, client(url) as api:
        ask = {"model": "hadal", "messages": QUESTION, "n": 3, "seed": 5, "max_tokens": 5}
        whole = api.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
        again = api.chat.completions.create(**ask)
        streamed = list(api.chat.completions.create(**ask, stream=True))
    said = [c.message.reasoning_content for c in whole.choices]
    assert len(set(said)) == 3
    assert said == [c.message.reasoning_content for c in again.choices]
    for index in range(3):
        deltas = [c.choices[0].delta for c in streamed if c.choices[0].index == index]
        text = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
        assert text == said[index]
    scored = whole.choices[0].logprobs.content
    assert len(scored) == 5
    assert all(len(entry.top_logprobs) == 2 for entry in scored)
    assert again.usage.prompt_tokens_details.cached_tokens == 0  # shorter than a block


def test_completions_with_ids_and_echo():
    with serving(engine_front()) as url, client(url) as api:
        reply = api.completions.create(
            model="hadal", prompt=[0, 100, 200, 300], max_tokens=3, echo=True, logprobs=1
        )
        zero = api.completions.create(
            model="hadal", prompt=[[0, 100], [0, 7, 9]], max_tokens=0, echo=True, logprobs=0
        )
    scored = reply.choices[0].logprobs
    assert len(scored.tokens) == 7
    assert scored.token_logprobs[0] is None
    assert all(value <= 0 for value in scored.token_logprobs[1:])
    assert [len(c.logprobs.tokens) for c in zero.choices] == [2, 3]


def test_messages_whole_and_streamed():
    tools = [
        {"name": "run", "description": "Run.", "input_schema": TOOLS[0]["function"]["parameters"]}
    ]
    ask = {"model": "hadal", "max_tokens": 100, "messages": QUESTION, "tools": tools}
    front = scripted(call("ls", said="Looking."), call("ls", said="Looking."), answer("Done."))
    with (
        serving(front) as url,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as api,
    ):
        whole = api.messages.create(**ask)
        with api.messages.stream(**ask) as stream:
            streamed = stream.get_final_message()
        counted = api.messages.count_tokens(
            model="hadal", messages=QUESTION, tools=tools
        ).input_tokens
        result = {"type": "tool_result", "tool_use_id": streamed.content[-1].id, "content": "a.txt"}
        kept = [block.model_dump(exclude_none=True) for block in streamed.content[1:]]
        turn = {"role": "assistant", "content": kept}  # all but the thinking
        done = api.messages.create(
            **ask | {"messages": [*QUESTION, turn, {"role": "user", "content": [result]}]}
        )
    for message in (whole, streamed):
        assert message.stop_reason == "tool_use"
        assert [b.type for b in message.content] == ["thinking", "text", "tool_use"]
        assert message.content[0].thinking == "Look."
        assert message.content[0].signature == whole.content[0].signature != ""
        assert message.content[2].input == {"command": "ls"}
    assert whole.usage.input_tokens == counted
    assert done.content[-1].text == "Done."
    assert "Look.</think>" in encoding().decode(front.backend.inner.prompts[2])


RESPONSE_TOOLS = [{"type": "function", **TOOLS[0]["function"], "strict": False}]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("by_id", [True, False])
def test_responses(streamed, by_id):
    """Two turns: history kept by the server, or sent back item by item."""
    front = scripted(call("ls", said="Looking."), answer("Done."))

    def ask(api, **settings):
        settings = {
            "model": "hadal",
            "tools": RESPONSE_TOOLS,
            "instructions": "Be brief.",
        } | settings
        if not streamed:
            return api.responses.create(**settings)
        with api.responses.stream(**settings) as stream:
            return stream.get_final_response()

    with serving(front) as url, client(url) as api:
        first = ask(api, input="List the files.")
        made = first.output[-1]
        result = {"type": "function_call_output", "call_id": made.call_id, "output": "a.txt"}
        if by_id:
            second = ask(api, input=[result], previous_response_id=first.id)
        else:
            sent = [item.model_dump(exclude_none=True) for item in first.output]
            second = ask(api, input=[{"role": "user", "content": "List the files."}, *sent, result])
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
    assert first.output[0].content[0].text == "Look."
    assert first.output_text.strip() == "Looking."
    assert (made.name, json.loads(made.arguments)) == ("run", {"command": "ls"})
    assert second.output_text == "Done."
    assert second.status == "completed"
    prompts = [encoding().decode(ids) for ids in front.backend.inner.prompts]
    assert prompts[1].startswith(prompts[0] + "Look.</think>Looking.")


@pytest.mark.parametrize("streamed", [True, False])
def test_responses_that_nobody_stores(streamed):
    """A stateless client gets the reasoning sealed, sends nothing else back, and loses nothing."""
    front = scripted(call("ls", said="Looking."), answer("Done."))
    front.memory = None
    ask = {
        "model": "hadal",
        "tools": RESPONSE_TOOLS,
        "store": False,
        "include": ["reasoning.encrypted_content"],
    }
    with serving(front) as url, client(url) as api:
        if streamed:
            with api.responses.stream(**ask, input="List the files.") as stream:
                first = stream.get_final_response()
        else:
            first = api.responses.create(**ask, input="List the files.")
        sent = [item.model_dump(exclude_none=True) for item in first.output]
        sent[0] |= {"content": [], "summary": [{"type": "summary_text", "text": "shorter"}]}
        made = first.output[-1]
        result = {"type": "function_call_output", "call_id": made.call_id, "output": "a.txt"}
        history = [{"role": "user", "content": "List the files."}, *sent, result]
        api.responses.create(**ask, input=history)
        sent[0]["encrypted_content"] = sent[0]["encrypted_content"][:-4]
        with pytest.raises(openai.BadRequestError, match="is damaged"):
            api.responses.create(**ask, input=history)
    prompts = [encoding().decode(ids) for ids in front.backend.inner.prompts]
    assert prompts[1].startswith(prompts[0] + "Look.</think>Looking.")


@pytest.mark.parametrize("streamed", [True, False])
def test_thinking_of_which_only_the_signature_came_back(streamed):
    front = scripted(call("ls"), answer("Done."))
    front.memory = None
    parameters = TOOLS[0]["function"]["parameters"]
    tools = [{"name": "run", "description": "Run.", "input_schema": parameters}]
    ask = {"model": "hadal", "max_tokens": 100, "tools": tools}
    with (
        serving(front) as url,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as api,
    ):
        if streamed:
            with api.messages.stream(**ask, messages=QUESTION) as stream:
                first = stream.get_final_message()
        else:
            first = api.messages.create(**ask, messages=QUESTION)
        turn = [block.model_dump(exclude_none=True) for block in first.content]
        turn[0]["thinking"] = ""
        result = {"type": "tool_result", "tool_use_id": turn[-1]["id"], "content": "a.txt"}
        api.messages.create(
            **ask,
            messages=[
                *QUESTION,
                {"role": "assistant", "content": turn},
                {"role": "user", "content": [result]},
            ],
        )
    prompts = [encoding().decode(ids) for ids in front.backend.inner.prompts]
    assert prompts[1].startswith(prompts[0] + "Look.</think>")


def test_responses_that_are_not_known():
    with serving(scripted(answer("Done."))) as url, client(url) as api:
        with pytest.raises(openai.NotFoundError, match="is not known here"):
            api.responses.create(model="hadal", input="a", previous_response_id="resp_x")
        with pytest.raises(openai.BadRequestError, match="background"):
            api.responses.create(model="hadal", input="a", background=True)
