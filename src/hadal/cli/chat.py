"""`hadal chat`: talk to a model in the terminal."""

import asyncio
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console

from hadal.cli.serve import EngineOptions, UpstreamOptions, open_front
from hadal.cli.thinking import Mode, thinking
from hadal.errors import InputError

if TYPE_CHECKING:
    from hadal.chat import Tool

__all__ = ["chat"]


def chat(
    checkpoint: Path | None = None,
    *,
    tokenizer: Path | None = None,
    generation: Literal["v4", "v4-0731", "v4.1"] | None = None,
    system: str | None = None,
    tools: Path | None = None,
    mode: Mode = "thinking",
    effort: str | None = None,
    temperature: float = 1.0,
    max_tokens: int | None = None,
    seed: int | None = None,
    allow_small_window: Annotated[bool, Parameter(negative="")] = False,
    engine: EngineOptions | None = None,
    upstream: UpstreamOptions | None = None,
) -> None:
    r"""Talk to a model: reasoning and tool calls are shown as they come; you type tools' results.

    Examples:
        hadal chat path/to/checkpoint

        hadal chat --upstream http://gpu-box:8000 --tokenizer path/to/checkpoint \
            --mode think-max

    Args:
        checkpoint: Folder with weights and tokenizer.json; or nano, which comes with hadal.
        tokenizer: Folder or tokenizer.json, if not the checkpoint's.
        generation: Of the message format. Default: read from the checkpoint.
        system: First message.
        tools: JSON file with a list of OpenAI-shaped tools.
        mode: Whether the model reasons first; the report's modes are an effort, too.
        effort: How hard, by the generation's table; for v4.1 also 1 to 100.
        temperature: 0 for the most probable token.
        max_tokens: Tokens of an answer at most.
        seed: For the same answer again.
        allow_small_window: Accept maximum effort with less context than it is meant for.
        engine: How the model runs.
        upstream: Another server that runs it.
    """
    from hadal.serve.terminal import chat as talk

    prompt_mode, budget = thinking(mode, effort)
    declared = _read_tools(tools)
    front = open_front(
        checkpoint, tokenizer, generation, engine or EngineOptions(), upstream or UpstreamOptions()
    )
    front.allow_small_window = allow_small_window
    sampling: dict[str, Any] = {"temperature": temperature}
    if max_tokens is not None:
        sampling["max_tokens"] = max_tokens
    if seed is not None:
        sampling["seed"] = seed

    async def session() -> None:
        try:
            await talk(
                front,
                Console(),
                _ask,
                system=system,
                tools=declared,
                mode=prompt_mode,
                effort=None if budget is None else str(budget),
                sampling=sampling,
            )
        finally:
            await front.backend.close()

    asyncio.run(session())


def _ask(prompt: str) -> str:
    """Read a line. Ctrl-C ends that at once: asyncio's own handler waits until the line is there."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return input(prompt)
    finally:
        signal.signal(signal.SIGINT, handler)


def _read_tools(path: Path | None) -> "list[Tool]":
    from hadal.chat import Tool

    if path is None:
        return []
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise InputError(f"--tools {path}: {err}") from err
    if not isinstance(listed, list) or not all(isinstance(t, dict) for t in listed):
        raise InputError(f"--tools {path}: expected a list of tools")
    return [Tool(tool.get("function", tool)) for tool in listed]
