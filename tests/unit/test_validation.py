"""Typed results: what does not fit is told to the model, and nothing is coerced or fetched."""

import json

import pytest

from hadal.chat import Tool, ToolCall
from hadal.encoding.validation import check_call
from hadal.errors import ConfigError

SEARCH = Tool.of(
    "search",
    "",
    {
        "type": "object",
        "properties": {
            "query": {"type": "string"},
            "limit": {"type": "integer", "minimum": 1},
            "sort": {"enum": ["new", "old"]},
            "where": {"type": "array", "items": {"$ref": "#/$defs/filter"}},
        },
        "required": ["query"],
        "additionalProperties": False,
        "$defs": {"filter": {"type": "object", "required": ["name"]}},
    },
)


def fault(arguments, name="search", tools=(SEARCH,)):
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return check_call(ToolCall(name, text), tools)


def test_a_fitting_call_passes():
    assert fault({"query": "x", "limit": 3, "sort": "new", "where": [{"name": "a"}]}) is None
    assert fault({"anything": 1}, "free", (Tool({"name": "free"}),)) is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "missing: query"),
        ({"query": "x", "limit": "3"}, 'limit: expected integer, got string "3" (write it with string="false")'),
        ({"query": 3}, 'query: expected string, got number 3 (write it with string="true")'),
        ({"query": "x", "limit": 0}, "limit: minimum 1 does not hold for 0"),
        ({"query": "x", "sort": "up"}, 'sort: expected one of "new", "old", got "up"'),
        ({"query": "x", "color": 1}, 'unknown: "color"; known: query, limit, sort, where'),
        ({"query": "x", "where": [{}]}, "where[0]: missing: name"),
        ("[1]", "expected a JSON object"),
        ("{", "are not JSON"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(arguments, told):
    found = fault(arguments)
    assert told in found.message
    assert found.message.startswith("The call of search was not run")
    assert any(told in str(error) for error in found.errors)


def test_an_unknown_tool_is_told_with_the_closest_names_first():
    found = fault({}, "serch", (Tool.of("write"), SEARCH))
    assert "the tools are: search, write" in found.message


def test_long_values_and_many_errors_are_shortened():
    found = fault({"query": "x", "where": [["y" * 1000]] * 30})
    assert len(found.errors) == 30
    assert "and 22 more" in found.message
    assert len(found.message) < 2000


def test_deep_arguments_do_not_crash():
    deep = "[" * 100_000 + "]" * 100_000
    assert "JSON" in fault(f'{{"query": {deep}}}').message


def test_nothing_is_fetched():
    tool = Tool.of("t", "", {"properties": {"a": {"$ref": "http://127.0.0.1:9/x.json"}}})
    with pytest.raises(ConfigError, match="which is not in it"):
        fault({"a": 1}, "t", (tool,))


def test_a_broken_schema_is_the_callers_fault():
    with pytest.raises(ConfigError, match="'t' are not a JSON Schema"):
        fault({}, "t", (Tool.of("t", "", {"type": "strnig"}),))
