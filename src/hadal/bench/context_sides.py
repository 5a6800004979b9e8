"""The sides of `context` that run in this environment: `python -m hadal.bench.context_sides`."""

import sys
from collections.abc import Sequence
from typing import cast, get_args

import torch

from hadal.bench.networks import NetworkName, network, network_as_stored
from hadal.bench.side import Side, serve
from hadal.engine import Engine, EngineConfig, SamplingParams
from hadal.model import Transformer

__all__ = ["EngineSide", "main"]


class EngineSide:
    """Our engine with one request, its steps as large as it makes them by default."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._engine: Engine | None = None

    def start(self, ids: Sequence[int], new: int) -> int:
        """Take a prompt; return what the engine plans for it."""
        if self._engine is not None:
            self._engine.close()
        config = EngineConfig(
            max_num_seqs=1, max_model_len=len(ids) + new + 1, prefix_caching=False
        )
        self._engine = Engine(self._model, config)
        self._engine.add(ids, SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True))
        plan = self._engine.memory
        blocks = (
            -(-(len(ids) + new) // 128) * plan.block_bytes
        )  # of all, those that this one touches
        return blocks + plan.slots + plan.scratch

    def step(self) -> tuple[int, int | None]:
        """Run one step."""
        assert self._engine is not None
        [update] = self._engine.step()
        return update.prefill[0], update.token_ids[0] if update.token_ids else None


def _side(kind: str, name: NetworkName) -> Side:
    if kind == "hadal-fp4":
        return EngineSide(network_as_stored(name))
    if kind == "hadal-bf16":
        return EngineSide(network(name, dtype=torch.bfloat16))
    model = network(name)
    if kind == "hadal-fp32":
        return EngineSide(model)
    from hadal.bench.transformers_peer import TransformersSide, load_peer

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind.removeprefix("transformers-")]
    return TransformersSide(load_peer(model, dtype))


def main() -> None:
    """Run a side: which, network, threads."""
    kind, name, threads = sys.argv[1:]
    assert name in get_args(NetworkName)
    torch.set_num_threads(int(threads))
    serve(_side(kind, cast(NetworkName, name)))


if __name__ == "__main__":
    main()
