"""The CUDA kernels, compiled unchanged by g++ and run on the CPU, against the PyTorch reference.

Every launch runs in one of four thread orders with the race, bounds and barrier checks of tests/simt on, and
everything else about it is drawn from a seed as well: which kernel, block shape, alignment, how many blocks.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from simt import operators as simt
from simt.machine import ORDERS, Machine, SimtError, compiler
from strategies import DTYPES, KINDS, MORE, NORMS, norm_of, same_bits, weight_of
from test_simt_quantized import draw_quantized, draw_quantized_experts
from test_simt_refine import draw_refine
from torch import Tensor

from wanda_kernels import reference
from wanda_kernels.packed import pack_bitmap, pack_sparse24

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ to compile the kernels with")

CUDA_SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"


def draw_matrix(draw: random.Random, rows: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of different kinds: a block's next row starts from what this one taught it."""
    generator = np.random.default_rng(draw.getrandbits(32))
    with np.errstate(all="ignore"):
        kinds = [draw.choice([*KINDS, "normal", "two humps"]) for _ in range(rows)]
        weight = np.stack([
            generator.choice([1e-3, 1e3], cols) * (1 + generator.random(cols) / 10) if kind == "two humps"
            else weight_of(kind, 1, cols, generator)[0]
            for kind in kinds
        ])  # fmt: skip
        norm = norm_of(draw.choice([*NORMS, "usual", "usual"]), cols, generator)
    return torch.from_numpy(weight.astype(np.float32)).to(dtype), torch.from_numpy(norm.astype(np.float32))


def draw_weight(draw: random.Random, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix, or a stack of them with norms of different kinds."""
    if draw.random() < 0.7:
        return draw_matrix(draw, draw.randint(1, 6), cols, dtype)
    rows = draw.randint(1, 6)
    matrices = [draw_matrix(draw, rows, cols, dtype) for _ in range(draw.randint(1, 3))]
    return torch.stack([weight for weight, _ in matrices]), torch.stack([norm for _, norm in matrices])


def check(weight: Tensor, norm: Tensor, want: Tensor, output: str, got: tuple[Tensor, Tensor]) -> None:
    if output == "mask":
        assert torch.equal(got[1].bool(), want)
        assert int(got[1].max()) <= 1
        assert same_bits(got[0], weight)
        return
    assert same_bits(got[0], weight.masked_fill(want, 0))
    if output == "sums":
        score = (weight.abs().float() * norm.unsqueeze(-2)).square()
        gone = score.masked_fill(~want, 0)
        expected = torch.stack([gone.double().sum(-1), score.double().sum(-1)], -1).float()
        assert torch.allclose(got[1], expected, rtol=2e-5, atol=0, equal_nan=True)


def row_mask(weight: Tensor, norm: Tensor, k: int) -> Tensor:
    order = torch.sort(weight.abs().float() * norm.unsqueeze(-2), dim=-1, stable=True).indices
    return torch.zeros(weight.shape, dtype=torch.bool).scatter_(-1, order[..., :k], True)


def draw_rows(machine: Machine, seed: int) -> int:
    """Returns how many rows it checked."""
    draw = random.Random(seed)
    machine.order, machine.seed = draw.choice(ORDERS), seed
    dtype = draw.choice(DTYPES)
    path = draw.choice(["staged", "staged", "staged", "direct", "any"])
    cols = draw.choice([draw.randint(1, 70), draw.randint(1, 700), draw.randint(500, 2600), draw.choice([2048, 4096])])
    output = draw.choice(["prune", "sums", "mask"])
    chunk = 16 // dtype.itemsize
    if path == "staged":
        whole = 16 if output == "mask" else chunk
        cols = -(-cols // whole) * whole
    weight, norm = draw_weight(draw, cols, dtype)
    k = int(cols * draw.choice([0.0, 0.01, 0.3, 0.5, 0.5, 0.5, 0.7, 0.99]))
    if path == "any" and draw.random() < 0.5:
        k = cols
    quads = draw.choice([4, 16, 22] if cols <= 2048 else [16, 22])
    got = simt.rows(
        machine, weight, norm, k, output=output, path=path, grid=draw.randint(1, 3),
        halves=draw.choice([2, 4] if quads * 4 // chunk % 2 else [2, 3, 4]),
        offset=dtype.itemsize * draw.randint(0, 3) * (path != "staged"),
        gap=draw.choice([0, 0, 1, 3, 8]) * (chunk if path == "staged" else 1),
        distance=draw.choice([0.4, 0.4, -3.0, 6.0]), threads=draw.choice([32, 64, 256]), quads=quads,
    )  # fmt: skip
    check(weight, norm, row_mask(weight, norm, k), output, got)
    return weight.numel() // cols


@pytest.mark.parametrize("part", range(4))
def test_a_thousand_rows(machine: Machine, part: int) -> None:
    assert sum(draw_rows(machine, seed) for seed in range(part * 80, part * 80 + 80)) >= 250


@pytest.mark.slow
def test_thousands_of_rows(machine: Machine) -> None:
    assert sum(draw_rows(machine, seed) for seed in range(1000, 1000 + 800 * MORE)) >= 2_500 * MORE


@pytest.mark.parametrize(
    ("cols", "dtype", "quads"),
    [(11008, torch.bfloat16, 22), (11008, torch.float32, 22), (57344, torch.float16, 16), (70001, torch.float32, 16)],
)
def test_wide_rows(machine: Machine, cols: int, dtype: torch.dtype, quads: int) -> None:
    generator = torch.Generator().manual_seed(cols)
    weight = torch.randn(2, cols, generator=generator).to(dtype)
    weight[1] = weight[1].mul(4).round()  # ties by the thousand
    norm = torch.rand(cols, generator=generator) + 0.1
    path = "any" if cols > 57344 else "staged"
    got = simt.rows(machine, weight, norm, cols // 2, path=path, threads=256, quads=quads)
    check(weight, norm, row_mask(weight, norm, cols // 2), "prune", got)


@pytest.mark.parametrize("resident", [108, 132, 264, 528, 1056])
@pytest.mark.parametrize("matrices", [1, 8, 32, 60, 64, 128, 200, 512])
def test_blocks_of_a_stack_have_nearly_equal_shares(machine: Machine, matrices: int, resident: int) -> None:
    for rows in (768, 1408, 2880, 14336):
        grid = machine.library.simt_rows_grid(*(ctypes.c_int64(n) for n in (rows, matrices, resident)))
        assert 1 <= grid <= rows
        rounds = -(-grid * matrices // resident)
        most = rounds * -(-rows // grid)  # rows, one after the other, of the busiest place
        assert most <= 1.25 * rows * matrices / resident + 1


def draw_nm(machine: Machine, seed: int) -> None:
    draw = random.Random(seed)
    machine.order, machine.seed = draw.choice(ORDERS), seed
    dtype = draw.choice(DTYPES)
    path = draw.choice(["vector", "vector", "vector", "any", "segments"])
    if path == "vector":
        n, m = draw.choice([(1, 2), (1, 4), (2, 4), (2, 4), (3, 4), (4, 8), (4, 8), (2, 8), (7, 8),
                            (5, 16), (8, 16), (16, 32)])  # fmt: skip
        cols, offset, gap = draw.randint(1, 60) * max(m, 16), 0, draw.choice([0, 8])
    else:
        m = draw.randint(2, 32) if path == "any" else draw.choice([33, 48, 100])
        n = draw.randint(1, m - 1)
        cols, gap = m * draw.randint(1, 150 if path == "any" else 3), draw.randint(0, 3)
        offset = dtype.itemsize * draw.randint(0, 3)
    weight, norm = draw_weight(draw, cols, dtype)
    output = draw.choice(["prune", "sums", "mask"])
    got = simt.nm(
        machine, weight, norm, n, m, output=output, path=path, grid=draw.randint(1, 3), offset=offset, gap=gap,
        threads=draw.choice([32, 64, 128]),
    )  # fmt: skip
    check(weight, norm, reference.nm_mask(weight, norm, n, m), output, got)


def test_nm(machine: Machine) -> None:
    for seed in range(300):
        draw_nm(machine, seed)


def draw_pack_24(machine: Machine, seed: int) -> None:
    draw = random.Random(seed)
    machine.order, machine.seed = draw.choice(ORDERS), seed
    rows, cols = 32 * draw.randint(1, 3), 64 * draw.randint(1, 5)
    weight, norm = draw_matrix(draw, rows, cols, draw.choice([torch.bfloat16, torch.float16]))
    gap = draw.choice([0, 8])
    if draw.random() < 0.6:
        values, metadata, _ = simt.pack_24(machine, weight, norm, gap)
        want = reference.prune_pack_24(weight, norm)
    else:
        weight = weight.masked_fill(reference.nm_mask(weight, norm, 2, 4), 0)
        if draw.random() < 0.3:
            weight.view(-1)[torch.randperm(weight.numel())[:40]] = 1.0
        values, metadata, overfull = simt.pack_24(machine, weight, None, gap)
        assert overfull == int((weight.reshape(-1, 4).ne(0).sum(dim=1) > 2).sum())
        if overfull:
            return
        want = reference.pack_24(weight)
    assert same_bits(values, want[0])
    assert same_bits(metadata, want[1])
    assert same_bits(simt.unpack_24(machine, values, metadata), reference.unpack_24(*want))


def test_pack_24(machine: Machine) -> None:
    for seed in range(60):
        draw_pack_24(machine, seed)


def draw_sqnorm(machine: Machine, seed: int) -> None:
    draw = random.Random(seed)
    machine.order, machine.seed = draw.choice(ORDERS), seed
    dtype = draw.choice(DTYPES)
    is_vector, is_shared = draw.random() < 0.6, draw.random() < 0.4
    sequences, tokens = draw.randint(1, 3), draw.choice([1, 5, 127, 128, 129, 300, 1100, 4100])
    most = 40 if tokens <= 300 else 2
    cols = draw.randint(1, most) * 8 if is_vector else draw.randint(1, 2 * most)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sequences, tokens, cols, generator=generator).to(dtype)
    token_mask = torch.rand(sequences, tokens, generator=generator) < 0.7 if draw.random() < 0.5 else None
    if token_mask is not None:
        x[~token_mask] = torch.nan
    sqnorm = torch.rand(cols, generator=generator) if is_shared else torch.rand(sequences, cols, generator=generator)
    where = {"is_vector": is_vector, "offset": 0 if is_vector else dtype.itemsize}
    got = simt.add_sqnorm(machine, sqnorm, x, token_mask, **where)
    want = sqnorm.clone()
    reference.add_sqnorm_(want, x, token_mask)
    assert torch.allclose(got, want, rtol=1e-5, atol=0)  # the reference adds tokens one after the other
    squares = x.double().square() if token_mask is None else x.double().square().masked_fill(~token_mask[..., None], 0)
    exact = squares.sum(dim=(0, 1)) if is_shared else squares.sum(dim=1)
    assert torch.allclose(got.double(), sqnorm.double() + exact, rtol=1e-6, atol=0)

    again = sqnorm.clone()  # one call for each sequence: the same bits
    for i in range(sequences):
        rows = again if is_shared else again[i : i + 1]
        mask = None if token_mask is None else token_mask[i : i + 1]
        rows.copy_(simt.add_sqnorm(machine, rows, x[i : i + 1], mask, **where))
    assert same_bits(got, again)
    if is_vector:  # and for a tensor that is not aligned
        assert same_bits(got, simt.add_sqnorm(machine, sqnorm, x, token_mask, is_vector=False, offset=dtype.itemsize))


def test_sqnorm(machine: Machine) -> None:
    for seed in range(40):
        draw_sqnorm(machine, seed)


def draw_segments(machine: Machine, seed: int) -> None:
    draw = random.Random(seed)
    machine.order, machine.seed = draw.choice(ORDERS), seed
    dtype, is_vector = draw.choice(DTYPES), draw.random() < 0.6
    rows, segments = draw.choice([0, 1, 5, 129, 300, 1100]), draw.randint(1, 6)
    cols = draw.randint(1, 10) * 8 if is_vector else draw.randint(1, 70)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator).to(dtype)
    kind = draw.choice(["any", "all in the last", "all in the first", "single rows", "not all"])
    ends = sorted(draw.randint(0, rows) for _ in range(segments))
    if kind == "all in the last":
        ends = [0] * (segments - 1) + [rows]
    elif kind == "all in the first":
        ends = [rows] * segments
    elif kind == "single rows":
        ends = [min(i, rows) for i in range(segments)]
    elif kind == "any":
        ends[-1] = rows
    sqnorm = torch.rand(segments, cols, generator=generator)
    where = {"is_vector": is_vector, "offset": 0 if is_vector else dtype.itemsize}
    got = simt.add_sqnorm(machine, sqnorm, x, None, torch.tensor(ends, dtype=torch.int32), **where)
    want = sqnorm.clone()
    for i, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end > begin:
            want[i : i + 1] = simt.add_sqnorm(machine, want[i : i + 1], x[None, begin:end], None, **where)
    assert same_bits(got, want)


def test_segments(machine: Machine) -> None:
    for seed in range(60):
        draw_segments(machine, seed)


@pytest.mark.parametrize("ends", [[-7, 3], [9, 2, 40], [2**31 - 1, -(2**31)], [41, 50]], ids=str)
def test_bad_ends_read_and_write_nothing_outside(machine: Machine, ends: list[int]) -> None:
    for order, cols in itertools.product(ORDERS, (3, 64)):
        machine.order = order
        simt.add_sqnorm(
            machine, torch.zeros(len(ends), cols), torch.randn(40, cols), None, torch.tensor(ends, dtype=torch.int32)
        )


def draw_packed(machine: Machine, seed: int) -> None:
    draw = random.Random(seed)
    machine.order, machine.seed = draw.choice(ORDERS), seed
    form = draw.choice(["bitmap", "2:4"])
    dtype = draw.choice(DTYPES if form == "bitmap" else DTYPES[1:])
    rows, cols = draw.choice([1, 2, 5, 16, 17, 33, 48]), 64 * draw.choice([1, 2, 3, 15, 16, 17, 33, 50])
    weight, _ = draw_matrix(draw, rows, cols, dtype)
    weight = weight.nan_to_num(1, 2, -2).clamp(-50, 50)  # sums that float64 can judge
    warps = draw.choice([1, 2, 3, 8])
    if form == "bitmap":
        weight.masked_fill_(torch.rand(weight.shape) < draw.choice([0.0, 0.5, 0.9, 1.0]), 0)
        packed, tokens = pack_bitmap(weight), draw.randint(1, 8)
        block = (draw.choice([2, 4]), 1, warps)
    else:
        weight.masked_fill_(reference.nm_mask(weight, torch.ones(cols), 2, 4), 0)
        packed, tokens = pack_sparse24(weight), draw.choice([1, 1, 2, 3, 8, 9, 16, 17, 32])
        slices = [n for n in (1, 2, 4, 8) if n == 1 or (tokens * n <= 8 and cols // 64 % n == 0)]
        block = (draw.choice([16, 32]) if tokens > 8 else 16, draw.choice(slices), warps)
    assert same_bits(simt.unpack(machine, packed, warps=warps), weight)
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bias = torch.linspace(-3, 3, rows).to(dtype) if draw.random() < 0.5 else None
    got = simt.packed_linear(machine, x, packed, bias, block=block)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().T + 1
    unit = torch.finfo(dtype).eps / 2
    assert ((got.double() - exact).abs() <= 2e-6 * size + unit * exact.abs() * 1.01).all()


def test_packed(machine: Machine) -> None:
    for seed in range(60):
        draw_packed(machine, seed)


def draw_packed_experts(machine: Machine, seed: int) -> None:
    """Idle experts, more tokens than there is room for, tokens that are nobody's; ends that are wrong write nowhere
    else."""
    draw = random.Random(seed)
    machine.order, machine.seed = draw.choice(ORDERS), seed
    form = draw.choice(["bitmap", "2:4"])
    dtype = draw.choice(DTYPES if form == "bitmap" else DTYPES[1:])
    rows, cols = draw.choice([1, 5, 16, 17]), 64 * draw.choice([1, 3, 17, 33])
    counts = [draw.choice([0, 0, 1, 2, 5, 9]) for _ in range(draw.randint(1, 4))]
    weight, _ = draw_matrix(draw, len(counts) * rows, cols, dtype)
    weight = weight.nan_to_num(1, 2, -2).clamp(-50, 50)
    if form == "bitmap":
        packed, room = pack_bitmap(weight.masked_fill_(torch.rand(weight.shape) < 0.5, 0)), draw.choice([1, 2, 3, 8])
    else:
        weight.masked_fill_(reference.nm_mask(weight, torch.ones(cols), 2, 4), 0)
        packed, room = pack_sparse24(weight), draw.choice([1, 2, 8, 9, 32])
    ends = torch.tensor(counts).cumsum(0).int()
    x = torch.randn(int(ends[-1]) + draw.randint(0, 2), cols, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if len(x) == 0:
        return
    block = None if draw.random() < 0.3 else (room, draw.choice([1, 2, 4]))
    got = simt.packed_experts(machine, x, packed, ends, block=block)
    begin = 0
    for one, end in zip(weight.view(-1, rows, cols).double(), ends.tolist(), strict=True):
        part = x[begin:end].double()
        exact, size = part @ one.T, part.abs() @ one.abs().T + 1
        unit = torch.finfo(dtype).eps / 2
        assert ((got[begin:end].double() - exact).abs() <= 2e-6 * size + unit * exact.abs() * 1.01).all()
        begin = end
    assert bool((got[begin:] == 0).all())
    wrong = torch.tensor([draw.choice([-(2**31), -1, 0, 3, 100, 2**31 - 1]) for _ in counts], dtype=torch.int32)
    machine.races = False  # experts that claim the same tokens
    try:
        simt.packed_experts(machine, x, packed, wrong, block=block)
    finally:
        machine.races = True


def test_packed_experts(machine: Machine) -> None:
    for seed in range(60):
        draw_packed_experts(machine, seed)


# The tests of the tests: what a kernel needs is taken away, and something must notice.

SCENARIOS: tuple[Callable[[Machine, int], object], ...] = (
    draw_rows, draw_nm, draw_refine, draw_pack_24, draw_sqnorm, draw_segments, draw_packed,
    draw_packed_experts, draw_quantized, draw_quantized_experts,
)  # fmt: skip
SITES = {"barrier": r"__sync(threads|warp)\(\)", "mask": r"\bkFullMask,", "copy wait": r"copy_async_wait<[^>]+>\(\);"}


def notices(machine: Machine, draw: Callable[[Machine, int], object], seed: int) -> bool:
    try:
        draw(machine, seed)
    except AssertionError:
        return True
    return False


def test_every_barrier_and_mask_is_reached(machine: Machine) -> None:
    assert not any(notices(machine, draw, seed) for draw, seed in itertools.product(SCENARIOS, range(30)))
    reached = {kind: {(site.file, site.line) for site in machine.sites() if site.kind == kind} for kind in SITES}
    for kind, pattern in SITES.items():
        written = {
            (path.name, number)
            for path in CUDA_SOURCES.glob("*.cuh")
            for number, line in enumerate(path.read_text().splitlines(), 1)
            if re.search(pattern, line) and path.name != "platform.cuh"
        }
        assert written, kind
        assert reached[kind] == written, kind


@pytest.mark.slow
def test_every_barrier_mask_and_wait_is_needed(machine: Machine) -> None:
    reached = defaultdict(list)  # site -> the launches that pass it: no other can notice
    for draw, seed in itertools.product(SCENARIOS, range(40)):
        before = {number: site.visits for number, site in enumerate(machine.sites())}
        assert not notices(machine, draw, seed)
        for number, site in enumerate(machine.sites()):
            if site.visits > before.get(number, 0):
                reached[number].append((draw, seed))
    for number, site in enumerate(machine.sites()):
        machine.disabled = number
        for machine.removed_lane in (0, 31) if site.kind == "mask" else (31,):
            assert any(notices(machine, *launch) for launch in reached[number]), (
                f"nothing notices {site} without it, lane {machine.removed_lane}"
            )


def test_a_broken_kernel_is_reported(machine: Machine) -> None:
    weight, norm = torch.randn(2, 512), torch.rand(512)
    simt.rows(machine, weight, norm, 256)

    def site_of(kind: str) -> int:  # the first of the file: a plain row passes it
        sites = [(s.line, i) for i, s in enumerate(machine.sites()) if (s.kind, s.file) == (kind, "rows.cuh")]
        return min(sites)[1]

    barrier, mask = site_of("barrier"), site_of("mask")
    machine.disabled = barrier
    with pytest.raises(SimtError, match=r"race|unwritten"):
        simt.rows(machine, weight, norm, 256)
    machine.disabled = mask
    with pytest.raises(SimtError, match="lacks the calling lane"):
        simt.rows(machine, weight, norm, 256)
