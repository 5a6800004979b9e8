"""Messages in OpenAI's Chat Completions shape."""

import json
import logging
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.chat import (
    AssistantMessage,
    DeveloperMessage,
    ExtractedUrl,
    ImagePart,
    ReminderMessage,
    SystemMessage,
    TextPart,
    Tool,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from hadal.chat.openai_chat import (
    read_messages,
    to_chat_message,
)
from hadal.errors import InvalidConversationError

WEATHER = {
    "name": "get_weather",
    "description": "Weather of a place",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    "strict": True,
}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}


def read(*messages, **options):
    return read_messages(messages, **options)


def assistant(**fields):
    (message,) = read({"role": "assistant", **fields})
    return message


def refusal(*messages, **options):
    with pytest.raises(InvalidConversationError) as caught:
        read(*messages, **options)
    return caught.value


# Messages


def test_every_role_becomes_its_dataclass():
    assert read(
        {"role": "system", "content": "s"},
        {"role": "developer", "content": "d"},
        {"role": "latest_reminder", "content": "r"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "t", "tool_call_id": "c1"},
    ) == [
        SystemMessage("s"),
        DeveloperMessage("d"),
        ReminderMessage("r"),
        UserMessage("u"),
        AssistantMessage("a"),
        ToolMessage("t", "c1"),
    ]


def test_dataclasses_pass_through():
    message = UserMessage("hi")
    assert read(message)[0] is message


@pytest.mark.parametrize("fields", [{}, {"content": None}, {"content": ""}])
def test_absent_content_is_empty(fields):
    for role in ("system", "user", "assistant", "tool"):
        assert read({"role": role, **fields})[0].content == ""


def test_text_parts_stay_parts():
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]
    assert read({"role": "user", "content": parts}) == [UserMessage((TextPart("a"),))]
    extracted = [{"type": "extracted_url", "url": "u"}]
    assert read({"role": "user", "content": extracted})[0].content == (ExtractedUrl("u"),)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal", "video_url"])
def test_parts_other_than_text_are_refused_by_path(kind):
    parts = [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "data:secret"}}]
    error = refusal({"role": "user", "content": "x"}, {"role": "user", "content": parts})
    assert error.where == "messages[1].content[1]"
    assert "text" in error.hint
    assert "secret" not in str(error)


def test_images_are_kept_on_request():
    part = {"type": "image_url", "image_url": {"url": "u", "detail": "auto"}}
    assert read({"role": "user", "content": [part]}, images=True)[0].content == (ImagePart("u"),)
    part["image_url"]["detail"] = "high"
    error = refusal({"role": "user", "content": [part]}, images=True)
    assert error.where == "messages[0].content[0].image_url.detail"


def test_reference_keys_are_read():
    tools = [{"type": "function", "function": WEATHER}]
    system, developer, user, said = read(
        {"role": "system", "content": "s", "tools": tools, "response_format": {"type": "x"}},
        {"role": "developer", "content": "d", "tools": tools, "task": "query", "mask": 1},
        {"role": "user", "content": "u", "task": "action", "mask": 0},
        {"role": "assistant", "content": "a", "task": "title", "wo_eos": True, "mask": 1},
    )
    assert system.tools == developer.tools == (Tool(WEATHER),)
    assert list(system.tools[0].function) == list(WEATHER), "the model sees the order of the keys"
    assert system.response_format == {"type": "x"}
    assert (developer.task, user.task, said.task) == ("query", "action", "title")
    assert said.prefix


def test_prefix_and_wo_eos_must_agree():
    assert assistant(prefix=True).prefix
    assert assistant(prefix=True, wo_eos=True).prefix
    assert not assistant(prefix=False).prefix
    assert "differ" in str(refusal({"role": "assistant", "prefix": True, "wo_eos": False}))


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ({"role": "user", "content": "u", "tools": [1]}, "messages[0].tools"),
        ({"role": "user", "content": "u", "response_format": {"a": 1}}, "messages[0].response_fo"),
        ({"role": "user", "content": "u", "reasoning_content": "r"}, "messages[0].reasoning_conte"),
        ({"role": "user", "content_blocks": [{}]}, "messages[0].content_blocks"),
        ({"role": "tool", "content": "u", "task": "action"}, "messages[0].task"),
        ({"role": "tool", "content": "u", "tool_calls": [CALL]}, "messages[0].tool_calls"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "messages[0].function_call"),
        ({"role": "assistant", "refusal": "no"}, "messages[0].refusal"),
        ({"role": "assistant", "audio": {"id": "x"}}, "messages[0].audio"),
        ({"role": "assistant", "tool_call_id": "c1"}, "messages[0].tool_call_id"),
    ],
)
def test_a_misplaced_field_with_a_value_is_an_error_under_both_policies(message, where):
    for unknown in ("error", "warn"):
        error = refusal(message, unknown=unknown)
        assert error.where.startswith(where)
        assert error.hint


def test_fields_written_out_empty_say_nothing():
    empty = {"tools": None, "tool_calls": [], "refusal": None, "function_call": None, "audio": None}
    assert read({"role": "user", "content": "u", "tools": [], "name": None, "prefix": False}) == [
        UserMessage("u")
    ]
    del empty["tools"]
    assert assistant(content="a", annotations=[], name="", **empty) == AssistantMessage("a")


def test_names_of_speakers_follow_the_policy_and_names_of_results_are_redundant(caplog):
    assert refusal({"role": "user", "content": "u", "name": "bob"}).where == "messages[0].name"
    assert read({"role": "user", "content": "u", "name": "bob"}, unknown="warn") == [
        UserMessage("u")
    ]
    assert "messages[0].name" in caplog.text
    assert "bob" not in caplog.text
    assert read({"role": "tool", "content": "r", "name": "f"}) == [ToolMessage("r")]


@pytest.mark.parametrize(
    ("message", "where", "hint"),
    [
        ({"role": "function", "content": "x"}, "messages[0].role", "tool"),
        ({"role": "robot", "content": "x"}, "messages[0].role", None),
        ({"content": "x"}, "messages[0].role", None),
        ("hello", "messages[0]", None),
        ({"role": "user", "content": "x", "task": "dance"}, "messages[0].task", None),
        ({"role": "user", "content": {"a": 1}}, "messages[0].content", "JSON"),
        ({"role": "user", "content": 3}, "messages[0].content", None),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]", None),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text", None),
        ({"role": "assistant", "prefix": 1}, "messages[0].prefix", None),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls[0].function", None),
        ({"role": "system", "tools": [{"function": {}}]}, "messages[0].tools[0].function.n", None),
        ({"role": "user", "content": "a \ud83d"}, "messages[0].content", "character"),
        ({"role": "assistant", "reasoning": "a \ud83d"}, "messages[0].reasoning", "character"),
    ],
)
def test_a_fault_names_its_path(message, where, hint):
    error = refusal(message)
    assert error.where.startswith(where)
    assert hint is None or hint in error.hint


def test_all_faults_of_a_request_are_listed():
    error = refusal(
        {"role": "robot"},
        {"role": "user", "content": "u", "foo": 1},
        {"role": "assistant", "prefix": "x", "tool_calls": [{"function": {"name": 1}}]},
    )
    assert error.where == "messages[0].role"
    for path in ("messages[1].foo", "messages[2].prefix", "messages[2].tool_calls[0].function.nam"):
        assert path in str(error)


def test_a_flood_of_faults_is_counted_not_listed():
    error = refusal({"role": "user", **{f"field_{i}": 1 for i in range(5000)}})
    assert "4980 more" in str(error)
    assert len(str(error)) < 3000


def test_unknown_fields_are_named_everywhere():
    call = {"function": {"name": "f", "arguments": "{}", "deep": "SECRET"}, "side": 1}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "t", "part": 1}], "top": 1},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "system", "tools": [{"function": WEATHER, "tool": 1}]},
    ]
    error = refusal(*messages)
    for path in (
        "messages[0].top",
        "messages[0].content[0].part",
        "messages[1].tool_calls[0].side",
        "messages[1].tool_calls[0].function.deep",
        "messages[2].tools[0].tool",
    ):
        assert path in str(error)
    assert "SECRET" not in str(error)


def test_unknown_fields_are_warned_about_one_by_one_without_their_values(caplog):
    with caplog.at_level(logging.WARNING, logger="hadal.chat.wire"):
        read({"role": "user", "content": "u", "foo": "SECRET", "x\n" * 99: 1}, unknown="warn")
    assert caplog.records[0].field_path == "messages[0].foo"
    assert len(caplog.records) == 2
    assert "SECRET" not in caplog.text
    assert all("\n" not in r.getMessage() for r in caplog.records)


def test_a_flood_of_unknown_fields_does_not_fill_the_log(caplog):
    read({"role": "user", **{f"field_{i}": 1 for i in range(5000)}}, unknown="warn")
    assert len(caplog.records) == 21
    assert "4980 more" in caplog.text


def test_a_refused_request_logs_nothing(caplog):
    refusal({"role": "user", "foo": 1}, {"role": "robot"}, unknown="warn")
    assert not caplog.records


def test_any_mapping_is_an_object():
    assert read(MappingProxyType({"role": "user", "content": "u"})) == [UserMessage("u")]


def test_the_policy_is_checked():
    with pytest.raises(ValueError, match="unknown"):
        read(unknown="ignore")


@pytest.mark.parametrize("value", [{"role": "user"}, "hello", b"x"])
def test_messages_must_be_a_list(value):
    with pytest.raises(InvalidConversationError, match="list of messages"):
        read_messages(value)


# Calls


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": 1.50}', '{"a": 1.50}'),
        ("not json", "not json"),
        ({"ort": "Köln", "n": [1, None]}, '{"ort": "Köln", "n": [1, null]}'),
        (None, "{}"),
        ("", "{}"),
    ],
)
def test_arguments_become_json_text(arguments, expected):
    call = {"function": {"name": "f", "arguments": arguments}}
    assert assistant(tool_calls=[call]).tool_calls == (ToolCall("f", expected),)


def test_arguments_may_be_missing_but_not_a_list():
    assert assistant(tool_calls=[{"function": {"name": "f"}}]).tool_calls[0].arguments == "{}"
    call = {"function": {"name": "f", "arguments": [1]}}
    error = refusal({"role": "assistant", "tool_calls": [call]})
    assert error.where == "messages[0].tool_calls[0].function.arguments"


@pytest.mark.parametrize("arguments", [{"a": {1, 2}}, {"a": "\ud83d"}, "\ud83d"])
def test_arguments_that_are_no_json_text_are_refused(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    error = refusal({"role": "assistant", "tool_calls": [call]})
    assert error.where == "messages[0].tool_calls[0].function.arguments"


@pytest.mark.parametrize("function", [{"name": ""}, {"name": "f", "x": {1}}, {"name": "\ud83d"}])
def test_tools_without_a_name_or_json_text_are_refused(function):
    error = refusal({"role": "system", "tools": [{"function": function}]})
    assert error.where.startswith("messages[0].tools[0].function")


def test_the_id_of_a_call_may_stand_within_the_function():
    inside = {"function": {"name": "f", "id": "c1"}, "index": 0}
    assert assistant(tool_calls=[inside]).tool_calls[0].id == "c1"
    assert assistant(tool_calls=({**inside, "id": "c1"},)).tool_calls[0].id == "c1"
    assert "differ" in str(refusal({"role": "assistant", "tool_calls": [{**inside, "id": "c2"}]}))


def test_only_function_tools_are_called_and_declared():
    custom = {"type": "custom", "function": {"name": "f"}}
    error = refusal({"role": "assistant", "tool_calls": [custom]})
    assert error.where == "messages[0].tool_calls[0].type"
    error = refusal({"role": "system", "tools": [custom]})
    assert error.where == "messages[0].tools[0].type"


# Reasoning


THINKING_BLOCK = {"type": "thinking", "thinking": "why", "signature": "s"}


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_content": "why"},
        {"reasoning": "why"},
        {"reasoning_details": [{"type": "reasoning.text", "text": t} for t in ("w", "hy")]},
        {"reasoning_details": [{"type": "reasoning.summary", "summary": "why"}]},
        {"thinking_blocks": [THINKING_BLOCK]},
        {"provider_specific_fields": {"reasoning_content": "why", "citations": None}},
        {"reasoning": "why", "reasoning_content": "why", "thinking_blocks": [THINKING_BLOCK]},
        {"reasoning": "why", "reasoning_content": " "},
        {"reasoning": "", "reasoning_content": "why", "reasoning_details": []},
    ],
)
def test_every_spelling_of_reasoning_is_read(fields):
    assert assistant(content="a", **fields) == AssistantMessage("a", "why")


def test_reasoning_that_is_not_known_differs_from_empty_reasoning():
    assert assistant(reasoning_content=None).reasoning_content is None
    assert assistant(reasoning_content="").reasoning_content == ""


def test_spellings_of_reasoning_that_differ_are_an_error():
    error = refusal({"role": "assistant", "reasoning": "a", "reasoning_content": "b"})
    assert "messages[0].reasoning_content, messages[0].reasoning" in str(error)


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_details": [{"type": "reasoning.encrypted", "data": "xx"}]},
        {"thinking_blocks": [{"type": "redacted_thinking", "data": "xx"}]},
    ],
)
def test_encrypted_reasoning_is_an_error_with_a_way_out(fields):
    assert "send the text" in refusal({"role": "assistant", **fields}).hint


def test_reasoning_of_a_wrong_shape_is_refused():
    fields = {"thinking_blocks": "why"}
    error = refusal({"role": "assistant", "provider_specific_fields": fields})
    assert error.where == "messages[0].provider_specific_fields.thinking_blocks"


def test_other_fields_of_providers_follow_the_policy():
    message = {"role": "assistant", "provider_specific_fields": {"citations": [1]}}
    assert refusal(message).where == "messages[0].provider_specific_fields.citations"
    assert read(message, unknown="warn") == [AssistantMessage()]


# Round trips

TEXT = st.text(max_size=8)
NAME = st.text(min_size=1, max_size=8)
PARTS = st.one_of(TEXT.map(TextPart), NAME.map(ExtractedUrl), NAME.map(ImagePart))
CONTENT = st.one_of(TEXT, st.lists(PARTS, max_size=3).map(tuple))
TASK = st.sampled_from([None, "action", "query", "authority", "domain", "title", "read_url"])
TOOL = st.builds(Tool.of, NAME, TEXT)
DECLARED = st.lists(TOOL, max_size=2).map(tuple)
FORMAT = st.sampled_from([None, {"type": "json_object"}, {"type": "text"}])
MAYBE = st.none() | TEXT
CALLS = st.lists(st.builds(ToolCall, NAME, NAME, MAYBE), max_size=2).map(tuple)
SAID = st.builds(AssistantMessage, CONTENT, MAYBE, CALLS, st.booleans(), TASK)
MESSAGE = st.one_of(
    st.builds(SystemMessage, CONTENT, DECLARED, FORMAT),
    st.builds(UserMessage, CONTENT, TASK),
    st.builds(ToolMessage, CONTENT, MAYBE),
    st.builds(ReminderMessage, CONTENT),
    st.builds(DeveloperMessage, CONTENT, DECLARED, FORMAT, TASK),
    SAID,
)


@settings(derandomize=True, deadline=None)
@given(MESSAGE)
def test_a_message_survives_writing_and_reading(message):
    body = json.loads(json.dumps(to_chat_message(message)))
    assert read_messages([body], images=True) == [message]


def test_reasoning_is_written_in_both_spellings():
    body = to_chat_message(AssistantMessage("a", "why"))
    assert body["reasoning"] == body["reasoning_content"] == "why"
    assert "reasoning" not in to_chat_message(AssistantMessage("a"))
