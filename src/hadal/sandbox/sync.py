"""The SDK without await: made by scripts/make_sync.py from the asynchronous classes; do not edit.

Works everywhere, inside a running event loop and in notebooks too: the work is done on a loop of its own.
"""

import signal as signals
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hadal.errors import CommandFailedError
from hadal.sandbox.box import AsyncSandbox, command_body
from hadal.sandbox.files import AsyncFiles
from hadal.sandbox.network_policy import NetworkPolicy
from hadal.sandbox.portal import call, iterate
from hadal.sandbox.process import AsyncProcess, StreamName
from hadal.sandbox.protocol import MouseButton, SnapshotKind
from hadal.sandbox.replay import ReplayReport
from hadal.sandbox.results import (
    BoxInfo,
    CallResult,
    Change,
    Event,
    ExecResult,
    FileEvent,
    FileStat,
    Usage,
)
from hadal.sandbox.screen import AsyncConsole, AsyncKeyboard, AsyncMouse
from hadal.sandbox.specs import Spec

__all__ = ["Console", "Files", "Keyboard", "Mouse", "Process", "Sandbox"]

Command = str | Sequence[str]


class Process:
    """A handle on a command. Iterate over it for its output; it goes on whether anybody reads or not.

    Attributes:
        id: Its number in the log of the box: `box.attach(id)` gives another handle, from any process.
    """

    def __init__(self, wrapped: AsyncProcess) -> None:
        self.wrapped = wrapped
        self.id = wrapped.id

    def __iter__(self) -> Iterator[tuple[StreamName, bytes]]:
        return iterate(aiter(self.wrapped))

    def wait(self) -> ExecResult:
        """Wait for its end and return its result, with the output that nobody has read by then.

        Raises:
            SandboxGoneError: The box has ended.
        """
        return call(self.wrapped.wait())

    def write(self, data: bytes | str) -> None:
        """Give it input; for a command started with `interactive` or a terminal.

        What it has not read before its end is lost.

        Raises:
            NodeError: The connection broke off; how much of the input has arrived is not known.
        """
        return call(self.wrapped.write(data))

    def close_stdin(self) -> None:
        """Say that no more input comes."""
        return call(self.wrapped.close_stdin())

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of its terminal."""
        return call(self.wrapped.resize(rows, columns))

    def kill(self, signal: int = signals.SIGKILL) -> None:
        """Signal its process group; SIGKILL reaches every process of its session."""
        return call(self.wrapped.kill(signal))

    def detach(self) -> None:
        """Let go of it; it goes on."""
        return call(self.wrapped.detach())


class Files:
    """Operations on files. Names are text; bytes that are no UTF-8 are as `os.fsdecode` has them.

    Every method raises SandboxFileError with the reason of the system, and SandboxGoneError.
    """

    def __init__(self, wrapped: AsyncFiles) -> None:
        self.wrapped = wrapped

    def read(
        self, path: str, *, offset: int = 0, length: int = 0, user: str | None = None
    ) -> bytes:
        """Return the content of a file, or a part of it; a length of 0 is up to the end."""
        return call(self.wrapped.read(path, offset=offset, length=length, user=user))

    def read_text(self, path: str, *, user: str | None = None) -> str:
        """Return the content of a file as UTF-8."""
        return call(self.wrapped.read_text(path, user=user))

    def read_chunks(
        self, path: str, *, offset: int = 0, length: int = 0, user: str | None = None
    ) -> Iterator[bytes]:
        """Yield the content of a file of any size."""
        return iterate(self.wrapped.read_chunks(path, offset=offset, length=length, user=user))

    def write(
        self,
        path: str,
        data: bytes | str | Path,
        *,
        mode: int | None = None,
        append: bool = False,
        create: bool = False,
        parents: bool = False,
        user: str | None = None,
        request_id: str | None = None,
    ) -> None:
        """Write a file.

        Args:
            path: In the box.
            data: Content, or the path of a file here.
            mode: Permission bits. Default: as they are, or 0644.
            append: Add to the end.
            create: Fail where it exists.
            parents: Make missing directories above it.
            user: Who writes it.
            request_id: Twice the same writes once. Default: a random one.
        """
        return call(
            self.wrapped.write(
                path,
                data,
                mode=mode,
                append=append,
                create=create,
                parents=parents,
                user=user,
                request_id=request_id,
            )
        )

    def stat(self, path: str, *, follow: bool = True) -> FileStat:
        """Describe a file; with `follow`, what a link leads to."""
        return call(self.wrapped.stat(path, follow=follow))

    def exists(self, path: str) -> bool:
        """Return whether there is such a file."""
        return call(self.wrapped.exists(path))

    def list(self, path: str, *, depth: int = 1) -> list[FileStat]:
        """Describe what is in a directory, and in those in it down to a depth; sorted by path."""
        return call(self.wrapped.list(path, depth=depth))

    def remove(self, path: str, *, recursive: bool = False, user: str | None = None) -> None:
        """Remove a file or an empty directory; with `recursive` a whole tree."""
        return call(self.wrapped.remove(path, recursive=recursive, user=user))

    def rename(self, path: str, target: str, *, user: str | None = None) -> None:
        """Give a file another name, replacing what has it."""
        return call(self.wrapped.rename(path, target, user=user))

    def mkdir(
        self, path: str, *, mode: int = 493, parents: bool = False, user: str | None = None
    ) -> None:
        """Make a directory; with `parents` also those above it, and none is fine too."""
        return call(self.wrapped.mkdir(path, mode=mode, parents=parents, user=user))

    def chmod(self, path: str, mode: int) -> None:
        """Set permission bits."""
        return call(self.wrapped.chmod(path, mode))

    def chown(self, path: str, owner: str) -> None:
        """Set the owner: a user of the image, or `uid:gid`."""
        return call(self.wrapped.chown(path, owner))

    def symlink(self, path: str, target: str) -> None:
        """Make a symbolic link at `path` that leads to `target`."""
        return call(self.wrapped.symlink(path, target))

    def watch(self, path: str) -> Iterator[FileEvent]:
        """Yield what happens in a directory, or to a file, from now on; ends when nobody asks any more."""
        return iterate(self.wrapped.watch(path))

    def upload(self, local: Path | str, path: str, *, user: str | None = None) -> None:
        """Copy a file to a path, or the content of a directory into a directory that is made."""
        return call(self.wrapped.upload(local, path, user=user))

    def pack(self, path: str, *, user: str | None = None) -> Iterator[bytes]:
        """Yield a file, or what is in a directory, as a tar stream."""
        return iterate(self.wrapped.pack(path, user=user))

    def unpack(self, path: str, data: bytes | Path, *, user: str | None = None) -> None:
        """Unpack a tar stream, or a tar file here, into a directory that exists."""
        return call(self.wrapped.unpack(path, data, user=user))

    def download(self, path: str, local: Path | str) -> None:
        """Copy a file, or the content of a directory, to a path here.

        What comes from a box is not trusted: links are kept where they stay inside, and never followed.

        Raises:
            UnsafeFileError: There are links that lead outside, devices and the like; or the archive that
                comes out of the box is no good.
        """
        return call(self.wrapped.download(path, local))


class Console:
    """The serial console of a machine without a guest program. Both methods raise UnsupportedError elsewhere."""

    def __init__(self, wrapped: AsyncConsole) -> None:
        self.wrapped = wrapped

    def read(self) -> bytes:
        """Return the end of what was said on it, 64 KiB at most; a node that was started anew has heard no more."""
        return call(self.wrapped.read())

    def type(self, text: str, *, request_id: str | None = None) -> None:
        """Type a text of at most 4,096 characters on it.

        Args:
            text: As a terminal sends it: Enter is a newline.
            request_id: Twice the same types once. Default: a random one.
        """
        return call(self.wrapped.type(text, request_id=request_id))


class Keyboard:
    """The keyboard, of US layout. Every method raises UnsupportedError where the box has none."""

    def __init__(self, wrapped: AsyncKeyboard) -> None:
        self.wrapped = wrapped

    def type(self, text: str, *, request_id: str | None = None) -> None:
        """Type a text of at most 4,096 characters, some thirty a second.

        Args:
            text: Printable ASCII, newlines and tabs.
            request_id: Twice the same types once. Default: a random one.

        Raises:
            ConfigError: There is no key for one of its characters; then none is typed.
        """
        return call(self.wrapped.type(text, request_id=request_id))

    def press(self, keys: str, *, request_id: str | None = None) -> None:
        """Press keys together and let go of them.

        Args:
            keys: As "Enter", "a" or "Control+Alt+F2": the names that browsers have for them.
            request_id: Twice the same presses once. Default: a random one.

        Raises:
            ConfigError: There is no such key.
        """
        return call(self.wrapped.press(keys, request_id=request_id))


class Mouse:
    """The mouse. Every method raises UnsupportedError where the box has none."""

    def __init__(self, wrapped: AsyncMouse) -> None:
        self.wrapped = wrapped

    def move(self, x: int, y: int, *, request_id: str | None = None) -> None:
        """Move to a pixel of the screen, as `screenshot` shows it.

        Raises:
            ConfigError: The screen is smaller.
        """
        return call(self.wrapped.move(x, y, request_id=request_id))

    def click(
        self,
        x: int,
        y: int,
        *,
        button: MouseButton = "left",
        count: int = 1,
        request_id: str | None = None,
    ) -> None:
        """Move to a pixel of the screen and click.

        Args:
            x: Of the pixel, from the left.
            y: Of the pixel, from the top.
            button: Which.
            count: How often: 2 for a double click.
            request_id: Twice the same clicks once. Default: a random one.

        Raises:
            ConfigError: The screen is smaller.
        """
        return call(self.wrapped.click(x, y, button=button, count=count, request_id=request_id))


class Sandbox:
    """A box. Make one with `create`; leaving the `with` block ends it, unless it is detached.

    Attributes:
        id: Its name on the node; `Sandbox.connect(id)` finds it from anywhere.
        files: Its file system.
        keyboard, mouse, console: Those of a whole machine, beside its screen.
        client: The connection to its node.
    """

    def __init__(self, wrapped: AsyncSandbox) -> None:
        self.wrapped = wrapped
        self.console = Console(wrapped.console)
        self.files = Files(wrapped.files)
        self.keyboard = Keyboard(wrapped.keyboard)
        self.mouse = Mouse(wrapped.mouse)
        self.id = wrapped.id

    @classmethod
    def create(
        cls,
        spec: Spec | str | None = None,
        *,
        node: str | None = None,
        key: str | None = None,
        name: str | None = None,
        trajectory: str | None = None,
        request_id: str | None = None,
        verify: Path | None = None,
    ) -> Self:
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
        return cls(
            call(
                AsyncSandbox.create(
                    spec,
                    node=node,
                    key=key,
                    name=name,
                    trajectory=trajectory,
                    request_id=request_id,
                    verify=verify,
                )
            )
        )

    @classmethod
    def connect(
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
        return cls(call(AsyncSandbox.connect(box, node=node, key=key, verify=verify)))

    def detach(self) -> None:
        """Let the box live when this block is left."""
        return self.wrapped.detach()

    def kill(self) -> bool:
        """End the box; False where it has ended already."""
        return call(self.wrapped.kill())

    def close(self) -> None:
        """Let go of the box: it ends, unless it is detached."""
        return call(self.wrapped.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return call(self.wrapped.__aexit__(kind, error, trace))

    def info(self) -> BoxInfo:
        """Return what its node knows of it, also when it is gone."""
        return call(self.wrapped.info())

    def usage(self) -> Usage:
        """Return what it uses now."""
        return call(self.wrapped.usage())

    def run(
        self,
        command: Command,
        *,
        timeout_s: float | None = None,
        quiet_s: float | None = None,
        stdin: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        output_limit: int | None = None,
        check: bool = False,
        request_id: str | None = None,
    ) -> ExecResult:
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
        result = self.wrapped.recorded_command(body)
        if result is None:
            result = call(self.wrapped.perform(body, request_id))
        if check and not result.ok:
            raise CommandFailedError(f"{command!r}: {result.describe()}", result=result)
        return result

    def spawn(
        self,
        command: Command,
        *,
        interactive: bool = False,
        tty: tuple[int, int] | None = None,
        timeout_s: float | None = None,
        quiet_s: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        output_limit: int | None = None,
        request_id: str | None = None,
    ) -> Process:
        """Start a command and return a handle on it.

        Input may follow where it is `interactive`, or has a terminal: `tty` is its rows and columns. The
        other arguments and errors are those of `run`.
        """
        return Process(
            call(
                self.wrapped.spawn(
                    command,
                    interactive=interactive,
                    tty=tty,
                    timeout_s=timeout_s,
                    quiet_s=quiet_s,
                    env=env,
                    cwd=cwd,
                    user=user,
                    output_limit=output_limit,
                    request_id=request_id,
                )
            )
        )

    def attach(self, command: int, *, stdout: int = 0, stderr: int = 0) -> Process:
        """Return a handle on a command by its number, with its output from these offsets on."""
        return Process(call(self.wrapped.attach(command, stdout=stdout, stderr=stderr)))

    def call(
        self,
        function: Callable[..., object] | str,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
        *,
        timeout_s: float = 60.0,
        fresh: bool = False,
        pickled: bool = False,
        request_id: str | None = None,
    ) -> CallResult:
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
        return call(
            self.wrapped.call(
                function,
                args,
                kwargs,
                timeout_s=timeout_s,
                fresh=fresh,
                pickled=pickled,
                request_id=request_id,
            )
        )

    def pause(self, *, reclaim: bool = False) -> None:
        """Stop every process in it, until `resume` or any other request.

        Args:
            reclaim: Whether others get its memory meanwhile: that of a machine goes to the disk, of a container what
                the kernel can take. Then pausing takes longer, and so does the next request.

        Raises:
            NodeError: With `reclaim`: the memory of a machine cannot be kept; it runs on.
        """
        return call(self.wrapped.pause(reclaim=reclaim))

    def resume(self) -> None:
        """Let its processes go on."""
        return call(self.wrapped.resume())

    def snapshot(
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
        return call(self.wrapped.snapshot(name, kind=kind, request_id=request_id))

    def screenshot(self) -> bytes:
        """Return what is on the screen of a whole machine, as PNG.

        Raises:
            UnsupportedError: The box has no screen.
        """
        return call(self.wrapped.screenshot())

    def set_network(self, policy: NetworkPolicy, *, request_id: str | None = None) -> None:
        """Change what the box may reach; connections that are not allowed any more are cut.

        Raises:
            UnsupportedError: It was made without a network.
        """
        return call(self.wrapped.set_network(policy, request_id=request_id))

    def network(self) -> dict[str, Any]:
        """Return what it has sent and received, and what it was denied last, as JSON."""
        return call(self.wrapped.network())

    def fork(self, count: int = 1, *, request_id: str | None = None) -> list[Self]:
        """Make boxes that begin with the files of this one, as they are at this moment.

        Of a machine all that runs in it is copied too, of a container no process. The new boxes live on when this one
        ends; each is ended by its own block, or by `kill`.

        Raises:
            LaunchError, NoCapacityError, NodeError: One could not be made; then none is.
        """
        return [
            type(self)(other) for other in call(self.wrapped.fork(count, request_id=request_id))
        ]

    def log(self, *, after: int = 0) -> list[Event]:
        """Return what was done in the box, in order, behind a position."""
        return call(self.wrapped.log(after=after))

    def changes(self, *, content: bool = True, limit: int | None = None) -> list[Change]:
        """Return every path that differs from the image, sorted.

        Args:
            content: Whether files are read, for their digests; without it a list takes little time.
            limit: More paths than that are an error.

        Raises:
            SandboxFileError: There are more (EOVERFLOW).
        """
        return call(self.wrapped.changes(content=content, limit=limit))

    def replay(self, recorded: str, *, before: int | None = None) -> ReplayReport:
        """Do what is in the log of another box again in this one, and compare results and files.

        With `before` this box becomes a branch: it has what was done until then, and goes on otherwise.

        Args:
            recorded: Id of a box of the same node, living or gone. While it lives, files are compared too.
            before: Position of the first step that is left out; files are not compared then.

        Raises:
            HadalError: The log cannot be read, or this box fails; a failing step is a difference.
        """
        return call(self.wrapped.replay(recorded, before=before))

    def blame(self, path: str) -> list[Event]:
        """Return which records may have changed a file last: those that were under way when it changed.

        File systems stamp changes with a clock that ticks every few milliseconds: of several short
        commands within a tick, all are named. None is where the file changed while nothing was under way:
        a process in the background did it, or it is as in the image.
        """
        return call(self.wrapped.blame(path))

    def blob(self, digest: str) -> bytes:
        """Return content that the log names by its digest."""
        return call(self.wrapped.blob(digest))

    def forward(self, port: int, *, host: str = "127.0.0.1", local_port: int = 0) -> int:
        """Listen on a port of this machine, and connect who comes to a port in the box.

        Args:
            port: In the box.
            host: Address in the box.
            local_port: On the loopback of this machine; 0 for a free one.

        Returns:
            The local port. It is open until `close` or `kill`.
        """
        return call(self.wrapped.forward(port, host=host, local_port=local_port))

    @property
    def replaying(self) -> int:
        """Records of the trajectory that have not been asked for again."""
        return self.wrapped.replaying
