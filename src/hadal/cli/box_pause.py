"""`hadal box pause` and `resume`."""

import asyncio
from typing import Annotated

from cyclopts import Parameter

from hadal.cli.node_options import NodeOptions

__all__ = ["pause", "resume"]


def pause(
    box: str,
    /,
    *,
    reclaim: Annotated[bool, Parameter(negative="")] = False,
    where: NodeOptions | None = None,
) -> None:
    """Stop all that runs in a box, until it is used again.

    Examples:
        hadal box pause build --reclaim

    Args:
        box: Which.
        reclaim: Give its memory back meanwhile; then the next use takes longer.
        where: The node.
    """

    async def work() -> None:
        async with (where or NodeOptions()).open() as node:
            await (await node.open(box)).pause(reclaim=reclaim)

    asyncio.run(work())


def resume(box: str, /, *, where: NodeOptions | None = None) -> None:
    """Let a box go on that is paused, before somebody uses it.

    Examples:
        hadal box resume build

    Args:
        box: Which.
        where: The node.
    """

    async def work() -> None:
        async with (where or NodeOptions()).open() as node:
            await (await node.open(box)).resume()

    asyncio.run(work())
