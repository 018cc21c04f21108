"""Packed formats and their products: lossless, the same on every backend to rounding, and refused where damaged."""

from __future__ import annotations

import backends
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, KINDS, NORMS, norm_of, same_bits, weight_of

from wanda_kernels import ops, reference
from wanda_kernels.packed import pack_bitmap, pack_sparse24, validate_bitmap, validate_sparse24
from wanda_kernels.packed import weight as packed_weight
from wanda_kernels.packed.format import PADDING, bits_of, choose_format, is_24, packed_bytes
from wanda_kernels.packed.linear import PackedLinear
from wanda_kernels.packed.values import ValueType
from wanda_kernels.packed.weight import product_dtype

BACKENDS = backends.names()
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@st.composite
def sparse_weights(draw, is_24=None):
    import numpy as np

    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, cols = draw(st.integers(1, 7)), 64 * draw(st.integers(1, 6))
    dtype = draw(st.sampled_from(DTYPES))
    with np.errstate(over="ignore", invalid="ignore"):
        weight = weight_of(draw(st.sampled_from(KINDS)), rows, cols, generator).astype(np.float32)
    weight = torch.from_numpy(weight).to(dtype)
    if draw(st.booleans()) if is_24 is None else is_24:
        norm = torch.from_numpy(norm_of(draw(st.sampled_from(NORMS)), cols, generator))
        return weight.masked_fill(reference.nm_mask(weight, norm, 2, 4), 0)
    share = draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
    return weight.masked_fill(torch.from_numpy(generator.random((rows, cols)) < share), 0)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@settings(max_examples=150)
@given(weight=sparse_weights())
def test_bitmaps_are_lossless(backend, weight):
    packed = pack_bitmap(weight)
    validate_bitmap(*packed)
    assert same_bits(backends.implementation(backend, "unpack_bitmap")(*packed), weight)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@settings(max_examples=150)
@given(weight=sparse_weights(is_24=True))
def test_24_is_lossless(backend, weight):
    packed = pack_sparse24(weight)
    validate_sparse24(*packed)
    assert same_bits(backends.implementation(backend, "unpack_sparse24")(*packed), weight)


@pytest.mark.skipif(not backends.has_interpreter(), reason="no Triton that interprets its kernels here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py packs on a GPU")
@settings(max_examples=40, deadline=None)
@given(weight=sparse_weights())
def test_a_card_packs_as_the_cpu_does(weight):
    from wanda_kernels import triton

    values, bitmap, starts = pack_bitmap(weight)
    filled = torch.zeros_like(values)
    assert torch.equal(triton.pack_bitmap(bits_of(weight), starts, bits_of(filled)), bitmap)
    assert same_bits(filled, values)
    got = triton.pack_sparse24(bits_of(weight))
    if is_24(weight):
        values, indices = pack_sparse24(weight)
        assert same_bits(got[0].view(weight.dtype), values)
        assert torch.equal(got[1], indices)
    assert got[2] == int((weight.view(BITS[weight.dtype]) != 0).view(-1, 4).sum(dim=1).max())


def test_minus_zero_and_nan_payloads_are_kept():
    bits = torch.tensor([-0x8000, 0x7FA5, -1, 0x7F80] + [0] * 60, dtype=torch.int16)  # -0.0, two NaN, inf
    weight = bits.view(torch.bfloat16)[None].repeat(2, 1)
    assert same_bits(ops.unpack_bitmap(*pack_bitmap(weight)), weight)
    weight[:, 2:4] = 0
    assert same_bits(ops.unpack_sparse24(*pack_sparse24(weight)), weight)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@settings(max_examples=60)
@given(weight=sparse_weights(is_24=True), data=st.data())
def test_a_band_of_rows_is_unpacked(backend, weight, data):
    first = data.draw(st.integers(0, weight.shape[0] - 1))
    last = data.draw(st.integers(first + 1, weight.shape[0]))
    values, bitmap, starts = pack_bitmap(weight)
    band = backends.implementation(backend, "unpack_bitmap")(values, bitmap[first:last], starts[first : last + 1])
    assert same_bits(band, weight[first:last])
    values, indices = pack_sparse24(weight)
    band = backends.implementation(backend, "unpack_sparse24")(values[first:last], indices[first:last])
    assert same_bits(band, weight[first:last])


@pytest.mark.parametrize("form", ["bitmap", "2:4"])
@pytest.mark.parametrize(("dtype", "kind"), [*((dtype, None) for dtype in DTYPES), (torch.float32, ValueType(4, 0))])
@pytest.mark.parametrize("rows", [7, 33_001])  # more than a band of 8 MiB
@pytest.mark.parametrize("shape", [(40,), (2, 20), (3,), ()])
def test_a_product_by_bands_is_the_product(form, dtype, kind, rows, shape):
    """Small integers: every sum is exact, in whatever order a BLAS adds. Few tokens are filled up."""
    generator = torch.Generator().manual_seed(rows)
    dense = torch.nn.Linear(64, rows, dtype=dtype)
    for parameter in dense.parameters():
        parameter.data = torch.randint(-2, 3, parameter.shape, generator=generator).to(dtype)
    weight = dense.weight.data.masked_fill_(reference.nm_mask(dense.weight.data, torch.ones(64), 2, 4), 0)
    packed = PackedLinear.from_linear(dense, form, kind)
    x = torch.randint(-2, 3, (*shape, 64), generator=generator).to(dtype)
    expected = torch.nn.functional.linear(x, weight if kind is None else packed.unpacked(), dense.bias)
    near = {"rtol": 0, "atol": 0} if kind is None else {}
    torch.testing.assert_close(packed._product("unpack", x, packed.packed(), packed.bias), expected, **near)


@pytest.mark.parametrize("kind", [None, ValueType(8, 0)])
@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_its_own_under_autocast_and_with_gradients(kind, tokens, has_bias):
    """Neither torch's products inside in another type, nor a graph that keeps a band's memory."""
    torch.manual_seed(0)
    packed = PackedLinear.from_linear(torch.nn.Linear(64, 6), "bitmap", kind).packed()
    x, bias = torch.randn(tokens, 64), torch.randn(6) if has_bias else None

    def product(x, bias):
        return ops.bitmap_linear(x, *packed, bias) if kind is None else ops.quantized_linear(x, *packed, bias)

    expected = product(x, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product(x, bias), expected)
    found = product(x.clone().requires_grad_(), bias)
    assert torch.equal(found.detach(), expected)
    assert "Addmm" not in str(found.grad_fn)


def test_dtypes_that_differ_are_refused_for_any_number_of_tokens():
    layer = torch.nn.Linear(64, 6, dtype=torch.bfloat16)
    layer.weight.data[:, ::2] = 0
    for kind, message in ((None, "x must be"), (ValueType(8, 0), "bias must be")):
        packed = PackedLinear.from_linear(layer, "bitmap", kind)
        for tokens in (40, 1, 40):
            with pytest.raises(TypeError, match=message):
                packed(torch.randn(tokens, 64))


def test_a_first_product_in_inference_mode_leaves_what_can_be_loaded(monkeypatch):
    monkeypatch.setattr(packed_weight, "in_huge_pages", torch.clone)
    layer = PackedLinear.from_linear(torch.nn.Linear(64, 6), "bitmap")
    layer.load_state_dict(layer.state_dict())
    with torch.inference_mode():
        expected = layer(torch.ones(1, 64))
    layer.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()})
    assert torch.equal(layer(torch.ones(1, 64)), expected)


def test_products_of_many_tokens_are_in_a_type_that_the_processor_has():
    has = {torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(), torch.float32: True}
    has[torch.float16] = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    for dtype in DTYPES:
        assert product_dtype(dtype) == (dtype if has[dtype] else torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=120)
@given(data=st.data())
def test_products_against_float64(backend, data):
    """As near to float64 as the dense product of that dtype: an output is a float32 sum, rounded once."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    rows, cols = data.draw(st.sampled_from([1, 3, 63, 64, 65, 130])), 64 * data.draw(st.sampled_from([1, 2, 3, 7, 40]))
    tokens = data.draw(st.sampled_from([1, 2, 3, 4, 7, 8, 15, 16, 17, 24, 31, 32, 33]))
    dtype = data.draw(st.sampled_from(DTYPES))
    weight = torch.randn(rows, cols, generator=generator).to(dtype)
    x = torch.randn(tokens, cols, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if data.draw(st.booleans()) else None
    if data.draw(st.booleans()):
        weight.masked_fill_(reference.nm_mask(weight, torch.ones(cols), 2, 4), 0)
        got = backends.implementation(backend, "sparse24_linear")(x, *pack_sparse24(weight), bias)
    else:
        weight.masked_fill_(torch.rand(rows, cols, generator=generator) < 0.5, 0)
        got = backends.implementation(backend, "bitmap_linear")(x, *pack_bitmap(weight), bias)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().T + 1
    unit = torch.finfo(dtype).eps / 2
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= 2e-6 * size + unit * exact.abs() * 1.01).all()


@st.composite
def experts_of(draw, count: int, many: bool = True):
    """How many tokens each of some experts gets: none, few, or more than kernels multiply with packed weights."""
    return [
        draw(st.sampled_from([0, 0, 1, 1, 2, 3, 7, 8, 9, 20, *([32, 33, 40] if many else [])])) for _ in range(count)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=100)
@given(data=st.data())
def test_products_with_experts_are_those_with_each(backend, data):
    """Rows sorted by expert, and some behind the last that are nobody's."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    counts = data.draw(st.integers(1, 9).flatmap(experts_of))
    rows, cols = data.draw(st.sampled_from([1, 3, 16, 17, 65])), 64 * data.draw(st.sampled_from([1, 2, 3, 7]))
    dtype, behind = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 3))
    weight = torch.randn(len(counts) * rows, cols, generator=generator).to(dtype)
    x = torch.randn(sum(counts) + behind, cols, generator=generator).to(dtype)
    ends = torch.tensor(counts).cumsum(0).int()
    x[int(ends[-1]) :] = torch.nan
    if data.draw(st.booleans()):
        weight.masked_fill_(reference.nm_mask(weight, torch.ones(cols), 2, 4), 0)
        got = backends.implementation(backend, "sparse24_experts")(x, *pack_sparse24(weight), ends)
    else:
        weight.masked_fill_(torch.rand(weight.shape, generator=generator) < 0.5, 0)
        got = backends.implementation(backend, "bitmap_experts")(x, *pack_bitmap(weight), ends)
    assert got.dtype == dtype
    assert got.shape == (len(x), rows)
    begin = 0
    for one, end in zip(weight.view(-1, rows, cols), ends.tolist(), strict=True):
        part = x[begin:end].double()
        exact, size = part @ one.double().T, part.abs() @ one.double().abs().T + 1
        unit = torch.finfo(dtype).eps / 2
        assert ((got[begin:end].double() - exact).abs() <= 2e-6 * size + unit * exact.abs() * 1.01).all()
        begin = end
    assert bool((got[begin:] == 0).all())


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("cpu")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_products_have_the_same_bits_alone_and_for_any_number_of_threads(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([1, 0, 3, 32, 9, 0])
    weight = torch.randn(6 * 300, 192, generator=generator).to(dtype)
    weight.masked_fill_(reference.nm_mask(weight, torch.ones(192), 2, 4), 0)
    x, ends = torch.randn(45, 192, generator=generator).to(dtype), counts.cumsum(0).int()
    for form, pack in (("bitmap", pack_bitmap), ("sparse24", pack_sparse24)):
        experts = backends.implementation(backend, f"{form}_experts")
        expected = experts(x, *pack(weight), ends)
        alone = [
            backends.implementation(backend, f"{form}_linear")(part, *pack(one))
            for part, one in zip(x.split(counts.tolist()), weight.split(300), strict=True)
        ]
        assert torch.equal(torch.cat(alone), expected)
        threads = torch.get_num_threads()
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                assert torch.equal(experts(x, *pack(weight), ends), expected)
        finally:
            torch.set_num_threads(threads)


def test_what_belongs_to_experts_without_a_token_is_not_read():
    weight = torch.randn(4 * 8, 64)
    weight.masked_fill_(reference.nm_mask(weight, torch.ones(64), 2, 4), 0)
    values, bitmap, starts = pack_bitmap(weight)
    x, ends = torch.randn(3, 64), torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    expected = ops.bitmap_experts(x, values, bitmap, starts, ends)
    values[starts[16] : starts[24]] = torch.nan
    starts[17:24] = 2**30  # far outside
    assert torch.equal(ops.bitmap_experts(x, values, bitmap, starts, ends), expected)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("cpu")])
def test_the_same_bits_for_any_number_of_threads(backend):
    torch.manual_seed(0)
    weight = torch.randn(700, 192).to(torch.bfloat16)
    weight[torch.rand(700, 192) < 0.5] = 0
    packed, x = pack_bitmap(weight), torch.randn(3, 192).to(torch.bfloat16)
    expected = backends.implementation(backend, "bitmap_linear")(x, *packed)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(backends.implementation(backend, "bitmap_linear")(x, *packed), expected)
    finally:
        torch.set_num_threads(threads)


def test_shapes_of_x():
    weight = torch.randn(10, 64)
    packed = pack_bitmap(weight)
    for shape in ((64,), (2, 64), (2, 3, 64), (0, 64), (2, 0, 64), (40, 64)):
        x = torch.randn(shape)
        torch.testing.assert_close(ops.bitmap_linear(x, *packed), torch.nn.functional.linear(x, weight))
    transposed = torch.randn(64, 5).t()
    torch.testing.assert_close(ops.bitmap_linear(transposed, *packed), torch.nn.functional.linear(transposed, weight))


def test_nothing_is_read_past_the_values():
    """The values of 2:4 may end at the end of their memory, those of a bitmap 32 after the last."""
    weight = torch.randn(5, 64)
    weight.masked_fill_(reference.nm_mask(weight, torch.ones(64), 2, 4), 0)
    values, indices = pack_sparse24(weight)
    guarded = torch.full((values.numel() + 64,), torch.nan)
    guarded[: values.numel()] = values.flatten()
    x = torch.randn(1, 64)
    inside = guarded[: values.numel()].view(values.shape)
    assert torch.equal(ops.sparse24_linear(x, inside, indices), ops.sparse24_linear(x, values, indices))
    assert not ops.unpack_sparse24(inside, indices).isnan().any()
    values, bitmap, starts = pack_bitmap(weight)
    values[-PADDING:] = torch.nan  # read, never used
    assert not ops.bitmap_linear(x, values, bitmap, starts).isnan().any()
    assert not ops.unpack_bitmap(values, bitmap, starts).isnan().any()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v, b, s: (v[:-1], b, s), "keeps 192 weights, 191 are there"),
        (lambda v, b, s: (torch.cat([v, v[:1]]), b, s), "keeps 192 weights, 193 are there"),
        (lambda v, b, s: (v, b ^ 1, s), "row starts do not fit its bitmap"),
        (lambda v, b, s: (v, b, s.flip(0)), "row starts do not fit its bitmap"),
        (lambda v, b, s: (v, b, s + 1), "row starts do not fit its bitmap"),
        (lambda v, b, s: (v, b, torch.full_like(s, -(2**31))), "row starts do not fit its bitmap"),
    ],
)
def test_damaged_bitmaps_are_refused(damage, message):
    weight = torch.ones(6, 64)
    weight[:, ::2] = 0
    with pytest.raises(ValueError, match=message):
        validate_bitmap(*damage(*pack_bitmap(weight)))


def test_damaged_indices_are_refused():
    weight = torch.zeros(2, 64)
    values, indices = pack_sparse24(weight)
    for code in (0b0000, 0b0001, 0b1111, 0b0110):  # second <= first
        damaged = indices.clone()
        damaged[1, 3] = code << 4 | 0b1000
        with pytest.raises(ValueError, match="do not ascend"):
            validate_sparse24(values, damaged)


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match=r"four of its columns keep 4 weights"):
        pack_sparse24(torch.ones(2, 64))
    with pytest.raises(ValueError, match=r"C_in a multiple of 64, got \[2, 48\]"):
        pack_bitmap(torch.ones(2, 48))
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        pack_bitmap(torch.ones(2, 64, dtype=torch.float64))


def test_choice_of_a_format():
    dense = torch.randn(8, 128).to(torch.bfloat16)
    half = dense.masked_fill(torch.arange(128) % 8 < 4, 0)
    pairs = dense.masked_fill(torch.arange(128) % 2 == 0, 0)
    assert choose_format(dense) is None
    assert (choose_format(half), is_24(half)) == ("bitmap", False)
    assert (choose_format(pairs), choose_format(pairs, "bitmap")) == ("2:4", "bitmap")
    assert choose_format(half, "2:4") is None
    assert choose_format(half[:, :48]) == "bitmap"  # filled up
    assert packed_bytes(pairs, "2:4") * 16 == 9 * pairs.numel() * 2
    for form, packed in (("bitmap", pack_bitmap(half)), ("2:4", pack_sparse24(pairs))):
        size = sum(tensor.numel() * tensor.element_size() for tensor in packed)
        assert size == packed_bytes(half if form == "bitmap" else pairs, form)
    with pytest.raises(ValueError, match="format must be auto, bitmap or 2:4, got 'zip'"):
        choose_format(half, "zip")
