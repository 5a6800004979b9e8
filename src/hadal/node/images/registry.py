"""A client of registries (OCI distribution, Docker registry v2), as far as pulling goes.

Whatever a registry says is checked: sizes while they stream, digests before anything is used. Its
redirects and token servers must be reached by TLS as it is itself. Secrets go to where they belong only.
"""

import asyncio
import base64
import functools
import hashlib
import ipaddress
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import aiohttp
from pydantic import BaseModel, ConfigDict, StringConstraints
from yarl import URL

from hadal.errors import ImageError
from hadal.node.images.oci import INDEX_TYPES, MANIFEST_TYPES, METADATA_BYTES_MAX, Descriptor, parse
from hadal.node.images.references import DEFAULT_REGISTRY, Reference

__all__ = ["RegistrySettings", "Repository"]

_CHUNK = 1 << 20
_REDIRECTS_MAX = 5
_CHALLENGE = re.compile(r'([a-z_]+)="([^"]*)"')
_HOST_OF_DEFAULT = "registry-1.docker.io"
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class RegistrySettings:
    """How registries are reached.

    Attributes:
        mirrors: For a registry, base URLs that are asked before it, in order.
        insecure: Hosts, with their port if they have one, that are spoken to without TLS. Addresses of
            this machine always are.
        credentials: For a registry, user and password.
        timeout_s: Without a byte from a registry.
        attempts: At each server, for each manifest and blob; a blob goes on where it broke off.
        retry_delay_s: Before the second attempt; it doubles.
        downloads: Blobs at a time.
    """

    mirrors: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    insecure: frozenset[str] = frozenset()
    credentials: Mapping[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    timeout_s: float = 60.0
    attempts: int = 5
    retry_delay_s: float = 0.5
    downloads: int = 4

    def check(self, address: str | URL) -> URL:
        """Return a URL that may be asked.

        Raises:
            ImageError: It is none, or without TLS where that is not allowed.
        """
        try:
            url = URL(address)
            host = url.host or ""
        except ValueError as error:
            raise ImageError(f"not a URL: {str(address)!r:.200}: {error}") from error
        if url.scheme == "https" and host:
            return url
        if url.scheme == "http" and (
            _is_loopback(host) or not self.insecure.isdisjoint((host, url.authority))
        ):
            return url
        raise ImageError(
            f"{url.origin() if host else url} is not reached by TLS",
            hint=f"to allow it, name {url.authority} among the insecure registries",
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


_TokenText = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]*$")]


class _Token(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    token: _TokenText | None = None
    access_token: _TokenText | None = None


class _UnavailableError(ImageError):
    """May work at the next attempt."""


class _DiskError(Exception):
    """Ours, not the registry's: no other attempt helps."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Endpoint:
    """One server that may have a repository."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        settings: RegistrySettings,
        base: str,
        of: Reference,
        owner: str,
    ) -> None:
        self.base = settings.check(base)
        self._owner = owner  # whose credentials it may see
        self._session = session
        self._settings = settings
        self._of = of
        self._authorization: str | None = None

    @asynccontextmanager
    async def get(
        self, path: str, headers: Mapping[str, str]
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """Ask for something of the repository; the answer is 200 or 206.

        Raises:
            ImageError: It is not.
        """
        url = self.base / f"v2/{self._of.repository}/{path}"
        used = self._authorization
        response = await self._follow(url, headers)
        try:
            if response.status == 401:
                if used == self._authorization:  # else another request has renewed it meanwhile
                    await self._authenticate(response.headers.getall("WWW-Authenticate", []))
                response.close()
                response = await self._follow(url, headers)
            if response.status not in (200, 206):
                kind = (
                    _UnavailableError
                    if response.status in (408, 429) or response.status >= 500
                    else ImageError
                )
                raise kind(f"{path}: {_describe(response.status)}")
            yield response
        finally:
            response.close()

    async def _follow(self, url: URL, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        for _ in range(_REDIRECTS_MAX):
            sent = dict(headers)
            if self._authorization is not None and url.origin() == self.base.origin():
                sent["Authorization"] = self._authorization
            response = await self._session.get(url, headers=sent, allow_redirects=False)
            if response.status not in (301, 302, 303, 307, 308):
                return response
            location = response.headers.get("Location", "")
            response.close()
            url = self._check_other(location, url)
        raise ImageError(f"{url.origin()}: more than {_REDIRECTS_MAX} redirects")

    def _check_other(self, address: str, seen_from: URL) -> URL:
        """Return the URL of another server that this one names."""
        try:
            url = self._settings.check(seen_from.join(URL(address, encoded=True)))
        except ValueError as error:
            raise ImageError(f"{self.base} leads to {address!r:.200}: {error}") from error
        if _is_loopback(url.host or "") and not _is_loopback(self.base.host or ""):
            raise ImageError(f"{self.base} leads to a server on this machine: {url.origin()}")
        return url

    async def _authenticate(self, challenges: list[str]) -> None:
        credentials = self._settings.credentials.get(self._owner)
        basic = _basic(*credentials) if credentials else None
        for challenge in challenges:
            scheme, _, rest = challenge.partition(" ")
            if scheme.lower() == "bearer":
                self._authorization = await self._get_token(dict(_CHALLENGE.findall(rest)), basic)
                return
            if scheme.lower() == "basic" and basic is not None:
                self._authorization = basic
                return
        raise ImageError(
            f"{self.base} asks who we are", hint=f"give user and password of {self._owner}"
        )

    async def _get_token(self, challenge: Mapping[str, str], basic: str | None) -> str:
        realm = self._check_other(challenge.get("realm", ""), self.base)
        scope = challenge.get("scope") or f"repository:{self._of.repository}:pull"
        query = {"scope": scope} | {k: v for k, v in challenge.items() if k == "service"}
        headers = {"Authorization": basic} if basic else {}
        async with self._session.get(
            realm.update_query(query), headers=headers, allow_redirects=False
        ) as response:
            if response.status != 200:
                raise ImageError(f"no token from {realm.origin()}: {_describe(response.status)}")
            answer = parse(_Token, await _read(response), f"the token of {realm.origin()}")
        return f"Bearer {answer.token or answer.access_token or ''}"


def _basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def _describe(status: int) -> str:
    return {401: "not allowed (401)", 403: "not allowed (403)", 404: "not there (404)"}.get(
        status, f"status {status}"
    )


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Return a short answer."""
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > METADATA_BYTES_MAX:
            raise ImageError(f"an answer of more than {METADATA_BYTES_MAX:,} bytes")
    return bytes(data)


class Repository:
    """The repository of a reference, through its mirrors and its registry.

    Args:
        session: To ask with; made by `open_session`.
        settings: How.
        reference: Whose.
    """

    def __init__(
        self, session: aiohttp.ClientSession, settings: RegistrySettings, reference: Reference
    ) -> None:
        self.reference = reference
        self._settings = settings
        registry = reference.registry
        own = settings.check(
            f"https://{_HOST_OF_DEFAULT if registry == DEFAULT_REGISTRY else registry}"
        )
        if _is_loopback(own.host or "") or settings.insecure.intersection((own.host, registry)):
            own = own.with_scheme("http").with_port(own.explicit_port)
        self._endpoints = [
            _Endpoint(session, settings, base, reference, URL(base).authority)
            for base in settings.mirrors.get(registry, ())
        ]
        self._endpoints.append(_Endpoint(session, settings, str(own), reference, registry))

    @staticmethod
    def open_session(settings: RegistrySettings) -> aiohttp.ClientSession:
        """Return a session for any number of repositories; close it."""
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=settings.timeout_s, sock_read=settings.timeout_s
        )
        return aiohttp.ClientSession(
            timeout=timeout,
            auto_decompress=False,
            read_bufsize=_CHUNK,
            headers={"Accept-Encoding": "identity", "User-Agent": "hadal"},
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=True,
        )

    async def manifest(self, tag_or_digest: str) -> bytes:
        """Return a manifest; where a digest is asked for, it is checked.

        Raises:
            ImageError: No server has it.
        """
        headers = {"Accept": ", ".join((*INDEX_TYPES, *MANIFEST_TYPES))}

        async def ask(endpoint: _Endpoint) -> bytes:
            async with endpoint.get(f"manifests/{tag_or_digest}", headers) as response:
                data = await _read(response)
            found = f"sha256:{hashlib.sha256(data).hexdigest()}"
            if ":" in tag_or_digest and found != tag_or_digest:
                raise ImageError(f"the manifest has digest {found}, expected {tag_or_digest}")
            return data

        return await self._ask_all(lambda endpoint: functools.partial(ask, endpoint))

    async def blob(self, wanted: Descriptor, target: Path, progress: Callable[[int], None]) -> None:
        """Write a blob into a file; it is what the descriptor says, or an error.

        Args:
            wanted: Digest and size.
            target: The file.
            progress: Told how many bytes are there.

        Raises:
            ImageError: No server gives it, or not in the size and with the content announced.
            OSError: The file cannot be written.
        """

        def make(endpoint: _Endpoint) -> Callable[[], Awaitable[None]]:
            return _Download(endpoint, wanted, target, progress).run

        try:
            await self._ask_all(make)
        except _DiskError as error:
            raise error.reason from error

    async def _ask_all(self, make: Callable[[_Endpoint], Callable[[], Awaitable[_T]]]) -> _T:
        """Ask one server after the other, each as often as is allowed."""
        reasons: list[str] = []
        hint: str | None = None
        for endpoint in self._endpoints:
            ask = make(endpoint)
            reason = ""
            for attempt in range(self._settings.attempts):
                if attempt:
                    await asyncio.sleep(self._settings.retry_delay_s * 2 ** (attempt - 1))
                try:
                    return await ask()
                except (_UnavailableError, aiohttp.ClientError, TimeoutError, OSError) as error:
                    reason = str(error) or type(error).__name__
                except ImageError as error:
                    reason, hint = error.message, error.hint
                    break
            reasons.append(f"{endpoint.base}: {reason}")
        raise ImageError(f"cannot pull {self.reference}: {'; '.join(reasons)}", hint=hint)


class _Download:
    """One blob from one server; each `run` continues where the one before broke off."""

    def __init__(
        self, endpoint: _Endpoint, wanted: Descriptor, target: Path, progress: Callable[[int], None]
    ) -> None:
        self._endpoint = endpoint
        self._wanted = wanted
        self._target = target
        self._progress = progress
        self._sha = hashlib.sha256()
        self._size = 0

    async def run(self) -> None:
        """Fetch what is missing; see that all of it is right."""
        headers = {"Range": f"bytes={self._size}-"} if self._size else {}
        async with self._endpoint.get(f"blobs/{self._wanted.digest}", headers) as response:
            if response.status == 206:
                self._check_range(response)
            else:
                self._sha, self._size = hashlib.sha256(), 0
            async for chunk in response.content.iter_chunked(_CHUNK):
                if self._size + len(chunk) > self._wanted.size:
                    raise ImageError(
                        f"{self._wanted.digest} has more than the {self._wanted.size:,} bytes announced"
                    )
                try:
                    await asyncio.to_thread(self._write, chunk)
                except OSError as error:
                    raise _DiskError(error) from error
                self._progress(self._size)
        if self._size < self._wanted.size:
            raise _UnavailableError(
                f"broke off after {self._size:,} of {self._wanted.size:,} bytes"
            )
        found = f"sha256:{self._sha.hexdigest()}"
        if found != self._wanted.digest:
            raise ImageError(f"a blob has digest {found}, expected {self._wanted.digest}")

    def _check_range(self, response: aiohttp.ClientResponse) -> None:
        wanted = f"bytes {self._size}-"
        if not response.headers.get("Content-Range", "").startswith(wanted):
            raise ImageError(f"{self._wanted.digest}: asked for {wanted}, got another range")

    def _write(self, chunk: bytes) -> None:
        with self._target.open("r+b" if self._size else "wb") as file:
            file.seek(self._size)
            file.write(chunk)
        self._sha.update(chunk)
        self._size += len(chunk)
