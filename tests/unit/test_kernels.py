"""Kernels beside what the modules say: the same numbers up to the order of a sum, on every kind of processor."""

import dataclasses
import threading

import pytest
import torch

from hadal.checkpoint import load
from hadal.errors import ConfigError
from hadal.model import ModelConfig, Precision, Trace, kernels, mhc, quant
from hadal.model.compressor import Tail, pool_windows
from hadal.model.kernels import mixing, native, products
from hadal.model.kernels.pooling import native_pool
from hadal.nano import nano_checkpoint

needs_library = pytest.mark.skipif(
    native.library() is None, reason="installed without a C compiler"
)
pytestmark = needs_library


def levels():
    best = native.library().hadal_level() if native.library() else 0
    return [pytest.param(n, id=name) for n, name in enumerate(native.LEVELS[: best + 1])]


def stored(outer, inner, form, seed=0):
    """Return codes, scales, and the matrix that they stand for."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(outer, inner, generator=draw) * torch.rand(outer, 1, generator=draw) * 3
    if form in ("bfloat16", "float32"):
        plain = weight.to(getattr(torch, form))
        return plain, None, plain.float()
    if form == "fp4":
        codes, scale = quant.quantize_fp4(weight)
        return codes, scale, quant.dequantize_fp4(codes, scale)
    dtype = torch.float32 if form == "fp8 float" else torch.float8_e8m0fnu
    codes, scale = quant.quantize_fp8(weight, scale_dtype=dtype)
    return codes, scale, quant.dequantize_fp8(codes, scale)


SIZES = [(64, 128), (130, 200), (7, 33), (4, 16), (256, 96), (1, 1)]


@pytest.mark.parametrize("at", levels())
@pytest.mark.parametrize("form", ["fp8", "fp8 float", "fp4", "bfloat16", "float32"])
@pytest.mark.parametrize("rows", [1, 3, 4, 21, 100])
def test_products_are_those_of_the_matrix(at, form, rows):
    for outer, inner in SIZES:
        if form == "fp4" and inner % 32:
            continue
        codes, scale, weight = stored(outer, inner, form)
        x = torch.randn(rows, inner)
        for rounds in (False, True):
            given = quant.round_trip_activations(x) if rounds else x
            exact = given.double() @ weight.double().T
            y = products.native_product(x, codes, scale, rounds=rounds, at=at)
            size = given.double().abs() @ weight.double().abs().T
            assert ((y - exact).abs() <= 1e-6 * size + 1e-30).all(), (outer, inner)


@pytest.mark.parametrize("at", levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_beside_any_others(at, dtype):
    codes, scale, _ = stored(130, 96, "fp4")
    x = torch.randn(9, 96).to(dtype)
    whole = products.native_product(x, codes, scale, at=at)
    for first in range(9):
        for last in range(first + 1, 10):
            part = products.native_product(x[first:last], codes, scale, at=at)
            assert torch.equal(part, whole[first:last])


@pytest.mark.parametrize("at", levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [767, 769, 960])
def test_rows_that_share_what_is_unpacked_have_the_bits_of_few(at, dtype, rows):
    """From 768 on for two threads, parts of 192, the last of them with one row or all of them full."""
    codes, scale, _ = stored(48, 96, "fp8")
    x = torch.randn(rows, 96).to(dtype)
    whole = products.native_product(x, codes, scale, at=at)
    parts = [products.native_product(part, codes, scale, at=at) for part in x.split(17)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("at", levels())
@pytest.mark.parametrize("form", ["fp8", "fp8 float", "fp4", "bfloat16", "float32"])
@pytest.mark.parametrize("rows", [1, 2, 5, 50])
def test_products_of_bfloat16_are_rounded_once(at, form, rows):
    for outer, inner in SIZES:
        if form == "fp4" and inner % 32:
            continue
        codes, scale, weight = stored(outer, inner, form)
        x = torch.randn(rows, inner).bfloat16()
        for rounds in (False, True):
            given = quant.round_trip_activations(x.float()) if rounds else x.float()
            exact = given.double() @ weight.double().T
            y = products.native_product(x, codes, scale, rounds=rounds, at=at)
            assert y.dtype == torch.bfloat16
            size = given.double().abs() @ weight.double().abs().T
            assert ((y - exact).abs() <= 1e-6 * size + exact.abs() / 256).all(), (outer, inner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["fp8", "fp8 float", "fp4", "bfloat16", "float32"])
def test_all_vector_forms_have_the_same_bits(form, dtype):
    """Whether the processor multiplies bfloat16 or not, alone and in tiles."""
    best = native.library().hadal_level()
    if best < 2:
        pytest.skip("this processor has no AVX-512")
    for inner in (224, 200, 96):
        if form == "fp4" and inner % 32:
            continue
        codes, scale, _ = stored(66, inner, form)
        x = torch.randn(23, inner).to(dtype)
        for rows in (1, 2, 3, 23):
            expected = products.native_product(x[:rows], codes, scale, at=1)
            for at in range(2, best + 1):
                found = products.native_product(x[:rows], codes, scale, at=at)
                assert torch.equal(found, expected), (inner, rows, at)


def test_threads_change_nothing():
    codes, scale, _ = stored(2058, 96, "fp8")
    x = torch.randn(3, 96)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = products.native_product(x, codes, scale)
        grouped = products.native_product(torch.randn(3, 192), codes, scale, groups=2)
        assert grouped.shape == (3, 2058)
        torch.set_num_threads(3)
        assert torch.equal(products.native_product(x, codes, scale), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_groups_are_products_of_their_own(monkeypatch, threads):
    """Also where a tile of scales reaches from one group into the next."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    codes, scale, weight = stored(3 * 50, 40, "fp8")
    x = torch.randn(60, 3 * 40)
    y = products.native_product(x, codes, scale, groups=3)
    expected = torch.cat(
        [x[:, 40 * g : 40 * g + 40] @ weight[50 * g : 50 * g + 50].T for g in range(3)], dim=1
    )
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)


def test_inputs_are_rounded_to_the_bit():
    every = torch.cat(
        [torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()[:127]] * 2
    )
    ties = (every[1:] + every[:-1]) / 2
    values = torch.cat(
        [
            every,
            ties,
            -every,
            -ties,
            every * 1.0001,
            every * 0.9999,
            torch.tensor([1e-30, 1e-4, 3e38]),
        ]
    )
    for exponent in (-60, -9, 0, 3, 60):
        x = (values * 2.0**exponent).repeat(3)
        x = x[: x.numel() // 128 * 128].reshape(-1, 128)
        x = torch.cat(
            [x, torch.zeros(1, 128), torch.randn(40, 128) * torch.logspace(-12, 12, 40)[:, None]]
        )
        x = x[torch.isfinite(x).all(dim=1)]
        out = x.clone()
        native.library().hadal_round_rows(out.data_ptr(), x.shape[0], 128, 128)
        assert torch.equal(out, quant.round_trip_activations(x))


def test_every_code_is_unpacked_as_it_is_read_elsewhere():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(1, 1)
    codes = codes[:, ~codes.float().isnan()[0]][:, :240]
    scale = torch.full((1, 2), 130, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    fp4 = torch.arange(256, dtype=torch.uint8).view(torch.int8)[None, :128]
    fp4_scale = torch.arange(60, 196, 17, dtype=torch.uint8)[None].view(torch.float8_e8m0fnu)
    for at in range(native.library().hadal_level() + 1):
        for dtype in (torch.float32, torch.bfloat16):
            for given, matrix, plain in (
                (codes, scale, quant.dequantize_fp8(codes, scale)),
                (fp4, fp4_scale, quant.dequantize_fp4(fp4, fp4_scale)),
            ):
                rows = torch.eye(plain.shape[1], dtype=dtype)
                got = [products.native_product(row[None], given, matrix, at=at) for row in rows]
                assert torch.equal(torch.cat(got, dim=1), plain.to(dtype))


@pytest.mark.parametrize("at", levels())
@pytest.mark.parametrize("exponent", [7, 8, 245, 246])
def test_scales_at_the_ends_of_what_bfloat16_holds(at, exponent):
    """Codes that stay normal numbers with them, up to 448 x 2^119; tables and exponents by bits do for some only."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    codes = codes[:, codes[0].float().abs() >= 2.0**-6]
    scale = torch.full((1, 2), exponent, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    rows = torch.eye(codes.shape[1], dtype=torch.bfloat16)
    got = [products.native_product(row[None], codes, scale, at=at) for row in rows]
    assert torch.equal(torch.cat(got, dim=1), quant.dequantize_fp8(codes, scale).bfloat16())


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, float("inf")])
def test_one_row_by_any_codes_of_fp8_is_the_same_in_every_vector_form(size):
    """Normal numbers, denormal ones and NaN, scales from the least to the largest, and inputs that fit and do not."""
    draw = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 256, (512, 256), generator=draw, dtype=torch.uint8)
    codes[:384][codes[:384] & 0x7F == 0x7F] = 0x05  # NaN in the last tile only
    codes[:128][codes[:128] & 0x7F < 8] = 0x31
    scale = torch.tensor([[127, 120], [10, 250], [127, 28], [127, 0]], dtype=torch.uint8)
    x = torch.randn(2, 256, generator=draw).to(torch.bfloat16)
    x[0, 3] *= size
    given = codes.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)
    best = native.library().hadal_level()
    found = [products.native_product(x[:1], *given, rounds=False, at=n) for n in range(1, best + 1)]
    beside = products.native_product(x.repeat(3, 1), *given, rounds=False)
    for y in found:
        assert torch.equal(y.isnan(), found[0].isnan())
        assert torch.equal(y.nan_to_num(), found[0].nan_to_num())
        assert torch.equal(y.nan_to_num(), beside[:1].nan_to_num())
    assert found[0][0, 384:].isnan().any()


def test_what_is_no_number_stays_none():
    codes, scale, _ = stored(8, 128, "fp8")
    bad = codes.view(torch.uint8).clone()
    bad[3, 5] = 0x7F
    for at in range(native.library().hadal_level() + 1):
        for dtype in (torch.float32, torch.bfloat16):
            ones = torch.ones(1, 128, dtype=dtype)
            y = products.native_product(ones, bad.view(torch.float8_e4m3fn), scale, at=at)
            assert y.isnan().tolist() == [[n == 3 for n in range(8)]]
    x = torch.ones(2, 128)
    x[1, 7] = torch.nan
    y = products.native_product(x, codes, scale, rounds=True)
    assert y[1].isnan().all()
    assert not y[0].isnan().any()


def site(streams=4, width=72, seed=0, dtype=torch.float32):
    """Return streams of some rows, an output, and the parameters of a site."""
    draw = torch.Generator().manual_seed(seed)
    mixing = (2 + streams) * streams
    fn = torch.randn(mixing, streams * width, generator=draw) / 8
    base, scale = torch.randn(mixing, generator=draw), torch.rand(3, generator=draw) + 0.5
    rows = torch.randn(9, streams, width, generator=draw).to(dtype) * 3
    return rows, torch.randn(9, width, generator=draw).to(dtype), (fn, base, scale)


@pytest.mark.parametrize("at", levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("streams", "width"), [(4, 72), (4, 128), (2, 5), (1, 16)])
def test_streams_are_mixed_as_the_module_mixes_them(at, dtype, streams, width):
    config = dataclasses.replace(ModelConfig.nano(), hc_mult=streams, hidden_size=width)
    rows, output, parameters = site(streams, width, dtype=dtype)
    expected = mhc.mixture(rows, *parameters, config)
    x, mix = mixing.mhc_read(rows, *parameters, config, at=at)
    pre, post, comb = mix.split((streams, streams, streams * streams), dim=1)
    close = {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(pre, expected.pre_TM, **close)
    torch.testing.assert_close(post, expected.post_TM, **close)
    torch.testing.assert_close(comb, expected.comb_TMM.flatten(1), **close)
    within = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-2}
    )
    torch.testing.assert_close(x, mhc.read(rows, expected), **within)
    new = mixing.mhc_write(rows, output, mix, at=at)
    torch.testing.assert_close(new, mhc.write(rows, output, expected, in_float32=True), **within)


def test_mixtures_have_the_same_bits_in_every_vector_form_and_beside_any_others():
    rows, output, parameters = site(dtype=torch.bfloat16)
    config = dataclasses.replace(ModelConfig.nano(), hidden_size=72)
    found = []
    for at in range(native.library().hadal_level() + 1):
        x, mix = mixing.mhc_read(rows, *parameters, config, at=at)
        found.append((x, mix, mixing.mhc_write(rows, output, mix, at=at)))
        alone = [mixing.mhc_read(rows[n : n + 1], *parameters, config, at=at) for n in range(9)]
        assert torch.equal(torch.cat([x for x, _ in alone]), x)
        assert torch.equal(torch.cat([mix for _, mix in alone]), mix)
    for other in found[2:]:
        assert all(torch.equal(a, b) for a, b in zip(found[1], other, strict=True))


def test_mixtures_with_gradients_have_no_kernel():
    rows, _, (fn, base, scale) = site()
    config = dataclasses.replace(ModelConfig.nano(), hidden_size=72)
    assert mixing.mhc_read(rows.requires_grad_(), fn, base, scale, config) is None
    assert mixing.mhc_read(rows.detach(), fn.requires_grad_(), base, scale, config) is None
    assert mixing.mhc_read(rows.detach().double(), fn.detach(), base, scale, config) is None


def test_more_streams_than_the_kernel_takes_have_none():
    for streams in (mixing.MOST_STREAMS, mixing.MOST_STREAMS + 1):
        config = dataclasses.replace(ModelConfig.nano(), hc_mult=streams, hidden_size=16)
        rows, _, parameters = site(streams, 16)
        expected = mhc.mixture(rows, *parameters, config)
        found = mixing.mhc_read(rows, *parameters, config)
        assert (found is None) == (streams > mixing.MOST_STREAMS)
        if found is not None:
            comb = found[1][:, 2 * streams :]
            torch.testing.assert_close(comb, expected.comb_TMM.flatten(1), rtol=1e-4, atol=1e-5)


def test_what_has_no_kernel():
    codes, scale, _ = stored(8, 128, "fp8")
    for x in (torch.randn(2, 128, dtype=torch.float64), torch.randn(1, 2, 128)):
        assert products.native_product(x, codes, scale) is None
    assert products.native_product(torch.randn(2, 128, requires_grad=True), codes, scale) is None
    with torch.no_grad():
        assert (
            products.native_product(torch.randn(2, 128, requires_grad=True), codes, scale)
            is not None
        )


def test_a_level_that_this_processor_has_not(monkeypatch):
    monkeypatch.setenv("HADAL_CPU_KERNELS", "avx9")
    with pytest.raises(ConfigError, match="expected plain"):
        native.level.__wrapped__()
    monkeypatch.setenv("HADAL_CPU_KERNELS", "plain")
    assert native.level.__wrapped__() == 0


def test_kernels_are_left_out_where_that_is_asked():
    seen = []
    with kernels.without_kernels():
        assert not kernels.is_on()
        other = threading.Thread(target=lambda: seen.append(kernels.is_on()))
        other.start()
        other.join()
    assert kernels.is_on()
    assert seen == [True]


@torch.no_grad()
def test_a_trained_network_says_the_same():
    """With its choices, which near-ties may turn over, and without roundings, which may go the other way."""
    model = load(nano_checkpoint(), dtype=torch.float32, precision=Precision.exact())
    ids = torch.randint(3, 2000, (400,), generator=torch.Generator().manual_seed(1))
    trace = Trace()
    with kernels.without_kernels():
        expected = model(ids, [400], trace=trace)
    found = model(ids, [400], trace=trace.replay())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    assert not torch.equal(found, expected)  # or no kernel was used


@pytest.mark.parametrize("at", levels())
@pytest.mark.parametrize(("rate", "overlap"), [(4, True), (128, False)])
def test_windows_are_pooled_as_the_modules_do(at, rate, overlap):
    width, count = 96, 5
    columns = 2 * width if overlap else width
    kv, gate = torch.randn(count * rate, columns), 5 * torch.randn(count * rate, columns)
    tail = Tail.fresh(rate, width, overlap=overlap, device=torch.device("cpu"))
    with kernels.without_kernels():
        expected = pool_windows(kv, gate, tail)
    before = (tail.previous_kv, tail.previous_gate) if overlap else None
    found = native_pool(kv, gate, before, rate, at=at)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    middle = slice(2 * rate, 3 * rate)
    own = [t[rate : 2 * rate, :width].contiguous() for t in (kv, gate)] if overlap else None
    assert torch.equal(native_pool(kv[middle], gate[middle], own, rate, at=at), found[2:3])
