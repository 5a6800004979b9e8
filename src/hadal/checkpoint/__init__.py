"""Weights in and out: official layout and Hugging Face layout, sharded, memory-mapped.

`load(path)` gives a `Transformer`, `save(model, path)` writes one, `convert` goes from layout to
layout or format to format, one tensor at a time. `tensor_specs` lists what a checkpoint of a config
must hold, read off the modules themselves.
"""

from hadal.checkpoint.convert import convert
from hadal.checkpoint.fingerprint import fingerprint
from hadal.checkpoint.load import load
from hadal.checkpoint.save import save
from hadal.checkpoint.source import CheckpointSource
from hadal.checkpoint.specs import TensorSpec, meta_model, tensor_specs
from hadal.checkpoint.synthetic import make_random

__all__ = [
    "CheckpointSource",
    "TensorSpec",
    "convert",
    "fingerprint",
    "load",
    "make_random",
    "meta_model",
    "save",
    "tensor_specs",
]
