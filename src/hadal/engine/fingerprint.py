"""A name for a model's weights, so that cached state is never used with others."""

from hashlib import blake2b

import torch

from hadal.model import Transformer

__all__ = ["fingerprint"]

_SAMPLES = 64


def fingerprint(model: Transformer) -> str:
    """Return a digest of config, dtype, precision, and samples of every tensor.

    A step of training changes nearly every weight, so samples tell two versions apart; they are not
    meant against someone who forges a checkpoint.
    """
    digest = blake2b(digest_size=16)
    digest.update(repr((model.config, str(model.dtype), model.precision)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        count = min(_SAMPLES, flat.shape[0])
        places = torch.arange(count) * (flat.shape[0] - 1) // max(count - 1, 1)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(bytes(flat[places.to(flat.device)].cpu().tolist()))
    return digest.hexdigest()
