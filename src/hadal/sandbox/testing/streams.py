"""Commands that are followed while they run: streams, input, terminals, signals."""

import signal
import socket
import time

from hadal.sandbox.specs import Capability
from hadal.sandbox.testing.registry import MakeBox, check, equal, holds

__all__ = [
    "attach_again",
    "group_signals",
    "interactive_input",
    "output_as_it_comes",
    "ports",
    "terminal",
    "terminal_flood",
    "unread_output",
    "watching",
]


@check()
def output_as_it_comes(make: MakeBox) -> None:
    """Output arrives while the command runs, each stream in order."""
    with make() as box:
        process = box.spawn("for i in 1 2 3; do echo out$i; echo err$i >&2; sleep 0.3; done")
        seen: list[tuple[float, str, bytes]] = []
        for name, data in process:
            seen.append((time.monotonic(), name, data))
        holds(seen[-1][0] - seen[0][0] > 0.4, "output came only at the end")
        for name in ("stdout", "stderr"):
            text = b"".join(d for _, n, d in seen if n == name).decode()
            equal(text, "".join(f"{name[3:]}{i}\n" for i in (1, 2, 3)))
        equal(process.wait().exit_code, 0)


@check()
def interactive_input(make: MakeBox) -> None:
    """Input can follow while the command runs, until it is closed."""
    with make() as box:
        process = box.spawn("read line; echo got $line; cat; echo end", interactive=True)
        process.write("one\n")
        lines = iter(process)
        equal(next(lines), ("stdout", b"got one\n"))
        process.write(b"two\n" * 50_000)
        process.close_stdin()
        rest = b"".join(data for _, data in lines)
        equal(rest, b"two\n" * 50_000 + b"end\n")


@check()
def unread_output(make: MakeBox) -> None:
    """A command whose output nobody reads goes on to its end."""
    with make() as box:
        box.spawn("head -c 3000000 /dev/zero; touch /tmp/ended", output_limit=5_000_000)
        deadline = time.monotonic() + 20
        while not box.files.exists("/tmp/ended"):
            holds(time.monotonic() < deadline, "it hangs")
            time.sleep(0.1)


@check()
def attach_again(make: MakeBox) -> None:
    """A command can be left and found again, from any offset, also when it has ended."""
    with make() as box:
        process = box.spawn("echo early; sleep 0.5; echo late; exit 4")
        equal(next(iter(process)), ("stdout", b"early\n"))
        process.detach()
        again = box.attach(process.id, stdout=2)
        result = again.wait()
        equal((result.stdout, result.exit_code), ("rly\nlate\n", 4))
        equal(box.attach(process.id).wait().stdout, "early\nlate\n")


@check()
def group_signals(make: MakeBox) -> None:
    """Signals reach the process group; SIGKILL everything that the command started."""
    with make() as box:
        process = box.spawn(
            "trap 'echo caught; exit 9' USR1; echo ready; while :; do sleep 0.05; done"
        )
        lines = iter(process)
        equal(next(lines), ("stdout", b"ready\n"))
        process.kill(signal.SIGUSR1)
        equal(next(data for name, data in lines if name == "stdout"), b"caught\n")
        equal(process.wait().exit_code, 9)
        process = box.spawn("sh -c 'sleep 66' & sleep 66")
        time.sleep(0.2)
        process.kill()
        equal(process.wait().signal, signal.SIGKILL)
        left = box.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout
        holds("66" not in left, f"processes are left: {left}")


@check(Capability.TTY)
def terminal(make: MakeBox) -> None:
    """A terminal has a size that can change, echoes, and turns keys into signals."""
    with make() as box:
        process = box.spawn(["sh"], tty=(31, 101), env={"PS1": "$ "})
        output, seen = iter(process), bytearray()

        def until(text: bytes) -> None:
            while text not in seen:
                seen.extend(next(output)[1])

        process.write("stty size; tty\n")
        until(b"31 101\r\n/dev/pts/")
        process.resize(41, 121)
        process.write("stty size\n")
        until(b"41 121\r\n")
        process.write("sleep 88\n")
        time.sleep(0.4)
        process.write(b"\x03")
        process.write("exit 7\n")
        result = process.wait()
        equal((result.exit_code, result.stderr), (7, ""))


@check(Capability.TTY)
def terminal_flood(make: MakeBox) -> None:
    """A terminal that is written to without end ends with its time, and only the limit is kept."""
    with make() as box:
        process = box.spawn(["yes"], tty=(24, 80), timeout_s=2, output_limit=10_000)
        result = process.wait()
        equal(result.timed_out, "time")
        kept = len(result.stdout_bytes)
        holds(result.truncated, f"{kept} bytes came, and nothing was left out")
        holds(kept <= 30_000, f"{kept} bytes were kept, with a limit of 10,000")


@check()
def ports(make: MakeBox) -> None:
    """A port in the box can be reached from here, in both directions, and a closed one refuses."""
    server = (
        "import socket\ns = socket.create_server(('127.0.0.1', 8123))\nprint('ready', flush=True)\n"
        "while True:\n c, _ = s.accept()\n data = b''\n"
        " while part := c.recv(65536): data += part\n c.sendall(data[::-1]); c.close()\n"
    )
    with make() as box:
        process = box.spawn(["python3", "-c", server])
        equal(next(iter(process)), ("stdout", b"ready\n"))
        port = box.forward(8123)
        data = bytes(range(256)) * 2000
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                back = b"".join(iter(lambda: connection.recv(65536), b""))
            holds(back == data[::-1], f"{len(back)} bytes came back wrong")
        with socket.create_connection(("127.0.0.1", box.forward(9)), timeout=10) as connection:
            equal(connection.recv(1), b"", "a closed port")


@check()
def watching(make: MakeBox) -> None:
    """What happens in a directory is told as it happens."""
    with make() as box:
        box.files.mkdir("/tmp/w")
        events = iter(box.files.watch("/tmp/w"))
        box.spawn("sleep 0.3; echo x > /tmp/w/a; mv /tmp/w/a '/tmp/w/b c'; rm '/tmp/w/b c'")
        seen = [next(events) for _ in range(6)]
        equal([(e.kind, e.name) for e in seen],
              [("created", "a"), ("modified", "a"), ("closed", "a"), ("moved_from", "a"),
               ("moved_to", "b c"), ("deleted", "b c")])  # fmt: skip
