"""Every exception that hadal raises on purpose, in one tree.

    HadalError                          base: .code (stable), .retryable, .hint
    ├── ConfigError (ValueError)        settings that are unknown or do not fit together
    ├── InputError (ValueError)         a tensor or argument of the wrong type, shape or range
    ├── EncodingError (ValueError)      messages, text and token ids
    │   ├── InvalidConversationError    messages that cannot be rendered: roles, order, shapes
    │   └── MalformedCompletionError    a completion that the published reference refuses (strict)
    ├── CheckpointError                 a checkpoint that cannot be read or written
    │   └── CheckpointMismatchError     its tensors are not the model's; all of them are listed
    ├── StorageError                    a store on disk that cannot be read or written
    ├── UpstreamError                   another server failed, or cannot be reached
    │   └── UpstreamRefusedError        it does not let us in, or has no such model
    ├── EngineError                     running the model
    │   ├── ContextLengthError          more tokens than the model or the window holds
    │   └── CapacityError               more than the cache or the queue holds; may work later
    └── SandboxError                    a box, its node or its log
        ├── LaunchError                 a box could not be made
        ├── SandboxGoneError            the box is no more; .cause: oom, ttl, idle, killed, ...
        ├── NoCapacityError             the node has no room; may work later or elsewhere
        ├── UnsupportedError            this backend or host cannot do that
        ├── CommandRefusedError         a command was not started: no such program, user, directory
        ├── CallFailedError             a called function did not return; .result
        ├── CommandFailedError          a command failed and the caller asked to be told; .result
        ├── SandboxFileError (OSError)  an operation on a file in a box; .errno as of the system
        ├── UnsafeFileError             something in a box that is not taken out of it
        ├── ImageError                  an image that cannot be found, read, built or stored
        ├── NodeError                   the node daemon cannot be reached, or failed
        │   └── NodeAuthError           it does not know the caller
        ├── UnknownOutcomeError         whether a recorded command has run cannot be known
        ├── ReplayDivergedError         a command differs from the one that is recorded there
        └── JournalError                the log of a node cannot be read or written

A message says what happened, to what, what was expected and what was found; `hint` says what to do
about it and is printed on a line of its own. Classes also inherit the built-in that a caller would
guess. All of them survive pickling.
"""

import enum
import os
from collections.abc import Sequence
from typing import ClassVar

__all__ = [
    "CallFailedError",
    "CapacityError",
    "CheckpointError",
    "CheckpointMismatchError",
    "CommandFailedError",
    "CommandRefusedError",
    "ConfigError",
    "ContextLengthError",
    "EncodingError",
    "EngineError",
    "GoneCause",
    "HadalError",
    "ImageError",
    "InputError",
    "InvalidConversationError",
    "JournalError",
    "LaunchError",
    "MalformedCompletionError",
    "NoCapacityError",
    "NodeAuthError",
    "NodeError",
    "ReplayDivergedError",
    "SandboxError",
    "SandboxFileError",
    "SandboxGoneError",
    "StorageError",
    "UnknownOutcomeError",
    "UnsafeFileError",
    "UnsupportedError",
    "UpstreamError",
    "UpstreamRefusedError",
]


class HadalError(Exception):
    """Base of all errors of this package.

    Attributes:
        code: Stable name of the kind of error, for programs.
        retryable: Whether the same call may succeed later without any change by the caller.
        message: What happened, without the hint.
        hint: What the caller can do, or None.
    """

    code: ClassVar[str] = "hadal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # BaseException pickles positional arguments only; ours are keyword arguments.
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(
    cls: type[HadalError], args: tuple[object, ...], attributes: dict[str, object]
) -> HadalError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class ConfigError(HadalError, ValueError):
    """A setting is unknown, out of range, or does not fit the others."""

    code = "config"


class InputError(HadalError, ValueError):
    """A tensor or argument has the wrong type, shape or range."""

    code = "input"


class EncodingError(HadalError, ValueError):
    """Messages, text and token ids do not fit together."""

    code = "encoding"


class InvalidConversationError(EncodingError):
    """Messages cannot be read or rendered.

    Attributes:
        where: Path of the offending value within the request, as `messages[2].content`, or "".
    """

    code = "invalid_conversation"

    def __init__(self, message: str, *, where: str = "", hint: str | None = None) -> None:
        self.where = where
        super().__init__(f"{where}: {message}" if where else message, hint=hint)


class MalformedCompletionError(EncodingError):
    """A completion breaks the format (strict parsing only).

    Attributes:
        offset: Characters from the start of the completion to the fault.
        text: The text concerned, shortened.
    """

    code = "malformed_completion"

    def __init__(self, reason: str, *, offset: int, text: str = "") -> None:
        self.offset = offset
        self.text = text if len(text) <= 200 else f"{text[:200]}…"
        found = f", found {self.text!r}" if text else ""
        super().__init__(f"malformed completion at character {offset}: {reason}{found}")


class CheckpointError(HadalError):
    """A checkpoint cannot be read or written."""

    code = "checkpoint"


class CheckpointMismatchError(CheckpointError):
    """The tensors of a checkpoint are not those of the model.

    Attributes:
        missing: Names that the model needs and the checkpoint lacks.
        unexpected: Names in the checkpoint that the model does not know.
        mismatched: One line for each tensor whose shape or dtype differs.
    """

    code = "checkpoint_mismatch"

    def __init__(
        self,
        what: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Sequence[str] = (),
        hint: str | None = None,
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)
        parts = [
            f"{len(names)} {title}:\n" + "\n".join(f"  {name}" for name in names)
            for title, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("of another shape or dtype", self.mismatched),
            )
            if names
        ]
        super().__init__(f"{what}: tensors do not match the model\n" + "\n".join(parts), hint=hint)


class StorageError(HadalError):
    """A store on disk cannot be read or written: locked, full, read-only or damaged."""

    code = "storage"
    retryable = True


class UpstreamError(HadalError):
    """Another server that we depend on failed or cannot be reached."""

    code = "upstream"
    retryable = True


class UpstreamRefusedError(UpstreamError):
    """Another server does not let us in, or does not have what we ask for; asking again does not help."""

    code = "upstream_refused"
    retryable = False


class EngineError(HadalError):
    """Running the model failed."""

    code = "engine"


class CapacityError(EngineError):
    """More is asked for than the cache, the queue or a limit holds; later there may be room."""

    code = "capacity"
    retryable = True


class ContextLengthError(EngineError, ValueError):
    """A sequence is longer than allowed.

    Attributes:
        limit: Tokens allowed.
        actual: Tokens asked for.
    """

    code = "context_length"

    def __init__(self, *, limit: int, actual: int, hint: str | None = None) -> None:
        self.limit = limit
        self.actual = actual
        super().__init__(
            f"context too long: expected at most {limit:,} tokens, got {actual:,}", hint=hint
        )


class SandboxError(HadalError):
    """A box, its node or its log."""

    code = "sandbox"


class LaunchError(SandboxError):
    """A box could not be made."""

    code = "launch"


class GoneCause(enum.StrEnum):
    """Why a box is no more."""

    OOM = "oom"
    """Its memory ran out, and what ran out took the box with it."""
    TTL = "ttl"
    """Its lifetime is over."""
    IDLE = "idle"
    """Nobody has used it for too long."""
    KILLED = "killed"
    """Somebody asked for its end."""
    NODE_LOST = "node_lost"
    """Its machine or its node daemon is gone."""
    CRASHED = "crashed"
    """Its first process ended, and nobody knows why."""
    NOT_WOKEN = "not_woken"
    """It was paused and its memory given back, and it could not be run again."""
    NOT_FOUND = "not_found"
    """The node has never had it, or has forgotten it."""


class SandboxGoneError(SandboxError):
    """The box is no more.

    Attributes:
        cause: Why.
    """

    code = "sandbox_gone"

    def __init__(self, message: str, *, cause: GoneCause, hint: str | None = None) -> None:
        self.cause = cause
        super().__init__(message, hint=hint)


class NoCapacityError(SandboxError):
    """The node has no room for what is asked; later or elsewhere there may be."""

    code = "no_capacity"
    retryable = True


class UnsupportedError(SandboxError):
    """This backend or this host cannot do that."""

    code = "unsupported"


class CommandRefusedError(SandboxError):
    """A command was not started: no such program, user or directory, or no process left.

    Attributes:
        errno: As of the system.
    """

    code = "command_refused"

    def __init__(self, message: str, *, errno: int, hint: str | None = None) -> None:
        self.errno = errno
        super().__init__(message, hint=hint)


class CommandFailedError(SandboxError):
    """A command failed, and the caller asked to be told by an exception (`check=True`).

    Attributes:
        result: What it left, as a call without `check` returns it.
    """

    code = "command_failed"

    def __init__(self, message: str, *, result: object) -> None:
        self.result = result
        super().__init__(message)


class CallFailedError(SandboxError):
    """A function that was called in a box did not return.

    Attributes:
        result: All that is known of the call.
    """

    code = "call_failed"

    def __init__(self, message: str, *, result: object) -> None:
        self.result = result
        super().__init__(message)


class SandboxFileError(SandboxError, OSError):
    """An operation on a file in a box failed.

    Attributes:
        errno: As of the system.
        filename: The path in the box.
    """

    code = "sandbox_file"

    def __init__(self, errno: int, filename: str, *, hint: str | None = None) -> None:
        super().__init__(f"{filename}: {os.strerror(errno)}", hint=hint)
        self.errno = errno
        self.filename = filename

    def __reduce__(self) -> tuple[object, ...]:
        # An OSError keeps these where no dictionary has them.
        return (_rebuild_file_error, (self.errno, self.filename, self.hint))


def _rebuild_file_error(errno: int, filename: str, hint: str | None) -> SandboxFileError:
    return SandboxFileError(errno, filename, hint=hint)


class UnsafeFileError(SandboxError):
    """Something in a box is not taken out of it: it would lead elsewhere here, or is no file."""

    code = "unsafe_file"


class ImageError(SandboxError):
    """An image cannot be found, read, built or stored."""

    code = "image"


class NodeError(SandboxError):
    """The node daemon cannot be reached, or failed."""

    code = "node"
    retryable = True


class NodeAuthError(NodeError):
    """The node daemon does not know the caller."""

    code = "node_auth"
    retryable = False


class UnknownOutcomeError(SandboxError):
    """A command was begun, and whether it has run cannot be known any more."""

    code = "unknown_outcome"


class ReplayDivergedError(SandboxError):
    """A command differs from the one that is recorded at its place.

    Attributes:
        position: Number of the record, from 1.
        recorded: What is recorded there, shortened.
        asked: What was asked for.
    """

    code = "replay_diverged"

    def __init__(
        self, *, position: int, recorded: str, asked: str, hint: str | None = None
    ) -> None:
        self.position = position
        self.recorded = recorded
        self.asked = asked
        super().__init__(
            f"step {position} of the trajectory differs: recorded {recorded}, asked for {asked}",
            hint=hint,
        )


class JournalError(SandboxError):
    """The log of a node cannot be read or written: full disk, damage, another version."""

    code = "journal"
