"""`hadal box`: boxes for code that nobody trusts, from the command line."""

import asyncio
import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import App, Parameter

from hadal.cli import box_log
from hadal.cli.box_commands import run, shell
from hadal.cli.box_list import show_boxes
from hadal.cli.box_options import BoxOptions
from hadal.cli.box_pause import pause, resume
from hadal.cli.box_screen import click, console, press, screenshot, type_text
from hadal.cli.node_options import NodeOptions
from hadal.errors import HadalError, InputError

__all__ = ["app"]

_Flag = Parameter(negative="")
_Json = Annotated[bool, Parameter(name="--json", negative="")]
_Side = Annotated[str, Parameter(allow_leading_hyphen=True)]  # `-`

app = App(
    name="box",
    help="Boxes for code that nobody trusts: made, used, copied, and ended.\n\n"
    "A BOX is an id, the beginning of one, or a name. Exit codes: 0, those of the command, 2 for wrong"
    " usage, 3 when the box or its node fails.",
)
for command in (run, shell, pause, resume, screenshot, press, click, console):
    app.command(command)
app.command(type_text, name="type")


@app.command
def create(
    image: str = "host",
    /,
    *,
    name: str | None = None,
    trajectory: str | None = None,
    options: BoxOptions | None = None,
    json_output: _Json = False,
    where: NodeOptions | None = None,
) -> None:
    """Make a box and print its id. It lives until `hadal box rm`, its time to live, or its idle time.

    Examples:
        hadal box create --name build --memory 2GiB --cpus 2

        hadal box create ./rootfs --mount /srv/data:/data --ttl 1h --allow pypi

        hadal box create debian:12 --backend microvm --memory 512MiB

    Args:
        image: `host` (this machine's /usr), a directory, an image of the node's store; of a machine also one that
            was kept, machine@NAME, or a disk of `hadal disk ls`.
        name: A box of this name that lives already is returned instead.
        trajectory: Log to go on with, or to begin.
        options: What it has.
        json_output: Print what is known of it as one JSON object.
        where: The node.
    """
    spec = (options or BoxOptions()).spec(image)

    async def work() -> dict[str, Any]:
        async with (where or NodeOptions()).open() as node:
            box = await node.create(spec, name=name, trajectory=trajectory)
            box.detach()
            async with box:
                return asdict(await box.info())

    made = asyncio.run(work())
    sys.stdout.write((json.dumps(made) if json_output else made["id"]) + "\n")


@app.command
def ls(*, json_output: _Json = False, where: NodeOptions | None = None) -> None:
    """Show the living boxes.

    Examples:
        hadal box ls --json

    Args:
        json_output: Print one JSON object a box.
        where: The node.
    """
    asyncio.run(show_boxes(where or NodeOptions(), json_output))


@app.command
def log(
    box: str,
    /,
    *,
    follow: Annotated[bool, _Flag] = False,
    after: int = 0,
    json_output: _Json = False,
    where: NodeOptions | None = None,
) -> None:
    """Show what was done in a box, also in one that is gone: its trajectory, command by command.

    Examples:
        hadal box log build --follow

        hadal box log 4k2n --json | jq .request

    Args:
        box: Which; one that is gone by its whole id.
        follow: Go on with what is done from now on, until the box is gone. What takes a while is shown
            twice: when it begins and when it ends.
        after: Show only what comes behind this position.
        json_output: Print one JSON object a record, with everything that is kept but the output.
        where: The node.
    """
    asyncio.run(box_log.show(where or NodeOptions(), box, after, follow, json_output))


@app.command
def cp(source: _Side, target: _Side, /, *, where: NodeOptions | None = None) -> None:
    """Copy files and directories into a box, out of one, or from one to another.

    A directory that exists is copied into, as cp does. `-` is a tar stream: what it has is unpacked into
    a directory of a box, or a path of one is packed.

    Examples:
        hadal box cp ./project build:/src

        hadal box cp build:/src/report.html .

        hadal box cp build:/var/log - | tar -tv

    Args:
        source: BOX:/path, a path here, or - for a tar stream on standard input.
        target: BOX:/path, a path here, or - for a tar stream on standard output.
        where: The node.
    """
    from hadal.sandbox.copying import copy, read_place

    places = read_place(source), read_place(target)

    async def work() -> None:
        async with (where or NodeOptions()).open() as node:
            await copy(node, *places)

    asyncio.run(work())


@app.command
def rm(
    *box: str, all_boxes: Annotated[bool, Parameter(name="--all", negative="")] = False,
    where: NodeOptions | None = None,
) -> None:  # fmt: skip
    """End boxes. Their logs are kept.

    Examples:
        hadal box rm build

        hadal box rm --all

    Args:
        box: Which.
        all_boxes: All that live on the node.
        where: The node.
    """
    if bool(box) == all_boxes:
        raise InputError("expected boxes to end, or --all")

    async def work() -> int:
        failures = 0
        async with (where or NodeOptions()).open() as node:
            names = [b.id for b in await node.boxes()] if all_boxes else box
            for name in names:
                try:
                    sys.stdout.write(f"{await node.end(name)}\n")
                except HadalError as error:
                    failures += 1
                    sys.stderr.write(f"error: {error}\n")
        return failures

    if asyncio.run(work()):
        sys.exit(3)


@app.command
def snapshot(
    box: str,
    /,
    *,
    name: str | None = None,
    full: Annotated[bool, Parameter(negative="")] = False,
    where: NodeOptions | None = None,
) -> None:
    """Keep what a box has changed as a layer, and print its reference: `hadal box create REFERENCE`.

    Examples:
        hadal box snapshot build --name with-tools

        hadal box create with-tools

    Args:
        box: Which; its processes stand still meanwhile.
        name: For the snapshot. Default: one is made up.
        full: Keep a machine with its memory and processes: `hadal node snapshots` lists such ones.
        where: The node.
    """

    async def work() -> str:
        async with (where or NodeOptions()).open() as node:
            kind = "full" if full else "files"
            return await (await node.open(box)).snapshot(name=name, kind=kind)

    sys.stdout.write(asyncio.run(work()) + "\n")


@app.command
def fork(
    box: str,
    /,
    *,
    count: Annotated[int, Parameter(name=("--count", "-n"))] = 1,
    where: NodeOptions | None = None,
) -> None:
    """Make boxes that begin with the files of one as they are now, and print their ids.

    Examples:
        hadal box fork build --count 4

    Args:
        box: Which.
        count: How many to make.
        where: The node.
    """

    async def work() -> list[str]:
        async with (where or NodeOptions()).open() as node:
            made = await (await node.open(box)).fork(count)
            for child in made:
                child.detach()
                await child.close()
            return [child.id for child in made]

    sys.stdout.write("".join(f"{child}\n" for child in asyncio.run(work())))
