"""What a run was asked for: kept in its journal, so that it goes on as it was begun."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

from hadal.cli.agent_options import AgentOptions, is_url
from hadal.cli.box_options import BoxOptions, absolute_image
from hadal.cli.serve import ServedOptions
from hadal.errors import ConfigError

__all__ = ["RunSettings", "model_identity"]


def model_identity(model: str) -> str:
    """Return what tells a model from another: the URL of a server, or what is in a checkpoint's folder.

    Raises:
        StorageError: The folder cannot be read.
    """
    from hadal.checkpoint import fingerprint
    from hadal.nano import named_checkpoint

    return _public(model) if is_url(model) else fingerprint(named_checkpoint(Path(model)))


def _public(url: str) -> str:
    """Return a URL without what may be secret in it: a name with a password, a query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Options of `hadal run` that a run cannot change on its way.

    Attributes:
        model, tokenizer, generation, image: As there.
        agent: What the agent may do.
        box: What the box has.
        served: How a server is asked.
    """

    model: str = "nano"
    tokenizer: str | None = None
    generation: str | None = None
    image: str = "host"
    agent: AgentOptions = field(default_factory=AgentOptions)
    box: BoxOptions = field(default_factory=BoxOptions)
    served: ServedOptions = field(default_factory=ServedOptions)

    def written(self) -> dict[str, Any]:
        """Return them as JSON, wherever they are read; without what may be secret.

        That is values of `--env` and `--mcp`, of which names are kept, and parts of a URL.
        """
        agent = replace(self.agent, mcp=_names(self.agent.mcp))
        box = replace(self.box.anywhere(), env=_names(self.box.env))
        model = self.model if self.model == "nano" else str(Path(self.model).resolve())
        whole = replace(
            self, agent=agent, box=box, image=absolute_image(self.image),
            model=_public(self.model) if is_url(self.model) else model,
            tokenizer=self.tokenizer and str(Path(self.tokenizer).resolve()),
        )  # fmt: skip
        return json.loads(json.dumps(asdict(whole)))

    @cached_property
    def identity(self) -> str:
        """What tells the model from another; a checkpoint is looked at once."""
        return model_identity(self.model)

    def command(self, task: str | None) -> str:
        """Return what two commands have in common that ask for the same, of the same model."""
        asked = [task, self.identity, str(Path.cwd()), self.written()]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def resumed(self, begun: dict[str, Any], *, has_box: bool) -> Self:
        """Return the settings that a run was begun with; what is said anew must be the same.

        An option with its default value counts as not said: a command line does not tell these apart.

        Args:
            begun: As `written` gave them.
            has_box: Whether its box was made: then values of `--env` are in it.

        Raises:
            ConfigError: Something else is asked for.
        """
        given = self.written()
        differing = _differing(given, begun, type(self)().written())
        if differing:
            raise ConfigError(
                f"the run was begun with another {', another '.join(differing)}",
                hint="go on without options: it has its own",
            )
        for option, kept, now, needed in (
            ("--mcp", begun["agent"]["mcp"], given["agent"]["mcp"], True),
            ("--env", begun["box"]["env"], given["box"]["env"], not has_box),
        ):
            if needed and now != kept:
                raise ConfigError(
                    f"the run was begun with {option} {', '.join(kept)}",
                    hint="the values are not kept, as they may be secret: give them again",
                )
        whole = _read(type(self), begun)
        return replace(
            whole, agent=replace(whole.agent, mcp=self.agent.mcp), box=replace(whole.box, env=self.box.env),
            model=self.model if is_url(self.model) else whole.model,
        )  # fmt: skip


def _names(pairs: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(text.partition("=")[0] for text in pairs)


def _differing(given: dict[str, Any], begun: dict[str, Any], default: dict[str, Any]) -> list[str]:
    """Return the names of options that are given and were other ones."""
    found: list[str] = []
    for name, value in given.items():
        if isinstance(value, dict):
            found += _differing(value, begun.get(name, default[name]), default[name])
        elif value not in (default[name], begun.get(name, default[name])):
            found.append(name)
    return found


def _read(kind: type[Any], written: dict[str, Any]) -> Any:
    """Return what was written of a dataclass."""
    made: dict[str, Any] = {}
    for part in fields(kind):
        if part.name not in written:  # of an older version
            continue
        value, own = written[part.name], getattr(kind(), part.name)
        if is_dataclass(own):
            value = _read(type(own), value)
        made[part.name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)
