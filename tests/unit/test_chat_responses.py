"""Requests, items and output in OpenAI's Responses shape."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.chat import (
    AssistantMessage,
    Conversation,
    DeveloperMessage,
    NamedToolChoice,
    ReminderMessage,
    SystemMessage,
    Termination,
    TextPart,
    Tool,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from hadal.chat.openai_responses import (
    from_responses_request,
    to_responses_input,
    to_responses_output,
)
from hadal.errors import InvalidConversationError


def messages_of(*items, **fields):
    return from_responses_request({"input": list(items), **fields}).messages


def refusal(*items, **fields):
    with pytest.raises(InvalidConversationError) as caught:
        messages_of(*items, **fields)
    return caught.value


def user(text):
    return {"role": "user", "content": text}


def said(text):
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "id": "m", "role": "assistant", "status": "completed"} | {
        "content": [part]
    }


def thought(text):
    part = {"type": "reasoning_text", "text": text}
    return {"type": "reasoning", "id": "r", "summary": [], "content": [part]}


def call(call_id, name="f", arguments="{}"):
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def result(call_id, output="out"):
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def turn(*ids, content="", reasoning=None):
    calls = tuple(ToolCall("f", "{}", call_id) for call_id in ids)
    return AssistantMessage(content, reasoning, calls)


# Items


def test_input_is_text_or_items():
    assert from_responses_request({"input": "hi"}).messages == (UserMessage("hi"),)
    assert from_responses_request({}).messages == ()
    assert messages_of(user("hi"), {"role": "developer", "content": "d"}) == (
        UserMessage("hi"),
        SystemMessage("d"),
    )


def test_instructions_come_first():
    found = messages_of({"role": "system", "content": "s"}, instructions="first")
    assert found == (SystemMessage("first"), SystemMessage("s"))


def test_one_text_part_is_its_text_and_several_stay_parts():
    parts = [{"type": "input_text", "text": text} for text in ("a", "b")]
    assert messages_of(user(parts[:1])) == (UserMessage("a"),)
    assert messages_of(user(parts)) == (UserMessage((TextPart("a"), TextPart("b"))),)
    assert messages_of(call("c"), result("c", parts[:1]))[1] == ToolMessage("a", "c")


def test_the_items_of_one_turn_fold_into_one_message():
    found = messages_of(user("q"), thought("why"), said("text"), call("a"), call("b"))
    assert found == (UserMessage("q"), turn("a", "b", content="text", reasoning="why"))


def test_several_texts_and_thoughts_of_one_turn_are_kept_apart_by_blank_lines():
    found = messages_of(thought("one"), said("a"), thought("two"), thought(""), said("b"))
    assert found == (AssistantMessage((TextPart("a"), TextPart("b")), "one\n\ntwo"),)


def test_parallel_results_follow_their_calls():
    found = messages_of(call("a"), call("b"), result("b", "2"), result("a", "1"))
    assert found == (turn("a", "b"), ToolMessage("2", "b"), ToolMessage("1", "a"))


def test_calls_that_alternate_with_results_join_the_turn_that_began_with_reasoning():
    found = messages_of(thought("why"), call("a"), result("a"), call("b"), result("b"))
    results = ToolMessage("out", "a"), ToolMessage("out", "b")
    assert found == (turn("a", "b", reasoning="why"), *results)


def test_calls_that_alternate_with_results_are_turns_of_their_own_without_reasoning():
    found = messages_of(call("a"), result("a"), call("b"), result("b"))
    assert found == (turn("a"), ToolMessage("out", "a"), turn("b"), ToolMessage("out", "b"))


@pytest.mark.parametrize(
    ("between", "second"),
    [
        (thought("again"), turn("b", reasoning="again")),
        (said("well"), turn("b", content="well")),
        ({"type": "reasoning", "summary": []}, turn("b")),
    ],
)
def test_reasoning_or_text_behind_a_result_begins_a_turn(between, second):
    found = messages_of(thought("why"), call("a"), result("a"), between, call("b"))
    assert found == (turn("a", reasoning="why"), ToolMessage("out", "a"), second)


def test_a_late_result_goes_behind_its_turn():
    found = messages_of(call("a"), call("b"), result("a"), said("hm"), user("go"), result("b"))
    results = ToolMessage("out", "a"), ToolMessage("out", "b")
    assert found == (turn("a", "b"), *results, turn(content="hm"), UserMessage("go"))


def test_ids_that_repeat_in_each_turn_pair_with_the_latest_call():
    found = messages_of(
        thought("1"), call("call_0"), result("call_0", "x"), call("call_0"), result("call_0", "y")
    )
    assert found == (
        turn("call_0", reasoning="1"),
        ToolMessage("x", "call_0"),
        turn("call_0"),
        ToolMessage("y", "call_0"),
    )


@pytest.mark.parametrize(
    ("items", "where"),
    [
        ([result("a")], "input[0].call_id"),
        ([result("a"), call("a")], "input[0].call_id"),
        ([call("a"), result("a"), result("a")], "input[2].call_id"),
        ([call("a"), call("a")], "input[1].call_id"),
    ],
)
def test_results_that_pair_with_nothing_are_refused(items, where):
    assert refusal(*items).where == where


def test_the_call_of_a_result_may_be_in_a_previous_response():
    found = from_responses_request({"input": [result("a")], "previous_response_id": "resp_1"})
    assert found.messages == (ToolMessage("out", "a"),)
    assert found.options == {"previous_response_id": "resp_1"}


def test_a_summary_counts_only_without_the_text():
    summary = [{"type": "summary_text", "text": text} for text in ("a", "b")]
    item = {"type": "reasoning", "summary": summary, "content": None}
    assert messages_of(item)[0].reasoning_content == "a\n\nb"
    assert messages_of(thought("why") | {"summary": summary})[0].reasoning_content == "why"
    assert messages_of(thought("why") | {"encrypted_content": "x"})[0].reasoning_content == "why"
    assert messages_of(thought(""))[0].reasoning_content == ""
    error = refusal({"type": "reasoning", "summary": [], "encrypted_content": "x"})
    assert error.where == "input[0].encrypted_content"
    assert "send the text" in error.hint


@pytest.mark.parametrize(
    ("item", "where"),
    [
        ({"type": "item_reference", "id": "x"}, "input[0]"),
        ({"type": "web_search_call", "id": "x"}, "input[0]"),
        ({"type": "custom_tool_call"}, "input[0]"),
        ({"foo": 1}, "input[0]"),
        (7, "input[0]"),
        ({"role": "tool", "content": "x"}, "input[0].role"),
        (user([{"type": "input_image", "image_url": "u"}]), "input[0].content[0]"),
        (user([{"type": "input_file", "file_id": "u"}]), "input[0].content[0]"),
        (user(None), "input[0].content"),
        (call("a", arguments=[1]), "input[0].arguments"),
        (call("a") | {"foo": 1}, "input[0].foo"),
        (said("x") | {"phase": "commentary"}, "input[0].phase"),
        ({"type": "function_call", "name": "f"}, "input[0].call_id"),
    ],
)
def test_items_that_cannot_be_kept_are_refused_by_path(item, where):
    assert refusal(item).where == where


def test_item_references_and_built_in_items_have_a_hint_or_a_name():
    assert "send the item" in refusal({"type": "item_reference", "id": "x"}).hint
    assert "web_search_call" in str(refusal({"type": "web_search_call"}))


def test_citations_follow_the_policy():
    cited = said("x")
    cited["content"][0]["annotations"] = [{"type": "url_citation"}]
    assert refusal(cited).where == "input[0].content[0].annotations"
    found = from_responses_request({"input": [cited]}, unknown="warn")
    assert found.messages == (AssistantMessage("x"),)


# Requests

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": None}


def test_a_whole_request_is_read():
    schema = {"type": "object"}
    found = from_responses_request(
        {
            "model": "m",
            "input": "q",
            "tools": [TOOL | {"description": "d", "strict": True}],
            "tool_choice": {"type": "function", "name": "f"},
            "text": {
                "format": {"type": "json_schema", "name": "n", "schema": schema},
                "verbosity": "low",
            },
            "reasoning": {"effort": "high", "summary": "auto"},
            "store": False,
            "temperature": None,
        }
    )
    function = {"name": "f", "description": "d", "parameters": schema, "strict": True}
    assert found == Conversation(
        messages=(UserMessage("q"),),
        tools=(Tool(function),),
        tool_choice=NamedToolChoice("f"),
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        effort="high",
        options={
            "model": "m",
            "store": False,
            "text": {"verbosity": "low"},
            "reasoning": {"summary": "auto"},
        },
    )
    assert list(found.tools[0].function) == list(function)


def test_effort_none_is_chat_mode():
    found = from_responses_request({"input": "q", "reasoning": {"effort": "none"}})
    assert (found.mode, found.effort) == ("chat", None)


def test_formats_of_text():
    def read(fmt):
        return from_responses_request({"input": "q", "text": {"format": fmt}}).response_format

    assert read({"type": "text"}) is None
    assert read(None) is None
    assert read({"type": "json_object"}) == {"type": "json_object"}


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [TOOL | {"name": ""}]}, "tools[0].name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "some"}, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"instructions": [user("x")]}, "instructions"),
        ({"input": {"role": "user"}}, "input"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"reasoning": {"foo": 1}}, "reasoning.foo"),
        ({"foo": 1}, "foo"),
    ],
)
def test_a_request_that_cannot_be_kept_whole_is_refused(fields, where):
    with pytest.raises(InvalidConversationError) as caught:
        from_responses_request({"input": "q", **fields})
    assert caught.value.where == where


def test_built_in_tools_are_named():
    with pytest.raises(InvalidConversationError, match="web_search") as caught:
        from_responses_request({"input": "q", "tools": [{"type": "web_search"}]})
    assert "declare it as a function" in caught.value.hint


# Output


def test_output_items_have_ids_of_their_response():
    message = AssistantMessage("text", "why", (ToolCall("f", "{}", "c1"), ToolCall("g")))
    items = to_responses_output(message, response_id="resp_9")
    assert [item["id"] for item in items] == ["rs_9", "msg_9", "fc_9_0", "fc_9_1"]
    assert [item.get("call_id") for item in items[2:]] == ["c1", "call_9_1"]
    assert {item["status"] for item in items} == {"completed"}
    assert items == to_responses_output(message, response_id="resp_9")


@pytest.mark.parametrize(
    ("termination", "statuses"),
    [
        (Termination.STOP, ["completed", "completed"]),
        (Termination.LENGTH_IN_REASONING, ["incomplete", "completed"]),
        (Termination.LENGTH_IN_CONTENT, ["completed", "incomplete"]),
        (Termination.LENGTH_IN_CALL, ["completed", "completed"]),
    ],
)
def test_the_item_that_was_cut_off_is_incomplete(termination, statuses):
    message = AssistantMessage("text", "why", termination=termination)
    items = to_responses_output(message, response_id="resp_9")
    assert [item["status"] for item in items] == statuses


# Round trips

TEXT = st.text(max_size=6)
CONTENT = TEXT | st.lists(TEXT.map(TextPart), min_size=2, max_size=3).map(tuple)


@st.composite
def conversations(draw):
    """Histories as a server sees them: each turn's calls are answered before anything else."""
    messages = []
    for number in range(draw(st.integers(0, 5))):
        if not messages or not isinstance(messages[-1], AssistantMessage):
            kind = draw(st.sampled_from(["user", "system", "assistant", "calls"]))
        else:
            kind = draw(st.sampled_from(["user", "system"]))
        if kind == "user":
            messages.append(UserMessage(draw(CONTENT)))
        elif kind == "system":
            messages.append(SystemMessage(draw(CONTENT)))
        else:
            num_calls = draw(st.integers(1, 3)) if kind == "calls" else 0
            ids = [f"call_{number}_{i}" for i in range(num_calls)]
            calls = tuple(ToolCall(draw(TEXT), draw(TEXT) or "{}", i) for i in ids)
            messages.append(AssistantMessage(draw(CONTENT), draw(st.none() | TEXT), calls))
            messages += [ToolMessage(draw(CONTENT), i) for i in draw(st.permutations(ids))]
    return messages


@settings(derandomize=True, deadline=None)
@given(conversations())
def test_messages_survive_writing_and_reading(messages):
    body = json.dumps({"input": to_responses_input(messages)})
    assert list(from_responses_request(body).messages) == messages


def test_a_call_behind_a_reasoned_turn_stays_a_turn_of_its_own():
    messages = [turn("a", reasoning="why"), ToolMessage("out", "a"), turn("b")]
    assert messages_of(*to_responses_input(messages)) == tuple(messages)


@settings(derandomize=True, deadline=None)
@given(
    st.builds(
        AssistantMessage,
        TEXT,  # a completion is one text
        st.none() | TEXT,
        st.lists(st.sampled_from("abc"), unique=True).map(
            lambda ids: tuple(ToolCall("f", "{}", i) for i in ids)
        ),
    )
)
def test_output_sent_back_as_input_is_the_same_turn(message):
    (found,) = messages_of(*to_responses_output(message, response_id="resp_1"))
    assert found == message


@pytest.mark.parametrize(
    "messages",
    [
        [DeveloperMessage("d")],
        [ReminderMessage("r")],
        [SystemMessage("s", tools=(Tool.of("f"),))],
        [UserMessage("u", task="action")],
        [AssistantMessage("a", prefix=True)],
        [AssistantMessage("a"), AssistantMessage("b")],
        [AssistantMessage(tool_calls=(ToolCall("f"),))],
        [ToolMessage("r")],
    ],
)
def test_what_has_no_item_is_not_written(messages):
    with pytest.raises(InvalidConversationError, match="messages"):
        to_responses_input(messages)
