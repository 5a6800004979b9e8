"""What a command writes: kept in memory while it is little, in a file when it is more, and followed live."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import BinaryIO

__all__ = ["Output", "Passage"]

MEMORY_BYTES = 128 * 1024
"""Of each stream; more goes to a file. Less than a guest's window: it waits for what lies in memory."""
_ACKNOWLEDGE_BYTES = 64 * 1024
_TAIL_BYTES = 64 * 1024
"""Kept behind a gap: not less than the guest keeps beyond a limit."""
_ERROR_BYTES = 64 * 1024


class _Stream:
    """One stream: its beginning, and its end where bytes between them are missing."""

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self._file: BinaryIO | None = None
        self._kept: Path | None = None
        self._memory = bytearray()
        self.end = 0  # of the beginning
        self.tail_at = 0
        self.tail = b""
        self.acknowledged = 0

    def add(self, offset: int, data: bytes) -> None:
        if self.tail or offset > self.end:
            # Bytes are missing before these; of what comes after a gap the end is kept.
            self.tail = (self.tail + data)[-_TAIL_BYTES:]
            self.tail_at = offset + len(data) - len(self.tail)
            return
        data = data[self.end - offset :]  # sent again after a new connection
        if self._file is None and self.end + len(data) > MEMORY_BYTES:
            self._file = self._spool.open("w+b", buffering=0)
            self._file.write(self._memory)
            self._memory.clear()
        if self._file is not None:
            self._file.seek(0, 2)
            self._file.write(data)
        else:
            self._memory += data
        self.end += len(data)

    def resume(self) -> None:
        """Go on with the file of a daemon that died."""
        if self._spool.exists():
            self._file = self._spool.open("r+b", buffering=0)
            self.end = self.acknowledged = self._file.seek(0, 2)

    def safe(self) -> int | None:
        """Return up to where the guest may let go, where that is news."""
        if self.tail:
            return self.tail_at + len(self.tail)
        if self._file is not None and self.end - self.acknowledged >= _ACKNOWLEDGE_BYTES:
            return self.end
        return None

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the beginning."""
        if self._kept is not None:
            with self._kept.open("rb") as file:
                file.seek(offset)
                return file.read(min(length, self.end - offset))
        if self._file is None:
            return bytes(self._memory[offset : offset + length])
        self._file.seek(offset)
        return self._file.read(min(length, self.end - offset))

    def whole(self) -> bytes:
        return self.read(0, self.end) + self.tail

    def close(self, kept: Path | None) -> None:
        if self._file is not None:
            self._kept = kept
            self._file.close()
            self._spool.unlink(missing_ok=True)


class Output:
    """Both streams of a command; the `OutputSink` of its guest.

    Args:
        folder: Where large output goes.
        name: Of its files there.
        acknowledge: Called with the offsets up to which both streams lie in files: the guest may let go.
        resume: Whether an earlier daemon may have left such files.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        acknowledge: Callable[[int, int], None],
        *,
        resume: bool = False,
    ) -> None:
        self._streams = {n: _Stream(folder / f"{name}.{n}") for n in (1, 2)}
        if resume:
            for stream in self._streams.values():
                stream.resume()
        self._acknowledge = acknowledge
        self._changed = asyncio.Event()
        self._ended = False

    def output(self, stream: int, offset: int, data: bytes) -> None:
        """Take bytes as they come."""
        kept = self._streams[stream]
        kept.add(offset, data)
        safe = kept.safe()
        if safe is not None:
            kept.acknowledged = safe
            # What lies in memory is acknowledged with the end of the command only.
            self._acknowledge(*(s.acknowledged for s in self._streams.values()))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def offsets(self) -> tuple[int, int]:
        """Return how far each stream has come without a gap."""
        return self._streams[1].end, self._streams[2].end

    def finish(self) -> None:
        """Say that nothing more comes."""
        self._ended = True
        self._wake()

    def whole(self, stream: int) -> bytes:
        """Return what is kept of a stream."""
        return self._streams[stream].whole()

    async def follow(
        self, stdout: int = 0, stderr: int = 0
    ) -> AsyncIterator[tuple[int, int, bytes]]:
        """Yield (stream, offset, bytes) from these offsets on until the command has ended."""
        position = {1: stdout, 2: stderr}
        while True:
            changed, ended = self._changed, self._ended
            for number, kept in self._streams.items():
                while position[number] < kept.end:
                    data = kept.read(position[number], 64 * 1024)
                    yield number, position[number], data
                    position[number] += len(data)
            if ended:
                for number, kept in self._streams.items():
                    if kept.tail:
                        yield number, kept.tail_at, kept.tail
                return
            await changed.wait()

    def close(self, kept: Mapping[int, Path] | None = None) -> None:
        """Remove its files.

        Args:
            kept: Where each stream lies from now on, for those who still follow, or come late.
        """
        for number, stream in self._streams.items():
            stream.close((kept or {}).get(number))


class Passage(Output):
    """Output that is taken as it comes: where nobody takes it the guest waits, and nothing is kept here.

    An operation on files may say any amount: a box makes a file of exabytes in no time.
    """

    def __init__(self, acknowledge: Callable[[int, int], None]) -> None:
        super().__init__(Path(), "", acknowledge)
        self._parts: deque[tuple[int, int, bytes]] = deque()
        self._taken = [0, 0]
        self._come = [0, 0]
        self._errors = bytearray()

    def output(self, stream: int, offset: int, data: bytes) -> None:
        """Take bytes as they come; there are never more than a window of them."""
        known = self._come[stream - 1] - offset
        if known >= len(data) and known > 0:
            return  # sent again after a new connection
        offset, data = offset + max(0, known), data[max(0, known) :]
        self._come[stream - 1] = offset + len(data)
        self._parts.append((stream, offset, data))
        if stream == 2:
            self._errors += data[: _ERROR_BYTES - len(self._errors)]
        self._wake()

    def whole(self, stream: int) -> bytes:
        """Return what it says of an error."""
        return bytes(self._errors) if stream == 2 else b""

    async def follow(
        self, stdout: int = 0, stderr: int = 0
    ) -> AsyncIterator[tuple[int, int, bytes]]:
        """Yield what has come and what comes, once."""
        while True:
            changed, ended = self._changed, self._ended
            while self._parts:
                stream, offset, data = self._parts.popleft()
                yield stream, offset, data
                self._taken[stream - 1] = offset + len(data)
                if not self._ended:
                    self._acknowledge(*self._taken)
            if ended:
                return
            await changed.wait()
