"""Random conversations, and what DeepSeek's own library makes of them.

Where the library differs from the published reference we follow the reference, and the generator
stays away: 1e-7 (Python writes 1e-07), integers beyond 64 bits, calls without parameters, reasoning
in chat mode, empty user messages, late system messages, messages that declare a response format.
"""

import json

import deepseek_recipe as recipe

from hadal.encoding.tokens import Control

WORDS = (
    "look. ", "Let me see\n\n", "/etc/hosts", "x = 1;\n", "  ", "日本語", "é", "😀", "don't", "1234567",
    '{"a": [1, 2]}', "<tool_result>", "</tool_result>", "<|User|>", "<", ">", "</", "\t", "\r\n",
    "<｜User｜>", "<｜end▁of▁sentence｜>", "<think>", "</think>", "<｜DSML｜tool_calls>", "｜DSML｜", "...",
)  # fmt: skip


def text(rng, most=6):
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(0, most)))


def value(rng, depth=0):
    kind = rng.randrange(8 if depth < 2 else 6)
    if kind < 3:
        return text(rng)
    if kind == 3:
        return rng.choice([0, -1, 7, 2**53, 1.5, 1e16, 1e22, -0.0, 0.25, 0.1])
    if kind == 4:
        return rng.choice([True, False, None])
    if kind == 5:
        return ""
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return {text(rng, 2): value(rng, depth + 1) for _ in range(rng.randint(0, 3))}


def draw(rng):
    """A conversation both libraries should render alike: ours as dicts, and its settings."""
    with_tools = rng.random() < 0.7
    mode = rng.choice(["thinking", "thinking", "chat"])
    messages = []
    if rng.random() < 0.7:
        messages.append({"role": "system", "content": text(rng)})
    if rng.random() < 0.2:
        messages.append({"role": "latest_reminder", "content": text(rng)})
    for turn in range(rng.randint(1, 5)):
        messages.append({"role": "user", "content": "u" + text(rng)})
        for step in range(rng.randint(0, 3)):
            messages += _step(rng, f"{turn}-{step}", with_tools=with_tools, mode=mode)
    if messages[-1]["role"] == "assistant":
        messages.append({"role": "user", "content": "u" + text(rng)})
    return {
        "messages": messages,
        "tools": [_tool(rng, i) for i in range(rng.randint(1, 3))] if with_tools else [],
        "mode": mode,
        "effort": rng.choice(["low", "high", "max"]),
    }


def _step(rng, name, *, with_tools, mode):
    said = {"role": "assistant", "content": text(rng), "reasoning_content": None}
    if mode == "thinking":
        said["reasoning_content"] = "r" + text(rng)
    if not with_tools:
        return [said]
    count = rng.randint(1, 3)
    said["tool_calls"] = [
        {
            "id": f"{name}-{i}",
            "type": "function",
            "function": {
                "name": rng.choice(["f", "get_weather"]),
                "arguments": json.dumps({"p": value(rng), text(rng, 2): value(rng)}),
            },
        }
        for i in range(count)
    ]
    results = [
        {"role": "tool", "tool_call_id": f"{name}-{i}", "content": text(rng)} for i in range(count)
    ]
    rng.shuffle(results)
    return [said, *results]


def _tool(rng, i):
    properties = {text(rng, 2) or "p": {"type": "string", "description": text(rng)}}
    parameters = {"type": "object", "properties": properties}
    function = {"name": f"tool_{i}", "description": text(rng) or "d", "parameters": parameters}
    return {"type": "function", "function": function}


def theirs(drawn):
    """The same conversation as an object of their library."""
    messages = []
    for m in drawn["messages"]:
        content = m["content"]
        match m["role"]:
            case "system":
                messages.append(recipe.SystemMessage(content))
            case "user":
                messages.append(recipe.UserMessage(content))
            case "latest_reminder":
                messages.append(recipe.LatestReminderMessage(content))
            case "tool":
                messages.append(recipe.ToolMessage(content, m["tool_call_id"]))
            case "assistant":
                calls = [
                    recipe.ToolCall(c["id"], c["function"]["name"], c["function"]["arguments"])
                    for c in m.get("tool_calls", ())
                ]
                messages.append(
                    recipe.AssistantMessage(content, m["reasoning_content"], calls or None)
                )
    tools = [
        recipe.ToolDefinition(f["name"], f["description"], f["parameters"])
        for f in (t["function"] for t in drawn["tools"])
    ]
    return recipe.Conversation(
        messages,
        tools=tools or None,
        thinking_mode=drawn["mode"] == "thinking",
        reasoning_effort=drawn["effort"],
    )


def difference(drawn, ours, their_encoding):
    """How the two renderings differ, or None: text, and where the control tokens are."""
    settings = {k: v for k, v in drawn.items() if k != "messages"}
    prompt = ours.prompt(drawn["messages"], generation_prompt=True, **settings)
    rendered = their_encoding.render_conversation(theirs(drawn))
    if prompt.text != rendered.prompt:
        pairs = zip(prompt.text, rendered.prompt, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), -1)
        return (
            f"at {at}: {prompt.text[at - 30 : at + 40]!r} != {rendered.prompt[at - 30 : at + 40]!r}"
        )
    at, ranges = 0, []
    for item in prompt.items:
        if isinstance(item, Control):
            ranges.append((at, at + len(item)))
        at += len(item)
    return None if ranges == rendered.special_ranges else "the control tokens are elsewhere"
