"""One side of a comparison in a process of its own, so that its memory is its own.

The parent drives: `SideProcess` starts a program, gives it a prompt, and asks for one step after
another, so that it can stop a side that takes too long. The program is `serve` round a `Side`; one
line of JSON each way. Only the step itself is timed, in the process that runs it.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from hadal.errors import EngineError

__all__ = ["Side", "SideProcess", "Step", "serve"]

_WARM_UP = 256
"""Tokens run before anything is measured: enough to touch every weight."""

Step = Mapping[str, Any]
"""Reply to a step: `wall` and `cpu` seconds; `done`, tokens computed; `token`, the next one or None; `peak`, bytes."""


class Side(Protocol):
    """What is compared: something that computes a prompt in steps and then decodes greedily."""

    def start(self, ids: Sequence[int], new: int) -> int | None:
        """Take a prompt, of which so many tokens will be decoded, and forget the last one.

        Returns:
            The bytes over the weights that are planned for it, if any are.
        """
        ...

    def step(self) -> tuple[int, int | None]:
        """Compute some tokens; return how many are done in all, and the next token once known."""
        ...


def serve(side: Side) -> None:
    """Answer the parent until it closes the pipe."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not reach the parent
    side.start([i + 2 for i in range(_WARM_UP)], 2)
    while side.step()[1] is None:
        pass
    side.step()
    ctypes.CDLL(None).malloc_trim(0)
    resident = _status_bytes("VmRSS")
    _answer(answers, {"resident": resident})
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            # 5: the highest resident size of the process begins anew.
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            planned = side.start(request["start"], request["new"])
            _answer(answers, {"planned": planned})
        else:
            wall, cpu = time.perf_counter(), time.process_time()
            done, token = side.step()
            spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            peak = _status_bytes("VmHWM") - resident
            _answer(answers, spent | {"done": done, "token": token, "peak": peak})


def _answer(stream: Any, value: dict[str, Any]) -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


class SideProcess:
    """A running side; it loads while the parent does something else, until `wait_ready`.

    Args:
        command: Program and arguments.
        environment: Variables to set beside those of this process.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self._errors = tempfile.TemporaryFile(  # noqa: SIM115 - open as long as the process
            "w+", encoding="utf-8", errors="replace"
        )
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | dict(environment or {}),
        )
        self._ready = False

    def wait_ready(self) -> None:
        """Wait until it has loaded and run its warm-up.

        Raises:
            EngineError: It ended.
        """
        if not self._ready:
            self._read()
            self._ready = True

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            EngineError: It ended; the message is the last that it printed.
        """
        self.wait_ready()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it printed is more telling
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-1:] or ["it printed nothing"]
        raise EngineError(f"the process ended with code {code}: {last[0]}")
