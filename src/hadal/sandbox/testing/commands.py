"""Commands: what they get, what comes back, and when they end."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

from hadal.errors import CommandFailedError, CommandRefusedError, ConfigError
from hadal.sandbox.testing.registry import MakeBox, check, equal, expect, holds

__all__ = [
    "a_thousand_at_once",
    "arguments",
    "background",
    "binary_and_standard_input",
    "environment",
    "exit_codes",
    "output_is_bounded",
    "refusals",
    "repeated_requests",
    "timeouts",
]


@check()
def exit_codes(make: MakeBox) -> None:
    """Exit codes and signals come back; failure is a value."""
    with make() as box:
        for code in (0, 1, 42, 255):
            equal(box.run(f"exit {code}").exit_code, code)
        ended = box.run("kill -SEGV $$")
        equal((ended.signal, ended.exit_code, ended.ok), (signal.SIGSEGV, 139, False))
        with expect(CommandFailedError) as caught:
            box.run("echo why >&2; exit 3", check=True)
        equal((caught.error.result.exit_code, caught.error.result.stderr), (3, "why\n"))


@check()
def arguments(make: MakeBox) -> None:
    """Arguments arrive as they were given, a line goes to the shell."""
    odd = ["", " a  b ", "$HOME", "'\"`\\", "é\n\t", "-n", "*", "x" * 100_000]
    with make() as box:
        equal(box.run(["printf", "%s\\0", *odd]).stdout.split("\0")[:-1], odd)
        equal(box.run("echo $((6 * 7)) | tr 4 5").stdout, "52\n")
        equal(box.run("cat <<'END'\nhere\nEND").stdout, "here\n")
        for nonsense in ("", [], [1]):
            with expect(ConfigError):
                box.run(nonsense)  # pyright: ignore[reportArgumentType]


@check()
def environment(make: MakeBox) -> None:
    """Variables, directory and user are those that were asked for."""
    with make(env={"A": "of the box", "B": "b"}) as box:
        equal(box.run("echo $A-$B", env={"A": "of the command"}).stdout, "of the command-b\n")
        equal(box.run("pwd", cwd="/tmp").stdout, "/tmp\n")
        equal(box.run("id -u; id -g", user="1234:5678").stdout, "1234\n5678\n")
        equal(box.run("id -u").stdout, "0\n")
        holds(box.run('command -v sh && test -n "$HOME"').ok, "PATH or HOME is missing")


@check()
def refusals(make: MakeBox) -> None:
    """What cannot start is an error that says why, and the box goes on."""
    with make() as box:
        for command, options, errno in (
            (["no-such-program"], {}, 2),
            (["/etc"], {}, 13),
            ("true", {"cwd": "/no/such"}, 2),
            ("true", {"user": "nobody-of-that-name"}, 22),
        ):
            with expect(CommandRefusedError) as caught:
                box.run(command, **options)  # pyright: ignore[reportArgumentType]
            equal(caught.error.errno, errno, str(command))
        equal(box.run("echo on").stdout, "on\n")


@check()
def binary_and_standard_input(make: MakeBox) -> None:
    """Bytes go in and come out unchanged, on the stream where they were written."""
    data = bytes(range(256)) * 4096
    with make() as box:
        result = box.run("cat; printf 'e\\377' >&2", stdin=data)
        equal(result.stdout_bytes == data, True, "output differs from input")
        equal(result.stderr_bytes, b"e\xff")
        equal(result.stderr, "e�")
        equal(box.run("cat").stdout, "", "without input there is none")
        equal(box.run("wc -c", stdin=b"").stdout.strip(), "0")


@check()
def output_is_bounded(make: MakeBox) -> None:
    """Output beyond the limit is dropped in the middle, counted, and said to be missing."""
    with make() as box:
        result = box.run("seq 1 300000", output_limit=10_000)
        whole = "".join(f"{i}\n" for i in range(1, 300_001))
        equal((result.truncated, result.stdout_total), (True, len(whole)))
        equal(result.stdout[:10_000], whole[:10_000])
        equal(result.stdout[-1000:], whole[-1000:])
        large = box.run("head -c 5000000 /dev/zero; head -c 400000 /dev/zero >&2")
        equal((len(large.stdout_bytes), len(large.stderr_bytes)), (5_000_000, 400_000))
        equal(large.truncated, False)


@check()
def timeouts(make: MakeBox) -> None:
    """A timeout ends all that the command started, within a second, and keeps what was written."""
    with make() as box:
        began = time.monotonic()
        result = box.run("echo before; (trap '' TERM; sleep 77) & sleep 77 | cat", timeout_s=1.5)
        took = time.monotonic() - began
        holds(took < 2.5, f"it took {took:.2f} s")
        equal((result.timed_out, result.stdout, result.ok), ("time", "before\n", False))
        quiet = box.run("while :; do sleep 0.05; echo .; test -e /nothing && break; "
                        "[ $((n=n+1)) = 5 ] && sleep 77; done", quiet_s=1.5)  # fmt: skip
        equal((quiet.timed_out, quiet.stdout), ("quiet", ".\n" * 5))
        left = box.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout
        holds("77" not in left, f"processes are left: {left}")
        equal(box.run("sleep 0.2; echo done", timeout_s=5).stdout, "done\n")


@check()
def background(make: MakeBox) -> None:
    """A process in the background does not hold a command, and lives on."""
    with make() as box:
        began = time.monotonic()
        equal(box.run("(sleep 3; echo late) & echo now").stdout, "now\n")
        holds(time.monotonic() - began < 2, "the command waited for its background")
        box.run("nohup sh -c 'while sleep 0.05; do echo . ; echo . >> /tmp/ticks; done' &")
        time.sleep(1)
        holds(int(box.run("wc -l < /tmp/ticks").stdout) > 3, "the background has died")


@check()
def repeated_requests(make: MakeBox) -> None:
    """The same request twice runs once, and both get the result."""
    with make() as box:
        first = box.run("echo x >> /tmp/once; wc -l < /tmp/once", request_id="r1")
        again = box.run("echo x >> /tmp/once; wc -l < /tmp/once", request_id="r1")
        equal(first.stdout, "1\n")
        equal(again.stdout, "1\n")
        line = "echo y >> /tmp/twice; sleep 0.2; wc -l < /tmp/twice"
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(box.run, line, request_id="r2") for _ in range(8)]
            several = [future.result() for future in running]
        equal({r.stdout for r in several}, {"1\n"})
        equal(box.run("wc -l < /tmp/twice").stdout, "1\n")


@check(slow=True)
def a_thousand_at_once(make: MakeBox) -> None:
    """A thousand commands run at the same time; each gets its own result."""
    with make(pids=4096, memory_mb=1024) as box:
        # They wait in open(2) for a writer of the pipe, which takes nothing of an emulated processor.
        box.run("mkdir /tmp/here && mkfifo /tmp/gate", check=True)
        line = ": > /tmp/here/$0; : < /tmp/gate; echo $0; exit $(($0 % 100))"
        running = [box.spawn(["sh", "-c", line, str(i)]) for i in range(1000)]
        deadline = time.monotonic() + 120
        while int(box.run("ls /tmp/here | wc -l").stdout) < 1000:
            holds(time.monotonic() < deadline, "a thousand do not run together in 120 s")
            time.sleep(0.5)
        gate = box.spawn("exec sleep 600 > /tmp/gate")
        for i, process in enumerate(running):
            result = process.wait()
            equal((result.stdout, result.exit_code), (f"{i}\n", i % 100))
        gate.kill()
