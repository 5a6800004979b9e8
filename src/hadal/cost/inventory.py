"""Every tensor of a network, grouped by what it is for: the source of all other counts.

Mirrors the modules of `hadal.model` in numbers; tests compare the two tensor for tensor.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from hadal.config import LayerKind, ModelConfig

__all__ = ["Part", "Store", "TensorGroup", "inventory", "stored_bytes", "tensor_count"]


class Part(StrEnum):
    """What a tensor is for."""

    EMBEDDING = "embedding"
    HEAD = "head"
    ATTENTION = "attention"
    COMPRESSOR = "compressor"
    INDEXER = "indexer"
    ROUTED_EXPERTS = "routed experts"
    SHARED_EXPERT = "shared expert"
    GATE = "gate"
    MHC = "mHC"
    NORMS = "norms"
    MTP = "MTP projections"


class Store(StrEnum):
    """How a checkpoint stores a tensor; what FP8 and EXPERT mean depends on the config."""

    FP8 = "fp8"
    EXPERT = "expert"
    BF16 = "bf16"
    FP32 = "fp32"
    INT64 = "int64"


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Tensors of one shape and purpose.

    Attributes:
        count: How many there are.
        active: How many of them one token uses.
        mtp: Whether they belong to an MTP block.
        multiplied: Whether a token is multiplied with them; not so tables and biases.
    """

    part: Part
    store: Store
    shape: tuple[int, ...]
    count: int = 1
    active: int | None = None
    mtp: bool = False
    multiplied: bool = False

    @property
    def size(self) -> int:
        """Return the numbers in one tensor."""
        return math.prod(self.shape)

    @property
    def used(self) -> int:
        """Return how many tensors a token uses."""
        return self.count if self.active is None else self.active

    @property
    def is_parameter(self) -> bool:
        """Return whether it counts as parameters; the hash tables do not."""
        return self.store is not Store.INT64


def inventory(config: ModelConfig) -> list[TensorGroup]:
    """Return all tensor groups of the main model and of its MTP blocks."""
    groups = list(_top(config))
    for idx, kind in enumerate(config.layer_kinds):
        groups += _block(config, kind, hashed=idx < config.num_hash_layers, mtp=False)
    for _ in range(config.num_nextn_predict_layers):
        groups += _block(config, LayerKind.SWA, hashed=False, mtp=True)
        groups += _mtp_extras(config)
    return _merged(groups)


def _merged(groups: list[TensorGroup]) -> list[TensorGroup]:
    """Return equal groups as one, so that large networks stay short lists."""
    totals: Counter[TensorGroup] = Counter(groups)
    return [
        TensorGroup(
            part=g.part,
            store=g.store,
            shape=g.shape,
            count=g.count * times,
            active=None if g.active is None else g.active * times,
            mtp=g.mtp,
            multiplied=g.multiplied,
        )
        for g, times in totals.items()
    ]


def _collapse(c: ModelConfig, *, mtp: bool) -> Iterator[TensorGroup]:
    yield from _mhc(((c.hc_mult, c.hc_mult * c.hidden_size), (c.hc_mult,), (1,)), 1, mtp=mtp)


def _mhc(shapes: tuple[tuple[int, ...], ...], count: int, *, mtp: bool) -> Iterator[TensorGroup]:
    for shape in shapes:
        yield TensorGroup(
            part=Part.MHC,
            store=Store.FP32,
            shape=shape,
            count=count,
            mtp=mtp,
            multiplied=len(shape) == 2,
        )


def _top(c: ModelConfig) -> Iterator[TensorGroup]:
    table = (c.vocab_size, c.hidden_size)
    yield TensorGroup(part=Part.EMBEDDING, store=Store.BF16, shape=table, active=0)
    yield TensorGroup(part=Part.HEAD, store=Store.BF16, shape=table, multiplied=True)
    yield TensorGroup(part=Part.NORMS, store=Store.BF16, shape=(c.hidden_size,))
    yield from _collapse(c, mtp=False)


def _block(c: ModelConfig, kind: LayerKind, *, hashed: bool, mtp: bool) -> Iterator[TensorGroup]:
    d = c.hidden_size
    yield TensorGroup(part=Part.NORMS, store=Store.BF16, shape=(d,), count=2, mtp=mtp)
    mixing = (2 + c.hc_mult) * c.hc_mult
    yield from _mhc(((mixing, c.hc_mult * d), (mixing,), (3,)), 2, mtp=mtp)
    yield from _attention(c, mtp=mtp)
    if kind is not LayerKind.SWA:
        rate, projected = (4, 2 * c.head_dim) if kind is LayerKind.CSA else (128, c.head_dim)
        yield from _compressor(c, Part.COMPRESSOR, rate, projected, c.head_dim)
    if kind is LayerKind.CSA:
        yield from _indexer(c)
    yield from _moe(c, hashed=hashed, mtp=mtp)


def _attention(c: ModelConfig, *, mtp: bool) -> Iterator[TensorGroup]:
    d, width, latent = c.hidden_size, c.head_dim, c.q_lora_rank
    matrices = (
        (latent, d),
        (c.num_attention_heads * width, latent),
        (width, d),
        (c.o_groups * c.o_lora_rank, c.heads_per_group * width),
        (d, c.o_groups * c.o_lora_rank),
    )
    for shape in matrices:
        yield TensorGroup(
            part=Part.ATTENTION, store=Store.FP8, shape=shape, mtp=mtp, multiplied=True
        )
    yield TensorGroup(
        part=Part.ATTENTION, store=Store.FP32, shape=(c.num_attention_heads,), mtp=mtp
    )
    for shape in ((latent,), (width,)):
        yield TensorGroup(part=Part.NORMS, store=Store.BF16, shape=shape, mtp=mtp)


def _compressor(
    c: ModelConfig, part: Part, rate: int, projected: int, width: int
) -> Iterator[TensorGroup]:
    shape = (projected, c.hidden_size)
    yield TensorGroup(part=part, store=Store.BF16, shape=shape, count=2, multiplied=True)
    yield TensorGroup(part=part, store=Store.FP32, shape=(rate, projected))
    yield TensorGroup(part=Part.NORMS, store=Store.BF16, shape=(width,))


def _indexer(c: ModelConfig) -> Iterator[TensorGroup]:
    heads, width = c.index_n_heads, c.index_head_dim
    queries = (heads * width, c.q_lora_rank)
    yield TensorGroup(part=Part.INDEXER, store=Store.FP8, shape=queries, multiplied=True)
    weights = (heads, c.hidden_size)
    yield TensorGroup(part=Part.INDEXER, store=Store.BF16, shape=weights, multiplied=True)
    yield from _compressor(c, Part.INDEXER, 4, 2 * width, width)


def _moe(c: ModelConfig, *, hashed: bool, mtp: bool) -> Iterator[TensorGroup]:
    d, inner = c.hidden_size, c.moe_intermediate_size
    for shape, each in (((inner, d), 2), ((d, inner), 1)):
        yield TensorGroup(
            part=Part.ROUTED_EXPERTS,
            store=Store.EXPERT,
            shape=shape,
            count=each * c.n_routed_experts,
            active=each * c.num_experts_per_tok,
            mtp=mtp,
            multiplied=True,
        )
        yield TensorGroup(
            part=Part.SHARED_EXPERT,
            store=Store.FP8,
            shape=shape,
            count=each,
            mtp=mtp,
            multiplied=True,
        )
    gate = (c.n_routed_experts, d)
    yield TensorGroup(part=Part.GATE, store=Store.BF16, shape=gate, mtp=mtp, multiplied=True)
    if hashed:
        table = (c.vocab_size, c.num_experts_per_tok)
        yield TensorGroup(part=Part.GATE, store=Store.INT64, shape=table)
    else:
        yield TensorGroup(part=Part.GATE, store=Store.FP32, shape=(c.n_routed_experts,), mtp=mtp)


def _mtp_extras(c: ModelConfig) -> Iterator[TensorGroup]:
    d = c.hidden_size
    yield TensorGroup(
        part=Part.MTP, store=Store.FP8, shape=(d, d), count=2, mtp=True, multiplied=True
    )
    yield TensorGroup(part=Part.NORMS, store=Store.BF16, shape=(d,), count=3, mtp=True)
    yield from _collapse(c, mtp=True)


def stored_bytes(group: TensorGroup, config: ModelConfig) -> dict[str, int]:
    """Return bytes in a checkpoint by stored dtype, scales included; plain floats are BF16."""
    quantization = config.quantization_config
    store = group.store
    if quantization is None and store in (Store.FP8, Store.EXPERT):
        store = Store.BF16
    if store is Store.EXPERT and config.expert_dtype == "fp4":
        num_scales = group.size // 32
        return {"fp4": group.count * group.size // 2, "scales": group.count * num_scales}
    if store in (Store.FP8, Store.EXPERT):
        assert quantization is not None
        rows, columns = group.shape
        scale_size = 4 if quantization.scale_dtype == "float32" else 1
        num_scales = -(-rows // 128) * -(-columns // 128)
        return {
            "fp8": group.count * group.size,
            "scales": group.count * num_scales * scale_size,
        }
    width = {Store.BF16: 2, Store.FP32: 4, Store.INT64: 8}[store]
    return {store.value: group.count * group.size * width}


def tensor_count(group: TensorGroup, config: ModelConfig) -> int:
    """Return how many tensors of a checkpoint a group makes, scales included."""
    quantised = group.store in (Store.FP8, Store.EXPERT)
    return group.count * (2 if quantised and config.quantization_config is not None else 1)
