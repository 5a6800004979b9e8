"""Two turns with a tool, through the `openai` SDK; prints what came back."""

import json
import sys

import openai

TOOL = {
    "name": "run",
    "description": "Run a command.",
    "parameters": {
        "type": "object",
        "properties": {"command": {"type": "string"}},
        "required": ["command"],
    },
}
QUESTION = {"role": "user", "content": "List the files."}
RESULT = "a.txt"


def chat(api, *, streamed, keeps):
    def ask(messages):
        settings = {
            "model": "hadal",
            "messages": messages,
            "tools": [{"type": "function", "function": TOOL}],
        }
        if not streamed:
            return api.chat.completions.create(**settings)
        with api.chat.completions.stream(**settings) as stream:
            return stream.get_final_completion()

    first = ask([QUESTION]).choices[0]
    [call] = first.message.tool_calls
    turn = first.message.model_dump(exclude_none=True)
    if not keeps:
        turn = {"role": "assistant", "content": turn.get("content"), "tool_calls": [
            {"id": call.id, "type": "function", "function": {
                "name": call.function.name, "arguments": call.function.arguments}}]}  # fmt: skip
    result = {"role": "tool", "tool_call_id": call.id, "content": RESULT}
    second = ask([QUESTION, turn, result]).choices[0]
    return {
        "finish": [first.finish_reason, second.finish_reason],
        "reasoning": [c.message.model_extra["reasoning_content"] for c in (first, second)],
        "content": [(c.message.content or "").strip() for c in (first, second)],
        "call": [call.function.name, json.loads(call.function.arguments)],
    }


def responses(api, *, streamed, keeps):
    def ask(items):
        settings = {"model": "hadal", "input": items, "store": False} | {
            "tools": [{"type": "function", "strict": False, **TOOL}]
        }
        if not streamed:
            return api.responses.create(**settings)
        with api.responses.stream(**settings) as stream:
            return stream.get_final_response()

    first = ask([QUESTION])
    call = first.output[-1]
    sent = [
        item.model_dump(exclude_none=True)
        for item in first.output
        if keeps or item.type != "reasoning"
    ]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
    second = ask([QUESTION, *sent, result])
    return {
        "finish": ["tool_calls" if call.type == "function_call" else call.type, "stop"],
        "reasoning": [r.output[0].content[0].text for r in (first, second)],
        "content": [r.output_text.strip() for r in (first, second)],
        "call": [call.name, json.loads(call.arguments)],
    }


def main():
    settings = json.loads(sys.argv[1])
    plays = {"chat": chat, "responses": responses}
    with openai.OpenAI(base_url=f"{settings['url']}/v1", api_key="none", max_retries=0) as api:
        seen = [
            plays[case["api"]](api, streamed=case["streamed"], keeps=case["keeps"])
            for case in settings["cases"]
        ]
    print(json.dumps({"version": openai.__version__, "seen": seen}))


if __name__ == "__main__":
    main()
