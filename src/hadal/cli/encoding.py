"""`hadal encode` and `hadal decode`: the message format in a shell pipe."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from cyclopts import Parameter

from hadal.cli.thinking import Mode, PromptMode, thinking
from hadal.errors import ConfigError, InputError

if TYPE_CHECKING:
    from hadal.chat import AssistantMessage
    from hadal.encoding import Prompt

__all__ = ["decode", "encode"]

GenerationName = Literal["v4", "v4-0731", "v4.1"]
_FinishReason = Literal["stop", "length", "tool_calls", "abort"]
_Flag = Parameter(negative="")
_Generation = Annotated[GenerationName | None, Parameter(name=["--generation", "-g"])]


def encode(
    source: Path | None = None,
    *,
    generation: _Generation = None,
    mode: Mode = "thinking",
    effort: str | None = None,
    tokenizer: Path | None = None,
    ids: Annotated[bool, _Flag] = False,
    continuation: Annotated[bool | None, Parameter(name="--generation-prompt")] = None,
    keep_thinking: Annotated[bool, _Flag] = False,
    strict: Annotated[bool, _Flag] = False,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Render a conversation (JSON) as the text, or the token ids, that the model reads.

    The JSON is a list of messages, or an object with "messages" and, if wanted, "tools",
    "tool_choice" and "response_format", as in a Chat Completions request.

    Examples:
        echo '[{"role": "user", "content": "Hello"}]' | hadal encode --generation v4

        hadal encode chat.json --tokenizer path/to/checkpoint --ids

        hadal encode chat.json -g v4-0731 --mode think-high --json | jq .text

    Args:
        source: File to read; standard input if it is left out or "-".
        generation: Which generation of the format. Default: read from the checkpoint that
            --tokenizer names.
        mode: Whether the model is to reason first; the report's modes are an effort, too.
        effort: How hard, by the generation's table; for v4.1 also 1 to 100.
        tokenizer: A checkpoint's folder or its tokenizer.json; needed for ids.
        ids: Print token ids, on one line.
        continuation: Open the assistant's turn always (--generation-prompt) or never
            (--no-generation-prompt). Default: after a user turn.
        keep_thinking: Keep the reasoning of earlier turns even if no tools are declared.
        strict: Byte-exact with the published reference, its oddities included.
        json_output: Print one JSON object: text, start (where the completion begins), and ids.
    """
    given = _read_conversation(source)
    from hadal.encoding import Encoding

    encoding = Encoding.load(generation, tokenizer=tokenizer, strict=strict)
    prompt_mode, budget = thinking(mode, effort)
    prompt = encoding.prompt(
        given.pop("messages"),
        mode=prompt_mode,
        effort=budget,
        drop_thinking=not keep_thinking,
        generation_prompt=continuation,
        **given,
    )
    found = encoding.tokenizer.encode_items(prompt.items) if ids else None
    _print_prompt(prompt, found, json_output=json_output)


def decode(
    source: Path | None = None,
    *,
    generation: _Generation = None,
    mode: PromptMode = "thinking",
    tokenizer: Path | None = None,
    tools: Path | None = None,
    finish_reason: _FinishReason | None = None,
    ids: Annotated[bool, _Flag] = False,
    text: Annotated[bool, _Flag] = False,
    strict: Annotated[bool, _Flag] = False,
) -> None:
    """Parse a completion (text or token ids) into a message (JSON).

    Exits with 1 if the completion is malformed; the message is printed all the same.

    Examples:
        printf 'easy</think>4<｜end▁of▁sentence｜>' | hadal decode -g v4 | jq .content

        hadal decode out.ids --ids --tokenizer path/to/checkpoint

        hadal decode prompt.ids --ids --tokenizer path/to/checkpoint --text

    Args:
        source: File to read; standard input if it is left out or "-".
        generation: Which generation of the format. Default: read from the checkpoint that
            --tokenizer names.
        mode: How the prompt ended: with an open think tag, or a closed one.
        tokenizer: A checkpoint's folder or its tokenizer.json; needed for ids.
        tools: JSON file with the declared tools: calls outside a proper block are then recovered.
        finish_reason: Why the engine stopped, if the text lacks the end-of-sentence token.
        ids: The input is token ids, separated by white space or commas, or a JSON list.
        text: Print the text of the ids and do not parse it.
        strict: Fail wherever the published reference does.
    """
    from hadal.encoding import Encoding

    encoding = Encoding.load(generation, tokenizer=tokenizer, strict=strict)
    if text and not ids:
        raise ConfigError("--text needs --ids: text is its own text", hint="leave one of them out")
    given = _read(source)
    if text:
        sys.stdout.write(encoding.decode(_read_ids(given)))
        return
    completion = _read_ids(given) if ids else given
    declared = _read_tools(tools) if tools is not None else None
    message = encoding.parse(completion, mode, tools=declared, finish_reason=finish_reason)
    print(json.dumps(_as_json(message), ensure_ascii=False))  # noqa: T201 - data goes to stdout
    if message.termination == "malformed":
        sys.exit(1)


def _as_json(message: "AssistantMessage") -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": message.content,
        "reasoning_content": message.reasoning_content,
        "tool_calls": [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ],
        "termination": message.termination,
        "problems": [
            {
                "kind": p.kind,
                "fatal": p.fatal,
                "offset": p.offset,
                "reason": p.reason,
                "text": p.text,
                "name": p.name,
                "arguments": p.arguments,
            }
            for p in message.problems
        ],
    }


def _print_prompt(prompt: "Prompt", ids: list[int] | None, *, json_output: bool) -> None:
    if json_output:
        out: dict[str, Any] = {"text": prompt.text, "start": prompt.start}
        if ids is not None:
            out["ids"] = ids
        print(json.dumps(out, ensure_ascii=False))  # noqa: T201 - data goes to stdout
    elif ids is not None:
        print(" ".join(map(str, ids)))  # noqa: T201 - data goes to stdout
    else:
        sys.stdout.write(prompt.text)  # no line feed: these are the exact bytes


def _read(source: Path | None) -> bytes:
    if source is None or str(source) == "-":
        return sys.stdin.buffer.read()
    try:
        return source.read_bytes()
    except OSError as err:
        raise InputError(f"cannot read {source}: {err.strerror}") from err


def _read_conversation(source: Path | None) -> dict[str, Any]:
    try:
        given: Any = json.loads(_read(source))
    except ValueError as err:
        raise InputError(f"the conversation is not JSON: {err}") from err
    if isinstance(given, list):
        return {"messages": given}
    known = ("messages", "tools", "tool_choice", "response_format")
    if not isinstance(given, dict) or "messages" not in given:
        raise InputError("expected a list of messages, or an object with `messages`")
    unknown = sorted(set(cast("dict[str, Any]", given)) - set(known))
    if unknown:
        raise ConfigError(
            f"unknown fields: {', '.join(unknown)}; expected {', '.join(known)}",
            hint="sampling settings are the engine's business",
        )
    return cast("dict[str, Any]", given)


def _read_tools(path: Path) -> list[Any]:
    try:
        given: Any = json.loads(_read(path))
    except ValueError as err:
        raise InputError(f"{path}: the tools are not JSON: {err}") from err
    if not isinstance(given, list):
        raise InputError(f"{path}: expected a list of tools")
    return cast("list[Any]", given)


def _read_ids(given: bytes) -> list[int]:
    try:
        return [int(word) for word in given.decode().strip(" \n[]").replace(",", " ").split()]
    except ValueError as err:
        raise InputError(f"expected token ids, got something else: {str(err)[:120]}") from err
