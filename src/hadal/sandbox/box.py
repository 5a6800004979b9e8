"""`AsyncSandbox`: one box, as its caller has it. `Sandbox` (sync.py) is the same without await."""

import asyncio
import base64
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from hadal.errors import CommandFailedError, ConfigError
from hadal.sandbox.calls import call_body, read_call
from hadal.sandbox.client import NodeClient
from hadal.sandbox.embedded import default_node_url, ensure_node
from hadal.sandbox.files import AsyncFiles
from hadal.sandbox.network_policy import NetworkPolicy
from hadal.sandbox.ports import listen_for
from hadal.sandbox.process import AsyncProcess, decode_result
from hadal.sandbox.protocol import SnapshotKind, command_record
from hadal.sandbox.replay import ReplayReport, replay
from hadal.sandbox.results import BoxInfo, CallResult, Change, Event, ExecResult, Usage
from hadal.sandbox.screen import AsyncConsole, AsyncKeyboard, AsyncMouse
from hadal.sandbox.specs import ContainerSpec, Spec
from hadal.sandbox.trajectory import Logged, Recorded, read_log

__all__ = ["AsyncSandbox"]

Command = str | Sequence[str]
_TICK_NS = 10_000_000
"""Longest tick of the clock of file systems: 100 Hz."""


class AsyncSandbox:
    """A box. Make one with `create`; leaving the `async with` block ends it, unless it is detached.

    Attributes:
        id: Its name on the node; `AsyncSandbox.connect(id)` finds it from anywhere.
        files: Its file system.
        keyboard, mouse, console: Those of a whole machine, beside its screen.
        client: The connection to its node.
    """

    def __init__(self, client: NodeClient, info: BoxInfo, recorded: Recorded | None = None) -> None:
        self.id = info.id
        self.client = client
        self.files = AsyncFiles(self)
        self.console = AsyncConsole(self)
        self.keyboard = AsyncKeyboard(self)
        self.mouse = AsyncMouse(self)
        self._path = f"/v1/boxes/{info.id}"
        self._recorded = recorded
        self._detached = False
        self._servers: list[asyncio.Server] = []

    # --- life ---

    @classmethod
    async def create(
        cls, spec: Spec | str | None = None, *, node: str | None = None, key: str | None = None,
        name: str | None = None, trajectory: str | None = None, request_id: str | None = None,
        verify: Path | None = None,
    ) -> Self:  # fmt: skip
        """Make a box, or come back to one.

        Args:
            spec: What to make; a string is the image of a container. Default: `ContainerSpec()`.
            node: URL of a node daemon. Default: $HADAL_NODE, or one that is started here.
            key: Its API key. Default: $HADAL_NODE_KEY.
            name: The living box of this name, if there is one.
            trajectory: The box of this trajectory, if there is one: what is then asked of it is
                answered from its log as far as that goes.
            request_id: Twice the same makes one box. Default: a random one.
            verify: Certificate to trust, for a node with its own.

        Raises:
            NodeError: The node cannot be reached or started.
            NoCapacityError, ImageError, LaunchError, ConfigError: It cannot be made.
            SandboxGoneError: The box of this trajectory has ended.
        """
        spec = ContainerSpec() if spec is None else spec
        spec = ContainerSpec(image=spec) if isinstance(spec, str) else spec
        client = _client(node, key, verify)
        body = {
            "spec": spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
            | {"backend": spec.backend},
            "request_id": request_id or uuid.uuid4().hex,
            "name": name,
            "trajectory": trajectory,
        }
        try:
            info = BoxInfo(**await client.request("POST", "/v1/boxes", body=body))
            recorded = None
            if trajectory is not None:
                recorded = Recorded(await read_log(client, info.id))
        except BaseException:
            await client.close()
            raise
        return cls(client, info, recorded)

    @classmethod
    async def connect(
        cls,
        box: str,
        *,
        node: str | None = None,
        key: str | None = None,
        verify: Path | None = None,
    ) -> Self:
        """Return a living box by its id; leaving the block does not end it.

        Raises:
            SandboxGoneError: It is gone, and why.
        """
        client = _client(node, key, verify)
        try:
            info = BoxInfo(**await client.request("GET", f"/v1/boxes/{box}"))
            if info.state == "gone":
                await client.request("GET", f"/v1/boxes/{box}/usage")  # says why
        except BaseException:
            await client.close()
            raise
        found = cls(client, info)
        found.detach()
        return found

    def detach(self) -> None:
        """Let the box live when this block is left."""
        self._detached = True

    async def kill(self) -> bool:
        """End the box; False where it has ended already."""
        try:
            return (await self.client.request("DELETE", self._path))["ended"]
        finally:
            await self.client.close()  # another request opens it again

    async def close(self) -> None:
        """Let go of the box: it ends, unless it is detached."""
        for server in self._servers:
            server.close()
        try:
            if not self._detached:
                await self.kill()
        finally:
            await self.client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def info(self) -> BoxInfo:
        """Return what its node knows of it, also when it is gone."""
        body = await self.client.request("GET", self._path)
        return BoxInfo(**body | {"capabilities": tuple(body["capabilities"])})

    async def usage(self) -> Usage:
        """Return what it uses now."""
        return Usage(**await self.client.request("GET", f"{self._path}/usage"))

    # --- commands ---

    async def run(
        self, command: Command, *, timeout_s: float | None = None, quiet_s: float | None = None,
        stdin: bytes | str | None = None, env: Mapping[str, str] | None = None, cwd: str | None = None,
        user: str | None = None, output_limit: int | None = None, check: bool = False,
        request_id: str | None = None,
    ) -> ExecResult:  # fmt: skip
        """Run a command and wait for its end.

        Args:
            command: A line for the image's shell, or program and arguments.
            timeout_s: After so long all of it is killed; the result has what it wrote until then.
            quiet_s: The same after so long without output.
            stdin: Its input. Default: none.
            env: Variables, beside those of the box.
            cwd: Where it starts.
            user: Who runs it.
            output_limit: Bytes that are kept of each stream: the beginning, and the last 16 KiB.
            check: Whether failure raises.
            request_id: Twice the same runs once. Default: a random one.

        Raises:
            CommandRefusedError: It could not be started.
            CommandFailedError: With `check`: it failed. The error has the result.
            SandboxGoneError: The box has ended; the error says why.
            UnknownOutcomeError: The trajectory has it begun, and nobody knows how it went.
            ReplayDivergedError: The trajectory has another command here.
        """
        body = command_body(command, timeout_s, quiet_s, stdin, env, cwd, user, output_limit)
        result = self.recorded_command(body)
        if result is None:
            result = await self.perform(body, request_id)
        if check and not result.ok:
            raise CommandFailedError(f"{command!r}: {result.describe()}", result=result)
        return result

    async def perform(self, body: dict[str, Any], request_id: str | None) -> ExecResult:
        """Run a command that is not recorded."""
        body["request_id"] = request_id or body.get("request_id") or uuid.uuid4().hex
        return decode_result(await self.client.request("POST", f"{self._path}/commands", body=body))

    async def spawn(
        self, command: Command, *, interactive: bool = False, tty: tuple[int, int] | None = None,
        timeout_s: float | None = None, quiet_s: float | None = None,
        env: Mapping[str, str] | None = None, cwd: str | None = None, user: str | None = None,
        output_limit: int | None = None, request_id: str | None = None,
    ) -> AsyncProcess:  # fmt: skip
        """Start a command and return a handle on it.

        Input may follow where it is `interactive`, or has a terminal: `tty` is its rows and columns. The
        other arguments and errors are those of `run`.
        """
        body = command_body(command, timeout_s, quiet_s, None, env, cwd, user, output_limit)
        body |= {"interactive": interactive or tty is not None, "tty": tty, "wait": False}
        body["request_id"] = request_id or uuid.uuid4().hex
        started = await self.client.request("POST", f"{self._path}/commands", body=body)
        return AsyncProcess(self.client, self.id, started["id"])

    async def attach(self, command: int, *, stdout: int = 0, stderr: int = 0) -> AsyncProcess:
        """Return a handle on a command by its number, with its output from these offsets on."""
        return AsyncProcess(self.client, self.id, command, stdout, stderr)

    async def call(
        self, function: Callable[..., object] | str, args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None, *, timeout_s: float = 60.0, fresh: bool = False,
        pickled: bool = False, request_id: str | None = None,
    ) -> CallResult:  # fmt: skip
        """Call a function in a box made from a FunctionSpec: in a warm interpreter, with nothing of an earlier call.

        Args:
            function: A function that needs nothing around it, or source whose last function is called.
            args: Positional arguments, as JSON allows.
            kwargs: Named arguments.
            timeout_s: After so long it is ended, with all that it has started.
            fresh: In a box that nobody has used before, as graders want it.
            pickled: Arguments go pickled, and the result comes as `result.pickle`, which is for another
                box to read: it is never unpickled here.
            request_id: Twice the same calls once. Default: a random one.

        Raises:
            UnsupportedError: The box is of another kind.
            ConfigError: There is no function, or its arguments are no JSON.
        """
        body = call_body(function, args, kwargs or {}, pickled)
        record = self._take("call", body)
        if record is not None and record.state == "done":
            return read_call({**json.loads(base64.b64decode(record.stdout)), "recorded": True})
        body |= {
            "timeout_s": timeout_s,
            "fresh": fresh,
            "request_id": request_id or uuid.uuid4().hex,
        }
        return read_call(await self.client.request("POST", f"{self._path}/call", body=body))

    async def pause(self, *, reclaim: bool = False) -> None:
        """Stop every process in it, until `resume` or any other request.

        Args:
            reclaim: Whether others get its memory meanwhile: that of a machine goes to the disk, of a container what
                the kernel can take. Then pausing takes longer, and so does the next request.

        Raises:
            NodeError: With `reclaim`: the memory of a machine cannot be kept; it runs on.
        """
        body = {"reclaim": reclaim}
        await self.client.request("POST", f"{self._path}/pause", body=body)

    async def resume(self) -> None:
        """Let its processes go on."""
        await self.client.request("POST", f"{self._path}/resume", body={})

    async def snapshot(
        self,
        name: str | None = None,
        *,
        kind: SnapshotKind = "files",
        request_id: str | None = None,
    ) -> str:
        """Keep what this box is now; nothing in it runs meanwhile.

        Args:
            name: In the node's store. Default: the digest of the image, or one that is made up.
            kind: "files" makes an image of them; "full" keeps a machine with its memory and processes, to go on
                as often as somebody wants.
            request_id: Twice the same makes one. Default: a random one.

        Returns:
            What `from_` of a spec takes: an image on any node that sees the store, a machine on this one.

        Raises:
            UnsupportedError: The backend cannot.
            ImageError: It cannot be stored.
        """
        body = {"name": name, "kind": kind, "request_id": request_id or uuid.uuid4().hex}
        return (await self.client.request("POST", f"{self._path}/snapshot", body=body))["reference"]

    async def screenshot(self) -> bytes:
        """Return what is on the screen of a whole machine, as PNG.

        Raises:
            UnsupportedError: The box has no screen.
        """
        async with self.client.download(f"{self._path}/screenshot", query={}) as content:
            return await content.read()

    async def set_network(self, policy: NetworkPolicy, *, request_id: str | None = None) -> None:
        """Change what the box may reach; connections that are not allowed any more are cut.

        Raises:
            UnsupportedError: It was made without a network.
        """
        body = {"policy": policy.to_json(), "request_id": request_id or uuid.uuid4().hex}
        await self.client.request("PUT", f"{self._path}/network", body=body)

    async def network(self) -> dict[str, Any]:
        """Return what it has sent and received, and what it was denied last, as JSON."""
        return await self.client.request("GET", f"{self._path}/network")

    async def fork(self, count: int = 1, *, request_id: str | None = None) -> list[Self]:
        """Make boxes that begin with the files of this one, as they are at this moment.

        Of a machine all that runs in it is copied too, of a container no process. The new boxes live on when this one
        ends; each is ended by its own block, or by `kill`.

        Raises:
            LaunchError, NoCapacityError, NodeError: One could not be made; then none is.
        """
        body = {"count": count, "request_id": request_id or uuid.uuid4().hex}
        made = await self.client.request("POST", f"{self._path}/fork", body=body)
        return [type(self)(self.client.twin(), BoxInfo(**info)) for info in made["boxes"]]

    # --- the log ---

    async def log(self, *, after: int = 0) -> list[Event]:
        """Return what was done in the box, in order, behind a position."""
        return [
            Event(
                position=r.position,
                kind=r.kind,
                request=r.request,
                digest=r.digest,
                state=_state(r.state),
                began_ns=r.began_ns,
                ended_ns=r.ended_ns,
                result=r.result,
            )
            for r in await read_log(self.client, self.id, after=after)
        ]

    async def changes(self, *, content: bool = True, limit: int | None = None) -> list[Change]:
        """Return every path that differs from the image, sorted.

        Args:
            content: Whether files are read, for their digests; without it a list takes little time.
            limit: More paths than that are an error.

        Raises:
            SandboxFileError: There are more (EOVERFLOW).
        """
        query = {"content": "1" if content else "0"}
        query |= {} if limit is None else {"limit": str(limit)}
        body = await self.client.request("GET", f"{self._path}/changes", query=query)
        return [Change(**change) for change in body["changes"]]

    async def replay(self, recorded: str, *, before: int | None = None) -> ReplayReport:
        """Do what is in the log of another box again in this one, and compare results and files.

        With `before` this box becomes a branch: it has what was done until then, and goes on otherwise.

        Args:
            recorded: Id of a box of the same node, living or gone. While it lives, files are compared too.
            before: Position of the first step that is left out; files are not compared then.

        Raises:
            HadalError: The log cannot be read, or this box fails; a failing step is a difference.
        """
        info = BoxInfo(**await self.client.request("GET", f"/v1/boxes/{recorded}"))
        return await replay(type(self)(self.client, info), self, before=before)

    async def blame(self, path: str) -> list[Event]:
        """Return which records may have changed a file last: those that were under way when it changed.

        File systems stamp changes with a clock that ticks every few milliseconds: of several short
        commands within a tick, all are named. None is where the file changed while nothing was under way:
        a process in the background did it, or it is as in the image.
        """
        changed = (await self.files.stat(path, follow=False)).ctime_ns
        return [
            event
            for event in await self.log()
            if event.began_ns <= changed + _TICK_NS
            and (event.ended_ns is None or changed <= event.ended_ns)
        ]

    async def blob(self, digest: str) -> bytes:
        """Return content that the log names by its digest."""
        async with self.client.download(f"/v1/blobs/{digest}", query={}) as content:
            return await content.read()

    async def forward(self, port: int, *, host: str = "127.0.0.1", local_port: int = 0) -> int:
        """Listen on a port of this machine, and connect who comes to a port in the box.

        Args:
            port: In the box.
            host: Address in the box.
            local_port: On the loopback of this machine; 0 for a free one.

        Returns:
            The local port. It is open until `close` or `kill`.
        """
        server = await listen_for(self.client, f"{self._path}/ports/{port}", host, local_port)
        self._servers.append(server)
        return server.sockets[0].getsockname()[1]

    @property
    def replaying(self) -> int:
        """Records of the trajectory that have not been asked for again."""
        return len(self._recorded) if self._recorded is not None else 0

    def _take(self, kind: str, request: dict[str, Any]) -> Logged | None:
        if self._recorded is None:
            return None
        record = self._recorded.take(kind, request)
        if record is None:
            self._recorded = None
        return record

    def recorded_command(self, body: dict[str, Any]) -> ExecResult | None:
        """Return the recorded result of a command; None where it is to be run."""
        if self._recorded is None:
            return None
        stdin = body.get("stdin")
        record = self._take("command", command_record(body, _decode(stdin)))
        if record is None:
            return None
        large = record.result is not None and any(k.endswith("_blob") for k in record.result)
        if record.state == "begun" or large:
            # It was under way, or its output is large: the node has it under the same request id.
            body["request_id"] = record.request_id
            return None
        return record.outcome()

    def recorded(self, kind: str, request: dict[str, Any]) -> bool:
        """Return whether a change of files, or what was typed or clicked, is recorded as done."""
        record = self._take(kind, request)
        if record is not None and record.state != "begun":
            record.outcome()
            return True
        return False

    def recorded_write(self, query: Mapping[str, str], data: bytes | Path) -> bool:
        """Return whether a write is recorded as done."""
        if self._recorded is None:
            return False
        content = data.read_bytes() if isinstance(data, Path) else data
        request: dict[str, Any] = {
            "path": query["path"],
            "how": query["how"],
            "content": hashlib.sha256(content).hexdigest(),
            "size": len(content),
        }
        request |= {"mode": int(query["mode"], 8)} if "mode" in query else {}
        request |= {"parents": True} if "parents" in query else {}
        request |= {"user": query["user"]} if "user" in query else {}
        return self.recorded("write", request)


def _state(text: str) -> Literal["begun", "done", "refused", "unknown"]:
    if text == "begun" or text == "done" or text == "refused":
        return text
    return "unknown"


def _client(node: str | None, key: str | None, verify: Path | None) -> NodeClient:
    url = node or default_node_url() or ensure_node()
    return NodeClient(url, key=key or os.environ.get("HADAL_NODE_KEY"), verify=verify)


def _decode(stdin: str | None) -> bytes | None:
    return None if stdin is None else base64.b64decode(stdin)


def command_body(
    command: Command, timeout_s: float | None, quiet_s: float | None, stdin: bytes | str | None,
    env: Mapping[str, str] | None, cwd: str | None, user: str | None, output_limit: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Return a command as the node takes it.

    Raises:
        ConfigError: It is empty, or not made of strings.
    """
    body: dict[str, Any] = {}
    if isinstance(command, str):
        body["shell"] = command
    else:
        body["argv"] = list(command)
    parts = list[object](command)
    if not parts or not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"a command is a line of text or a list of strings, got {command!r}")
    if stdin is not None:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        body["stdin"] = base64.b64encode(data).decode()
    optional = {
        "timeout_s": timeout_s, "quiet_s": quiet_s, "env": dict(env) if env else None, "cwd": cwd,
        "user": user, "output_limit": output_limit,
    }  # fmt: skip
    return body | {name: value for name, value in optional.items() if value is not None}
