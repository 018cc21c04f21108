"""As test_simt.py, for the swaps: masks, their number and the errors are the reference's, bit for bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from simt import operators as simt
from simt.machine import ORDERS, Machine, compiler
from strategies import DTYPES, MORE
from torch import Tensor

from wanda_kernels import reference

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ to compile the kernels with")


def draw_layer(draw: random.Random, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mask, weight, gram): masks of any share, weights with ties, inputs that have much in common."""
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    x = torch.randn(2 * cols, cols, generator=generator) + torch.randn(cols, generator=generator)
    kind = draw.choice(["plain", "outliers", "equal columns", "zero channels", "few inputs"])
    some = torch.rand(cols, generator=generator) < 0.2
    if kind == "outliers":
        x[:, some] *= 1000
    elif kind == "equal columns":
        x[:, some] = x[:, :1].clone()
    elif kind == "zero channels":
        x[:, some] = 0
    elif kind == "few inputs":
        x = x[:3]
    weight = torch.randn(rows, cols, generator=generator)
    if draw.random() < 0.4:  # ties
        weight = weight.round()
    weight, gram = weight.to(draw.choice(DTYPES)), x.T @ x
    if draw.random() < 0.1:  # what is not finite
        (weight if draw.random() < 0.5 else gram)[-1, draw.randrange(cols)] = draw.choice([torch.nan, torch.inf])
    share = draw.choice([0.0, 0.3, 0.5, 0.5, 0.5, 0.9, 1.0])
    return torch.rand(rows, cols, generator=generator) < share, weight, gram


def check_refined(
    machine: Machine, mask: Tensor, weight: Tensor, gram: Tensor, damping: float, launch: dict[str, Any], *,
    most_swaps: int = 0, pattern: tuple[int, int] | None = None, sweeps: int = 0,
) -> int:  # fmt: skip
    """The reference's mask, swaps and sums, to the bit where they are numbers. Returns the swaps of all rows."""
    want, sums = mask.clone(), torch.zeros(len(mask), 2, dtype=torch.float64)
    if pattern is None:
        swaps = reference.refine_rows_(want, weight, gram, damping, most_swaps, sums)
        limits = {"most_swaps": most_swaps}
    else:
        swaps = reference.refine_nm_(want, weight, gram, *pattern, damping, sweeps, sums)
        limits = {"m": pattern[1], "sweeps": sweeps}
    got = simt.refine(machine, mask, weight, gram, damping, **limits, **launch)
    assert torch.equal(got[0], want)
    assert torch.equal(got[1], swaps)
    assert bool(torch.where(sums.isnan(), got[2].isnan(), got[2] == sums).all()) or not launch.get("has_sums", True)
    return int(swaps.sum())


def draw_refine(machine: Machine, seed: int) -> int:
    draw = random.Random(seed)
    machine.order, machine.seed = draw.choice(ORDERS), seed
    m = draw.choice([0, 0, 0, 2, 4, 4, 5, 8, 64])
    cols = draw.choice([draw.randint(1, 20), draw.randint(1, 140)]) if m == 0 else m * draw.randint(1, 100 // m + 1)
    rows = draw.choice([1, 2, 5, 9, 70]) if cols < 40 else draw.randint(1, 4)
    mask, weight, gram = draw_layer(draw, rows, cols)
    pairs = cols % 2 == 0 and draw.random() < 0.8
    launch = {
        "place": draw.choice(simt.REFINE_PLACES), "pairs": pairs, "threads": draw.choice([32, 64, 128]),
        "band": draw.choice([1, 2, 64, 1 << 20]), "has_sums": draw.random() < 0.7,
        "offset": 0 if pairs else draw.randint(0, 3),
    }  # fmt: skip
    damping = draw.choice([0.0, 0.3, 1.0, 7.5])
    if m == 0:
        most = draw.choice([0, 1, 4, 100])
        return check_refined(machine, mask, weight, gram, damping, launch, most_swaps=most)
    n = draw.randint(1, m - 1)
    mask = reference.nm_mask(weight if draw.random() < 0.5 else mask.float(), torch.ones(cols), n, m)
    sweeps = draw.choice([1, 2, 4])
    return check_refined(machine, mask, weight, gram, damping, launch, pattern=(n, m), sweeps=sweeps)


@pytest.mark.parametrize("part", range(2))
def test_refine(machine: Machine, part: int) -> None:
    assert sum(draw_refine(machine, seed) for seed in range(part * 75, part * 75 + 75)) >= 500


@pytest.mark.slow
def test_hundreds_of_refinements(machine: Machine) -> None:
    assert sum(draw_refine(machine, seed) for seed in range(1000, 1000 + 300 * MORE)) >= 5_000 * MORE


@pytest.mark.parametrize(("place", "cols"), [("staged", 4096), ("shared", 4099), ("global", 4098)])
def test_refine_wide_rows(machine: Machine, place: str, cols: int) -> None:
    generator = torch.Generator().manual_seed(cols)
    x = torch.randn(64, cols, generator=generator) + torch.randn(cols, generator=generator)
    weight, mask = torch.randn(2, cols, generator=generator), torch.rand(2, cols, generator=generator) < 0.5
    launch = {"place": place, "pairs": cols % 2 == 0, "threads": 256}
    assert check_refined(machine, mask, weight.bfloat16(), x.T @ x, 0.3, launch, most_swaps=2) == 4


def test_refine_has_the_same_bits_in_every_order(machine: Machine) -> None:
    mask, weight, gram = draw_layer(random.Random(1), 5, 64)
    results = []
    for machine.order in ORDERS:
        results.append(simt.refine(machine, mask, weight, gram, 0.3, most_swaps=4))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
