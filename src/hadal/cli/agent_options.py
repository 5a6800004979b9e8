"""What `hadal run` can ask of an agent."""

import json
import shlex
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from hadal.cli.quantities import read_pairs
from hadal.cli.thinking import Mode, thinking
from hadal.errors import ConfigError

if TYPE_CHECKING:
    from hadal.agent import AgentConfig
    from hadal.sandbox import AsyncSandbox
    from hadal.tools import Toolbox

__all__ = ["AgentOptions", "is_url", "keeps_logprobs"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class AgentOptions:
    """What the agent may do.

    Attributes:
        mode: Whether the model reasons first; the report's modes are an effort, too.
        effort: How hard, by the generation's table; for v4.1 also 1 to 100.
        temperature: 0 for the most probable token. Default: as the checkpoint's generation_config.json says, or 1.
        seed: Of the sampling.
        max_turns: Replies of the model, at most.
        window: Tokens of prompt and reply together, at most.
        hold_calls: Hold its calls to their grammar, so that none can be malformed; checkpoints only.
        logprobs: Keep the log-probability of every token that it says, for trainers. Default: where the model is a
            checkpoint.
        python: Let it run Python programs, too.
        mcp: NAME=COMMAND or NAME=URL of an MCP server whose tools it may use; can be repeated. A command
            runs on this machine, outside of the box.
    """

    mode: Mode = "thinking"
    effort: str | None = None
    temperature: float | None = None
    seed: int | None = None
    max_turns: int = 500
    window: int = 512 * 1024
    hold_calls: Annotated[bool, Parameter(negative="")] = False
    logprobs: bool | None = None
    python: Annotated[bool, Parameter(negative="")] = False
    mcp: Annotated[tuple[str, ...], Parameter(negative="")] = ()

    @asynccontextmanager
    async def toolbox(self, box: "AsyncSandbox") -> AsyncGenerator["Toolbox"]:
        """Give the tools of a run; MCP servers end with the block.

        Raises:
            ConfigError: A server cannot be used, or two tools have the same name.
        """
        from hadal.tools import BashTool, EditorTool, FileWatch, PythonTool, Toolbox

        tools: list[Any] = [BashTool(box), EditorTool(box)]
        tools += [PythonTool(box)] if self.python else []
        async with AsyncExitStack() as stack:
            for name, where in read_pairs("--mcp", self.mcp).items():
                from hadal.tools.mcp_tools import mcp_tools

                server = where if is_url(where) else shlex.split(where)
                tools += await stack.enter_async_context(mcp_tools(server, prefix=f"{name}_"))
            yield Toolbox(tools, FileWatch(box))

    def config(self, model: str) -> "AgentConfig":
        """Return settings of the agent.

        Raises:
            ConfigError: The checkpoint's own settings cannot be read.
        """
        from hadal.agent import AgentConfig, Limits

        temperature = self.temperature
        sampling: dict[str, Any] = {
            "temperature": _own_temperature(model) if temperature is None else temperature
        }
        sampling |= {} if self.seed is None else {"seed": self.seed}
        sampling |= {"logprobs": 0} if keeps_logprobs(self.logprobs, model) else {}
        mode, effort = thinking(self.mode, self.effort)
        limits = Limits(turns=self.max_turns, window=self.window)
        return AgentConfig(
            mode=mode, effort=effort, sampling=sampling, limits=limits,
            hold_calls=self.hold_calls,
        )  # fmt: skip


def keeps_logprobs(asked: bool | None, model: str) -> bool:
    """Return whether log-probabilities are to be kept: without a word, where asking for them cannot be refused."""
    return not is_url(model) if asked is None else asked


def is_url(text: str) -> bool:
    """Return whether a model or an MCP server is named by its address."""
    return text.startswith(("http://", "https://"))


def _own_temperature(model: str) -> float:
    from hadal.nano import named_checkpoint

    path = named_checkpoint(Path(model)) / "generation_config.json"
    try:
        return float(json.loads(path.read_text()).get("temperature", 1.0))
    except (FileNotFoundError, NotADirectoryError):
        return 1.0  # a server, too: what its model wants is not known here
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read the temperature from {path}: {error}") from error
