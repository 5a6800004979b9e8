"""`hadal run`: an agent in a box, until its task is done."""

import asyncio
import json
import os
import sys
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Never

from cyclopts import Parameter
from rich.console import Console

from hadal.cli.agent_options import AgentOptions, is_url
from hadal.cli.box_options import BoxOptions
from hadal.cli.run_settings import RunSettings
from hadal.cli.serve import EngineOptions, ServedOptions, UpstreamOptions, open_front
from hadal.errors import ConfigError, SandboxGoneError
from hadal.plain_text import visible

if TYPE_CHECKING:
    from hadal.agent import Ending, Journal
    from hadal.sandbox import AsyncSandbox
    from hadal.sandbox.specs import Spec
    from hadal.serve import Front

__all__ = ["open_model", "run", "runs_folder"]

_Flag = Parameter(negative="")
_EXIT_CODES = {"scored": 0, "failed": 1, "void": 3}


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
    served: ServedOptions | None = None,
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
        model: A checkpoint's folder, or the URL of a server with a completions endpoint, whose key is read from
            HADAL_UPSTREAM_KEY; or nano, the small network that comes with hadal.
        tokenizer: Folder or tokenizer.json, where the model is a URL.
        generation: Of the message format. Default: read from the checkpoint.
        image: Of the box.
        resume: Id of a run to go on with; it has its task, its options and its box already.
        new: Begin another run, even if one of the same command is not finished.
        runs: Folder of the runs. Default: under $HADAL_HOME, or the user's state.
        keep_box: Do not end the box with the run.
        json_output: Print the run's id and every event, as a line of JSON each, and nothing else.
        agent: What the agent may do.
        box: What the box has.
        engine: How the model runs.
        served: How such a server is asked.
    """
    _check_usage(task, resume, new=new)
    settings = RunSettings(
        model=model, tokenizer=tokenizer and str(tokenizer), generation=generation, image=image,
        agent=agent or AgentOptions(), box=box or BoxOptions(), served=served or ServedOptions(),
    )  # fmt: skip
    folder = runs or runs_folder()
    console = Console(stderr=json_output, highlight=False)
    if resume is not None:
        settings = _resumed(folder, resume, settings, console, json_output=json_output)
    run = _Asked(folder, task, settings, settings.box.spec(settings.image), resume=resume, new=new)
    front = open_model(
        settings.model, Path(settings.tokenizer) if settings.tokenizer else None, settings.generation,
        engine or EngineOptions(), settings.served,
    )  # fmt: skip
    working = _run(front, run, console, json_output=json_output, keep_box=keep_box)
    _leave(asyncio.run(working), console, new=new)


def _leave(ending: "Ending", console: Console, *, new: bool) -> Never:
    """End the program with the code that says how a run ended."""
    if ending.outcome == "void":
        without = ", without --new," if new else ""
        console.print(f"hint: the same command{without} goes on with it", markup=False)
    sys.exit(_EXIT_CODES[ending.outcome])


def _check_usage(task: str | None, resume: str | None, *, new: bool) -> None:
    if (task is None) == (resume is None):
        raise ConfigError("expected a task or --resume ID", hint="see --help for examples")
    if resume is not None and new:
        raise ConfigError("expected --resume ID or --new, got both")


def _resumed(
    folder: Path, name: str, given: RunSettings, console: Console, *, json_output: bool
) -> RunSettings:
    """Return the settings that a run was begun with; leave the program where it has ended.

    Raises:
        ConfigError: There is no such run, or it was begun with other options or other weights.
    """
    from hadal.agent import Trajectory, read_events
    from hadal.agent.run_files import RunFiles

    events = read_events(RunFiles(folder).path(name))
    ending = Trajectory.of(events).ending
    if ending is not None and not ending.reason.is_ours:
        if json_output:
            print(json.dumps(next(e for e in reversed(events) if e["kind"] == "end")))  # noqa: T201 - data goes to stdout
        console.print(f"it has ended: {ending.reason}", markup=False)
        sys.exit(_EXIT_CODES[ending.outcome])
    begun = next((e for e in events if e["kind"] == "task"), {})
    if "settings" not in begun:  # of an older version
        return given
    settings = given.resumed(begun["settings"], has_box=any(e["kind"] == "box" for e in events))
    if settings.identity != begun["identity"]:
        raise ConfigError(
            f"the weights in {settings.model} are not those that the run was begun with",
            hint="begin another run",
        )
    return settings


def open_model(
    model: str, tokenizer: Path | None, generation: str | None, engine: EngineOptions,
    served: ServedOptions | None = None,
) -> "Front":  # fmt: skip
    """Return encoding and backend of a checkpoint, or of the server at a URL.

    Raises:
        ConfigError: A URL without a tokenizer, or options of a server for a checkpoint.
    """
    served = served or ServedOptions()
    if is_url(model):
        upstream = UpstreamOptions(upstream=model, **asdict(served))
        return open_front(None, tokenizer, generation, engine, upstream)
    if served != ServedOptions():
        raise ConfigError(
            f"--upstream-model and --upstream-takes are for a model at a URL, got {model}"
        )
    return open_front(Path(model), tokenizer, generation, engine, UpstreamOptions())


@dataclass(frozen=True)
class _Asked:
    """What run is wanted: fields are arguments of `run`."""

    folder: Path
    task: str | None
    settings: RunSettings
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
        command, settings = self.settings.command(self.task), self.settings.written()
        while not self.new and (found := RunFiles(self.folder).take_up(command)) is not None:
            yield found, True
        journal = Journal(self.folder / f"{uuid.uuid4().hex[:12]}.jsonl")
        task = journal.append(
            "task", text=self.task, command=command, settings=settings, identity=self.settings.identity
        )  # fmt: skip
        journal.events.append(task)
        yield journal, False


async def _run(
    front: "Front", run: _Asked, console: Console, *, json_output: bool, keep_box: bool
) -> "Ending":
    from hadal.agent import Agent
    from hadal.agent.boxed import note_box
    from hadal.agent.budget import described
    from hadal.agent.terminal import Terminal

    options = run.settings.agent
    config = options.config(run.settings.model)
    config.check(front.encoding)  # before there is a box
    terminal = None if json_output else Terminal(console)

    def watch(event: dict[str, Any]) -> None:
        if terminal is None:
            print(json.dumps(event), flush=True)  # noqa: T201 - data goes to stdout
        else:
            terminal.show(event)

    try:
        with terminal or nullcontext():
            async with run.opened(console) as (journal, box, is_new):
                if terminal is None:
                    watch({"kind": "run", "id": journal.path.stem, "journal": str(journal.path)})
                if is_new:
                    note_box(journal, box, watch)
                task = next(e["text"] for e in journal.events if e["kind"] == "task")
                async with options.toolbox(box) as toolbox:
                    agent = Agent(
                        front.backend, front.encoding, toolbox, journal, config, watch=watch
                    )
                    ending = await agent.run([task])
                    if terminal is not None and agent.trajectory.parts:
                        start = agent.trajectory.start or {}
                        fill = described(agent.trajectory.parts, start.get("window"))
                        console.print(f"context: {fill}", markup=False, style="dim")
                if not keep_box and ending.outcome != "void":
                    await box.kill()
            return ending
    finally:
        await front.backend.close()
