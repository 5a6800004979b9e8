"""Whole sequences through the model: for tests and research, not for serving."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hadal.model.transformer import Transformer

__all__ = ["logits"]


def logits(
    model: Transformer, sequences: Sequence[Sequence[int] | Tensor]
) -> list[Float[Tensor, "T V"]]:
    """Return float32 logits of every token of every sequence, without gradients.

    Raises:
        InputError, ContextLengthError: As `Transformer.forward`.

    Example:
        >>> from hadal.model import ModelConfig, Transformer, logits
        >>> first, second = logits(Transformer(ModelConfig.nano()), [[0, 5, 7], [0, 9]])
        >>> first.shape, second.shape
        (torch.Size([3, 4096]), torch.Size([2, 4096]))
    """
    rows = [torch.as_tensor(ids, device=model.device).reshape(-1) for ids in sequences]
    if not rows:
        return []
    lengths = [len(ids) for ids in rows]
    with torch.no_grad():
        flat = model(torch.cat(rows), lengths)
    return list(flat.split(lengths))
