"""`hadal run`: an agent in a box, until its task is done."""

import asyncio
import json
import os
import shlex
import sys
import uuid
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console

from hadal.cli.box_options import BoxOptions
from hadal.cli.quantities import read_pairs
from hadal.cli.serve import EngineOptions, UpstreamOptions, open_front
from hadal.cli.thinking import Mode, thinking
from hadal.errors import ConfigError

if TYPE_CHECKING:
    from hadal.agent import AgentConfig, Ending
    from hadal.sandbox import AsyncSandbox
    from hadal.serve import Front
    from hadal.tools import Toolbox

__all__ = ["open_model", "run", "runs_folder"]

_Flag = Parameter(negative="")


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
    hold_calls: Annotated[bool, _Flag] = False
    python: Annotated[bool, _Flag] = False
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

                is_url = where.startswith(("http://", "https://"))
                server = where if is_url else shlex.split(where)
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
        mode, effort = thinking(self.mode, self.effort)
        limits = Limits(turns=self.max_turns, window=self.window)
        return AgentConfig(
            mode=mode, effort=effort, sampling=sampling, limits=limits,
            hold_calls=self.hold_calls,
        )  # fmt: skip


def _own_temperature(model: str) -> float:
    from hadal.nano import named_checkpoint

    path = named_checkpoint(Path(model)) / "generation_config.json"
    try:
        return float(json.loads(path.read_text()).get("temperature", 1.0))
    except (FileNotFoundError, NotADirectoryError):
        return 1.0  # a server, too: what its model wants is not known here
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read the temperature from {path}: {error}") from error


def runs_folder() -> Path:
    """Return where runs are kept: $HADAL_HOME/runs, or under the user's state."""
    home = os.environ.get("HADAL_HOME")
    if home:
        return Path(home) / "runs"
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "hadal" / "runs"


def run(
    task: str | None = None,
    *,
    model: str = "nano",
    tokenizer: Path | None = None,
    generation: Literal["v4", "v4-0731", "v4.1"] | None = None,
    image: str = "host",
    resume: str | None = None,
    runs: Path | None = None,
    keep_box: Annotated[bool, _Flag] = False,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
    agent: AgentOptions | None = None,
    box: BoxOptions | None = None,
    engine: EngineOptions | None = None,
) -> None:
    r"""Let an agent work in a box until it has an answer.

    It has a shell and an editor there, and nothing of this machine but what --mount names. A run that was
    killed goes on with --resume. Exit codes: 0 it answered, 1 it got to no answer, 2 wrong usage, 3 the model or
    the box failed.

    Examples:
        hadal run "Write the number of lines of moon.txt to sun.txt" \
            --mount ./data:/data:rw --working-dir /data

        hadal run "Which files are in /usr/share/doc?" --model path/to/checkpoint

        hadal run "Fix the failing test" --model http://gpu-box:8000 \
            --tokenizer path/to/checkpoint --mount ./project:/project:rw

        hadal run --resume 3f2a91c04d7b

    Args:
        task: What it is asked to do.
        model: A checkpoint's folder, or the URL of a server with a completions endpoint; or nano, the small
            network that comes with hadal.
        tokenizer: Folder or tokenizer.json, where the model is a URL.
        generation: Of the message format. Default: read from the checkpoint.
        image: Of the box.
        resume: Id of a run to go on with; it has its task and its box already.
        runs: Folder of the runs. Default: under $HADAL_HOME, or the user's state.
        keep_box: Do not end the box with the run.
        json_output: Print every event as a line of JSON, and nothing else.
        agent: What the agent may do.
        box: What the box has.
        engine: How the model runs.
    """
    if (task is None) == (resume is None):
        raise ConfigError("expected a task or --resume ID", hint="see --help for examples")
    from hadal.agent.run_files import RunFiles

    path = (runs or runs_folder()) / f"{resume or uuid.uuid4().hex[:12]}.jsonl"
    if resume is not None:
        path = RunFiles(path.parent).path(resume)
    front = open_model(model, tokenizer, generation, engine or EngineOptions())
    spec = (box or BoxOptions()).spec(image)
    console = Console(stderr=json_output, highlight=False)
    console.print(f"run {path.stem} ({path})", markup=False)
    options = agent or AgentOptions()
    working = _run(
        front, path, task, spec, options, options.config(model), console, json_output=json_output,
        keep_box=keep_box,
    )  # fmt: skip
    ending = asyncio.run(working)
    if ending.outcome == "void":
        console.print(f"hint: go on with hadal run --resume {path.stem}", markup=False)
    sys.exit({"scored": 0, "failed": 1, "void": 3}[ending.outcome])


def open_model(
    model: str, tokenizer: Path | None, generation: str | None, engine: EngineOptions
) -> "Front":
    """Return encoding and backend of a checkpoint, or of the server at a URL.

    Raises:
        ConfigError: A URL without a tokenizer.
    """
    if model.startswith(("http://", "https://")):
        return open_front(None, tokenizer, generation, engine, UpstreamOptions(upstream=model))
    return open_front(Path(model), tokenizer, generation, engine, UpstreamOptions())


async def _run(
    front: "Front", path: Path, task: str | None, spec: Any, options: AgentOptions,
    config: "AgentConfig", console: Console,
    *, json_output: bool, keep_box: bool,
) -> "Ending":  # fmt: skip
    from hadal.agent import Agent, Journal, Trajectory
    from hadal.agent.boxed import note_box, open_box
    from hadal.agent.terminal import Terminal

    terminal = None if json_output else Terminal(console)

    def watch(event: dict[str, Any]) -> None:
        if terminal is None:
            print(json.dumps(event), flush=True)  # noqa: T201 - data goes to stdout
        else:
            terminal.show(event)

    try:
        with terminal or nullcontext(), Journal(path) as journal:
            known = Trajectory.of(journal.events).ending
            if known is not None and not known.reason.is_ours:
                console.print(f"it has ended: {known.reason}", markup=False)
                return known
            asked = next((e for e in journal.events if e["kind"] == "task"), None)
            if asked is None:
                asked = journal.append("task", text=task)
            box, is_new = await open_box(journal, spec)
            async with box:
                if is_new:
                    note_box(journal, box, watch)
                async with options.toolbox(box) as toolbox:
                    agent = Agent(
                        front.backend,
                        front.encoding,
                        toolbox,
                        journal,
                        config,
                        watch=watch,
                    )
                    ending = await agent.run([asked["text"]])
                if not keep_box and ending.outcome != "void":
                    await box.kill()
            return ending
    finally:
        await front.backend.close()
