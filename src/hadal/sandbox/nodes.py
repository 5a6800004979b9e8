"""`AsyncNode`: a node daemon as its callers have it, for what is not about one box."""

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from hadal.errors import GoneCause, InputError, NodeError, SandboxGoneError
from hadal.sandbox.box import AsyncSandbox
from hadal.sandbox.client import NodeClient
from hadal.sandbox.embedded import answers, default_node_url, ensure_node, state_folder
from hadal.sandbox.results import BoxInfo, NodeStatus, Usage
from hadal.sandbox.specs import Spec

__all__ = ["AsyncNode"]


class AsyncNode:
    """A connection to a node daemon.

    Args:
        url: `unix:///path` or `http(s)://host:port`. Default: $HADAL_NODE, or the embedded node, which is
            started where that is needed.
        key: Its API key. Default: $HADAL_NODE_KEY.
        verify: Certificate to trust. Default: $HADAL_NODE_CA, or the system's.
        start: Whether the embedded node may be started.

    Raises:
        NodeError: It does not run, or does not start.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        key: str | None = None,
        verify: Path | None = None,
        start: bool = True,
    ) -> None:
        trusted = os.environ.get("HADAL_NODE_CA")
        self.url = url or default_node_url() or (ensure_node() if start else _embedded())
        self._key = key or os.environ.get("HADAL_NODE_KEY")
        self._verify = verify or (Path(trusted) if trusted else None)
        self.client = NodeClient(self.url, key=self._key, verify=self._verify)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.client.close()

    async def status(self) -> NodeStatus:
        """Return what the node says of itself."""
        return NodeStatus(**await self.client.request("GET", "/v1/node"))

    async def stop(self, *, end_boxes: bool = False) -> None:
        """Tell it to end. Its boxes live on until their lease is over, unless they are ended too.

        Raises:
            NodeAuthError: It was asked over the network; only its own machine may.
        """
        await self.client.request("POST", "/v1/node/stop", body={"end_boxes": end_boxes})

    async def boxes(self) -> list[BoxInfo]:
        """Return the living boxes, the oldest first."""
        body = await self.client.request("GET", "/v1/boxes")
        found = [_info(box) for box in body["boxes"]]
        return sorted(found, key=lambda box: box.created_ns)

    async def kept_machines(self) -> list[dict[str, Any]]:
        """Return what is known of the machines that were kept whole, as JSON."""
        return (await self.client.request("GET", "/v1/machines/kept"))["machines"]

    async def remove_kept_machine(self, reference: str) -> None:
        """Remove one; machines that go on from it live on.

        Raises:
            ImageError: There is none.
        """
        await self.client.request("DELETE", f"/v1/machines/kept/{quote(reference, safe='')}")

    async def usage(self, box: str) -> Usage | None:
        """Return what a box uses; None where it has ended."""
        try:
            return Usage(**await self.client.request("GET", f"/v1/boxes/{box}/usage"))
        except SandboxGoneError:
            return None

    async def find(self, text: str) -> BoxInfo:
        """Return a box by its id, its name, or the beginning of its id; one that is gone by its id only.

        Raises:
            SandboxGoneError: There is none.
            InputError: More than one begins so.
        """
        living = await self.boxes()
        exact = [box for box in living if text in (box.id, box.name)]
        if exact:
            return exact[0]
        begun = [box for box in living if text and box.id.startswith(text)]
        if len(begun) > 1:
            ids = ", ".join(box.id for box in begun[:5])
            raise InputError(f"{text!r} is the beginning of {len(begun)} boxes: {ids}")
        if begun:
            return begun[0]
        if not text.isalnum() or not text.isascii():
            raise _no_box(text)
        try:
            return _info(await self.client.request("GET", f"/v1/boxes/{text}"))
        except SandboxGoneError as error:
            raise _no_box(text) from error

    async def create(
        self, spec: Spec, *, name: str | None = None, trajectory: str | None = None
    ) -> AsyncSandbox:
        """Make a box, as `AsyncSandbox.create` does; it ends with its block unless it is detached."""
        return await AsyncSandbox.create(
            spec,
            node=self.url,
            key=self._key,
            verify=self._verify,
            name=name,
            trajectory=trajectory,
        )

    async def end(self, text: str) -> str:
        """End a box, as `find` finds it, and return its id."""
        found = await self.find(text)
        await self.client.request("DELETE", f"/v1/boxes/{found.id}")
        return found.id

    async def open(self, text: str) -> AsyncSandbox:
        """Return a living box, as `find` finds it, over this connection; it is not ended by its block.

        Raises:
            SandboxGoneError: There is none, or it is gone, and why.
        """
        info = await self.find(text)
        if info.state == "gone":
            await self.client.request("GET", f"/v1/boxes/{info.id}/usage")  # says why
        box = AsyncSandbox(self.client, info)
        box.detach()
        return box


def _info(body: dict[str, Any]) -> BoxInfo:
    fields: dict[str, Any] = body | {"capabilities": tuple(body["capabilities"])}
    return BoxInfo(**fields)


def _no_box(text: str) -> SandboxGoneError:
    return SandboxGoneError(
        f"no box {text!r} on this node",
        cause=GoneCause.NOT_FOUND,
        hint="`hadal box ls` shows those there are",
    )


def _embedded() -> str:
    socket = state_folder() / "node.sock"
    if not answers(socket):
        raise NodeError(
            f"no node daemon runs here: nobody listens at {socket}",
            hint="the first `hadal box create` starts one; so does `hadal node serve`",
        )
    return f"unix://{socket}"
