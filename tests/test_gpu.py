"""What needs a card: streams, devices, graphs, repeated bits, exhausted memory, tensors in the wrong place. That the
operators compute what the reference does is checked by the tests of every backend (``pytest -m gpu`` runs those of
the backend "cuda" too).
"""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from strategies import same_bits
from torch import Tensor

import wanda_kernels
from wanda_kernels import ops, reference
from wanda_kernels.packed import PackedLinear, dispatch, pack_bitmap, pack_sparse24
from wanda_kernels.packed.values import ValueType, pack_kept, pack_quantized, quantize
from wanda_kernels.static import StaticDecoder

pytestmark = pytest.mark.gpu

Arguments = tuple[object, ...]
REFINED = 512  # columns: the reference adds one after the other


def matrix(
    rows: int = 96, cols: int = 4096, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator).to(dtype), torch.rand(cols, generator=generator) + 0.1


@functools.cache
def packed(seed: int) -> tuple[Tensor, Tensor]:
    return reference.prune_pack_24(*matrix(seed=seed))


@functools.cache
def sparse(seed: int) -> Tensor:
    """2:4, so that every seed keeps as many."""
    weight, norm = matrix(seed=seed)
    return weight.masked_fill(reference.nm_mask(weight, norm, 2, 4), 0)


@functools.cache
def quantized(seed: int) -> Arguments:
    """(values, scales, codes, starts)"""
    (values, codes, starts, scales), _ = pack_quantized(sparse(seed), "bitmap", ValueType(4, 128))
    return values, scales.view(torch.bfloat16), codes, starts


@functools.cache
def gram(seed: int) -> Tensor:
    """Of integers: the same bits whatever adds them up."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-8, 9, (64, REFINED), generator=generator).float()
    x += torch.randint(-8, 9, (REFINED,), generator=generator)
    return x.T @ x


def arguments(name: str, seed: int = 0) -> Arguments:
    """On the CPU; other values, of the same shapes, for another seed."""
    weight, norm = matrix(seed=seed)
    dense, products = weight[:, :REFINED].contiguous(), gram(seed)
    ends = torch.tensor([2, 2, 4], dtype=torch.int32)
    nearest = quantize(dense, ValueType(4, 32))
    kept = sparse(seed) != 0
    levels = quantize(sparse(seed), ValueType(4, 32))[0]
    stored, starts = pack_kept(levels, kept, 4)
    channels, sums = products.diagonal().sqrt(), torch.zeros(96, 2, dtype=torch.float64)
    return {
        "prune_rows_": (weight, norm, 0.5, torch.zeros(96, 2)),
        "row_mask": (weight, norm, 0.5),
        "prune_nm_": (weight, norm, 2, 4, torch.zeros(96, 2)),
        "nm_mask": (weight, norm, 4, 8),
        "refine_rows_": (reference.row_mask(dense, channels, 0.5), dense, products, 0.3, None, sums),
        "refine_nm_": (reference.nm_mask(dense, channels, 2, 4), dense, products, 2, 4, 0.3, 4, sums),
        "solve_rows_": (dense.clone(), reference.row_mask(dense, channels, 0.5), products, dense, 0.3, 4, sums),
        "calibrate_levels_": (nearest[0], dense, nearest[1], products, 4, 1.0, 3, sums[:, 0].clone()),
        "add_gram_": (products.clone(), weight[:, :REFINED].mul(4).round(), 0.5, 2.0),
        "pack_24": (reference.unpack_24(*packed(seed)),),
        "prune_pack_24": (weight, norm),
        "unpack_24": packed(seed),
        "add_sqnorm_": (torch.zeros(3, 4096), weight, torch.arange(96) % 7 != 0),
        "rms_norm_sqnorm": (weight, norm.bfloat16(), 1e-6, torch.zeros(3, 4096), torch.arange(96) % 7 != 0, True),
        "silu_mul_sqnorm": (weight, weight.flip(0), torch.zeros(3, 4096), None),
        "gelu_tanh_mul_sqnorm": (weight, weight.flip(0), torch.zeros(3, 4096), None),
        "bitmap_linear": (weight[:5], *pack_bitmap(sparse(seed)), weight[0, :96].clone()),
        "sparse24_linear": (weight[:5], *pack_sparse24(sparse(seed)), weight[0, :96].clone()),
        "dense_linear": (weight[:5], weight.flip(1), weight[0, :96].clone()),
        "unpack_bitmap": pack_bitmap(sparse(seed)),
        "unpack_sparse24": pack_sparse24(sparse(seed)),
        "bitmap_experts": (weight[:5], *pack_bitmap(sparse(seed)), ends),
        "sparse24_experts": (weight[:5], *pack_sparse24(sparse(seed)), ends),
        "quantized_linear": (weight[:5], *quantized(seed), weight[0, :96].clone(), 4),
        "quantized_experts": (weight[:5], *quantized(seed)[:2], ends, *quantized(seed)[2:], 4),
        "unpack_quantized": (*quantized(seed), 4, torch.bfloat16),
        "quantize": (weight, 4, 64, norm),
        "exact_levels": (ops.unpack_quantized(*quantized(seed), 4, torch.bfloat16), 4, 128),
        "pack_kept_": (torch.zeros_like(stored), levels, kept, starts, 4),
    }[name]


def on(device: str, args: Arguments) -> Arguments:
    return tuple(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args)


def call(name: str, args: Arguments, implementation=ops) -> tuple[Tensor, ...]:
    """What the operator returns, and its tensors after the call: some are written in place."""
    result = getattr(implementation, name)(*args)
    returned = () if result is None else result if isinstance(result, tuple) else (result,)
    return (*returned, *(arg for arg in args if isinstance(arg, Tensor)))


BY_PRODUCTS = ("solve_rows_", "calibrate_levels_")  # of floats


def check(name: str, got: tuple[Tensor, ...], seed: int = 0) -> None:
    """Bits, but for sums and activations."""
    fused, near = name.endswith("_sqnorm"), name.endswith(("_sqnorm", "_linear", "_experts")) or name in BY_PRODUCTS
    for ours, theirs in zip(got, call(name, arguments(name, seed), reference), strict=True):
        if ours.dtype == torch.float32 and ours.shape != (4096,):  # sums, in another order
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3 if fused else 2e-5, atol=0)
        elif near and ours.dtype == torch.float64:
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-2, atol=0)
        elif near and ours.dtype == torch.bfloat16:  # one unit here and there
            torch.testing.assert_close(ours.cpu(), theirs, rtol=2**-7, atol=1e-5 if fused else 1e-2)
        elif near and ours.dtype == torch.int8:  # next to the middle of two levels
            assert (ours.cpu() != theirs).double().mean() < 1e-2
        else:
            assert same_bits(ours.cpu(), theirs)


NAMES = sorted(ops.__all__)
IN_NO_GRAPH = ("solve_rows_", "quantize", "exact_levels", "pack_kept_")  # they ask the host how to go on
ASKS = ("pack_24", "refine_nm_", *IN_NO_GRAPH)


@pytest.mark.parametrize("name", NAMES)
def test_the_current_stream_is_used(name):
    """The operands arrive late on a side stream: a launch on any other stream would see zeros."""
    source = on("cuda", arguments(name))
    operands = tuple(arg.zero_().clone() if isinstance(arg, Tensor) else arg for arg in on("cuda", arguments(name)))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for target, value in zip(operands, source, strict=True):
            if isinstance(target, Tensor):
                target.copy_(value)
        got = call(name, operands)
    stream.synchronize()
    check(name, got)


@pytest.mark.parametrize("name", NAMES)
def test_second_device(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    got = call(name, on("cuda:1", arguments(name)))
    assert all(tensor.device == torch.device("cuda:1") for tensor in got)
    assert torch.cuda.current_device() == 0
    check(name, got)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in IN_NO_GRAPH])
def test_graph_capture_and_replay(name):
    operands = on("cuda", arguments(name))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(name, operands)
    for seed in (1, 2):
        for target, value in zip(operands, arguments(name, seed), strict=True):
            if isinstance(target, Tensor):
                target.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        check(name, got, seed)


@pytest.mark.parametrize("name", NAMES)
def test_two_hundred_repetitions_give_the_same_bits(name):
    start = on("cuda", arguments(name))
    expected = None
    for _ in range(200):
        got = call(name, tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in start))
        expected = got if expected is None else expected
        assert all(same_bits(left, right) for left, right in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ASKS])
def test_nothing_waits_for_the_device(name):
    operands = on("cuda", arguments(name))
    call(name, operands)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(name, operands)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_a_graph_break(name):
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: call(name, args), fullgraph=True)
    check(name, compiled(*on("cuda", arguments(name))))


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_apart_and_unaligned(dtype, offset):
    """Views whose rows start anywhere: their neighbours are not touched."""
    weight, norm = matrix(40, 1000, dtype)
    for prune, mask in (
        (lambda w: ops.prune_rows_(w, norm.cuda(), 0.5), reference.row_mask(weight, norm, 0.5)),
        (lambda w: ops.prune_nm_(w, norm.cuda(), 2, 4), reference.nm_mask(weight, norm, 2, 4)),
        (lambda w: ops.prune_nm_(w, norm.cuda(), 3, 5), reference.nm_mask(weight, norm, 3, 5)),
    ):
        storage = torch.full((40, 1017), 7.0, dtype=dtype, device="cuda")
        view = storage[:, offset : offset + 1000]
        view.copy_(weight)
        prune(view)
        expected = torch.full((40, 1017), 7.0, dtype=dtype)
        expected[:, offset : offset + 1000] = weight.masked_fill(mask, 0)
        assert same_bits(storage.cpu(), expected)


@pytest.mark.parametrize("cols", [4096, 11008, 28672, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_rows_are_refined_as_on_the_cpu(dtype, cols):
    """What a block's shared memory holds whole, in part and, on most cards, not."""
    generator = torch.Generator().manual_seed(cols)
    x = torch.randn(64, cols, generator=generator) + torch.randn(cols, generator=generator)
    weight, products = torch.randn(9, cols, generator=generator).to(dtype), x.T @ x
    mask = torch.rand(9, cols, generator=generator) < 0.5
    got, wanted = mask.cuda(), torch.zeros(9, 2).double()
    there = wanted.cuda()
    swaps = ops.refine_rows_(got, weight.cuda(), products.cuda(), 0.3, 50, there)
    assert torch.equal(ops.refine_rows_(mask, weight, products, 0.3, 50, wanted), swaps.cpu())
    assert torch.equal(got.cpu(), mask)
    assert torch.equal(there.cpu(), wanted)


def test_offsets_beyond_32_bits():
    """53248 x 43008 in bfloat16: 2.3 G elements, past what an int32 counts."""
    rows, cols = 43008, 53248
    if torch.cuda.get_device_properties(0).total_memory < 12 << 30:
        pytest.skip("needs 12 GB of device memory")
    weight = torch.empty(rows, cols, dtype=torch.bfloat16, device="cuda")
    tail = torch.randn(8, cols).to(torch.bfloat16)
    norm = torch.rand(cols) + 0.1
    weight.fill_(1.0)
    weight[-8:] = tail.cuda()
    ops.prune_rows_(weight, norm.cuda(), 0.5)
    assert same_bits(weight[-8:].cpu(), tail.masked_fill(reference.row_mask(tail, norm, 0.5), 0))
    weight[-8:] = tail.cuda()
    ops.prune_nm_(weight, norm.cuda(), 2, 4)
    assert same_bits(weight[-8:].cpu(), tail.masked_fill(reference.nm_mask(tail, norm, 2, 4), 0))


def test_exhausted_memory_is_an_error_and_the_next_call_works():
    weight, norm = (tensor.cuda() for tensor in matrix(1, 4096))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-3)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            ops.row_mask(weight.expand(1 << 22, 4096), norm, 0.5)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    check_row = reference.row_mask(weight.cpu(), norm.cpu(), 0.5)
    assert torch.equal(ops.row_mask(weight, norm, 0.5).cpu(), check_row)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("prune_rows_", {1: Tensor.cpu}, "norm is on cpu, weight is on cuda:0"),
        ("prune_rows_", {3: Tensor.cpu}, "score_sums is on cpu, weight is on cuda:0"),
        ("prune_rows_", {1: lambda norm: norm[:-1]}, "norm has 4095 elements, weight has 4096 columns"),
        ("nm_mask", {1: Tensor.cpu}, "norm is on cpu, weight is on cuda:0"),
        ("prune_nm_", {3: lambda m: 5}, "weight has 4096 columns, not a multiple of m = 5"),
        ("refine_rows_", {0: Tensor.cpu}, "mask is on cpu, weight is on cuda:0"),
        ("refine_nm_", {2: Tensor.cpu}, "gram is on cpu, weight is on cuda:0"),
        ("refine_nm_", {0: torch.zeros_like}, "mask must keep 2 of every 4 columns, 12288 of its groups do not"),
        ("pack_24", {0: torch.ones_like}, "98304 of its groups of four have more than two non-zeros"),
        ("pack_24", {0: lambda weight: weight[:31]}, "multiple of 32 rows and of 64 columns"),
        ("unpack_24", {1: Tensor.cpu}, "metadata is on cpu, values are on cuda:0"),
        ("add_sqnorm_", {2: Tensor.cpu}, "token_mask is on cpu, x is on cuda:0"),
        ("add_sqnorm_", {0: Tensor.cpu}, "sqnorm is on cpu, x is on cuda:0"),
    ],
)
def test_illegal_inputs_name_the_argument(name, change, message):
    operands = [change.get(i, lambda arg: arg)(arg) for i, arg in enumerate(on("cuda", arguments(name)))]
    before = [operand.clone() for operand in operands if isinstance(operand, Tensor)]
    with pytest.raises(ValueError, match=message):
        getattr(ops, name)(*operands)
    after = [operand for operand in operands if isinstance(operand, Tensor)]
    assert all(same_bits(left, right) for left, right in zip(before, after, strict=True))


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_pruned(target, dtype):
    model = tiny.model("llama", dtype).cuda()
    report = wanda_kernels.prune(model, tiny.ids().cuda(), **target)
    assert report.achieved_sparsity == 0.5
    assert torch.isfinite(model(tiny.ids().cuda()).logits).all()


@pytest.mark.parametrize("tokens", [1, 8, 32, 33, 600])
@pytest.mark.parametrize("form", ["bitmap", "2:4", "2:4 + copy"])
def test_a_packed_layer_is_the_dense_one(form, tokens):
    """The dense product of the same card is as far from float64."""
    dense = torch.nn.Linear(4096, 96).to("cuda", torch.bfloat16)
    dense.weight.data.copy_(sparse(0))
    layer = PackedLinear.from_linear(dense, form.split()[0])
    if "copy" in form:
        layer.keep_prefill_copy()
        assert layer.prefill_bytes() * 16 == 9 * dense.weight.numel() * 2
    x = torch.randn(tokens, 4096, device="cuda").bfloat16()
    dispatch.clear()
    with torch.no_grad():
        exact = x.double() @ dense.weight.double().T + dense.bias.double()
        error = (layer(x).double() - exact).abs().max()
        assert error <= 1.5 * (dense(x).double() - exact).abs().max() + 1e-6
    if "copy" in form:
        assert layer.cpu().prefill_bytes() == 0


@pytest.mark.parametrize(("pack", "seed"), [(pack_bitmap, 0), (pack_bitmap, 1), (pack_sparse24, 0), (pack_sparse24, 1)])
def test_a_weight_is_packed_on_the_card_as_on_the_cpu(pack, seed):
    weight = sparse(seed)
    for got, want in zip(pack(weight.cuda()), pack(weight), strict=True):
        assert same_bits(got.cpu(), want)
    if pack is pack_sparse24:
        with pytest.raises(ValueError, match="keep 4 weights"):
            pack(matrix(seed=seed)[0].cuda())


@pytest.mark.parametrize("form", [None, "bitmap", "2:4"])
def test_decoding_by_replays_gives_the_tokens_of_plain_steps(form):
    """The graph's kernels are those of the warm-up, on the same addresses: the same bits."""
    model = tiny.model(hidden_size=128, intermediate_size=192, dtype=torch.bfloat16)
    if form is not None:
        wanda_kernels.prune(model, tiny.ids(), **({"pattern": "2:4"} if form == "2:4" else {"sparsity": 0.5}))
        wanda_kernels.compress(model)
    model, prompt = model.cuda(), tiny.ids(2, 7).cuda()
    decoder = StaticDecoder(model, prompt, 12)
    found, _ = decoder.generate(prompt)
    again, _ = decoder.generate(prompt)
    decoder._advance = decoder._step
    plain, _ = decoder.generate(prompt)
    assert torch.equal(found, again)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_replays_of_a_model_whose_attention_has_windows(family):
    """Of 8 tokens, shorter than what is generated: the graph keeps no token's mask."""
    model, prompt = tiny.model(family).cuda(), tiny.ids(2, 5).cuda()
    decoder = StaticDecoder(model, prompt, 12)
    found, _ = decoder.generate(prompt)
    decoder._advance = decoder._step
    assert torch.equal(found, decoder.generate(prompt)[0])
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, min_new_tokens=12,
                         do_sample=False)  # fmt: skip
    assert torch.equal(found, ids[:, prompt.shape[1] :])
