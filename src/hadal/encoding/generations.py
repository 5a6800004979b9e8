"""The generations of the format: which tags, which tokens, which words for how hard to think.

All V4 checkpoints look alike from outside; only the encoder file within a checkpoint tells them
apart. The generation is therefore named by the caller or read from that file, never guessed from
the name of a model.
"""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from hadal.encoding.tags import V4_TAGS, V41_TAGS, Tags
from hadal.errors import CheckpointError, ConfigError

__all__ = [
    "GENERATIONS",
    "Effort",
    "Generation",
    "detect_generation",
    "generation_named",
    "note_generation",
]

_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_NOTE: Final = "hadal_generation"

Effort = str | int | None
"""How hard to think: a name of the generation's table; for V4.1 also 1 to 100; None: its default."""

_ABSOLUTE_MAXIMUM: Final = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, rigorously stress-testing your logic against all potential paths, "
    "edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)
_BEYOND_MAXIMUM: Final = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: "
    "exhaustively decompose the problem into its most fundamental components, trace every causal "
    "chain to its root, and resolve the underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles "
    "and are certain that no assumption remains unchecked and no error remains undiscovered.\n\n"
)
_BUDGET: Final = (
    "Reasoning Effort: {budget} (range 1-100, the higher the value, the more thorough the "
    "reasoning)\n\n"
)


@dataclass(frozen=True, slots=True)
class Generation:
    """One version of the format.

    Attributes:
        name: What `Encoding.load` calls it.
        tags: Names of the DSML tags.
        efforts: Text before the system text for each effort; None is the default.
        has_system_token: System messages have a token, may stand anywhere, and images have a
            place (V4.1).
    """

    name: str
    tags: Tags
    efforts: Mapping[str | None, str]
    has_system_token: bool = False

    def effort_text(self, effort: Effort) -> str:
        """The text that asks for `effort` in thinking mode.

        Raises:
            ConfigError: The generation does not know this effort.
        """
        if isinstance(effort, int) and not isinstance(effort, bool) and self.has_system_token:
            if 1 <= effort <= 100:
                return _BUDGET.format(budget=effort)
        elif effort is None or isinstance(effort, str):
            text = self.efforts.get(effort)
            if text is not None:
                return text
        known = ", ".join(str(e) for e in self.efforts)
        numbers = " or an integer from 1 to 100" if self.has_system_token else ""
        raise ConfigError(
            f"unknown reasoning effort for {self.name}: expected one of {known}{numbers}, "
            f"got {effort!r}",
            hint="generations differ: v4 has high and max; v4-0731 and v4.1 have low, high, max",
        )


def _budgets(**budgets: int) -> dict[str | None, str]:
    return {name: _BUDGET.format(budget=budget) for name, budget in budgets.items()}


GENERATIONS: Final[Mapping[str, Generation]] = MappingProxyType(
    {
        g.name: g
        for g in (
            Generation("v4", V4_TAGS, {None: "", "high": "", "max": _ABSOLUTE_MAXIMUM}),
            Generation(
                "v4-0731",
                V4_TAGS,
                {None: "", "low": "", "high": _ABSOLUTE_MAXIMUM, "max": _BEYOND_MAXIMUM},
            ),
            Generation(
                "v4.1",
                V41_TAGS,
                {None: _BUDGET.format(budget=75), **_budgets(low=50, high=75, xhigh=75, max=100)},
                has_system_token=True,
            ),
        )
    }
)


def generation_named(name: str) -> Generation:
    """The generation of this name.

    Raises:
        ConfigError: There is none.
    """
    if name not in GENERATIONS:
        raise ConfigError(
            f"unknown generation of the format: expected one of {', '.join(GENERATIONS)}, "
            f"got {name!r}",
            hint="detect_generation(folder) reads it from a checkpoint's own encoder file",
        )
    return GENERATIONS[name]


def detect_generation(folder: str | Path) -> str:
    """Read the generation from the encoder file that a checkpoint carries (it is never run).

    `encoding/encoding.py` is V4.1; `encoding/encoding_dsv4.py` is V4-0731 if it assigns
    REASONING_EFFORT_PROMPTS and the original V4 if it assigns REASONING_EFFORT_MAX. Checkpoints that we
    made name it in tokenizer_config.json instead (`note_generation`).

    Raises:
        CheckpointError: There is no such file, or it defines neither.
    """
    folder = Path(folder)
    noted = _noted_generation(folder)
    if noted is not None:
        return noted
    if (folder / "encoding" / "encoding.py").is_file():
        return "v4.1"
    path = folder / "encoding" / "encoding_dsv4.py"
    hint = "name the generation: Encoding.load('v4' | 'v4-0731' | 'v4.1')"
    try:
        names = _assigned_names(ast.parse(path.read_text(encoding="utf-8")))
    except FileNotFoundError as err:
        raise CheckpointError(
            f"cannot tell the generation of {folder}: expected encoding/encoding_dsv4.py or "
            "encoding/encoding.py, found neither",
            hint=hint,
        ) from err
    except (OSError, SyntaxError, ValueError) as err:
        raise CheckpointError(f"cannot read {path}: {err}", hint=hint) from err
    if "REASONING_EFFORT_PROMPTS" in names:
        return "v4-0731"
    if "REASONING_EFFORT_MAX" in names:
        return "v4"
    raise CheckpointError(
        f"cannot tell the generation of {folder}: expected {path.name} to assign "
        "REASONING_EFFORT_PROMPTS or REASONING_EFFORT_MAX, found neither",
        hint=hint,
    )


def note_generation(folder: Path, name: str) -> None:
    """Write the generation into a checkpoint of our own.

    Raises:
        ConfigError: There is no such generation.
        OSError: It cannot be written.
    """
    generation_named(name)
    (folder / _TOKENIZER_CONFIG).write_text(json.dumps({_NOTE: name}) + "\n")


def _noted_generation(folder: Path) -> str | None:
    path = folder / _TOKENIZER_CONFIG
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as err:
        raise CheckpointError(f"cannot read {path}: {err}") from err
    name = fields.get(_NOTE) if isinstance(fields, dict) else None
    if name is not None and name not in GENERATIONS:
        raise CheckpointError(
            f"{path}: {_NOTE} is {name!r}", hint=f"there are {', '.join(GENERATIONS)}"
        )
    return name


def _assigned_names(tree: ast.Module) -> set[str]:
    targets: list[ast.expr] = []
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(node, ast.AnnAssign):
            targets.append(node.target)
    return {t.id for t in targets if isinstance(t, ast.Name)}
