"""The predictions: that the model still says what it was set to say, and what is printed beside a measurement."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import pytest

from benchmarks import cards, predict, records, works
from benchmarks.cards import CARDS, Work

H100 = CARDS["H100"]
AUDIT = json.loads(Path(__file__).with_name("audit.json").read_text())


@pytest.mark.parametrize("entry", AUDIT, ids=lambda entry: f"{entry['work']['kernel']} {entry['work']['size']}")
def test_says_of_the_first_kernels_what_the_audit_said(entry):
    """audit.json: an H100 and the kernels as they were when the constants were set; and a range, from reading them."""
    low, high = entry["predicted"]
    found = cards.predict(Work(**entry["work"]), H100).share
    assert low - 0.07 <= found <= high + 0.07


def test_more_in_flight_fewer_instructions_and_more_blocks_are_never_slower():
    plain = Work("a", (4096, 4096), "bfloat16", 64, 128, 1024, 8, 4096, 3000, 750, 1e-6, 4096)
    seconds = cards.predict(plain, H100).seconds
    for better in ({"ahead": 1}, {"slots": 1000}, {"registers": 40}, {"waits": 0.0}, {"serial": 100}, {"load": 2048}):
        assert cards.predict(Work(**{**plain.__dict__, **better}), H100).seconds <= seconds, better


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [(64, 256, 0, 4), (65, 256, 0, 3), (32, 1024, 0, 2), (16, 32, 0, 32), (16, 128, 50 << 10, 4), (255, 512, 0, 1)],
)
def test_blocks_of_a_processor(registers, threads, shared, blocks):
    """As CUDA's occupancy calculator has it: 65,536 registers, 2,048 threads, 32 blocks, 228 KB and 1 KB a block."""
    assert cards.resident(registers, threads, shared, H100) == blocks


@pytest.mark.parametrize(
    ("processors", "shared"), [(132, 227 << 10), (108, 163 << 10), (84, 99 << 10), (20, 64 << 10), (1, 48 << 10)]
)
def test_plans_of_rows_fit_the_device(processors, shared):
    """For every width that is whole chunks of 16 bytes, and some that are not."""
    most_threads = {4: 128, 16: 896, 22: 256}  # as __launch_bounds__ has it
    for dtype, size in ((0, 4), (1, 2)):
        for cols in itertools.chain(range(16 // size, 60_000, 16 // size), range(1, 60_000, 997)):
            path, quads, threads, halves, needed, *_ = works._plan("rows", 9, cols, dtype, 0, processors, shared)
            assert (path == 2) == (cols > 57344)
            if path == 2:
                continue
            assert needed <= shared, (cols, dtype, quads, halves)
            assert threads <= most_threads[quads]
            assert (threads - 32) * 4 * quads < cols <= threads * 4 * quads
            chunks = 4 * quads * size // 16
            assert halves in ((2, 4) if chunks % 2 else (2, 3, 4)) if path == 0 else halves == 0, (cols, dtype)


@pytest.mark.parametrize("product", ["bitmap", "sparse24"])
@pytest.mark.parametrize(("processors", "shared"), [(132, 227 << 10), (108, 163 << 10), (84, 99 << 10), (20, 99 << 10)])
def test_plans_of_products_fit_the_device_and_fill_it(product, processors, shared):
    for tokens in range(1, 9 if product == "bitmap" else 33):
        for height, cols in ((1, 64), (100, 576), (1024, 4096), (4096, 4096), (11008, 4096), (4096, 11008)):
            threads, grid, *rest = works._plan(product, height, cols, tokens, processors, shared)
            assert 32 <= threads <= 256
            assert rest[4 if product == "sparse24" else 3] <= shared
            if tokens == 1 and height >= 1024:
                assert grid >= 2 * processors


@pytest.mark.parametrize("form", range(3))
@pytest.mark.parametrize("processors", [132, 108, 20, 1])
def test_plans_of_quantized_products_fit_and_take_every_column(form, processors):
    for tokens in range(1, 17):
        for height, cols in (
            (1, 64),
            (100, 576),
            (1024, 4096),
            (4096, 4096),
            (11008, 4096),
            (4096, 11008),
            (4, 1 << 20),
        ):
            threads, grid, room, share, needed, *_ = works._plan(
                "quantized", height, cols, 8, 0, form, tokens, processors, 48 << 10
            )
            assert 32 <= threads <= 256
            assert needed <= 48 << 10
            assert (threads // 32 - 1) * share * 512 < cols <= threads // 32 * share * 512
            assert room in (1, 4, 8)
            assert grid * 4 >= height
            assert grid * threads // 32 >= min(16 * processors, grid * min(8, -(-cols // 1024)))


@pytest.mark.parametrize(
    ("processors", "shared"), [(132, 227 << 10), (108, 163 << 10), (84, 99 << 10), (20, 64 << 10), (1, 48 << 10)]
)
def test_plans_of_refinement_fit_the_device(processors, shared):
    for dtype, size in ((0, 4), (1, 2)):
        for cols in range(1, 60_000, 97):
            place, width, threads, needed, *_ = works._plan("refine", 9, cols, dtype, processors, shared)
            assert needed <= shared, (cols, dtype)
            assert place == (0 if 1792 + cols * (16 + size) <= shared else 1 if 1792 + cols * 8 <= shared else 2)
            assert width == (1 if cols % 2 else 2)
            assert threads % 32 == 0
            assert 32 <= threads <= 896  # as __launch_bounds__ has it


def test_swaps_of_a_7b_model_are_predicted_to_take_less_than_ten_seconds():
    first, swaps, _ = predict.refinement(H100)
    assert first + swaps < 10


def test_the_file_is_what_the_command_writes():
    with predict.PREDICTIONS.open(newline="") as file:
        written = list(csv.DictReader(file))
    made = [predict.cells(cards.predict(work, card)) for card in CARDS.values() for work in predict.suite(card)]
    assert written == [{name: str(value) for name, value in line.items()} for line in made], (
        "python -m benchmarks.predict"
    )


def line(**changes) -> records.Row:
    return {
        "suite": "select", "operator": "prune_rows_", "shape": "4096 x 4096", "dtype": "bfloat16",
        "implementation": "wanda_kernels", "copy_ratio": 1.25, "device": "NVIDIA H100 80GB HBM3",
    } | changes  # fmt: skip


def test_beside_measurements(tmp_path, capsys):
    product = {"suite": "sparse", "operator": "bitmap_linear", "tokens": 1}
    rounded = {**product, "operator": "quantized_linear int4, groups of 128"}
    lines = [
        line(),
        line(implementation="topk", copy_ratio=30.0),
        line(operator="row_mask"),
        line(**product, copy_ratio=1.1),
        line(**product, implementation="torch linear", ratio=1.37, ratio_to="wanda_kernels"),
        line(**rounded),
        line(**rounded, implementation="torch linear", ratio=1.6, ratio_to="wanda_kernels"),
        line(operator="kthvalue", device="AMD EPYC"),
    ]
    with records.writer(tmp_path / "select.csv") as write:
        for each in lines:
            write(each)
    assert predict.beside(tmp_path) == 0
    told = capsys.readouterr().out
    assert told.count("predicted 0") + told.count("predicted 1") == 3
    assert "measured 0.80 of copy speed" in told
    assert "measured 1.37 x dense" in told
    figures = next(text for text in told.splitlines() if text.startswith("figures: "))
    found = json.loads(figures.removeprefix("figures: "))["predictions"]
    assert [each["measured"] for each in found] == [0.8, 1.37, 1.6]
    assert "3 predictions" in told.splitlines()[-1]


def test_beside_nothing_that_is_known(tmp_path, capsys):
    with records.writer(tmp_path / "select.csv") as write:
        write(line(device="NVIDIA L4"))
    assert predict.beside(tmp_path) == 0
    assert "none of a card that is known: A100, H100, H200" in capsys.readouterr().out
