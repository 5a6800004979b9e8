"""Requests and content blocks in Anthropic's Messages shape."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.chat import (
    AssistantMessage,
    Conversation,
    DeveloperMessage,
    ImagePart,
    NamedToolChoice,
    ReminderMessage,
    SystemMessage,
    TextPart,
    Tool,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from hadal.chat.anthropic import (
    TOOL_ERROR_MARK,
    from_anthropic_request,
    thinking_signature,
    to_anthropic_content,
    to_anthropic_request,
)
from hadal.errors import InvalidConversationError


def text(value, **fields):
    return {"type": "text", "text": value, **fields}


def user(*blocks):
    return {"role": "user", "content": list(blocks)}


def said(*blocks):
    return {"role": "assistant", "content": list(blocks)}


def use(call_id, **arguments):
    return {"type": "tool_use", "id": call_id, "name": "f", "input": arguments}


def result(call_id, content="out", **fields):
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **fields}


THOUGHT = {"type": "thinking", "thinking": "why", "signature": "xyz"}


def read(*messages, **fields):
    return from_anthropic_request({"messages": list(messages), **fields})


def messages_of(*messages, **fields):
    return read(*messages, **fields).messages


def refusal(*messages, **fields):
    with pytest.raises(InvalidConversationError) as caught:
        read(*messages, **fields)
    return caught.value


# Messages


def test_content_is_text_or_blocks():
    assert messages_of({"role": "user", "content": "hi"}) == (UserMessage("hi"),)
    assert messages_of(user(text("hi"))) == (UserMessage("hi"),)
    assert messages_of(user(text("a"), text("b"))) == (UserMessage((TextPart("a"), TextPart("b"))),)
    assert messages_of(user()) == (UserMessage(""),)


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("s", [SystemMessage("s")]),
        ([text("s", cache_control={"type": "ephemeral"})], [SystemMessage("s")]),
        ([text("a"), text("b")], [SystemMessage((TextPart("a"), TextPart("b")))]),
        ([], []),
        (None, []),
    ],
)
def test_the_system_text_comes_first(system, expected):
    assert list(messages_of(user(text("u")), system=system)) == [*expected, UserMessage("u")]


def test_a_system_message_may_stand_among_the_others():
    found = messages_of(user(text("u")), {"role": "system", "content": "now"})
    assert found == (UserMessage("u"), SystemMessage("now"))


def test_a_turn_of_the_model_has_thinking_text_and_calls():
    found = messages_of(said(THOUGHT, text("a"), use("c1", ort="Köln")), user(result("c1")))
    assert found == (
        AssistantMessage("a", "why", (ToolCall("f", '{"ort": "Köln"}', "c1"),)),
        ToolMessage("out", "c1"),
    )


def test_unsigned_and_empty_thinking_is_kept():
    empty = {"type": "thinking", "thinking": ""}
    assert messages_of(said(empty, text("a")), user())[0].reasoning_content == ""
    assert messages_of(said(text("a")), user())[0].reasoning_content is None
    several = said(THOUGHT, empty, text("a"), THOUGHT)
    assert messages_of(several, user())[0].reasoning_content == "why\n\nwhy"


def test_results_and_text_become_messages_in_block_order():
    blocks = result("a"), text("x"), text("y"), result("b", [text("1"), text("2")]), text("z")
    assert messages_of(user(*blocks)) == (
        ToolMessage("out", "a"),
        UserMessage((TextPart("x"), TextPart("y"))),
        ToolMessage((TextPart("1"), TextPart("2")), "b"),
        UserMessage("z"),
    )


def test_a_failed_result_says_so_in_its_text():
    mark = TOOL_ERROR_MARK
    assert messages_of(user(result("a", "boom", is_error=True)))[0].content == f"{mark}\nboom"
    assert messages_of(user(result("a", None, is_error=True)))[0].content == mark
    parts = [text("1"), text("2")]
    assert messages_of(user(result("a", parts, is_error=True)))[0].content == (
        TextPart(f"{mark}\n1"),
        TextPart("2"),
    )
    assert messages_of(user(result("a", "fine", is_error=False)))[0].content == "fine"


def test_a_last_message_of_the_assistant_is_a_prefix():
    assert messages_of(user(text("u")), said(text("Sure,")))[-1] == AssistantMessage(
        "Sure,", prefix=True
    )
    assert not messages_of(said(use("c1")))[-1].prefix
    assert not messages_of(said(text("a")), user(text("u")))[0].prefix


@pytest.mark.parametrize(
    ("message", "where"),
    [
        (user({"type": "image", "source": {"data": "secret"}}), "messages[0].content[0]"),
        (user({"type": "document"}), "messages[0].content[0]"),
        (user(result("a", [{"type": "image"}])), "messages[0].content[0].content[0]"),
        (said({"type": "redacted_thinking", "data": "x"}), "messages[0].content[0]"),
        (said({"type": "server_tool_use"}), "messages[0].content[0]"),
        (user(THOUGHT), "messages[0].content[0]"),
        (said(result("a")), "messages[0].content[0]"),
        (user("text"), "messages[0].content[0]"),
        (said(use("c1") | {"input": "{}"}), "messages[0].content[0].input"),
        (said(use("c1") | {"caller": {"type": "code"}}), "messages[0].content[0].caller"),
        (user(text("x", citations=[{"a": 1}])), "messages[0].content[0].citations"),
        (user(text("x", foo=1)), "messages[0].content[0].foo"),
        (user(text("x\ud83d")), "messages[0].content[0].text"),
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 3}, "messages[0].content"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_path(message, where):
    error = refusal(message)
    assert error.where == where
    assert "secret" not in str(error)


def test_refusals_say_what_to_do():
    assert "send the text" in refusal(said({"type": "redacted_thinking"})).hint
    assert "declare your own" in refusal(said({"type": "server_tool_use"})).hint
    assert "text" in refusal(user({"type": "image"})).hint


def test_fields_written_out_empty_say_nothing():
    block = text("x", citations=None, cache_control=None)
    assert messages_of(user(block), container=None, mcp_servers=[]) == (UserMessage("x"),)
    direct = use("c1") | {"caller": {"type": "direct"}}
    assert messages_of(said(direct))[0].tool_calls == (ToolCall("f", "{}", "c1"),)


def test_unknown_fields_are_left_out_with_a_warning_if_asked(caplog):
    body = {"messages": [user(text("x", foo="SECRET"))], "bar": 1}
    assert from_anthropic_request(body, unknown="warn").messages == (UserMessage("x"),)
    assert "messages[0].content[0].foo" in caplog.text
    assert "SECRET" not in caplog.text


# Requests

TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}}


def test_a_whole_request_is_read():
    found = read(
        user(text("u")),
        model="m",
        max_tokens=9,
        tools=[TOOL | {"cache_control": {"type": "ephemeral"}, "type": "custom"}],
        tool_choice={"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 5},
        output_config={
            "effort": "high",
            "format": {"type": "json_schema", "schema": {"type": "object"}},
        },
    )
    assert found == Conversation(
        messages=(UserMessage("u"),),
        tools=(Tool({"name": "f", "description": "d", "parameters": {"type": "object"}}),),
        tool_choice=NamedToolChoice("f"),
        response_format={"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        mode="thinking",
        effort="high",
        options={
            "model": "m",
            "max_tokens": 9,
            "disable_parallel_tool_use": True,
            "thinking": {"budget_tokens": 5},
        },
    )


@pytest.mark.parametrize(
    ("choice", "expected"), [("auto", "auto"), ("any", "required"), ("none", "none")]
)
def test_words_of_the_tool_choice(choice, expected):
    assert read(tools=[TOOL], tool_choice={"type": choice}).tool_choice == expected


@pytest.mark.parametrize(
    ("fields", "mode", "effort"),
    [
        ({}, None, None),
        ({"thinking": {"type": "adaptive"}}, "thinking", None),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "max"}}, "chat", "max"),
        ({"output_config": {"effort": "none"}}, "chat", None),
    ],
)
def test_mode_and_effort(fields, mode, effort):
    found = read(**fields)
    assert (found.mode, found.effort) == (mode, effort)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [TOOL | {"name": ""}]}, "tools[0].name"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"output_format": {"type": "json_schema"}}, "output_format.schema"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"system": 3}, "system"),
        ({"foo": 1}, "foo"),
    ],
)
def test_a_request_that_cannot_be_kept_whole_is_refused(fields, where):
    assert refusal(user(text("u")), **fields).where == where


def test_strict_is_a_key_of_the_function():
    function = read(tools=[TOOL | {"strict": True}]).tools[0].function
    assert list(function) == ["name", "description", "parameters", "strict"]
    bare = {"name": "f", "input_schema": {}}
    assert list(read(tools=[bare]).tools[0].function) == ["name", "parameters"]


def test_two_formats_must_agree():
    one = {"type": "json_schema", "schema": {"type": "object"}}
    assert read(output_format=one, output_config={"format": one}).response_format
    other = {"type": "json_schema", "schema": {}}
    assert "differ" in str(refusal(output_format=one, output_config={"format": other}))


def test_server_tools_are_named():
    error = refusal(tools=[{"type": "bash_20250124", "name": "bash"}])
    assert "bash_20250124" in str(error)


# Writing


def test_content_is_thinking_text_and_calls():
    message = AssistantMessage("a", "why", (ToolCall("f", '{"x": 1}', "c1"),))
    assert to_anthropic_content(message) == [
        {"type": "thinking", "thinking": "why", "signature": thinking_signature("why")},
        {"type": "text", "text": "a"},
        {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}},
    ]
    assert to_anthropic_content(AssistantMessage()) == []


@pytest.mark.parametrize(
    "call", [ToolCall("f", "{}"), ToolCall("f", "[]", "c1"), ToolCall("f", "{", "c1")]
)
def test_calls_without_an_id_or_an_object_are_not_written(call):
    with pytest.raises(InvalidConversationError):
        to_anthropic_content(AssistantMessage(tool_calls=(call,)))


def test_results_and_the_text_behind_them_share_a_message():
    messages = (
        AssistantMessage(tool_calls=(ToolCall("f", "{}", "a"), ToolCall("f", "{}", "b"))),
        ToolMessage("1", "a"),
        ToolMessage("2", "b"),
        UserMessage("x"),
        UserMessage("y"),
    )
    body = to_anthropic_request(Conversation(messages))["messages"]
    assert [m["role"] for m in body] == ["assistant", "user", "user"]
    assert [b["type"] for b in body[1]["content"]] == ["tool_result", "tool_result", "text"]


@pytest.mark.parametrize(
    "conversation",
    [
        Conversation((DeveloperMessage("d"),)),
        Conversation((ReminderMessage("r"),)),
        Conversation((SystemMessage("s", tools=(Tool.of("f"),)),)),
        Conversation((UserMessage("u", task="action"),)),
        Conversation((UserMessage((ImagePart("u"),)),)),
        Conversation((ToolMessage("r"),)),
        Conversation((AssistantMessage("a"),)),
        Conversation((AssistantMessage("a", prefix=True), UserMessage("u"))),
        Conversation(response_format={"type": "json_object"}),
        Conversation(tools=(Tool({"name": "f"}),)),
        Conversation(tools=(Tool({"name": "f", "parameters": {}, "x": 1}),)),
    ],
)
def test_what_has_no_place_is_not_written(conversation):
    with pytest.raises(InvalidConversationError):
        to_anthropic_request(conversation)


TEXT = st.text(max_size=6)
CONTENT = TEXT | st.lists(TEXT.map(TextPart), min_size=2, max_size=3).map(tuple)
ARGUMENTS = st.dictionaries(TEXT, TEXT | st.integers() | st.booleans(), max_size=2).map(
    lambda value: json.dumps(value, ensure_ascii=False)
)
CALLS = st.lists(st.builds(ToolCall, TEXT, ARGUMENTS, TEXT), max_size=2).map(tuple)
MESSAGES = st.lists(
    st.one_of(
        st.builds(SystemMessage, CONTENT),
        st.builds(UserMessage, CONTENT),
        st.builds(ToolMessage, CONTENT, TEXT),
        st.builds(AssistantMessage, CONTENT, st.none() | TEXT, CALLS),
    ),
    max_size=5,
)


@settings(derandomize=True, deadline=None)
@given(
    st.builds(
        Conversation,
        messages=MESSAGES.filter(
            lambda ms: not (ms and isinstance(ms[-1], AssistantMessage) and not ms[-1].tool_calls)
        ).map(tuple),
        tools=st.just((Tool.of("f", "d"),)),
        tool_choice=st.sampled_from(["auto", "none", "required", NamedToolChoice("f")]),
        response_format=st.sampled_from(
            [None, {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}]
        ),
        mode=st.sampled_from([None, "thinking", "chat"]),
        effort=st.sampled_from([None, "low", "max"]),
        options=st.fixed_dictionaries(
            {},
            optional={
                "model": TEXT,
                "disable_parallel_tool_use": st.booleans(),
                "thinking": st.just({"budget_tokens": 1}),
            },
        ),
    )
)
def test_a_conversation_survives_writing_and_reading(conversation):
    body = json.dumps(to_anthropic_request(conversation))
    assert from_anthropic_request(body) == conversation


def test_a_prefix_and_adaptive_thinking_survive_writing_and_reading():
    body = {
        "messages": [{"role": "user", "content": "u"}, said(text("Sure,"))],
        "thinking": {"type": "adaptive"},
    }
    conversation = from_anthropic_request(body)
    assert to_anthropic_request(conversation) == body
