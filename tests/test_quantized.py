"""Packed weights of 8 or 4 bits: unpacking, and products that are the reference's to the bit on every CPU backend
(those of CUDA: test_simt_quantized.py)."""

from __future__ import annotations

import ctypes
import mmap

import backends
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, same_bits
from torch import Tensor
from torch.nn.functional import linear

from wanda_kernels import ops, reference
from wanda_kernels._checks_quantized import group_of
from wanda_kernels.packed import pack_sparse24
from wanda_kernels.packed.values import ValueType, pack_kept, pack_rows, quantize
from wanda_kernels.reference.quantized import MOST_OF_X, _rounded, levels_of

BACKENDS = [name for name in backends.names() if name.startswith("cpu")]
ON_CUDA = [name for name in backends.names() if name.startswith("cuda")]  # whose products have other bits
FORMS = ("bitmap", "2:4", "dense")
KINDS = ("normal", "outliers", "zeros", "a zero group", "denormal", "tiny", "huge", "ties", "NaN", "inf", "far apart")


def packed_of(
    levels: Tensor, scales: Tensor, form: str, bits: int, kept: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(values, scales, codes, starts). ``kept`` columns of a bitmap are not those of 2:4."""
    if form == "dense":
        return pack_rows(levels, bits), scales, None, None
    if form == "2:4":
        kept = ~reference.nm_mask(levels.float(), torch.ones(levels.shape[1]), 2, 4)
    values, starts = pack_kept(levels, kept, bits)
    if form == "bitmap":
        codes = (kept.view(len(kept), -1, 8) << torch.arange(8)).sum(dim=2).to(torch.uint8)
        return values, scales, codes, starts
    codes = pack_sparse24(kept.float())[1]
    return values[:-64].view(-1, levels.shape[1] // 2), scales, codes, None


@st.composite
def weights(draw, bits=None, rows=None):
    """(values, scales, codes, starts, bits)."""
    bits = bits or draw(st.sampled_from([8, 4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = rows or draw(st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 33]))
    cols = 64 * draw(st.integers(1, 10))
    group = draw(st.sampled_from([0, 32, 64, 128]))
    form = draw(st.sampled_from(FORMS))
    weight = torch.randn(rows, cols, generator=generator) * torch.rand(rows, 1, generator=generator)
    if draw(st.booleans()):
        levels, scales = quantize(weight, ValueType(bits, group))
    else:  # of all bytes, with the scales of a damaged file
        most = 1 << (bits - 1)
        levels = torch.randint(-most, most, (rows, cols), generator=generator).to(torch.int8)
        scales = torch.randn(rows, ValueType(bits, group).scales(cols), generator=generator).bfloat16()
        odd = torch.tensor([0.0, -1.0, 1e-39, 3e38, torch.inf, torch.nan])
        taken = torch.rand(scales.shape, generator=generator) < draw(st.sampled_from([0.0, 0.1]))
        chosen = odd[torch.randint(0, len(odd), scales.shape, generator=generator)].bfloat16()
        scales = torch.where(taken, chosen, scales)
    share = draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
    kept = torch.rand(rows, cols, generator=generator) >= share
    if draw(st.booleans()):
        kept[torch.rand(rows, generator=generator) < 0.4] = draw(st.booleans())  # rows of nothing, or of everything
    return *packed_of(levels, scales, form, bits, kept), bits


def tokens_of(kind: str, tokens: int, cols: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    x = torch.randn(tokens, cols, generator=generator)
    some = torch.rand(tokens, cols, generator=generator)
    if kind == "outliers":
        x = torch.where(some < 0.01, x * 50, x)
    elif kind == "zeros":
        x = torch.where(some < 0.7, -0.0, x)
    elif kind == "a zero group":
        x[:, :64] = 0
    elif kind in ("denormal", "tiny", "huge"):
        x = x * {"denormal": 1e-43, "tiny": 3e-36, "huge": 1e38}[kind]
    elif kind == "ties":
        x = torch.randint(-254, 255, (tokens, cols), generator=generator) / 2
        x[:, ::32] = 127.0
    elif kind in ("NaN", "inf"):
        x[some < 0.01] = float(kind)
    elif kind == "far apart":
        x = x * 10 ** (some * 60 - 30)
    return x.to(dtype)


def arguments(weight) -> tuple:
    values, scales, codes, starts, bits = weight
    return (values, scales, codes, starts), bits


@pytest.mark.parametrize("backend", [*BACKENDS, *ON_CUDA])
@settings(max_examples=150)
@given(weight=weights(), dtype=st.sampled_from(DTYPES))
def test_unpacking_is_the_references(backend, weight, dtype):
    got = backends.implementation(backend, "unpack_quantized")(*weight, dtype)
    assert same_numbers(got, reference.unpack_quantized(*weight, dtype))


def same_numbers(got: Tensor, expected: Tensor) -> bool:
    """Bit for bit, but for what is in a NaN."""
    nan = expected.isnan()
    return torch.equal(got.isnan(), nan) and same_bits(got.masked_fill(nan, 0), expected.masked_fill(nan, 0))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=300)
@given(weight=weights(), data=st.data())
def test_products_are_the_references(backend, weight, data):
    packed, bits = arguments(weight)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    cols = packed[0].shape[1] if packed[2] is None else packed[2].shape[1] * 8
    tokens, dtype = data.draw(st.sampled_from([1, 1, 2, 3, 4, 5, 8, 31, 32])), data.draw(st.sampled_from(DTYPES))
    x = tokens_of(data.draw(st.sampled_from(KINDS)), tokens, cols, dtype, generator)
    bias = torch.randn(len(packed[1]), generator=generator).to(dtype) if data.draw(st.booleans()) else None
    got = backends.implementation(backend, "quantized_linear")(x, *packed, bias, bits)
    assert got.dtype == dtype
    assert same_numbers(got, reference.quantized_linear(x, *packed, bias, bits))


def check_near(got: Tensor, x: Tensor, packed: tuple[Tensor, ...], bits: int, bias: Tensor | None) -> None:
    """That ``got`` is the product of the rounded x and weight, but for the rounding of float32 sums and of y."""
    levels = levels_of(*packed, bits).double()
    group = group_of(levels.shape[1], packed[1].shape[1])
    whole, x_scales = _rounded(x, group, MOST_OF_X[bits])

    def scaled(values: Tensor, factors: Tensor) -> Tensor:
        return values * factors.double().repeat_interleave(group, dim=1)[:, : values.shape[1]]

    inputs, weight = scaled(whole.double(), x_scales), scaled(levels, packed[1])
    exact = inputs @ weight.T + (0 if bias is None else bias.double())
    size = inputs.abs() @ weight.abs().T + exact.abs()
    factors = (x_scales.double()[:, None] * packed[1].double()).amax(dim=2)
    fits = 2 * (size + factors) < torch.finfo(torch.float32).max  # or float32 sums may overflow on the way
    limits = torch.finfo(got.dtype)
    allowed = 2e-6 * size + limits.eps / 2 * 1.01 * exact.abs() + limits.smallest_normal * limits.eps
    # A scale of x times a tiny one of the weight may be a denormal, of steps of 2^-149: rounded, perhaps twice.
    allowed += 2.0**-149 * (whole.double().abs() @ levels.abs().T)
    is_near = ((got.double() - exact).abs() <= allowed) | (exact.abs() >= limits.max) & got.isinf()
    assert bool((is_near | ~fits).all())
    assert bool(got[exact.isnan()].isnan().all()) or not bool(packed[1].isfinite().all())


@pytest.mark.parametrize("backend", ON_CUDA)
@settings(max_examples=60)
@given(weight=weights(), data=st.data())
def test_products_on_cuda_are_near(backend, weight, data):
    packed, bits = arguments(weight)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    cols = packed[0].shape[1] if packed[2] is None else packed[2].shape[1] * 8
    tokens, dtype = data.draw(st.sampled_from([1, 2, 5, 8, 16])), data.draw(st.sampled_from(DTYPES))
    x = tokens_of(data.draw(st.sampled_from(KINDS)), tokens, cols, dtype, generator)
    bias = torch.randn(len(packed[1]), generator=generator).to(dtype) if data.draw(st.booleans()) else None
    check_near(backends.implementation(backend, "quantized_linear")(x, *packed, bias, bits), x, packed, bits, bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("cols", [11008, 28672])
def test_sums_of_wide_rows_are_exact(backend, form, bits, cols):
    """Of the largest values: the sums of 8 bits are past 2^31."""
    levels = torch.full((3, cols), -128 if bits == 8 else -8, dtype=torch.int8)
    levels[1] = -levels[0] - 1
    packed = packed_of(levels, torch.ones(3, 1).bfloat16(), form, bits, torch.ones(3, cols).bool())
    x = torch.full((2, cols), 3.0)
    x[1, ::2] = -2.9
    got = backends.implementation(backend, "quantized_linear")(x, *packed, None, bits)
    assert same_bits(got, reference.quantized_linear(x, *packed, None, bits))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_scale_there_is(backend, bits):
    """Negative, denormal, too large for a product, NaN: a set may go another way for those that are usual."""
    some = (*range(0, 0x400, 5), *range(0x400, 0x7A00, 97), *range(0x7A00, 0x8000, 5))
    scales = torch.tensor([*some, *(bits - 0x8000 for bits in some)], dtype=torch.int16).view(torch.bfloat16)[:, None]
    most = {8: 127, 4: 7}[bits]
    levels = torch.tensor([-most - 1, -most, -3, -1, 0, 1, 2, most]).to(torch.int8).repeat(len(scales), 8)
    kept = torch.rand(levels.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = packed_of(levels, scales, "bitmap", bits, kept)
    for dtype in DTYPES:
        got = backends.implementation(backend, "unpack_quantized")(*packed, bits, dtype)
        assert same_numbers(got, reference.unpack_quantized(*packed, bits, dtype))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@settings(max_examples=60)
@given(weight=weights(), data=st.data())
def test_many_tokens_take_the_unpacked_weight(backend, weight, data):
    packed, bits = arguments(weight)
    dtype = data.draw(st.sampled_from(DTYPES))
    dense = reference.unpack_quantized(*packed, bits, dtype)
    x, bias = torch.randn(40, dense.shape[1]).to(dtype), torch.randn(len(dense)).to(dtype)
    for added in (None, bias):
        got = backends.implementation(backend, "quantized_linear")(x, *packed, added, bits)
        expected = linear(x.float(), dense.float(), None if added is None else added.float())
        # Sums cancel: each output may be off by a rounding of the largest. Torch's own product of 16 bits may add in
        # them, ours is in float32 where the processor has no such product.
        largest = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else torch.tensor(0.0)
        near = {"rtol": 4 * torch.finfo(dtype).eps, "atol": float(largest) * torch.finfo(dtype).eps + 1e-37}
        torch.testing.assert_close(got, expected.to(dtype), equal_nan=True, **near)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_many_tokens_of_an_expert_take_its_unpacked_weight(backend):
    """Small integers and scales that are powers of two: sums are exact, unless x was rounded."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(-7, 8, (3 * 6, 64), generator=generator).to(torch.int8)
    scales = torch.full((3 * 6, 1), 0.5, dtype=torch.bfloat16)
    x, ends = torch.randint(-99, 100, (42, 64), generator=generator).float(), torch.tensor([1, 1, 41]).int()
    x[1:] += 2.0**-10
    for bits in (8, 4):
        packed = packed_of(levels, scales, "bitmap", bits, torch.rand(18, 64, generator=generator) < 0.5)
        dense = reference.unpack_quantized(*packed, bits, torch.float32)
        got = backends.implementation(backend, "quantized_experts")(x, *packed[:2], ends, *packed[2:], bits)
        assert torch.equal(got[1:41], x[1:41] @ dense[12:].T)
        assert not got[41:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=100)
@given(data=st.data())
def test_products_with_experts_are_the_references(backend, data):
    """Rows sorted by expert, and some behind the last that are nobody's."""
    counts = data.draw(st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 5, 9, 32]), min_size=1, max_size=5))
    rows, bits = data.draw(st.sampled_from([2, 6, 8, 18])), data.draw(st.sampled_from([8, 4]))
    packed, bits = arguments(data.draw(weights(bits, len(counts) * rows)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    cols = packed[0].shape[1] if packed[2] is None else packed[2].shape[1] * 8
    dtype = data.draw(st.sampled_from(DTYPES))
    x = torch.randn(sum(counts) + data.draw(st.integers(0, 2)), cols, generator=generator).to(dtype)
    ends = torch.tensor(counts).cumsum(0).int()
    x[int(ends[-1]) :] = torch.nan
    got = backends.implementation(backend, "quantized_experts")(x, *packed[:2], ends, *packed[2:], bits)
    assert same_numbers(got, reference.quantized_experts(x, *packed[:2], ends, *packed[2:], bits))


@pytest.mark.parametrize("bits", [8, 4])
def test_an_experts_many_tokens_take_the_unpacked_weight(bits):
    levels, scales = quantize(torch.randn(12, 128), ValueType(bits, 64))
    packed = packed_of(levels, scales, "bitmap", bits, torch.rand(12, 128) < 0.5)
    x, ends = torch.randn(43, 128), torch.tensor([2, 42]).int()
    got = ops.quantized_experts(x, *packed[:2], ends, *packed[2:], bits)
    dense = reference.unpack_quantized(*packed, bits, torch.float32)
    torch.testing.assert_close(got[2:42], x[2:42] @ dense[6:].T)
    assert bool((got[42] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("form", FORMS)
def test_products_have_the_same_bits_for_any_number_of_threads(backend, bits, form):
    levels, scales = quantize(torch.randn(1003, 192), ValueType(bits, 64))
    packed, x = packed_of(levels, scales, form, bits, torch.rand(1003, 192) < 0.5), torch.randn(9, 192)
    product = backends.implementation(backend, "quantized_linear")
    expected = reference.quantized_linear(x, *packed, None, bits)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(product(x, *packed, None, bits), expected)
    finally:
        torch.set_num_threads(threads)


def test_shapes_of_x():
    levels, scales = quantize(torch.randn(10, 64), ValueType(8, 0))
    packed = packed_of(levels, scales, "bitmap", 8, torch.rand(10, 64) < 0.5)
    dense = reference.unpack_quantized(*packed, 8, torch.float32)
    for shape in ((64,), (2, 64), (2, 3, 64), (0, 64), (2, 0, 64), (40, 64)):
        x = torch.randn(shape)
        torch.testing.assert_close(ops.quantized_linear(x, *packed), linear(x, dense), rtol=1e-3, atol=1e-3)
    transposed = torch.randn(64, 5).t()
    expected = ops.quantized_linear(transposed.contiguous(), *packed)
    assert torch.equal(ops.quantized_linear(transposed, *packed), expected)


class AtTheEnd:
    """Copies of tensors that end where a page begins that nobody may read."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._maps: list[tuple[mmap.mmap, int, int]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
        before = -(-size // page) * page
        memory = mmap.mmap(-1, before + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=before - size)
        copy = copy.view(tensor.shape).copy_(tensor)
        assert self._libc.mprotect(ctypes.c_void_p(address + before), ctypes.c_size_t(page), 0) == 0
        self._maps.append((memory, address + before, page))  # they stay: tensors point into them
        return copy


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 13])
def test_nothing_is_read_past_the_tensors(backend, bits, form, rows):
    """Values of a bitmap end 64 bytes after the last one, all else with its last element."""
    at_the_end = AtTheEnd()
    for cols in (64, 576):
        for group in (0, 32, 128):
            levels, scales = quantize(torch.randn(rows, cols), ValueType(bits, group))
            kept = torch.rand(rows, cols) < 0.5
            kept[-1] = rows % 2 == 0  # the last row keeps all, or none
            packed = packed_of(levels, scales, form, bits, kept)
            guarded = tuple(None if part is None else at_the_end(part) for part in packed)
            for tokens in (1, 2, 4):
                x = torch.randn(tokens, cols).bfloat16()
                got = backends.implementation(backend, "quantized_linear")(at_the_end(x), *guarded, None, bits)
                assert torch.equal(got, reference.quantized_linear(x, *packed, None, bits))
            dense = backends.implementation(backend, "unpack_quantized")(*guarded, bits, torch.float16)
            assert torch.equal(dense, reference.unpack_quantized(*packed, bits, torch.float16))


@pytest.mark.parametrize("bits", [8, 4])
def test_padding_is_never_used(bits):
    levels, scales = quantize(torch.randn(5, 64), ValueType(bits, 32))
    packed = packed_of(levels, scales, "bitmap", bits, torch.rand(5, 64) < 0.5)
    x = torch.randn(1, 64)
    expected = ops.quantized_linear(x, *packed, None, bits)
    packed[0][-64:] = 255
    assert torch.equal(ops.quantized_linear(x, *packed, None, bits), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_products_are_near_the_dense_ones(bits):
    """The rounding of x is far below that of the weights: 16 bits beside 8, 8 beside 4 for each group."""
    generator = torch.Generator().manual_seed(0)
    levels, scales = quantize(torch.randn(64, 1024, generator=generator), ValueType(bits, 128))
    packed = packed_of(levels, scales, "bitmap", bits, torch.rand(64, 1024, generator=generator) < 0.5)
    x = torch.randn(4, 1024, generator=generator)
    exact = x.double() @ reference.unpack_quantized(*packed, bits, torch.float32).double().T
    error = (ops.quantized_linear(x, *packed, None, bits) - exact).norm() / exact.norm()
    assert error < (1e-4 if bits == 8 else 1e-2)


def test_flushed_denormals_change_nothing():
    levels, scales = quantize(torch.randn(4, 64) * 1e-38, ValueType(8, 0))
    packed, x = packed_of(levels, scales, "dense", 8), torch.randn(1, 64)
    expected = ops.quantized_linear(x, *packed)
    assert bool((expected != 0).any())
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor flushes no denormals")
        got = ops.quantized_linear(x, *packed)
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(got, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.zeros(3, 64)}, TypeError, "values must be (torch.)?(uint8|Byte)"),
        ({"scales": torch.ones(3, 1)}, TypeError, "scales must be (torch.)?bfloat16"),
        ({"scales": torch.ones(3, 5).bfloat16()}, ValueError, "scales must be for 32, 64, 128 or all of the 128"),
        ({"scales": torch.ones(0, 1).bfloat16()}, ValueError, r"scales must be contiguous \[C_out, groups\]"),
        ({"bits": 3}, ValueError, "bits must be 8 or 4, got 3"),
        ({"starts": torch.zeros(4).int()}, ValueError, "starts must be None without codes"),
        ({"values": torch.zeros(3, 96).byte()}, ValueError, "a multiple of 64, got"),
        ({"values": torch.zeros(2, 128).byte()}, ValueError, r"values must be contiguous \[3, 128\], got \[2, 128\]"),
        ({"codes": torch.zeros(3, 12).byte()}, ValueError, "C_in a multiple of 64, got"),
        ({"codes": torch.zeros(3, 16).byte()}, ValueError, r"values must be contiguous \[3, 64\], got \[3, 128\]"),
        ({"x": torch.zeros(2, 64)}, ValueError, r"x must be \[\.\., 128\], got \[2, 64\]"),
        ({"x": torch.zeros(2, 128).double()}, TypeError, "x must be float32, bfloat16 or float16"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must be \[3\], got \[2\]"),
        ({"bias": torch.zeros(3).half()}, TypeError, "bias must be .*as x is"),
        ({"values": torch.zeros(3, 64 + (1 << 20)).byte()}, ValueError, "at most 1048576 columns, got 1048640"),
    ],
)
@pytest.mark.parametrize("of", [ops, reference])
def test_what_is_refused(of, change, error, message):
    given = {
        "x": torch.zeros(2, 128), "values": torch.zeros(3, 128).byte(), "scales": torch.ones(3, 1).bfloat16(),
        "codes": None, "starts": None, "bias": None, "bits": 8,
    }  # fmt: skip
    with pytest.raises(error, match=rf"wanda::quantized_linear: .*{message}"):
        of.quantized_linear(**{**given, **change})
