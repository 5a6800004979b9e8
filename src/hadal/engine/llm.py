"""The front door: many prompts in, their completions out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hadal.engine.completion import Completion
from hadal.engine.engine import Engine
from hadal.engine.engine_config import EngineConfig
from hadal.engine.launch import open_engine
from hadal.engine.sampling_params import SamplingParams
from hadal.engine.stepper import TokenBytes
from hadal.errors import ConfigError, InputError
from hadal.model import Transformer

__all__ = ["LLM"]


class LLM:
    """A model that generates.

    Args:
        model: A checkpoint's folder, or a model.
        config: How to serve; its fields can be given as keyword arguments instead.
        token_bytes: Exact bytes of a token id, for stop texts.
        device: Where a checkpoint's model runs, as torch names it. A model is where it is.
        dtype: Of its activations, as torch names it; None for what the checkpoint has.
        **settings: Fields of `EngineConfig`.

    Raises:
        ConfigError, CheckpointError: As `Engine` and `hadal.checkpoint.load`.

    Example:
        >>> from hadal.engine import LLM, SamplingParams
        >>> from hadal.model import ModelConfig, Transformer
        >>> llm = LLM(Transformer(ModelConfig.nano()), max_model_len=4096)
        >>> [done] = llm.generate([[0, 5, 7]], SamplingParams(max_tokens=4, temperature=0.0))
        >>> len(done.token_ids)
        4
    """

    def __init__(
        self,
        model: str | Path | Transformer,
        config: EngineConfig | None = None,
        *,
        token_bytes: TokenBytes | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **settings: Any,
    ) -> None:
        config = replace(config or EngineConfig(), **settings)
        if not isinstance(model, Transformer):
            self.engine = open_engine(
                model, config, device=device or "cpu", dtype=dtype, token_bytes=token_bytes
            )
            return
        if (device, dtype) != (None, None):
            raise ConfigError(
                "device and dtype are for checkpoints",
                hint="make the model in the dtype, and .to()",
            )
        self.engine = Engine(model, config, token_bytes=token_bytes)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Return one completion for each prompt, in their order.

        Args:
            prompts: Token ids.
            params: One for all, or one for each.
            progress: Show a bar on stderr.

        Raises:
            InputError: Ids or parameters that do not fit; nothing runs then.
            ContextLengthError: A prompt is too long.
        """
        each = self._params_of(prompts, params)
        added: list[str] = []
        done: dict[str, Completion] = {}
        try:
            for ids, own in zip(prompts, each, strict=True):
                added.append(self.engine.add(ids, own))
            self._drive(set(added), done, progress=progress)
        finally:
            for request_id in set(added) - done.keys():
                self.engine.cancel(request_id)
        return [done[request_id] for request_id in added]

    def _drive(self, wanted: set[str], done: dict[str, Completion], *, progress: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
            prefill = bar.add_task("prompt tokens", total=None)
            finished = bar.add_task("completions", total=len(wanted))
            seen: dict[str, tuple[int, int]] = {}
            while wanted - done.keys():
                for update in self.engine.step():
                    seen[update.request_id] = update.prefill
                    if update.completion is not None and update.request_id in wanted:
                        done[update.request_id] = update.completion
                total = sum(t for _, t in seen.values())
                bar.update(prefill, completed=sum(n for n, _ in seen.values()), total=total)
                bar.update(finished, completed=len(done))

    def _params_of(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise InputError(
                f"params: expected one, or one for each of {len(prompts)} prompts, got {len(params)}"
            )
        return list(params)
