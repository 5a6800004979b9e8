"""Users and passwords of registries, from where `docker login` and its kin keep them."""

import base64
import binascii
import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from hadal.errors import ImageError
from hadal.node.images.failures import image_errors
from hadal.node.images.oci import parse
from hadal.node.images.references import DEFAULT_REGISTRY

__all__ = ["read_credentials"]


class _Login(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    auth: str | None = None


class _Logins(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    auths: Annotated[dict[str, _Login], Field(default_factory=dict[str, _Login])]


def read_credentials(path: Path | None = None) -> dict[str, tuple[str, str]]:
    """Return user and password for each registry; none where there is no such file.

    Passwords that a credential helper keeps are not found.

    Args:
        path: Default: config.json in $DOCKER_CONFIG, or else in ~/.docker.

    Raises:
        ImageError: The file cannot be read.
    """
    folder = os.environ.get("DOCKER_CONFIG")
    file = path or (Path(folder) if folder else Path.home() / ".docker") / "config.json"
    if not file.exists():
        return {}
    with image_errors("read the logins of registries"):
        logins = parse(_Logins, file.read_bytes(), str(file))
    return {
        _registry(address): _decode(address, login.auth)
        for address, login in logins.auths.items()
        if login.auth
    }


def _registry(address: str) -> str:
    host = address.removeprefix("https://").removeprefix("http://").partition("/")[0]
    return DEFAULT_REGISTRY if host in (f"index.{DEFAULT_REGISTRY}", DEFAULT_REGISTRY) else host


def _decode(address: str, auth: str) -> tuple[str, str]:
    try:
        user, colon, password = base64.b64decode(auth, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise ImageError(f"the login of {address!r:.100} cannot be read") from error
    if not colon:
        raise ImageError(f"the login of {address!r:.100} has no password")
    return user, password
