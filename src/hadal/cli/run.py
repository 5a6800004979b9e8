"""`hadal run`: an agent in a box, until its task is done."""

import asyncio
import hashlib
import json
import os
import shlex
import sys
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console

from hadal.cli.box_options import BoxOptions
from hadal.cli.quantities import read_pairs
from hadal.cli.serve import EngineOptions, UpstreamOptions, open_front
from hadal.cli.thinking import Mode, thinking
from hadal.errors import ConfigError, SandboxGoneError
from hadal.plain_text import visible

if TYPE_CHECKING:
    from hadal.agent import AgentConfig, Ending, Journal
    from hadal.sandbox import AsyncSandbox
    from hadal.sandbox.specs import Spec
    from hadal.serve import Front
    from hadal.tools import Toolbox

__all__ = ["keeps_logprobs", "model_identity", "open_model", "run", "runs_folder"]

_Flag = Parameter(negative="")
_EXIT_CODES = {"scored": 0, "failed": 1, "void": 3}


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
    hold_calls: Annotated[bool, _Flag] = False
    logprobs: bool | None = None
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

                server = where if _is_url(where) else shlex.split(where)
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
    return not _is_url(model) if asked is None else asked


def _is_url(text: str) -> bool:
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
    new: Annotated[bool, _Flag] = False,
    runs: Path | None = None,
    keep_box: Annotated[bool, _Flag] = False,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
    agent: AgentOptions | None = None,
    box: BoxOptions | None = None,
    engine: EngineOptions | None = None,
) -> None:
    r"""Let an agent work in a box until it has an answer.

    It has a shell and an editor there, and nothing of this machine but what --mount names. The same command
    goes on with a run of it that was killed. Exit codes: 0 it answered, 1 it got to no answer, 2 wrong usage, 3 the
    model or the box failed.

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
        new: Begin another run, even if one of the same command is not finished.
        runs: Folder of the runs. Default: under $HADAL_HOME, or the user's state.
        keep_box: Do not end the box with the run.
        json_output: Print every event as a line of JSON, and nothing else.
        agent: What the agent may do.
        box: What the box has.
        engine: How the model runs.
    """
    if (task is None) == (resume is None):
        raise ConfigError("expected a task or --resume ID", hint="see --help for examples")
    if resume is not None and new:
        raise ConfigError("expected --resume ID or --new, got both")
    options, boxed, folder = agent or AgentOptions(), box or BoxOptions(), runs or runs_folder()
    console = Console(stderr=json_output, highlight=False)
    if resume is not None:
        _leave_if_ended(folder, resume, console)
    command = _command(task, model, tokenizer, generation, image, options, boxed)
    run = _Asked(folder, task, command, boxed.spec(image), resume=resume, new=new)
    front = open_model(model, tokenizer, generation, engine or EngineOptions())
    working = _run(
        front, run, options, options.config(model), console, json_output=json_output,
        keep_box=keep_box,
    )  # fmt: skip
    ending = asyncio.run(working)
    if ending.outcome == "void":
        without = ", without --new," if new else ""
        console.print(f"hint: the same command{without} goes on with it", markup=False)
    sys.exit(_EXIT_CODES[ending.outcome])


def _leave_if_ended(folder: Path, name: str, console: Console) -> None:
    from hadal.agent import Trajectory, read_events
    from hadal.agent.run_files import RunFiles

    ending = Trajectory.of(read_events(RunFiles(folder).path(name))).ending
    if ending is not None and not ending.reason.is_ours:
        console.print(f"it has ended: {ending.reason}", markup=False)
        sys.exit(_EXIT_CODES[ending.outcome])


def _command(
    task: str | None, model: str, tokenizer: Path | None, generation: str | None, image: str,
    options: AgentOptions, boxed: BoxOptions,
) -> str:  # fmt: skip
    """Return what two commands have in common that ask for the same; values of `--env`, which may be secret, are left out."""
    names = tuple(text.partition("=")[0] for text in boxed.env)
    fields = [asdict(options), asdict(replace(boxed, env=names))]
    asked = [task, model, str(tokenizer), generation, image, str(Path.cwd()), *fields]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def open_model(
    model: str, tokenizer: Path | None, generation: str | None, engine: EngineOptions
) -> "Front":
    """Return encoding and backend of a checkpoint, or of the server at a URL.

    Raises:
        ConfigError: A URL without a tokenizer.
    """
    if _is_url(model):
        return open_front(None, tokenizer, generation, engine, UpstreamOptions(upstream=model))
    return open_front(Path(model), tokenizer, generation, engine, UpstreamOptions())


def model_identity(model: str) -> str:
    """Return what tells a model from another: the URL of a server, or what is in a checkpoint's folder.

    Raises:
        StorageError: The folder cannot be read.
    """
    from hadal.checkpoint import fingerprint
    from hadal.nano import named_checkpoint

    return model if _is_url(model) else fingerprint(named_checkpoint(Path(model)))


@dataclass(frozen=True)
class _Asked:
    """What run is wanted: fields are arguments of `run`."""

    folder: Path
    task: str | None
    command: str
    spec: "Spec"
    resume: str | None
    new: bool

    @asynccontextmanager
    async def opened(
        self, console: Console
    ) -> AsyncGenerator["tuple[Journal, AsyncSandbox, bool]"]:
        """Give the journal of a run, its box, and whether that is new to it.

        A run of the same command that is not finished is gone on with, unless its box is no more: then it stays
        as it is, and is not looked at again.
        """
        from hadal.agent.boxed import open_box

        for journal, is_found in self._journals():
            with journal:
                console.print(f"run {journal.path.stem} ({journal.path})", markup=False)
                if is_found:
                    console.print("it was not finished; --new begins another", markup=False)
                try:
                    box, is_new = await open_box(journal, self.spec)
                except SandboxGoneError as error:
                    if not is_found:
                        raise
                    journal.append("abandoned", text=str(error))
                    console.print(f"it cannot go on: {visible(str(error))}", markup=False)
                    continue
                async with box:
                    yield journal, box, is_new
                return

    def _journals(self) -> "Iterator[tuple[Journal, bool]]":
        """Yield journals to work with, and whether each was found: the next one is for who cannot use the last."""
        from hadal.agent import Journal
        from hadal.agent.run_files import RunFiles

        if self.resume is not None:
            yield Journal(RunFiles(self.folder).path(self.resume)), False
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        while not self.new and (found := RunFiles(self.folder).take_up(self.command)) is not None:
            yield found, True
        journal = Journal(self.folder / f"{uuid.uuid4().hex[:12]}.jsonl")
        journal.events.append(journal.append("task", text=self.task, command=self.command))
        yield journal, False


async def _run(
    front: "Front", run: _Asked, options: AgentOptions, config: "AgentConfig", console: Console,
    *, json_output: bool, keep_box: bool,
) -> "Ending":  # fmt: skip
    from hadal.agent import Agent
    from hadal.agent.boxed import note_box
    from hadal.agent.terminal import Terminal

    terminal = None if json_output else Terminal(console)

    def watch(event: dict[str, Any]) -> None:
        if terminal is None:
            print(json.dumps(event), flush=True)  # noqa: T201 - data goes to stdout
        else:
            terminal.show(event)

    try:
        with terminal or nullcontext():
            async with run.opened(console) as (journal, box, is_new):
                if is_new:
                    note_box(journal, box, watch)
                task = next(e["text"] for e in journal.events if e["kind"] == "task")
                async with options.toolbox(box) as toolbox:
                    agent = Agent(
                        front.backend, front.encoding, toolbox, journal, config, watch=watch
                    )
                    ending = await agent.run([task])
                if not keep_box and ending.outcome != "void":
                    await box.kill()
            return ending
    finally:
        await front.backend.close()
