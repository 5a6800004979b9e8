"""The sides of `context` that run in this environment: `python -m hadal.bench.context_sides`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hadal.bench.side import Side, serve
from hadal.checkpoint import load
from hadal.engine import Engine, EngineConfig, SamplingParams
from hadal.model import Precision, Transformer

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


def _side(kind: str, folder: Path) -> Side:
    """Return a side by its name in `context.py`; every form of ours computes without simulated roundings."""
    exact = Precision.exact()
    if kind == "hadal-fp4":
        return EngineSide(load(folder / "stored", dtype=torch.bfloat16, precision=exact))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind.rpartition("-")[2]]
    if kind.startswith("hadal"):
        return EngineSide(load(folder / "official", dtype=dtype, precision=exact))
    from hadal.bench.transformers_peer import TransformersSide, load_peer_from

    return TransformersSide(load_peer_from(folder / "huggingface", dtype))


def main() -> None:
    """Run a side: which, where the networks are, threads."""
    kind, folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    serve(_side(kind, Path(folder)))


if __name__ == "__main__":
    main()
