"""What is used of Firecracker's API: requests, their fields, and in which state of the machine each is allowed.

Written down from its description, src/firecracker/swagger/firecracker.yaml at version 1.17.0-dev, commit
004d9353 (2026). The monitor checks what it sends against this; so does the server that stands in for
Firecracker in tests.
"""

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["REQUESTS", "VERSION", "ApiError", "Request", "State", "find_request"]

VERSION = (1, 17)
"""Of Firecracker. Earlier ones do not boot a kernel as Debian packs it (bzImage)."""


class State(enum.StrEnum):
    """Of a machine, as `GET /` says it."""

    NOT_STARTED = "Not started"
    RUNNING = "Running"
    PAUSED = "Paused"


_NEW, _STARTED = frozenset({State.NOT_STARTED}), frozenset({State.RUNNING, State.PAUSED})


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class BootSource(_Body):
    """What is booted."""

    kernel_image_path: str
    boot_args: str
    initrd_path: str


class MachineConfiguration(_Body):
    """Processors and memory."""

    vcpu_count: int = Field(ge=1, le=32)
    mem_size_mib: int


class Drive(_Body):
    """A disk."""

    drive_id: str
    is_root_device: bool
    path_on_host: str
    is_read_only: bool


class NetworkInterface(_Body):
    """A network card, and the tap of the host that it leads to."""

    iface_id: str
    host_dev_name: str


class Vsock(_Body):
    """A virtio socket, and the Unix socket that leads to it."""

    guest_cid: int = Field(ge=3)
    uds_path: str


class EntropyDevice(_Body):
    """A source of random numbers."""


class Balloon(_Body):
    """What gives memory back to the host."""

    amount_mib: int
    deflate_on_oom: bool
    free_page_reporting: bool


class Action(_Body):
    """What is done at once."""

    action_type: Literal["InstanceStart"]


class Vm(_Body):
    """Whether it runs."""

    state: Literal["Paused", "Resumed"]


class SnapshotCreate(_Body):
    """Where a snapshot goes."""

    snapshot_path: str
    mem_file_path: str


class MemoryBackend(_Body):
    """Where the memory of a snapshot comes from."""

    backend_type: Literal["File"]
    backend_path: str


class SnapshotLoad(_Body):
    """What is started from."""

    snapshot_path: str
    mem_backend: MemoryBackend


@dataclass(frozen=True)
class Request:
    """A request that may be made.

    Attributes:
        method: Of HTTP.
        path: With `{id}` where the field `id_field` of its body stands again.
        body: What it takes; None for nothing.
        states: In which it is allowed.
        id_field: That.
        fresh: Whether nothing may have been configured before.
    """

    method: str
    path: str
    body: type[BaseModel] | None
    states: frozenset[State] = frozenset(State)
    id_field: str = ""
    fresh: bool = False


REQUESTS = (
    Request("GET", "/", None),
    Request("GET", "/version", None),
    Request("PUT", "/boot-source", BootSource, _NEW),
    Request("PUT", "/machine-config", MachineConfiguration, _NEW),
    Request("PUT", "/drives/{id}", Drive, _NEW, "drive_id"),
    Request("PUT", "/network-interfaces/{id}", NetworkInterface, _NEW, "iface_id"),
    Request("PUT", "/vsock", Vsock, _NEW),
    Request("PUT", "/entropy", EntropyDevice, _NEW),
    Request("PUT", "/balloon", Balloon, _NEW),
    Request("PUT", "/actions", Action, _NEW),
    Request("PATCH", "/vm", Vm, _STARTED),
    Request("PUT", "/snapshot/create", SnapshotCreate, frozenset({State.PAUSED})),
    Request("PUT", "/snapshot/load", SnapshotLoad, _NEW, fresh=True),
)


class ApiError(ValueError):
    """A request that the API does not have. Internal: whoever makes or takes it says so."""


def find_request(method: str, path: str, body: Mapping[str, Any] | None) -> Request:
    """Return which request this is.

    Raises:
        ApiError: None, or with a body that it does not take.
    """
    for request in REQUESTS:
        pattern = re.escape(request.path).replace(r"\{id\}", "([A-Za-z0-9_]+)")
        found = re.fullmatch(pattern, path)
        if request.method == method and found is not None:
            _check_body(request, body, found.groups())
            return request
    raise ApiError(f"Invalid request method and/or path: {method} {path}.")


def _check_body(request: Request, body: Mapping[str, Any] | None, ids: tuple[str, ...]) -> None:
    if (body is None) != (request.body is None):
        raise ApiError(f"{request.path}: {'no body' if body is None else 'a body'}")
    if request.body is None:
        return
    try:
        request.body.model_validate(body)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ApiError(f"{request.path}: {'; '.join(problems)}") from None
    assert body is not None
    if ids and body[request.id_field] != ids[0]:
        raise ApiError(
            f"The id from the path [{ids[0]}] does not match the one from the body [{body[request.id_field]}]!"
        )
