"""A registry for tests: serves images as registries do, and fails as they do."""

import asyncio
import base64
import hashlib
import re
from contextlib import asynccontextmanager

from aiohttp import web

RANGE = re.compile(r"bytes=(\d+)-")


class RegistryServer:
    """Serves blobs and manifests of made images; the attributes are faults.

    Attributes:
        requests: Method, path and Range of each.
        given: Authorization of each.
        cut_after: Bytes after which the first answers with a blob break off, one for each.
        ignore_range: Whether a range is answered with the whole.
        endless: Whether blobs never end.
        damage: Digests whose content comes with one bit wrong.
        token: What is asked for; None lets everybody in.
        basic: User and password for a token, or for everything where there is no token server.
        unavailable: So many requests are answered with 503.
    """

    def __init__(self):
        self.tags, self.blobs, self.requests = {}, {}, []
        self.cut_after, self.damage = [], set()
        self.given = []
        self.ignore_range = self.endless = False
        self.token = self.basic = self.realm = self.redirect = None
        self.unavailable = self.tokens_given = 0
        self.most_at_once = self.at_once = 0
        self.slow_s = 0.0

    def add(self, image, repository="library/tool", tag="1", top=None):
        self.blobs |= image.blobs
        self.tags[repository, tag] = (top or image.manifest)["digest"]

    @asynccontextmanager
    async def running(self):
        app = web.Application()
        app.router.add_get("/v2/{repository:.+}/manifests/{reference}", self.manifest)
        app.router.add_get("/v2/{repository:.+}/blobs/{digest}", self.blob)
        app.router.add_get("/token", self.give_token)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.host = f"127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    def refusal(self, request):
        self.requests.append((request.method, request.path, request.headers.get("Range")))
        if self.unavailable:
            self.unavailable -= 1
            return web.Response(status=503)
        given = request.headers.get("Authorization", "")
        self.given.append(given)
        if self.token is not None and given != f"Bearer {self.token}":
            realm = self.realm or f"http://{self.host}/token"
            challenge = f'Bearer realm="{realm}",service="here",scope="repository:x:pull"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        if self.token is None and self.basic and given != self.basic_header():
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="here"'})
        return None

    def basic_header(self):
        return "Basic " + base64.b64encode(":".join(self.basic).encode()).decode()

    async def give_token(self, request):
        if self.basic and request.headers.get("Authorization") != self.basic_header():
            return web.Response(status=401)
        assert request.query["service"] == "here"
        self.tokens_given += 1
        return web.json_response({"token": self.token})

    async def manifest(self, request):
        if (refusal := self.refusal(request)) is not None:
            return refusal
        reference = request.match_info["reference"]
        digest = self.tags.get((request.match_info["repository"], reference), reference)
        data = self.blobs.get(digest)
        if data is None:
            return web.Response(status=404)
        return web.Response(body=self.sent(digest, data), content_type="application/json")

    def sent(self, digest, data):
        return bytes([data[0] ^ 1]) + data[1:] if digest in self.damage else data

    async def blob(self, request):
        if (refusal := self.refusal(request)) is not None:
            return refusal
        digest = request.match_info["digest"]
        if self.redirect is not None:
            raise web.HTTPTemporaryRedirect(self.redirect(digest))
        if digest not in self.blobs:
            return web.Response(status=404)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.slow_s)
            return await self.stream(request, digest)
        finally:
            self.at_once -= 1

    async def stream(self, request, digest):
        data = self.sent(digest, self.blobs[digest])
        asked = RANGE.fullmatch(request.headers.get("Range", ""))
        start = int(asked[1]) if asked and not self.ignore_range else 0
        response = web.StreamResponse(status=206 if start else 200)
        if start:
            response.headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.endless:
            response.enable_chunked_encoding()
        else:
            response.content_length = len(data) - start
        await response.prepare(request)
        cut = self.cut_after.pop(0) if self.cut_after and b"layers" not in data else None
        if cut is not None:
            await response.write(data[start : start + cut])
            request.transport.close()
            return response
        await response.write(data[start:])
        while self.endless:
            await response.write(hashlib.sha256(data).digest() * 1000)
        return response
