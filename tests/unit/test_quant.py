"""Stored formats: every code, ties to even, byte layouts, exact round trips (spec 3, T10, T14)."""

import math

import pytest
import torch

from hadal.errors import InputError
from hadal.model import quant
from hadal.model.quant.fp4 import unpack_fp4
from hadal.model.quant.scales import decode_ue8m0, encode_ue8m0, power_of_two_scale

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_ue8m0_bytes_are_exponents():
    raw = torch.arange(255, dtype=torch.uint8)
    values = decode_ue8m0(raw.view(torch.float8_e8m0fnu))
    assert values.tolist() == [2.0 ** (b - 127) for b in range(255)]
    assert torch.equal(encode_ue8m0(values).view(torch.uint8), raw)


@pytest.mark.parametrize("largest", [448.0, 6.0])
def test_power_of_two_scale_is_the_smallest_that_fits(largest):
    amax = torch.cat((torch.logspace(-20, 20, 4001), largest * 2.0 ** torch.arange(-30.0, 30.0)))
    scale = power_of_two_scale(amax, largest)
    expected = torch.tensor([2.0 ** math.ceil(math.log2(a / largest)) for a in amax.double()])
    assert torch.equal(scale, expected)


def test_scale_bytes_are_never_read_as_numbers():
    """T10a: a UE8M0 byte of 127 means 1.0, not 127."""
    weight, scale = quant.quantize_fp8(torch.full((128, 128), 448.0))
    assert scale.view(torch.uint8).item() == 127
    assert quant.dequantize_fp8(weight, scale)[0, 0].item() == 448.0


def test_fp4_every_code_and_nibble_order():
    row = torch.tensor([*E2M1, *(-v for v in E2M1)] * 2).reshape(1, 32)
    packed, scale = quant.quantize_fp4(row)
    assert scale.view(torch.uint8).item() == 127
    assert packed.view(torch.uint8)[0, 0].item() == 0x10  # low nibble: even column
    assert torch.equal(unpack_fp4(packed), row)


def test_fp4_ties_go_to_the_even_code():
    """T14: vLLM's first encoder compared with <= and produced stray tokens."""
    midpoints = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    row = torch.tensor([*midpoints, *(-m for m in midpoints), *[6.0] * 18])
    values = quant.dequantize_fp4(*quant.quantize_fp4(row.reshape(1, 32)))[0]
    assert values[:7].tolist() == expected
    assert values[7:14].tolist() == [-v for v in expected]


def test_fp4_rounds_to_nearest_of_a_16_entry_table():
    x = torch.linspace(-6, 6, 32 * 500).reshape(-1, 32)
    x[:, 0] = 6.0
    table = torch.tensor([*E2M1, *(-v for v in E2M1)])
    values = quant.dequantize_fp4(*quant.quantize_fp4(x))
    best = (x.unsqueeze(-1) - table).abs().amin(-1)
    assert torch.equal((x - values).abs(), best)


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 70), (1, 1), (4, 300)])
@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.float32])
def test_fp8_blocks(shape, scale_dtype):
    weight = torch.randn(shape, generator=torch.manual_seed(0)) * 0.02
    stored, scale = quant.quantize_fp8(weight, scale_dtype=scale_dtype)
    assert stored.dtype == torch.float8_e4m3fn
    assert scale.dtype == scale_dtype
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    once = quant.dequantize_fp8(stored, scale)
    assert ((once - weight).abs() <= weight.abs() / 16 + 1e-4 * weight.abs().max()).all()
    if scale_dtype != torch.float32:
        assert torch.equal(quant.dequantize_fp8(*quant.quantize_fp8(once)), once)


def test_fp8_cast_really_casts():
    """T14: 17/16 lies between two E4M3 codes; a clamp-and-rescale would keep it."""
    x = torch.full((1, 128), 17 / 16)
    x[0, 0] = 448.0
    assert quant.round_trip_activations(x)[0, 1].item() == 1.0


def test_quantised_rounds_are_idempotent_and_exact_in_storage():
    kv = torch.randn(7, 96, generator=torch.manual_seed(1))
    packed = quant.quantize_kv_entries(kv, 32)
    values = quant.dequantize_kv_entries(packed, 96, 32)
    assert torch.equal(values, quant.round_trip_kv_entries(kv, 32))
    assert torch.equal(quant.quantize_kv_entries(values, 32), packed)
    key = quant.hadamard(torch.randn(7, 64, generator=torch.manual_seed(2)))
    packed = quant.quantize_index_keys(key)
    values = quant.dequantize_index_keys(packed)
    assert torch.equal(values, quant.round_trip_index_keys(key))
    assert torch.equal(quant.dequantize_index_keys(quant.quantize_index_keys(values)), values)


def test_published_entry_sizes():
    assert quant.kv_entry_bytes(512, 64) == 584
    assert quant.index_key_bytes(128) == 68
    packed = quant.quantize_kv_entries(torch.randn(3, 512), 64)
    assert packed.shape == (3, 584)
    assert not packed[:, -1].any()


def test_fp4_to_fp8_is_lossless_or_refused():
    weight = torch.randn(256, 256, generator=torch.manual_seed(3)) * 0.02
    packed, scale = quant.quantize_fp4(weight)
    converted = quant.dequantize_fp8(*quant.fp4_to_fp8(packed, scale))
    assert torch.equal(converted, quant.dequantize_fp4(packed, scale))
    weight[0, :32] *= 2.0**-40
    with pytest.raises(InputError, match="loses"):
        quant.fp4_to_fp8(*quant.quantize_fp4(weight))


def test_hadamard_is_the_orthogonal_sylvester_matrix():
    matrix = quant.hadamard(torch.eye(8))
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert torch.allclose(matrix, torch.kron(torch.kron(two, two), two) * 8**-0.5)
    assert torch.allclose(matrix @ matrix, torch.eye(8), atol=1e-6)
    with pytest.raises(InputError, match="power of two"):
        quant.hadamard(torch.ones(12))


@pytest.mark.parametrize(
    "fake", [quant.fake_quantize_fp4, quant.fake_quantize_fp8, quant.round_trip_activations]
)
def test_fake_quantisation_passes_the_gradient_straight(fake):
    weight = torch.randn(32, 64, generator=torch.manual_seed(4), requires_grad=True)
    out = fake(weight)
    assert not torch.equal(out, weight)
    (out * torch.arange(64.0)).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.arange(64.0).expand(32, 64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_no_format_can_hold_is_refused(bad):
    weight = torch.zeros(128, 128)
    weight[3, 4] = bad
    for quantise in (quant.quantize_fp8, quant.quantize_fp4):
        with pytest.raises(InputError, match="NaN or infinite"):
            quantise(weight)


def test_exponents_do_not_wrap():
    for scale in (2.0**-130, float("inf"), 3.0):
        with pytest.raises(InputError, match="powers of two"):
            encode_ue8m0(torch.tensor([scale]))
    with pytest.raises(InputError, match="expected float8_e8m0fnu or float32"):
        decode_ue8m0(torch.ones(2, dtype=torch.bfloat16))
    packed, _ = quant.quantize_fp4(torch.ones(128, 128))
    tiny = encode_ue8m0(torch.full((128, 4), 2.0**-125))
    values = quant.dequantize_fp8(*quant.fp4_to_fp8(packed, tiny))
    assert torch.equal(values, quant.dequantize_fp4(packed, tiny))


def test_floor_under_activation_scales():
    """Values far below it land on the subnormal grid of the floor's scale."""
    rounded = quant.round_trip_activations(torch.full((1, 128), 1e-9))
    floor_scale = 2.0 ** math.ceil(math.log2(1e-4 / 448))
    assert rounded[0, 0].item() == 2 * 2.0**-9 * floor_scale


def test_scales_of_neighbouring_blocks_are_apart():
    """A large channel takes precision from its own 64 channels, not from the next ones."""
    kv = torch.full((1, 144), 0.003)
    kv[0, 70] = 448.0
    rounded = quant.round_trip_kv_entries(kv, 16)[0]
    assert rounded[3] == torch.tensor(0.003 * 2**13).to(torch.float8_e4m3fn).float() / 2**13
    assert rounded[100] == torch.tensor(0.003).to(torch.float8_e4m3fn).float()
    assert rounded[3] != rounded[100]


def test_floors_and_partial_blocks():
    """Below the floor the scale stays; the last block of a row may be short."""
    x = torch.full((1, 160), 1e-6)
    x[0, 150] = 448.0
    rounded = quant.round_trip_kv_entries(torch.nn.functional.pad(x, (0, 16)), 16)[0]
    floor_scale = 2.0 ** math.ceil(math.log2(1e-4 / 448))
    expected = (torch.tensor(1e-6) / floor_scale).to(torch.float8_e4m3fn).float() * floor_scale
    assert rounded[0] == expected  # first two blocks of 64: the floor
    assert rounded[130] == 0.0  # third block, of 32: the scale of 448
    assert rounded[150] == 448.0
