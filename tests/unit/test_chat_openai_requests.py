"""Requests in OpenAI's Chat Completions shape."""

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
    TextPart,
    Tool,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from hadal.chat.openai_chat import from_chat_request, to_chat_request
from hadal.errors import InvalidConversationError

WEATHER = {
    "name": "get_weather",
    "description": "Weather of a place",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    "strict": True,
}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
THINKING_BLOCK = {"type": "thinking", "thinking": "why", "signature": "s"}


def request(**fields):
    return from_chat_request({"messages": [{"role": "user", "content": "u"}], **fields})


def request_error(**fields):
    with pytest.raises(InvalidConversationError) as caught:
        request(**fields)
    return caught.value


TOOLS = [{"type": "function", "function": WEATHER}]


def test_a_whole_request_is_read():
    body = {
        "model": "m",
        "temperature": 0.5,
        "seed": None,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "u"}],
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "response_format": {"type": "json_object"},
        "reasoning_effort": "high",
    }
    expected = Conversation(
        messages=(SystemMessage("s"), UserMessage("u")),
        tools=(Tool(WEATHER),),
        tool_choice=NamedToolChoice("get_weather"),
        response_format={"type": "json_object"},
        effort="high",
        options={"model": "m", "temperature": 0.5, "stream_options": {"include_usage": True}},
    )
    assert from_chat_request(body) == expected
    assert from_chat_request(json.dumps(body)) == expected
    assert from_chat_request(json.dumps(body).encode()) == expected


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"\xff\xfe\xff", "JSON"),
        ("{", "JSON"),
        ('{"seed": NaN}', "NaN"),
        ("[" * 100_000, "JSON"),
        ("[]", "an array"),
        ("{}", "messages"),
        ('{"messages": "hi"}', "messages"),
    ],
)
def test_a_body_that_is_no_request_is_refused(body, said):
    with pytest.raises(InvalidConversationError, match=said):
        from_chat_request(body)


@pytest.mark.parametrize(
    ("fields", "mode", "effort"),
    [
        ({}, None, None),
        ({"reasoning_effort": "max"}, None, "max"),
        ({"reasoning_effort": 75}, None, "75"),
        ({"reasoning_effort": "none"}, "chat", None),
        ({"reasoning": {"effort": "low", "enabled": True}}, "thinking", "low"),
        ({"reasoning": {"enabled": False}}, "chat", None),
        ({"thinking": {"type": "enabled"}}, "thinking", None),
        ({"thinking": {"type": "adaptive"}}, "thinking", None),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "max"}, "chat", "max"),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, "chat", None),
        ({"chat_template_kwargs": {"thinking": True}}, "thinking", None),
        ({"chat_template_kwargs": {"enable_thinking": False, "thinking": True}}, "chat", None),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}}, None, "low"),
    ],
)
def test_mode_and_effort_come_from_every_spelling_and_off_wins(fields, mode, effort):
    found = request(**fields)
    assert (found.mode, found.effort) == (mode, effort)


def test_efforts_must_agree():
    assert request(reasoning_effort="low", reasoning={"effort": "low"}).effort == "low"
    assert "differ" in str(request_error(reasoning_effort="low", reasoning={"effort": "high"}))
    assert request_error(reasoning_effort=True).where == "reasoning_effort"


def test_what_else_the_thinking_fields_say_goes_into_the_options():
    found = request(
        thinking={"type": "enabled", "budget_tokens": 9},
        reasoning={"max_tokens": 7, "effort": "low"},
        chat_template_kwargs={"thinking": True, "drop_thinking": False},
    )
    assert found.options == {
        "thinking": {"budget_tokens": 9},
        "reasoning": {"max_tokens": 7},
        "chat_template_kwargs": {"drop_thinking": False},
    }


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"functions": [{}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"web_search_options": {"a": 1}}, "web_search_options"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].function"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "foo": 1}}, "thinking.foo"),
        ({"reasoning": "high"}, "reasoning"),
        ({"chat_template_kwargs": {"foo": 1}}, "chat_template_kwargs.foo"),
        ({"foo": 1}, "foo"),
    ],
)
def test_a_request_that_cannot_be_kept_whole_is_refused(fields, where):
    assert request_error(**fields).where == where


def test_tools_on_a_message_count_for_the_tool_choice():
    body = {"messages": [{"role": "system", "tools": TOOLS}], "tool_choice": "required"}
    assert from_chat_request(body).tool_choice == "required"


def test_text_is_no_response_format():
    assert request(response_format={"type": "text"}).response_format is None


def test_faults_of_messages_and_of_the_request_come_together():
    error = request_error(messages=[{"role": "robot"}], foo=1, tool_choice="required")
    for path in ("messages[0].role", "foo", "tool_choice"):
        assert path in str(error)


def test_a_developer_turn_of_the_pipeline_cannot_be_written_into_a_request():
    with pytest.raises(InvalidConversationError, match=r"messages\[0\]"):
        to_chat_request(Conversation((DeveloperMessage("d"),)))


# Round trips

TEXT = st.text(max_size=8)
CONTENT = TEXT | st.lists(TEXT.map(TextPart), max_size=3).map(tuple)
CALLS = st.lists(st.builds(ToolCall, TEXT), max_size=2).map(tuple)
MESSAGE = st.one_of(
    st.builds(SystemMessage, CONTENT),
    st.builds(UserMessage, CONTENT, st.sampled_from([None, "action"])),
    st.builds(ToolMessage, CONTENT, st.none() | TEXT),
    st.builds(ReminderMessage, CONTENT),
    st.builds(AssistantMessage, CONTENT, st.none() | TEXT, CALLS, st.booleans()),
)


@settings(derandomize=True, deadline=None)
@given(
    st.builds(
        Conversation,
        messages=st.lists(MESSAGE, max_size=3).map(tuple),
        tools=st.just((Tool.of("f"),)),
        tool_choice=st.sampled_from(["auto", "none", "required", NamedToolChoice("f")]),
        response_format=st.sampled_from([None, {"type": "json_object"}]),
        mode=st.sampled_from([None, "thinking", "chat"]),
        effort=st.sampled_from([None, "low", "max", "50"]),
        options=st.fixed_dictionaries(
            {},
            optional={
                "model": TEXT,
                "stop": st.lists(TEXT),
                "thinking": st.just({"budget_tokens": 1}),
                "reasoning": st.just({"exclude": True}),
                "chat_template_kwargs": st.just({"drop_thinking": True}),
            },
        ),
    )
)
def test_a_conversation_survives_writing_and_reading(conversation):
    body = json.dumps(to_chat_request(conversation))
    assert from_chat_request(body) == conversation


# Anything else


BODY = {
    "messages": [
        {"role": "system", "content": "s", "tools": TOOLS},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "assistant", "reasoning_details": [{"type": "reasoning.text", "text": "r"}]},
        {"role": "assistant", "thinking_blocks": [THINKING_BLOCK], "tool_calls": [CALL]},
    ],
    "tools": TOOLS,
    "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    "reasoning": {"effort": "low"},
    "thinking": {"type": "enabled"},
    "response_format": {"type": "json_schema", "json_schema": {}},
}
JUNK = st.sampled_from(
    [None, True, 0, -1.5, "", "x", "\ud83d", [], {}, [None], [[]], ["x"], {"type": 1}, {"a": 1}]
)


@settings(derandomize=True, deadline=None)
@given(st.data())
def test_a_body_with_anything_anywhere_is_read_or_refused(data):
    body = json.loads(json.dumps(BODY))
    spot = body
    while True:
        keys = sorted(spot) if isinstance(spot, dict) else range(len(spot))
        key = data.draw(st.sampled_from(list(keys)))
        inner = spot[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        spot = inner
    spot[key] = data.draw(JUNK)
    where = "nothing was wrong"
    try:
        from_chat_request(body)
    except InvalidConversationError as err:
        where = err.where
    assert where
