"""How fast each GPU kernel should be on a card, from what the compiler made of it and how it is launched (works.py), by
a model of the card (cards.py).

    python -m benchmarks.predict                    writes benchmarks/results/predictions.csv
    python -m benchmarks.predict --beside FOLDER    the same for a GPU's result files (*.csv), beside what it measured

Columns: ``registers``; ``blocks``, that a processor can hold; ``kb_in_flight`` a processor, at most; ``slots``,
instructions a lane and element; ``share`` of copy speed, or times as fast as the dense product (``of``).
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cards import CARDS, Card, Prediction, Work, predict
from benchmarks.harness import OURS
from benchmarks.operators import SUMS
from benchmarks.places import RESULTS
from benchmarks.records import Row, key_of, number, read
from benchmarks.works import (
    bitmap,
    nm_24,
    pack_24,
    quantized,
    refine_24,
    refine_sums,
    refine_swaps,
    rms_norm,
    rows,
    silu_mul,
    sparse24,
    sqnorm,
)

PREDICTIONS = RESULTS / "predictions.csv"
LLAMA_7B = {(4096, 4096): 4 * 32, (11008, 4096): 2 * 32, (4096, 11008): 32}  # weights of its linear layers, how many


def suite(card: Card) -> Iterator[Work]:
    """What LLaMA's layers and 2,048 tokens ask for."""
    for dtype in ("bfloat16", "float32"):
        for sums in (False, True):
            for height, cols in ((4096, 4096), (4096, 11008), (8192, 28672)):
                yield rows(card, height, cols, dtype, sums)
    for sums in (False, True):
        for height, cols in ((4096, 4096), (11008, 4096), (4096, 11008)):
            yield nm_24(card, height, cols, "bfloat16", sums)
    for height, cols in ((4096, 4096), (11008, 4096)):
        yield pack_24(card, height, cols)
    for tokens in (2048, 16384):
        yield sqnorm(card, tokens, 4096)
    yield rms_norm(card, 2048, 4096)
    yield silu_mul(card, 2048, 11008)
    for product in (bitmap, sparse24):
        for height, cols in ((1024, 4096), (4096, 4096), (11008, 4096), (4096, 11008)):
            yield product(card, height, cols)
    yield sparse24(card, 4096, 4096, 16)
    for height, cols in ((4096, 4096), (11008, 4096), (4096, 11008)):
        for form, bits, group in (("bitmap", 8, 0), ("bitmap", 4, 128), ("2:4", 8, 0), ("2:4", 4, 128)):
            yield quantized(card, height, cols, form, bits, group)
    yield quantized(card, 32000, 4096, "dense")
    yield quantized(card, 4096, 4096, tokens=8)
    for work in (refine_sums, refine_swaps, refine_24):
        for height, cols in ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 28672)):
            yield work(card, height, cols)


def refinement(card: Card) -> tuple[float, ...]:
    """Seconds of what swaps begin with, of swaps at 50 % and of those at 2:4, for LLaMA-7B's linear layers in
    bfloat16."""
    return tuple(
        sum(number * predict(work(card, *shape), card).seconds for shape, number in LLAMA_7B.items())
        for work in (refine_sums, refine_swaps, refine_24)
    )


COLUMNS = ("card", "kernel", "shape", "dtype", "registers", "blocks", "kb_in_flight", "slots", "us", "share", "of")


def cells(found: Prediction) -> dict[str, object]:
    work = found.work
    return {
        "card": found.card, "kernel": work.kernel, "shape": work.shape, "dtype": work.dtype,
        "registers": work.registers, "blocks": found.blocks, "kb_in_flight": round(found.in_flight / 1024, 1),
        "slots": round(found.slots, 1),
        "us": round(found.seconds * 1e6, 1), "share": round(found.share, 3),
        "of": "dense" if work.dense_bytes else "copy",
    }  # fmt: skip


def show(lines: list[dict[str, object]]) -> None:
    table = Table(title="Predictions, not measured", title_justify="left", box=None)
    for name in COLUMNS:
        table.add_column(name, justify="left" if isinstance(lines[0][name], str) else "right", no_wrap=True)
    for line in lines:
        table.add_row(*(str(line[name]) for name in COLUMNS))
    Console(width=140).print(table)


def _work_of(row: Row, card: Card) -> Work | None:
    """What a line of a result file has measured, where it is something that is predicted."""
    height, cols = (int(number) for number in row["shape"].split(" x "))
    operator, is_16_bit = row["operator"].removesuffix(SUMS), row["dtype"] == "bfloat16"
    sums = operator != row["operator"]
    if operator == "prune_rows_":
        return rows(card, height, cols, row["dtype"], sums)
    if operator == "prune_nm_ 2:4":
        return nm_24(card, height, cols, row["dtype"], sums)
    plain = {"prune_pack_24": pack_24, "add_sqnorm_": sqnorm, "rms_norm_sqnorm": rms_norm, "silu_mul_sqnorm": silu_mul}
    if operator in plain and is_16_bit:
        return plain[operator](card, height, cols)
    products = {"bitmap_linear": (bitmap, (1, 2, 4, 8)), "sparse24_linear": (sparse24, range(1, 33))}
    if operator in products and int(row["tokens"]) in products[operator][1]:
        return products[operator][0](card, height, cols, int(row["tokens"]))
    match = re.fullmatch(r"quantized_linear int([84])(?:, groups of (\d+))?", operator)
    if match and int(row["tokens"]) <= 8:
        return quantized(card, height, cols, "bitmap", int(match[1]), int(match[2] or 0), int(row["tokens"]))
    return None


def _measured(row: Row, peers: list[Row], work: Work) -> float | None:
    """Share of copy speed, or times as fast as the dense product."""
    if not work.dense_bytes:
        ratio = number(row, "copy_ratio")
        return 1 / ratio if ratio else None
    name = (*key_of(row)[:7], "torch linear")
    return next((number(peer, "ratio") for peer in peers if key_of(peer)[:8] == name), None)


def beside(folder: Path) -> int:
    """Prints a line for each measurement that was predicted."""
    found, miss = [], 0.0
    measured = [row for path in sorted(folder.glob("*.csv*")) for row in read(path)]
    for row in measured:
        card = next((card for name, card in CARDS.items() if name in row["device"]), None)
        work = None if card is None or row["implementation"] != OURS else _work_of(row, card)
        share = None if work is None else _measured(row, measured, work)
        if card is None or work is None or share is None:
            continue
        predicted = predict(work, card).share
        found.append({"kernel": work.kernel, "shape": work.shape, "dtype": work.dtype, "card": card.name,
                      "predicted": round(predicted, 3), "measured": round(share, 3)})  # fmt: skip
        miss = max(miss, abs(predicted - share))
        of = "x dense" if work.dense_bytes else "of copy speed"
        print(f"{work.kernel} {work.shape} {work.dtype}: predicted {predicted:.2f}, measured {share:.2f} {of}")
    if not found:
        print(f"summary: {len(measured)} rows, none of a card that is known: {', '.join(CARDS)}")
        return 0
    print("figures: " + json.dumps({"predictions": found}))
    print(f"summary: {len(found)} predictions, off by {miss:.2f} at most")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="of result files that a GPU wrote")
    options = parser.parse_args()
    if options.beside is not None:
        if not options.beside.is_dir():
            parser.error(f"--beside {options.beside} is no folder")
        return beside(options.beside)
    lines = [cells(predict(work, card)) for card in CARDS.values() for work in suite(card)]
    with PREDICTIONS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    show(lines)
    for card in CARDS.values():
        first, *swaps = (f"{seconds:.1f} s" for seconds in refinement(card))
        print(f"LLaMA-7B refined on {card.name}, predicted: first sums {first}, swaps {swaps[0]}, of 2:4 {swaps[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
