"""How an image is built: a base, and steps on top of it. Read from TOML, or made in Python.

base = "debian:12"

[[step]]
run = "apt-get update && apt-get install -y git"

[[step]]
copy = "src"                 # of the recipe's own directory
to = "/app"

[[step]]
environment = { LANG = "C.UTF-8" }
working_directory = "/app"
user = "1000"
"""

import tomllib
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hadal.errors import ConfigError
from hadal.node.images.failures import image_errors

__all__ = ["Recipe", "Step"]

_KINDS = ("run", "copy_from", "settings")


class Step(BaseModel):
    """One step: a command, a copy, or settings for what comes after it and for the image.

    Attributes:
        run: Command for `/bin/sh -c`.
        copy_from: File or directory below the recipe's directory; `copy` in TOML.
        to: Where in the image it goes: the path of the copied file or directory itself.
        environment: Variables to add.
        working_directory: Where commands start.
        user: Who runs them.
        entrypoint: Put before every command of the image.
        command: What runs where nothing else is asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    run: str | None = None
    copy_from: str | None = Field(None, alias="copy")
    to: str | None = None
    environment: dict[str, str] | None = None
    working_directory: str | None = None
    user: str | None = None
    entrypoint: tuple[str, ...] | None = None
    command: tuple[str, ...] | None = None

    @property
    def settings(self) -> dict[str, object] | None:
        """What it sets, or None."""
        given = self.model_dump(exclude={"run", "copy_from", "to"}, exclude_none=True)
        return given or None

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        if sum(value is not None for value in (self.run, self.copy_from, self.settings)) != 1:
            raise ValueError("a step is either `run`, or `copy` with `to`, or settings")
        if (self.copy_from is None) != (self.to is None):
            raise ValueError("`copy` and `to` belong together")
        return self

    def __str__(self) -> str:
        if self.run is not None:
            return f"run {self.run}"
        if self.copy_from is not None:
            return f"copy {self.copy_from} to {self.to}"
        return f"set {', '.join(self.settings or {})}"


class Recipe(BaseModel):
    """A base and steps.

    Attributes:
        base: Reference of an image.
        steps: In order; `step` in TOML.
        directory: That copies are taken from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    base: str
    steps: Annotated[tuple[Step, ...], Field(alias="step")] = ()
    directory: Path = Path()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a recipe from a TOML file.

        Raises:
            ImageError: The file cannot be read.
            ConfigError: It is no recipe.
        """
        with image_errors("read a recipe"):
            text = path.read_bytes()
        try:
            content = tomllib.loads(text.decode("utf-8"))
            return cls.model_validate({"directory": path.parent} | content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{path}: {where}: {first['msg']}") from error
        except ValueError as error:  # no TOML, or not UTF-8
            raise ConfigError(f"{path}: {error}") from error
