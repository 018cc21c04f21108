"""rms_norm_sqnorm, silu_mul_sqnorm, gelu_tanh_mul_sqnorm: every backend against the reference and float64.

On the CPU outputs and sums are the reference's to the bit, and its outputs transformers'. The Triton kernels compute
the variance and the activation their own way: in float32 1e-6 of it, in 16-bit types one unit in the last place for
each rounding (their interpreter truncates to bfloat16 where a GPU rounds to nearest).
"""

from __future__ import annotations

import importlib

import backends
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, same_bits
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from wanda_kernels import ops, reference
from wanda_kernels.pruning.statistics import norm_of_sequences

BACKENDS = backends.statistics_names()
CPU = [name for name in BACKENDS if name.startswith("cpu")]
TRITON = [name for name in BACKENDS if not name.startswith("cpu")]
PRODUCTS = ("silu_mul_sqnorm", "gelu_tanh_mul_sqnorm")


@st.composite
def fused_calls(draw):
    """(operator, its arguments but for sqnorm, where sqnorm goes among them, sequences, cols)"""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sequences, tokens = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 15, 16, 17, 40, 130]))
    cols = draw(st.sampled_from([1, 2, 15, 16, 33, 64, 100, 257, 600]))
    dtype = draw(st.sampled_from(DTYPES))
    mask = torch.rand(sequences, tokens, generator=generator) < 0.7 if draw(st.booleans()) else None

    def inputs(*shape: int) -> torch.Tensor:
        x = (torch.randn(*shape, generator=generator) * 2).to(dtype)
        if mask is not None:
            x[~mask] = torch.nan  # padding may hold anything
        return x.flatten(0, 1) if draw(st.booleans()) else x

    operator = draw(st.sampled_from(["rms_norm_sqnorm", *PRODUCTS]))
    if operator == "rms_norm_sqnorm":
        weight = (torch.rand(cols, generator=generator) + 0.5).to(dtype)
        x, eps, unit_offset = inputs(sequences, tokens, cols), draw(st.sampled_from([1e-6, 1e-5])), draw(st.booleans())
        return operator, lambda sqnorm: (x, weight, eps, sqnorm, mask, unit_offset), sequences, cols
    gate, up = inputs(sequences, tokens, 2 * cols).chunk(2, dim=-1)  # rows that are not adjacent
    return operator, lambda sqnorm: (gate, up, sqnorm, mask), sequences, cols


def run(backend, call, shape):
    operator, arguments, _, _ = call
    sqnorm = torch.full(shape, 0.25)
    return backends.implementation(backend, operator)(*arguments(sqnorm)), sqnorm


@pytest.mark.parametrize("backend", CPU)
@settings(max_examples=150)
@given(call=fused_calls())
def test_same_bits_as_the_reference(backend, call):
    for shape in ((call[2], call[3]), (call[3],)):
        if len(shape) == 1 and call[1](None)[0].dim() == 2:
            continue  # a flattened x is one sequence then
        expected, expected_sqnorm = run("reference", call, shape)
        got, sqnorm = run(backend, call, shape)
        assert torch.equal(got.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
        assert got.is_contiguous()
        assert torch.equal(sqnorm, expected_sqnorm)


@pytest.mark.parametrize("backend", TRITON)
@settings(max_examples=60)
@given(call=fused_calls())
def test_triton_agrees_with_the_reference(backend, call):
    shape = (call[2], call[3])
    expected, _ = run("reference", call, shape)
    got, sqnorm = run(backend, call, shape)
    x, mask = got.float(), call[1](None)[-2 if call[0] == "rms_norm_sqnorm" else -1]
    counted = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask.view(x.shape[:-1])
    truncated = backend == "triton-interpreter" and got.dtype == torch.bfloat16
    unit = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-7}[got.dtype] * (2 if truncated else 1)
    largest = expected.float()[counted].abs().max() if counted.any() else torch.zeros(())
    error = (x - expected.float()).abs()[counted]
    assert (error <= unit * expected.float().abs()[counted] + 2e-6 * largest).all()

    # The sums are those of the very values that were returned.
    squares = x.double().square().masked_fill(~counted[..., None], 0).view(shape[0], -1, shape[1]).sum(dim=1)
    torch.testing.assert_close(sqnorm.double(), squares + 0.25, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", TRITON)
def test_triton_adds_alone(backend):
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        x = torch.randn(2, 300, 40, generator=generator).to(dtype)[..., 1:34]
        mask = torch.rand(2, 300, generator=generator) < 0.6
        exact = x.double().square().masked_fill(~mask[..., None], 0).sum(dim=1)
        x[~mask] = torch.nan
        sqnorm = torch.full((2, 33), 0.5)
        backends.implementation(backend, "add_sqnorm_")(sqnorm, x, mask)
        torch.testing.assert_close(sqnorm.double(), exact + 0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("cols", [16, 20000])
def test_triton_gives_the_same_bits_for_any_split_of_whole_sequences(backend, cols, monkeypatch):
    if backend == "triton-interpreter" and cols == 20000:  # a minute; what is wide is a matter of two numbers
        kernels, cols = importlib.import_module("wanda_kernels.triton.rms_norm_sqnorm"), 100
        monkeypatch.setattr(kernels, "WIDEST", 64)
        monkeypatch.setattr(kernels, "WIDE_BLOCK", 32)
    x = torch.randn(3, 40 if cols == 16 else 17, cols, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(cols)
    together, apart = torch.zeros(3, cols), torch.zeros(3, cols)
    rms_norm_sqnorm = backends.implementation(backend, "rms_norm_sqnorm")
    y = rms_norm_sqnorm(x, weight, 1e-6, together)
    for i in range(3):
        assert same_bits(rms_norm_sqnorm(x[i : i + 1], weight, 1e-6, apart[i : i + 1]), y[i : i + 1])
    assert same_bits(together, apart)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton-interpreter"])
@pytest.mark.parametrize("operator", ["rms_norm_sqnorm", "silu_mul_sqnorm"])
def test_error_against_float64(backend, operator):
    """262,144 tokens, float32: what the sums alone lose, against the squares of what was returned."""
    torch.manual_seed(0)
    sqnorm, exact = torch.zeros(16), torch.zeros(16, dtype=torch.float64)
    for _ in range(8):
        x = torch.randn(16, 2048, 16) * torch.linspace(0.1, 10, 16)
        second = torch.ones(16) if operator == "rms_norm_sqnorm" else torch.randn_like(x)
        arguments = (x, second, 1e-6, sqnorm) if operator == "rms_norm_sqnorm" else (x, second, sqnorm)
        y = backends.implementation(backend, operator)(*arguments)
        exact += y.double().square().sum(dim=(0, 1))
    assert ((sqnorm.double() - exact) / exact).abs().max() <= 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_rms_norm_is_that_of_transformers(kind, dtype):
    torch.manual_seed(0)
    norm = kind(576, 1e-5).to(dtype)
    norm.weight.data = torch.randn(576).to(dtype)
    x = (torch.randn(2, 50, 576) * 3).to(dtype)
    y = ops.rms_norm_sqnorm(x, norm.weight.data, 1e-5, torch.zeros(576), None, kind is Gemma2RMSNorm)
    assert same_bits(y, norm(x).detach())


@pytest.mark.parametrize("operator", ["rms_norm_sqnorm", *PRODUCTS])
def test_empty_inputs(operator):
    for shape in ((0, 4, 8), (2, 0, 8), (2, 3, 0)):
        x, sqnorm = torch.ones(shape), torch.ones(shape[0], shape[2])
        arguments = (x, torch.ones(shape[2]), 1e-6, sqnorm) if operator == "rms_norm_sqnorm" else (x, x, sqnorm)
        assert getattr(ops, operator)(*arguments).shape == shape
        assert (sqnorm == 1).all()


def test_special_values_are_rounded_as_pytorch_rounds():
    """Products over the whole range of 16-bit types: denormals, ties, overflow, signed zeros."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, -1)
        for factor in (1.0, 0.7, -1.3, 3e-3, 300.0):
            up = torch.full_like(every, factor)
            for isa in CPU:
                y = backends.implementation(isa, "silu_mul_sqnorm")(every, up, torch.zeros(every.shape[1]))
                expected = torch.nn.functional.silu(every) * up
                assert torch.equal(y.isnan(), expected.isnan())
                assert same_bits(y.nan_to_num(nan=0), expected.nan_to_num(nan=0))


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize(("sequences", "cols"), [(1, 1), (15, 33), (16, 32), (130, 40)])
def test_triton_averages_sequences_as_the_official_code_does(backend, sequences, cols):
    """To the bit: every float32 step rounded for itself, in sample order."""
    from wanda_kernels import triton

    generator = torch.Generator().manual_seed(sequences)
    sqnorm = torch.rand(sequences, cols, generator=generator) * 10.0 ** torch.randint(-40, 38, (cols,))
    sqnorm[:, -1] = torch.tensor([0.0, float("nan"), float("inf")])[sequences % 3]
    on_device = sqnorm.cuda() if backend == "cuda" else sqnorm
    got = triton.norm_of_sequences(on_device).cpu()
    assert same_bits(got.nan_to_num(nan=-1.0), reference.norm_of_sequences(sqnorm).nan_to_num(nan=-1.0))


@pytest.mark.gpu
def test_the_driver_averages_sequences_in_a_few_launches():
    sqnorm = torch.rand(128, 4096, device="cuda")
    norm_of_sequences(sqnorm)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        norm_of_sequences(sqnorm)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(kernels) <= 4
