"""`hadal disk`: the disks that whole machines boot from."""

import asyncio
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from hadal.cli.quantities import human_bytes, human_seconds, parse_bytes

if TYPE_CHECKING:
    from hadal.node.machines.disk_images import DiskImage, DiskImages

__all__ = ["app"]

_Firmware = Literal["bios", "uefi"]
_GuestProgram = Literal["installed", "cloud-init", "none"]
_Json = Annotated[bool, Parameter(name="--json", negative="")]
app = App(name="disk", help="Make, add, list and remove the disks that whole machines boot from.")


@app.command
def make(
    name: str,
    image: str,
    *,
    size: Annotated[int, Parameter(converter=parse_bytes)] = 4 << 30,
    guest: _GuestProgram = "installed",
    state: Path | None = None,
    json_output: _Json = False,
) -> None:
    """Make a disk that boots, by BIOS and by UEFI, of an image that has a kernel and systemd.

    GRUB, an ext4 with the files of the image, and the guest program as a service of its system: the machine is
    used as any other box.

    Examples:
        hadal disk make debian debian-with-kernel

        hadal box create disk@debian --backend vm --memory 512MiB

    Args:
        name: Of the disk.
        image: As `hadal image ls` has it. In a box of it: `apt-get install linux-image-amd64 systemd-sysv`, then
            `hadal box snapshot`.
        size: Of the disk, as 4GiB; what is not written takes no room here.
        guest: Whether it gets the guest program; else whether cloud-init in it will.
        state: State folder of the node. Default: that of the embedded node.
        json_output: Print JSON.
    """
    from hadal.node.images import ImageStore
    from hadal.node.machines.bootable import make_bootable
    from hadal.sandbox.embedded import state_folder

    store = ImageStore((state or state_folder()) / "images")

    async def work() -> "DiskImage":
        try:
            found = await store.acquire(image)
            try:
                return await asyncio.to_thread(
                    _disks(state).make, name, f"image {image}",
                    lambda path: make_bootable(
                        found.layers, path, size >> 20, with_guest=guest == "installed"
                    ),
                    guest=guest,
                )  # fmt: skip
            finally:
                await store.release(found)
        finally:
            await store.close()

    _show(asyncio.run(work()), json_output=json_output)


@app.command
def add(
    name: str,
    file: Path,
    *,
    firmware: _Firmware = "bios",
    guest: _GuestProgram = "installed",
    state: Path | None = None,
    json_output: _Json = False,
) -> None:
    """Add a disk image of any system, raw or qcow2.

    Commands run through the guest program, which is in it already, or which cloud-init installs when it boots first.
    Without it there are its screen, keyboard, mouse and serial console.

    Examples:
        hadal disk add debian debian-12-genericcloud-amd64.qcow2 --guest cloud-init

        hadal disk add desktop desktop.qcow2 --firmware uefi --guest none

    Args:
        name: Of the disk.
        file: That is copied.
        firmware: That it boots by.
        guest: How it comes to the guest program.
        state: State folder of the node. Default: that of the embedded node.
        json_output: Print JSON.
    """
    _show(
        _disks(state).add_file(name, file, firmware=firmware, guest=guest), json_output=json_output
    )


@app.command
def ls(*, state: Path | None = None, json_output: _Json = False) -> None:
    """List the disks.

    Examples:
        hadal disk ls --json

    Args:
        state: State folder of the node. Default: that of the embedded node.
        json_output: Print one JSON object a line.
    """
    found = _disks(state).list()
    if json_output:
        sys.stdout.write("".join(json.dumps(asdict(disk)) + "\n" for disk in found))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("disk", "size", "here", "age", "firmware", "guest"):
        table.add_column(name, no_wrap=True, min_width=len(name))
    table.columns[0].min_width = max((len(disk.reference) for disk in found), default=0)
    table.columns[-1].min_width = len("cloud-init")
    table.add_column("from", overflow="fold")
    for disk in found:
        age = human_seconds(time.time() - disk.created_ns / 1e9)
        table.add_row(
            disk.reference,
            human_bytes(disk.size),
            human_bytes(disk.stored),
            age,
            disk.firmware,
            disk.guest,
            disk.source,
        )
    Console(highlight=False).print(table)


@app.command
def rm(*names: str, state: Path | None = None) -> None:
    """Remove disks; machines that were made from them live on.

    Examples:
        hadal disk rm debian

    Args:
        names: As `hadal disk ls` has them, with or without `disk@`.
        state: State folder of the node. Default: that of the embedded node.
    """
    for name in names:
        _disks(state).remove(name)


def _disks(state: Path | None) -> "DiskImages":
    from hadal.node.machines.disk_images import DiskImages, disk_images_folder
    from hadal.sandbox.embedded import state_folder

    return DiskImages(disk_images_folder((state or state_folder()).resolve()))


def _show(disk: "DiskImage", *, json_output: bool) -> None:
    if json_output:
        sys.stdout.write(json.dumps(asdict(disk)) + "\n")
        return
    text = f"{disk.reference}  {human_bytes(disk.size)}"
    Console(highlight=False, soft_wrap=True).print(text)
