"""`hadal node`: the daemon that makes the boxes of a machine."""

import asyncio
import json
import logging
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter
from rich.console import Console

from hadal.cli.listening import is_loopback
from hadal.cli.node_options import NodeOptions
from hadal.cli.quantities import human_seconds, parse_seconds
from hadal.errors import ConfigError, InputError, NodeAuthError, NodeError

if TYPE_CHECKING:
    from hadal.node.daemon import Listen

__all__ = ["app"]

_Json = Annotated[bool, Parameter(name="--json", negative="")]
_Flag = Parameter(negative="")
_Seconds = Annotated[float, Parameter(converter=parse_seconds)]
_KEY_LENGTH = 16
_NEW_KEY = "python3 -c 'import secrets; print(secrets.token_urlsafe())'"

app = App(name="node", help="The daemon that makes the boxes of a machine.")


@app.command
def serve(
    *,
    state: Path | None = None,
    socket: Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    key_file: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    name: str = "node",
    max_boxes: int = 10_000,
    overcommit: float | None = None,
    lease: _Seconds = 900,
    sync: Literal["process", "power"] = "process",
    accelerator: Literal["auto", "kvm", "tcg"] = "auto",
    microvm: Literal["qemu", "firecracker"] = "qemu",
) -> None:
    """Make boxes for others: on a Unix socket of this user, and with --port over HTTP.

    It runs until SIGTERM or Ctrl-C. The boxes live on for the lease, and the next daemon with the same
    state folder finds them again. What it does is logged here and, in the state folder, to node.log.

    Examples:
        hadal node serve --port 7777 --key-file keys --tls-cert c.pem --tls-key k.pem

        HADAL_NODE=https://10.0.0.5:7777 HADAL_NODE_KEY=... hadal box create

    Args:
        state: Folder of its boxes, images and log. Default: that of the embedded node.
        socket: Unix socket to listen on. Default: node.sock in the state folder.
        host: Address to listen on with --port.
        port: Port to listen on, which needs keys; 0 for any free one. Default: none.
        key_file: File with API keys, one on a line; also from $HADAL_NODE_KEYS, with commas.
        tls_cert: Certificate, with its chain.
        tls_key: Its private key.
        name: Of the node on this machine; its control groups are named after it.
        max_boxes: That live at a time.
        overcommit: Times the memory of this machine that boxes may use together, each counted with its
            limit: 1 promises no more than there is. Default: any amount.
        lease: Time that boxes outlive the daemon.
        sync: Whether the log of every box survives the end of every process, or also of the machine.
        accelerator: Of virtual machines: kvm, tcg (emulation), or auto, which is KVM where it runs a guest.
        microvm: What runs microVMs; firecracker needs KVM.
    """
    from hadal.node.daemon import LOG_FORMAT, Listen, log_to_file, run_daemon
    from hadal.node.node_config import NodeConfig
    from hadal.sandbox.embedded import state_folder

    folder = (state or state_folder()).resolve()
    listen = Listen(
        socket=socket or folder / "node.sock",
        host=host,
        port=port,
        keys=_keys(key_file),
        tls=_tls(tls_cert, tls_key),
    )
    _check(listen)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    log_to_file(folder / "node.log")
    Console(stderr=True).print(
        f"node {name}: {folder}, {_addresses(listen)}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    config = NodeConfig(
        state=folder, name=name, max_boxes=max_boxes, memory_mb=_memory_mb(overcommit), lease_s=round(lease), sync=sync,
        accelerator=accelerator, microvm=microvm,
    )  # fmt: skip
    sys.exit(run_daemon(config, listen))


def _memory_mb(overcommit: float | None) -> int | None:
    if overcommit is None:
        return None
    if overcommit <= 0:
        raise ConfigError(f"--overcommit: expected more than 0, got {overcommit}")
    return int(overcommit * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) >> 20


def _keys(file: Path | None) -> frozenset[str]:
    named = os.environ.get("HADAL_NODE_KEYS", "").split(",")
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--key-file {file}: {error}") from error
        named += [line for line in lines if not line.lstrip().startswith("#")]
        if not any(line.strip() for line in lines):
            raise InputError(f"--key-file {file}: it has no key")
    keys = frozenset(key.strip() for key in named if key.strip())
    if any(len(key) < _KEY_LENGTH for key in keys):
        raise ConfigError(
            f"an API key has at least {_KEY_LENGTH} characters",
            hint=_NEW_KEY,
        )
    return keys


def _tls(certificate: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    if (certificate is None) != (key is None):
        raise ConfigError("TLS needs both --tls-cert and --tls-key")
    if certificate is None or key is None:
        return None
    for file in (certificate, key):
        if not file.is_file():
            raise InputError(f"{file}: no such file", hint="PEM files are expected")
    return certificate, key


def _check(listen: "Listen") -> None:
    """See that a port asks for a key; warn of what others could read.

    The loopback address is no exception: all users of the machine reach it, and so do web pages, by way of
    a browser on it.
    """
    if listen.port is None:
        return
    if not listen.keys:
        raise ConfigError(
            "a port needs an API key: whoever reaches it is root here, and 127.0.0.1 is reached by every user"
            " and by web pages in a browser",
            hint=f"set --key-file or HADAL_NODE_KEYS ({_NEW_KEY}), or use the Unix socket, which needs none",
        )
    if listen.tls is None and not is_loopback(listen.host):
        Console(stderr=True).print(
            "warning: without TLS everybody on the way reads the API key and the boxes' data"
            " (--tls-cert, --tls-key)",
            style="yellow",
            soft_wrap=True,
        )


def _addresses(listen: "Listen") -> str:
    addresses = [f"unix://{listen.socket}"]
    if listen.port is not None:
        scheme = "http" if listen.tls is None else "https"
        host = f"[{listen.host}]" if ":" in listen.host else listen.host
        addresses.append(f"{scheme}://{host}:{listen.port or '(any)'}")
    return " and ".join(addresses)


@app.command
def kernel(
    package: Path | None = None, *, state: Path | None = None, json_output: _Json = False
) -> None:
    """Give virtual machines a kernel: one out of a Debian package, which need not be installed.

    Without a package it is Debian's newest for virtual machines, fetched by apt-get.

    Examples:
        hadal node kernel

        hadal node kernel linux-image-6.1.0-56-cloud-amd64_6.1.192-1_amd64.deb

    Args:
        package: The file of the package.
        state: State folder of the node. Default: that of the embedded node.
        json_output: Print JSON.
    """
    from hadal.node.machines.kernel import fetch_kernel, install_kernel, kernel_folder
    from hadal.sandbox.embedded import state_folder

    if package is not None and not package.is_file():
        raise ConfigError(f"no package {package}", hint="`apt-get download` fetches one")
    folder = kernel_folder((state or state_folder()).resolve())
    with tempfile.TemporaryDirectory() as fetched:
        made = install_kernel(package or fetch_kernel(Path(fetched)), folder)
    found = {"kernel": str(made.image), "modules": str(made.modules)}
    text = json.dumps(found) if json_output else f"machines boot {made.image}"
    sys.stdout.write(f"{text}\n")


@app.command
def snapshots(
    *, remove: str | None = None, json_output: _Json = False, where: NodeOptions | None = None
) -> None:
    """List the machines that were kept with their memory, or remove one.

    Examples:
        hadal box snapshot 3k2m --full --name ready

        hadal node snapshots

        hadal node snapshots --remove machine@ready

    Args:
        remove: The reference of one.
        json_output: Print one JSON object a line.
        where: The node.
    """

    async def work() -> list[dict[str, object]]:
        async with (where or NodeOptions()).open() as node:
            if remove is not None:
                await node.remove_kept_machine(remove)
                return []
            return await node.kept_machines()

    for kept in asyncio.run(work()):
        if json_output:
            line = json.dumps(kept)
        else:
            age = human_seconds(time.time() - int(str(kept["created_ns"])) / 1e9)
            size = int(str(kept["size"])) / 1e6
            line = f"{kept['reference']}  {size:,.0f} MB  {age} ago  of {kept['image']}"
        sys.stdout.write(line + "\n")


@app.command
def status(*, json_output: _Json = False, where: NodeOptions | None = None) -> None:
    """Say whether a node runs, and what it has. Exit code 1: it does not.

    Examples:
        hadal node status --json

    Args:
        json_output: Print one JSON object.
        where: The node.
    """

    async def work() -> dict[str, object]:
        async with (where or NodeOptions()).open(start=False) as node:
            status: dict[str, object] = asdict(await node.status())
            return {"running": True, "url": node.url, **status}

    try:
        found = asyncio.run(work())
    except NodeAuthError:
        raise
    except NodeError as error:
        if json_output:
            sys.stdout.write(json.dumps({"running": False, "reason": error.message}) + "\n")
        else:
            sys.stdout.write(f"not running: {error}\n")
        sys.exit(1)
    if json_output:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    found["uptime"] = human_seconds(float(str(found.pop("uptime_s"))))
    sys.stdout.write("".join(f"{key.replace('_', ' '):<10} {found[key]}\n" for key in found))


@app.command
def stop(*, end_boxes: Annotated[bool, _Flag] = False, where: NodeOptions | None = None) -> None:
    """End the node daemon of this machine. Its boxes live on for their lease.

    Examples:
        hadal node stop --end-boxes

    Args:
        end_boxes: End them too.
        where: The node, by its Unix socket.
    """
    from hadal.sandbox.embedded import wait_until_ended

    async def work() -> str:
        async with (where or NodeOptions()).open(start=False) as node:
            folder = (await node.status()).state
            await node.stop(end_boxes=end_boxes)
            return folder

    wait_until_ended(Path(asyncio.run(work())))
