"""The lines of `hadal box log`."""

import asyncio
import json
import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

from hadal.cli.node_options import NodeOptions
from hadal.cli.quantities import human_seconds
from hadal.plain_text import one_line

if TYPE_CHECKING:
    from hadal.sandbox.results import Event

__all__ = ["line_of", "show"]

_POLL_S = 0.25


async def show(where: NodeOptions, name: str, after: int, follow: bool, as_json: bool) -> None:
    """Print the log of a box, and go on with it."""
    from hadal.sandbox.box import AsyncSandbox

    async with where.open() as node:
        info = await node.find(name)
        box = AsyncSandbox(node.client, info)
        begun: set[int] = set()
        last = after
        while True:
            gone = not follow or (await box.info()).state == "gone"
            for event in await box.log(after=min(begun, default=last + 1) - 1):
                if event.position <= last and event.position not in begun:
                    continue
                if event.state == "begun" and event.position in begun:
                    continue
                (begun.add if event.state == "begun" else begun.discard)(event.position)
                last = max(last, event.position)
                sys.stdout.write((json.dumps(asdict(event)) if as_json else line_of(event)) + "\n")
            sys.stdout.flush()
            if gone:
                return
            await asyncio.sleep(_POLL_S)


def line_of(event: "Event") -> str:
    """Return a record as one line: position, kind, what, how it ended, how long it took."""
    took = ""
    if event.ended_ns is not None:
        took = human_seconds(max(0, event.ended_ns - event.began_ns) / 1e9)
    outcome = _outcome(event)
    return f"{event.position:>5}  {event.kind:<8} {outcome:<12} {took:>7}  {_what(event)}".rstrip()


def _what(event: "Event") -> str:
    request = event.request
    if "shell" in request:
        return one_line(str(request["shell"]))
    if isinstance(request.get("argv"), list):
        return one_line(shlex.join(str(part) for part in cast(list[object], request["argv"])))
    parts = [str(request[k]) for k in ("operation", "how", "path", "target") if request.get(k)]
    return one_line(" ".join(parts) or json.dumps(request))


def _outcome(event: "Event") -> str:
    result = event.result or {}
    if event.state == "begun":
        return "BEGUN"
    if event.state == "unknown":
        return "UNKNOWN"
    if event.state == "refused":
        return "refused"
    if result.get("timed_out"):
        return "timed out"
    if result.get("oom_killed"):
        return "out of mem"
    if "exit_code" in result:
        return f"exit {result['exit_code']}"
    return f"errno {result['errno']}" if result.get("errno") else "ok"
