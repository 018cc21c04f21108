"""Products with packed weights against dense ones, at LLaMA's shapes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, linear

from benchmarks import peers
from benchmarks.harness import Case, Inputs, Settings, WrongResultError
from benchmarks.operators import Shapes, backend_of
from wanda_kernels import ops
from wanda_kernels.packed import PackedLinear, dispatch, pack_bitmap, pack_sparse24
from wanda_kernels.packed.values import ValueType, pack_kept, quantize

BATCHES = (1, 4, 16)
DENSE = [(4096, 4096), (11008, 4096), (151936, 1536)]  # the last one: Qwen2.5 1.5B's output layer
DENSE_BATCHES = (1, 4, 8)
MANY_TOKENS = (32, 64, 256)  # through PackedLinear, which chooses
PREFILL_TOKENS = (512, 2048, 8192)
PREFILL = [(rows, 4096, tokens) for rows in (4096, 11008) for tokens in PREFILL_TOKENS] + [(8192, 8192, 8192)]
PREFILL_QUICK = [(64, 512, 64)]
FORMATS: dict[str, tuple[str, Callable[..., Any], Callable[..., Tensor]]] = {
    "bitmap": ("bitmap_linear", pack_bitmap, ops.bitmap_linear),
    "2:4": ("sparse24_linear", pack_sparse24, ops.sparse24_linear),
}

# Of bitmaps, and what of llama.cpp's one would take instead
QUANTIZED = {ValueType(8, 0): "q8_0", ValueType(4, 128): "q4_K", ValueType(4, 64): "q4_K"}

EXPERTS: dict[str, tuple[str, Callable[..., Any], Callable[..., Tensor]]] = {
    "bitmap": ("bitmap_experts", pack_bitmap, lambda *inputs: ops.bitmap_experts(*inputs)),
    "2:4": ("sparse24_experts", pack_sparse24, lambda *inputs: ops.sparse24_experts(*inputs)),
    "bitmap int4": (
        "quantized_experts",
        lambda weight: _pack_quantized(weight, ValueType(4, 128)),
        lambda x, values, scales, codes, starts, ends: ops.quantized_experts(x, values, scales, ends, codes, starts, 4),
    ),
}


def sparse(settings: Settings, shapes: Shapes) -> Iterator[Case]:
    """bfloat16, half of the weights kept (2:4 in both formats), and what stays dense."""
    on_cpu = settings.device.type == "cpu"
    threads: tuple[int | str, ...] = tuple(dict.fromkeys((1, os.cpu_count() or 1))) if on_cpu else ("",)
    if on_cpu and not settings.quick:  # the shape is llama.cpp's, and large
        yield from _beside_llama_cpp(settings)
    for rows, cols in shapes:
        for form in FORMATS:
            for count in threads:
                for tokens in BATCHES:
                    yield _product(settings, rows, cols, tokens, form, count)
        if on_cpu:  # the PyTorch reference, which serves CUDA, is for no measurement
            for kind in QUANTIZED:
                for count in threads:
                    for tokens in BATCHES:
                        yield _quantized(settings, rows, cols, tokens, kind, count)
        for rows, cols in shapes if settings.quick else DENSE:
            for count in threads:
                for tokens in DENSE_BATCHES:
                    yield _dense(settings, rows, cols, tokens, count)
    for tokens in MANY_TOKENS:
        for form in FORMATS:
            yield _layer(settings, *shapes[0], tokens, form, threads[-1])
    for form in EXPERTS:
        if on_cpu or form in FORMATS:
            yield _experts(settings, form, threads[-1])


def _pruned(settings: Settings, rows: int, cols: int) -> Tensor:
    weight = torch.randn(rows, cols, device=settings.device).to(torch.bfloat16)
    ops.prune_nm_(weight, torch.ones(cols, device=settings.device), 2, 4)
    return weight


def _product(settings: Settings, rows: int, cols: int, tokens: int, form: str, threads: int | str) -> Case:
    operator, pack, product = FORMATS[form]

    def make() -> Inputs:
        """x, the dense weight, the packed one."""
        weight = _pruned(settings, rows, cols)
        x = torch.randn(tokens, cols, device=settings.device).to(torch.bfloat16)
        return x, weight, pack(weight)

    return Case(
        "sparse", operator, f"{rows} x {cols}", torch.bfloat16, backend_of(operator, settings.device), make,
        lambda inputs: product(inputs[0], *inputs[2]), lambda inputs: _check(inputs, product(inputs[0], *inputs[2])),
        rows * cols * 2 * 9 // 16 + tokens * (rows + cols) * 2, _dense_peers(settings, rows, tokens), tokens=tokens,
        threads=threads,
    )  # fmt: skip


def _dense_peers(settings: Settings, rows: int, tokens: int) -> dict[str, Callable[[Inputs], Any]]:
    """Of inputs that begin with x and the dense weight."""
    found: dict[str, Callable[[Inputs], Any]] = {"torch linear": lambda inputs: linear(inputs[0], inputs[1])}
    gemv = peers.dense_gemv() if tokens == 1 and settings.device.type == "cpu" else None
    if gemv is not None:
        y = torch.empty(rows)
        found["dense GEMV"] = lambda inputs: gemv(inputs[1], inputs[0], y)
    return found


def _dense(settings: Settings, rows: int, cols: int, tokens: int, threads: int | str) -> Case:
    """A layer that stays dense in a packed model."""

    def make() -> Inputs:
        return tuple(torch.randn(size, cols).to(torch.bfloat16) for size in (tokens, rows))

    return Case(
        "sparse", "dense_linear", f"{rows} x {cols}", torch.bfloat16, backend_of("dense_linear", settings.device), make,
        lambda inputs: ops.dense_linear(*inputs), lambda inputs: _check(inputs, ops.dense_linear(*inputs)),
        rows * cols * 2 + tokens * (rows + cols) * 2, _dense_peers(settings, rows, tokens), tokens=tokens,
        threads=threads,
    )  # fmt: skip


def _pack_quantized(weight: Tensor, kind: ValueType) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, scales, codes, starts of a bitmap."""
    levels, scales = quantize(weight, kind)
    values, starts = pack_kept(levels, weight != 0, kind.bits)
    return values, scales, pack_bitmap(weight)[1], starts


def _unpacked(packed: tuple[Tensor, Tensor, Tensor, Tensor], kind: ValueType) -> Tensor:
    return ops.unpack_quantized(*packed, kind.bits, torch.bfloat16)


def _quantized(settings: Settings, rows: int, cols: int, tokens: int, kind: ValueType, threads: int | str) -> Case:
    """A bitmap with values of 8 or 4 bits against the same bitmap in bfloat16."""
    scales_bytes = 2 * rows * kind.scales(cols)

    def make() -> Inputs:
        """x, the rounded weight, its bitmap in bfloat16, the quantised one."""
        weight = _pruned(settings, rows, cols)
        x = torch.randn(tokens, cols, device=settings.device).to(torch.bfloat16)
        packed = _pack_quantized(weight, kind)
        return x, _unpacked(packed, kind), pack_bitmap(weight), packed

    def product(inputs: Inputs) -> Tensor:
        x, _, _, (values, scales, codes, starts) = inputs
        return ops.quantized_linear(x, values, scales, codes, starts, None, kind.bits)

    return Case(
        "sparse", f"quantized_linear {kind.name}" + (f", groups of {kind.group}" if kind.group else ""),
        f"{rows} x {cols}", torch.bfloat16, backend_of("quantized_linear", settings.device), make, product,
        lambda inputs: _check(inputs, product(inputs)),
        rows * cols * (2 + kind.bits) // 16 + scales_bytes + tokens * (rows + cols) * 2,
        {
            "bitmap_linear": lambda inputs: ops.bitmap_linear(inputs[0], *inputs[2]),
            "torch linear": lambda inputs: linear(inputs[0], inputs[1]),
        },
        tokens=tokens, threads=threads,
    )  # fmt: skip


def _beside_llama_cpp(settings: Settings) -> Iterator[Case]:
    """Products with 8 and 4 bits at the shape that llama.cpp measures its own at."""
    program = shutil.which(peers.LLAMA_CPP)
    if program is None:
        print(f"{peers.LLAMA_CPP} is not on the path: no product is measured beside llama.cpp's", flush=True)
        return
    for kind, theirs in QUANTIZED.items():
        case = _quantized(settings, *peers.LLAMA_CPP_SHAPE, 1, kind, peers.llama_cpp_threads())
        case.programs[f"llama.cpp {theirs}"] = partial(peers.llama_cpp_product, program, theirs)
        yield case


def prefill(settings: Settings) -> Iterator[Case]:
    """The products of a prompt on CUDA: a 2:4 layer against cuBLAS and, where torch takes the shape, its
    semi-structured tensor (cuSPARSELt or CUTLASS, as torch chooses). On a CPU with --quick alone, to have run once."""
    wanted = PREFILL_QUICK if settings.quick else PREFILL if settings.device.type == "cuda" else []
    for rows, cols, tokens in wanted:
        case = _layer(
            settings, rows, cols, tokens, "2:4", (os.cpu_count() or 1) if settings.device.type == "cpu" else ""
        )
        refusal = _refusal(settings.device, rows, cols, tokens)
        if refusal is None:
            semi = _SemiStructured()
            case.peers["torch semi-structured"] = semi
            case.check = partial(_check_both, semi)
        else:
            print(f"{case}: no semi-structured tensor: {refusal}", flush=True)
        yield case


class _SemiStructured:
    """The product with torch's semi-structured tensor of a case's weight, made at the first call: it is one for all
    copies of the inputs, and what else runs in a turn is larger than a cache."""

    def __init__(self) -> None:
        self._weight: Tensor | None = None

    def __call__(self, inputs: Inputs) -> Tensor:
        if self._weight is None:
            self._weight = peers.semi_structured(inputs[1])
        return linear(inputs[0], self._weight)


def _refusal(device: torch.device, rows: int, cols: int, tokens: int) -> str | None:
    """Why torch has no semi-structured product of this shape, or None."""
    try:
        weight = peers.semi_structured(torch.zeros(rows, cols, dtype=torch.bfloat16, device=device))
        linear(torch.zeros(tokens, cols, dtype=torch.bfloat16, device=device), weight)
    except (RuntimeError, NotImplementedError, ValueError, AssertionError) as error:
        return (str(error) or type(error).__name__).splitlines()[0][:200]
    return None


def _check_both(semi: _SemiStructured, inputs: Inputs) -> str:
    theirs = _check(inputs, semi(inputs)).split(",")[0]
    return f"{_check(inputs, inputs[2](inputs[0]))}, semi-structured: {theirs}"


def _layer(settings: Settings, rows: int, cols: int, tokens: int, form: str, threads: int | str) -> Case:
    """The layer of a packed model, which takes the fastest way for the shape, against nn.Linear."""
    if threads:
        torch.set_num_threads(int(threads))
    dispatch.clear()

    def make() -> Inputs:
        weight = _pruned(settings, rows, cols)
        dense = nn.Linear(cols, rows, bias=False, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        x = torch.randn(tokens, cols, device=settings.device).to(torch.bfloat16)
        return x, weight, PackedLinear.from_linear(dense, form)

    return Case(
        "sparse", f"PackedLinear {form}", f"{rows} x {cols}", torch.bfloat16,
        backend_of(FORMATS[form][0], settings.device), make, lambda inputs: inputs[2](inputs[0]),
        lambda inputs: _check(inputs, inputs[2](inputs[0])),
        rows * cols * 2 * 9 // 16 + tokens * (rows + cols) * 2,
        {"torch linear": lambda inputs: linear(inputs[0], inputs[1])}, tokens=tokens, threads=threads,
    )  # fmt: skip


def _experts(settings: Settings, form: str, threads: int | str) -> Case:
    """One token with four of the experts of a layer, as in a step of decoding, against torch's grouped product."""
    operator, pack, product = EXPERTS[form]
    experts, rows, cols = (8, 64, 128) if settings.quick else (32, 1280, 1024)

    def make() -> Inputs:
        """x, the chosen experts' weights, the packed stack, where experts' tokens end, the dense stack."""
        stack = _pruned(settings, experts * rows, cols)
        packed = pack(stack)
        if operator == "quantized_experts":
            stack = _unpacked(packed, ValueType(4, 128))
        chosen = torch.randperm(experts, device=settings.device)[:4].sort().values
        ends = torch.searchsorted(chosen, torch.arange(experts, device=settings.device), right=True).int()
        weights = stack.view(experts, rows, cols)
        x = torch.randn(4, cols, device=settings.device).to(torch.bfloat16)
        return x, weights[chosen], packed, ends, weights

    def check(inputs: Inputs) -> str:
        x, weights, packed, ends, _ = inputs
        exact = (weights.double() @ x.double().unsqueeze(2)).squeeze(2)
        error = float((product(x, *packed, ends).double() - exact).abs().max() / exact.abs().max())
        if not error <= 2e-2:
            raise WrongResultError(f"its result is off by {error:.2e} of the largest output")
        return f"relative error {error:.1e}"

    return Case(
        "sparse", operator, f"4 of {experts} x {rows} x {cols}", torch.bfloat16,
        backend_of(operator, settings.device), make, lambda inputs: product(inputs[0], *inputs[2], inputs[3]), check,
        4 * (sum(part.nbytes for part in pack(_pruned(settings, rows, cols))) + (rows + cols) * 2),
        {"torch grouped_mm": lambda inputs: grouped_mm(inputs[0], inputs[4].transpose(1, 2), offs=inputs[3])},
        tokens=1, threads=threads,
    )  # fmt: skip


def _check(inputs: Inputs, got: Tensor) -> str:
    """Against float64, with the dense product's own error beside it."""
    x, weight = inputs[:2]
    exact = x.double() @ weight.double().T
    largest = exact.abs().max()
    ours, dense = (float((y.double() - exact).abs().max() / largest) for y in (got, linear(x, weight)))
    if not ours <= 2e-2:  # beside values of 4 bits x has 8 bits
        raise WrongResultError(f"its result is off by {ours:.2e} of the largest output")
    return f"relative error {ours:.1e}, dense {dense:.1e}"
