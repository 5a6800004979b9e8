"""A record of every step, from which any of them can be run again alone.

JSON Lines: a header that names the model and the settings; `add` and `cancel` with what was asked; one
`step` each with the requests that ran, how many tokens from where, their blocks, and what was chosen.
Because a token depends on ids, parameters, seed and position alone, a step needs no other step to be
repeated: its requests are brought to where they were, and the step is run.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from hadal.engine.fingerprint import fingerprint
from hadal.engine.sampler import History, sample
from hadal.engine.sampling_params import SamplingParams
from hadal.errors import StorageError
from hadal.model import Transformer

__all__ = ["Replayed", "StepLog", "read_steps", "replay_step"]

_PLAIN = (
    "max_tokens min_tokens temperature top_p top_k min_p presence_penalty frequency_penalty "
    "repetition_penalty stop stop_token_ids ignore_eos"
).split()


class StepLog:
    """Writes the record. Lines are complete when they are written; nothing is held back.

    Args:
        path: File to append to.
        header: What the run depends on.

    Raises:
        StorageError: The file cannot be written.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            handle = os.open(path, flags, 0o600)  # it holds prompts
            self._file: TextIO = os.fdopen(handle, "a", encoding="utf-8", buffering=1)
        except OSError as err:
            raise StorageError(f"{path}: cannot write the step log: {err.strerror}") from err
        self.write("start", **header)

    def write(self, kind: str, **fields: Any) -> None:
        """Append a line.

        Raises:
            StorageError: It cannot be written.
        """
        try:
            self._file.write(json.dumps({"kind": kind, **fields}) + "\n")
        except OSError as err:
            raise StorageError(f"{self._path}: cannot write the step log: {err.strerror}") from err

    def add(self, request_id: str, ids: list[int], seed: int, params: SamplingParams) -> None:
        """Record a request."""
        plain = {name: getattr(params, name) for name in _PLAIN}
        bias = {str(token): value for token, value in params.logit_bias.items()}
        constrained = params.constraint is not None
        self.write(
            "add",
            id=request_id,
            ids=ids,
            seed=seed,
            params=plain | {"logit_bias": bias},
            constrained=constrained,
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass
class _Live:
    """A request as far as the log has been read."""

    ids: list[int]
    prompt_tokens: int
    seed: int
    params: SamplingParams
    constrained: bool
    history: History = field(default_factory=History)


@dataclass(frozen=True)
class Replayed:
    """A step that was run again.

    Attributes:
        step: Its number.
        recorded: New tokens of each request as they were recorded.
        repeated: As they came out now; None for a request held to a grammar, which is not recorded.
    """

    step: int
    recorded: dict[str, list[int]]
    repeated: dict[str, list[int] | None]

    @property
    def equal(self) -> bool:
        """Return whether everything that was repeated came out the same."""
        return all(new in (None, self.recorded[key]) for key, new in self.repeated.items())


def read_steps(path: Path) -> Iterator[dict[str, Any]]:
    """Return the lines of a log; a last one that was cut off is left out.

    Raises:
        StorageError: It cannot be read, or a line within is not what was written.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as err:
        raise StorageError(f"{path}: cannot read the step log: {err.strerror}") from err
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except ValueError:
            if number == len(lines):
                return
            raise StorageError(f"{path}: line {number} is damaged") from None


def replay_step(path: Path, model: Transformer, step: int) -> Replayed:
    """Run one recorded step again, alone.

    Raises:
        StorageError: The log has no such step, or is of another model.
    """
    live: dict[str, _Live] = {}
    for line in read_steps(path):
        if line["kind"] == "start" and line["model"] != fingerprint(model):
            raise StorageError(
                f"{path}: the log is of another model", hint="load the weights it names"
            )
        if line["kind"] == "add":
            live[line["id"]] = _request(line)
        elif line["kind"] == "step":
            if line["step"] == step:
                return _repeat(model, line, live)
            _advance(line, live)
    raise StorageError(f"{path}: there is no step {step}")


def _request(line: dict[str, Any]) -> _Live:
    stored = dict(line["params"])
    bias = {int(token): value for token, value in stored.pop("logit_bias").items()}
    params = replace(SamplingParams(logit_bias=bias), **stored)
    ids = list(line["ids"])
    return _Live(ids, len(ids), line["seed"], params, line["constrained"], History(frozenset(ids)))


def _advance(line: dict[str, Any], live: dict[str, _Live]) -> None:
    for work in line["work"]:
        request = live[work["id"]]
        for token in work["tokens"]:
            request.ids.append(token)
            request.history.add(token)


def _repeat(model: Transformer, line: dict[str, Any], live: dict[str, _Live]) -> Replayed:
    """Bring every request of a step to where it was, then run the step as one ragged batch."""
    caches, ids, lengths = [], [], []
    for work in line["work"]:
        request, cache = live[work["id"]], model.new_cache()
        before = request.ids[: work["start"]]
        with torch.inference_mode():
            for chunk in torch.tensor(before, dtype=torch.int64).split(512):
                if chunk.numel():
                    model.streams(chunk.to(model.device), [chunk.numel()], [cache])
        known = request.ids[work["start"] : work["start"] + work["run"]]
        ids += [*known, *work["drafts"]]
        lengths.append(len(known) + len(work["drafts"]))
        caches.append(cache)
    with torch.inference_mode():
        ids_T = torch.tensor(ids, dtype=torch.int64, device=model.device)
        parts = model(ids_T, lengths, caches).split(lengths)
    repeated = {
        work["id"]: _choose(work, live[work["id"]], logits, model)
        for work, logits in zip(line["work"], parts, strict=True)
    }
    return Replayed(line["step"], {w["id"]: w["tokens"] for w in line["work"]}, repeated)


def _choose(
    work: dict[str, Any], request: _Live, logits_TV: torch.Tensor, model: Transformer
) -> list[int] | None:
    if request.constrained:
        return None
    first = len(request.ids) - 1 - work["start"]
    eos = () if request.params.ignore_eos else (model.config.eos_token_id,)
    ends = (*request.params.stop_token_ids, *eos)
    chosen: list[int] = []
    for row in range(first, first + len(work["tokens"])):
        early = len(request.ids) - request.prompt_tokens < request.params.min_tokens
        token = sample(
            logits_TV[row],
            request.params,
            seed=request.seed,
            position=len(request.ids),
            history=request.history,
            forbidden=ends if early else (),
        )
        chosen.append(token)
        request.ids.append(token)
        request.history.add(token)
    return chosen
