"""Two turns with a tool, through `litellm`, by any of its providers; prints what came back."""

import json
import sys
from importlib.metadata import version

import litellm
from openai_sdk import QUESTION, RESULT, TOOL


def ask(messages, *, streamed, **settings):
    settings |= {"tools": [{"type": "function", "function": TOOL}], "num_retries": 0}
    if not streamed:
        return litellm.completion(messages=messages, **settings).choices[0]
    chunks = list(litellm.completion(messages=messages, stream=True, **settings))
    return litellm.stream_chunk_builder(chunks, messages=messages).choices[0]


def play(*, api, url, streamed, keeps):
    settings = {"model": f"{api}/hadal", "api_base": url, "api_key": "none", "max_tokens": 1000}
    if api != "anthropic":
        settings["api_base"] += "/v1"
    first = ask([QUESTION], streamed=streamed, **settings)
    [call] = first.message.tool_calls
    turn = first.message.model_dump()
    if not keeps:
        turn = {name: turn[name] for name in ("role", "content", "tool_calls")}
    result = {"role": "tool", "tool_call_id": call.id, "content": RESULT}
    second = ask([QUESTION, turn, result], streamed=streamed, **settings)
    return {
        "finish": [first.finish_reason, second.finish_reason],
        "reasoning": [c.message.get("reasoning_content") for c in (first, second)],
        "content": [(c.message.content or "").strip() for c in (first, second)],
        "call": [call.function.name, json.loads(call.function.arguments)],
    }


def main():
    settings = json.loads(sys.argv[1])
    seen = [play(url=settings["url"], **case) for case in settings["cases"]]
    print(json.dumps({"version": version("litellm"), "seen": seen}))


if __name__ == "__main__":
    main()
