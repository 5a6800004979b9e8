"""The table of `hadal box ls`."""

import asyncio
import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from hadal.cli.node_options import NodeOptions
from hadal.cli.quantities import human_bytes, human_seconds
from hadal.plain_text import one_line

if TYPE_CHECKING:
    from hadal.sandbox.results import BoxInfo, Usage

__all__ = ["show_boxes"]

_AT_A_TIME = 32


async def show_boxes(where: NodeOptions, as_json: bool) -> None:
    """Print the living boxes of a node."""
    async with where.open() as node:  # boxes outlive a daemon, so one that has ended is started
        boxes = await node.boxes()
        gate = asyncio.Semaphore(_AT_A_TIME)

        async def usage(box: str) -> "Usage | None":
            async with gate:
                return await node.usage(box)

        used = await asyncio.gather(*(usage(box.id) for box in boxes))
    _show(list(zip(boxes, used, strict=True)), as_json)


def _show(rows: "list[tuple[BoxInfo, Usage | None]]", as_json: bool) -> None:
    if as_json:
        for box, usage in rows:
            body = asdict(box) | {"usage": None if usage is None else asdict(usage)}
            sys.stdout.write(json.dumps(body) + "\n")
        return
    table = Table("id", "name", "state", "image", box=None, padding=(0, 2, 0, 0))
    for column in ("age", "idle", "memory", "of"):
        table.add_column(column, justify="right")
    now = time.time_ns()
    for box, usage in rows:
        table.add_row(
            box.id,
            one_line(box.name or "", 40),
            box.state,
            one_line(box.image, 40),
            human_seconds((now - box.created_ns) / 1e9),
            human_seconds(max(0, now - box.used_ns) / 1e9),
            human_bytes(usage.memory_bytes) if usage else "",
            human_bytes(usage.memory_limit_bytes) if usage else "",
        )
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(table if rows else "no boxes")
