"""transformers as a peer: the same weights, a prompt in chunks, greedy decoding, a `DynamicCache`.

Eager attention is the only one that it has for V4. One shot would take memory with the square of the
prompt, so prompts go in chunks.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from hadal.checkpoint import save
from hadal.model import Transformer

__all__ = ["CHUNK", "TransformersSide", "generate", "load_peer", "load_peer_from"]

CHUNK: Final = 512
"""Tokens of one call."""


def load_peer(model: Transformer, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model as transformers', through a checkpoint; in BF16 the whole module is cast."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "model", layout="huggingface")
        return load_peer_from(Path(folder) / "model", dtype)


def load_peer_from(path: Path, dtype: torch.dtype) -> Any:
    """Return the peer's model from a checkpoint in its layout."""
    from transformers import DeepseekV4ForCausalLM

    peer: Any = DeepseekV4ForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return peer.to(dtype).eval()


class TransformersSide:
    """The peer step by step (`hadal.bench.side.Side`)."""

    def __init__(self, peer: Any) -> None:
        self._peer = peer
        self._cache: Any = None
        self._pieces: list[torch.Tensor] = []
        self._done = 0

    def start(self, ids: Sequence[int], new: int) -> None:
        """Take a prompt."""
        from transformers import DynamicCache

        del new  # its cache grows by itself
        self._cache = DynamicCache(config=self._peer.config)
        self._pieces = list(torch.tensor(ids).split(CHUNK))
        self._done = 0

    @torch.no_grad()
    def step(self) -> tuple[int, int | None]:
        """Compute a chunk, or the token chosen last."""
        piece = self._pieces.pop(0)
        logits = self._peer(
            piece[None], past_key_values=self._cache, use_cache=True, logits_to_keep=1
        ).logits
        self._done += piece.shape[0]
        if self._pieces:
            return self._done, None
        token = int(logits[0, -1].argmax())
        self._pieces = [torch.tensor([token])]
        return self._done, token


def generate(peer: Any, prompt: Sequence[int], new: int) -> list[int]:
    """Return so many tokens, greedily."""
    side = TransformersSide(peer)
    side.start(prompt, new)
    out: list[int] = []
    while len(out) < new:
        _, token = side.step()
        if token is not None:
            out.append(token)
    return out
