"""What the SDK and the node daemon send each other over HTTP, as checked types.

docs/formats/node-api.md describes the routes; bytes travel in base64.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Base64Bytes,
    BaseModel,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

__all__ = [
    "CallRequest",
    "CommandRequest",
    "CreateRequest",
    "ErrorBody",
    "FileChange",
    "InputRequest",
    "MouseButton",
    "NetworkRequest",
    "PauseRequest",
    "Pointer",
    "SignalRequest",
    "SnapshotKind",
    "SnapshotRequest",
    "StopRequest",
    "command_record",
    "digest_of",
]


def _text(value: object) -> object:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("text without a zero byte is expected")
    os.fsencode(value)  # or it is no name that a system could have
    return value


Text = Annotated[Any, AfterValidator(_text), WithJsonSchema({"type": "string"})]
"""Names and arguments are bytes to the system: what is not UTF-8 is as `os.fsdecode` has it, which the
strings of pydantic refuse."""
Cells = Annotated[int, Field(ge=0, le=65535)]
RequestId = Annotated[str, Field(min_length=1, max_length=200)]
SnapshotKind = Literal["files", "full"]
MouseButton = Literal["left", "middle", "right"]


_RECORDED = ("argv", "shell", "env", "cwd", "user", "tty", "interactive")


def command_record(fields: Mapping[str, Any], stdin: bytes | None) -> dict[str, Any]:
    """Return what counts when two commands are compared: not how long a caller would wait for them."""
    record = {name: fields[name] for name in _RECORDED if fields.get(name)}
    if stdin is not None:
        record["stdin"] = hashlib.sha256(stdin).hexdigest()
    return record


def digest_of(kind: str, request: Mapping[str, Any]) -> str:
    """Return the digest of a request: sha256 of its canonical JSON, in hex."""
    text = json.dumps([kind, request], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CreateRequest(_Body):
    """POST /v1/boxes.

    Attributes:
        spec: As `hadal.sandbox.specs` reads it.
        request_id: The same one twice makes one box.
        name: At most one living box has it; asking again returns that box.
        trajectory: Log to go on with, or to begin.
    """

    spec: dict[str, Any]
    request_id: RequestId
    name: str | None = Field(default=None, max_length=200)
    trajectory: str | None = Field(default=None, max_length=200)


class CommandRequest(_Body):
    """POST /v1/boxes/{id}/commands.

    Attributes:
        argv: Program and arguments, or
        shell: a line for the image's /bin/sh.
        stdin: Given to it at once; None for none.
        interactive: Whether more input may follow; not with `stdin`.
        tty: Rows and columns of a terminal.
        timeout_s, quiet_s: Times after which it is killed.
        output_limit: Bytes kept of each stream.
        request_id: The same one twice runs once.
        wait: Whether to answer when it has ended, not when it has begun.
    """

    argv: tuple[Text, ...] | None = None
    shell: Text | None = None
    env: dict[Text, Text] = Field(default_factory=dict)
    cwd: Text | None = None
    user: Text | None = None
    stdin: Base64Bytes | None = None
    interactive: bool = False
    tty: tuple[Cells, Cells] | None = None
    timeout_s: float | None = Field(default=None, gt=0, le=30 * 86400)
    quiet_s: float | None = Field(default=None, gt=0, le=30 * 86400)
    output_limit: int = Field(default=16 << 20, ge=0, le=1 << 32)
    request_id: RequestId
    wait: bool = True


class SignalRequest(_Body):
    """POST /v1/boxes/{id}/commands/{command}/signal."""

    signal: int = Field(ge=1, le=64)


class FileChange(_Body):
    """POST /v1/boxes/{id}/files: one change of a path.

    Attributes:
        operation: What to do with `path`.
        target: New name, link target, mode in octal, or owner.
        recursive: With what is in it, or with missing parents.
    """

    operation: Literal["remove", "rename", "mkdir", "chmod", "chown", "symlink"]
    path: Text
    target: Text = ""
    recursive: bool = False
    user: Text | None = None
    request_id: RequestId


class CallRequest(_Body):
    """POST /v1/boxes/{id}/call.

    Attributes:
        source: Python that defines the function.
        name: Of the function.
        arguments: `[positional, named]`; or the same pickled, in base64, where `pickled`.
        pickled: The result then comes back pickled, too; nobody unpickles it on the way.
        timeout_s: After so long the call is ended.
        fresh: In a box that nobody has used before, and nobody will afterwards.
    """

    source: str
    name: str
    arguments: Any
    pickled: bool = False
    timeout_s: float = Field(default=60.0, gt=0, le=86400)
    fresh: bool = False
    request_id: RequestId


class NetworkRequest(_Body):
    """PUT /v1/boxes/{id}/network.

    Attributes:
        policy: As `NetworkPolicy.from_json` reads it.
    """

    policy: Any
    request_id: RequestId


class PauseRequest(_Body):
    """POST /v1/boxes/{id}/pause.

    Attributes:
        reclaim: Whether its memory is given back meanwhile.
    """

    reclaim: bool = False


class SnapshotRequest(_Body):
    """POST /v1/boxes/{id}/snapshot and /fork."""

    name: str | None = None
    kind: SnapshotKind = "files"
    count: int = Field(default=1, ge=1, le=1000)
    request_id: RequestId


class Pointer(_Body):
    """Where the pointer of a screen goes, and what is clicked there.

    Attributes:
        x, y: Of the pixels of the screen.
        button: That is clicked. Default: none.
        count: How often: 2 for a double click.
    """

    x: int = Field(ge=0, le=65535)
    y: int = Field(ge=0, le=65535)
    button: MouseButton | None = None
    count: int = Field(default=1, ge=1, le=10)


class InputRequest(_Body):
    """POST /v1/boxes/{id}/input: exactly one of its fields.

    Attributes:
        text: Typed, a key for each character.
        press: Keys that are held together, such as "Control+Alt+F2".
        pointer: Moved, and clicked.
        console: Given to the serial console, of a machine without a guest program.
    """

    text: str | None = Field(default=None, max_length=4096)
    press: str | None = Field(default=None, min_length=1, max_length=200)
    pointer: Pointer | None = None
    console: str | None = Field(default=None, max_length=4096)
    request_id: RequestId

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        parts = (self.text, self.press, self.pointer, self.console)
        given = [part for part in parts if part is not None]
        if len(given) != 1:
            raise ValueError(
                f"one of text, press, pointer and console is expected, got {len(given)}"
            )
        return self


class StopRequest(_Body):
    """POST /v1/node/stop.

    Attributes:
        end_boxes: Whether its boxes end with it.
    """

    end_boxes: bool = False


class ErrorBody(_Body):
    """What every failed request answers.

    Attributes:
        code: Of the class in `hadal.errors`.
        message, hint: For people.
        details: Attributes of the class.
    """

    code: str
    message: str
    hint: str | None = None
    details: dict[str, Any] = Field(default_factory=dict)
