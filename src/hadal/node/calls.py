"""Calls of functions, in the box that was asked or in one that nobody has used."""

import asyncio
import contextlib
import json
import secrets
from typing import TYPE_CHECKING, Any

from hadal.errors import GoneCause, HadalError
from hadal.node.box import Box
from hadal.node.functions import CallServer
from hadal.node.steps import begin_step, recorded_step
from hadal.sandbox.protocol import CallRequest
from hadal.sandbox.specs import Capability, FunctionSpec

if TYPE_CHECKING:
    from hadal.node.node import Node

__all__ = ["Calls"]


class Calls:
    """The interpreters of a node's boxes.

    Args:
        node: Whose boxes.
    """

    def __init__(self, node: "Node") -> None:
        self._node = node
        self._servers: dict[str, CallServer] = {}
        self._spares: dict[str, list[asyncio.Task[Box]]] = {}

    def start(self, box: Box) -> None:
        """Start the interpreter of a box, to be ready for its first call."""
        self._server(box).start()

    async def end(self, box_id: str) -> None:
        """Forget a box that ends, and end those that were kept ready for it."""
        self._servers.pop(box_id, None)
        for spare in self._spares.pop(box_id, []):
            with contextlib.suppress(HadalError):
                await self._node.end((await spare).id, GoneCause.KILLED)

    async def call(self, box_id: str, request: CallRequest) -> dict[str, Any]:
        """Call a function in a box of functions; the same request again returns the same answer.

        Raises:
            UnsupportedError: The box is of another kind.
            LaunchError: Its interpreter does not run.
        """
        box = self._node.get(box_id)
        box.require(Capability.CALL)
        journal, request_id = self._node.journal, request.request_id
        record = recorded_step(journal, box, request_id, repeatable=False)
        if record is not None:
            return {**json.loads(record.stdout), "recorded": True}
        box.touch()
        fields = request.model_dump(include={"source", "name", "arguments", "pickled"})
        details = {"fresh": request.fresh}
        with begin_step(
            journal, box, "call", fields, request_id=request_id, details=details
        ) as step:
            with box.in_use():
                answer = await self._perform_call(box, request)
            kept = ("error", "timed_out", "duration_s")
            step.result = {k: answer[k] for k in kept if k in answer}
            step.stdout = json.dumps(answer).encode()
        return answer

    async def _perform_call(self, box: Box, request: CallRequest) -> dict[str, Any]:
        call = request.model_dump(include={"source", "name", "arguments", "pickled"})
        if not request.fresh:
            return await self._server(box).call(call, request.timeout_s)
        other = await self._unused(box)
        try:
            return await self._server(other).call(call, request.timeout_s)
        finally:
            asyncio.get_running_loop().create_task(self._node.end(other.id, GoneCause.KILLED))

    def _server(self, box: Box) -> CallServer:
        if box.id not in self._servers:
            self._servers[box.id] = CallServer(box)
        return self._servers[box.id]

    async def _unused(self, box: Box) -> Box:
        """Return a box like this one that nobody has used, and see that spare ones are made."""
        assert isinstance(box.spec, FunctionSpec)
        spares = self._spares.setdefault(box.id, [])
        for _ in range(box.spec.spare + 1 - len(spares)):
            spares.append(asyncio.get_running_loop().create_task(self._make_spare(box)))
        return await spares.pop(0)

    async def _make_spare(self, box: Box) -> Box:
        made = await self._node.make_like(box, f"spare/{secrets.token_hex(16)}")
        await self._server(made).start()
        return made
