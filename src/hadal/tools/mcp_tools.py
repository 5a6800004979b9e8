"""Tools of MCP servers (Model Context Protocol), over the `mcp` SDK.

A server is a program on this machine, or somewhere on the network, and does what it does with its own rights:
it is no box. Calls have no request id there, so a run that dies during one may make it again.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from mcp import Client, MCPError, StdioServerParameters
from mcp.types import TextContent

from hadal.chat import Tool
from hadal.errors import ConfigError
from hadal.tools.tool import Said, ToolOutput, ToolUseError, cause_of

__all__ = ["MCPTool", "mcp_tools"]

_LISTED = 64
"""Pages of a list of tools, after which a server does not mean it."""
_START_S = 120.0
"""Until it has said what tools it has; some are fetched from a registry first."""


@dataclass(frozen=True)
class MCPTool:
    """A tool of a server.

    Attributes:
        client: The connection.
        declaration: As the server describes it; a name that others have, too, has a prefix.
        name: What the server calls it.
        timeout_s: Of a call.
    """

    client: Client
    declaration: Tool
    name: str
    timeout_s: float = 300.0

    async def call(self, arguments: dict[str, Any], request_id: str, said: Said) -> ToolOutput:
        """Call it; see `RunningTool.call`."""
        try:
            result = await self.client.call_tool(
                self.name, arguments, read_timeout_seconds=self.timeout_s
            )
        except (MCPError, TimeoutError) as error:
            raise ToolUseError(f"{self.name}: {error}") from error
        texts = [
            part.text if isinstance(part, TextContent) else f"[{part.type}, which cannot be shown]"
            for part in result.content
        ]
        return ToolOutput(text="\n".join(texts) or "(no output)", failed=bool(result.is_error))


@asynccontextmanager
async def mcp_tools(
    server: str | Sequence[str], *, prefix: str = "", env: dict[str, str] | None = None
) -> AsyncGenerator[list[MCPTool]]:
    """Connect to a server and return its tools; leaving the block ends it.

    Args:
        server: URL of one that runs, or program and arguments of one to start here.
        prefix: Before the names of its tools.
        env: Variables of a program, beside those of this process.

    Raises:
        ConfigError: It does not start, or does not speak the protocol.
    """
    where: Any = server
    if not isinstance(server, str):
        program, *arguments = server
        where = StdioServerParameters(
            command=program, args=arguments, env={**os.environ, **(env or {})}
        )
    client = Client(where)
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(_START_S):
                await client.__aenter__()
                # Told of no error: it would wrap one of the block in groups of its own.
                stack.push_async_callback(client.__aexit__, None, None, None)
                tools = await _tools(client, prefix)
        except Exception as error:  # of a server and a library that are not ours
            late = isinstance(error, TimeoutError)
            cause = f"no list of tools within {_START_S:g} s" if late else cause_of(error)
            raise ConfigError(f"MCP server {server!r} cannot be used: {cause}") from error
        yield tools


async def _tools(client: Client, prefix: str) -> list[MCPTool]:
    found: list[MCPTool] = []
    cursor: str | None = None
    for _ in range(_LISTED):
        page = await client.list_tools(cursor=cursor)
        for tool in page.tools:
            declared = Tool.of(f"{prefix}{tool.name}", tool.description or "", tool.input_schema)
            found.append(MCPTool(client, declared, tool.name))
        cursor = page.next_cursor
        if cursor is None:
            break
    return found
