"""How fast each GPU kernel should be on a card, from what the compiler made of it (sass.csv) and how it is launched.

    python -m benchmarks.predict                    writes benchmarks/results/predictions.csv
    python -m benchmarks.predict --beside FOLDER    the same for a GPU's result files (*.csv), beside what it measured

No figure of a GPU, but a model to be proved wrong by one. Its constants (``CARDS`` and the capitals below) were set
once, before any kernel was changed on its account, so that it gave what an audit had predicted for the kernels of that
day (tests/test_predict.py keeps both). A measurement may change them, and nothing else.

A processor (SM) is a closed queueing network. Its customers are the blocks that it holds (or warps, where those do not
wait for each other), each of which comes round with an item: a row, a pass, a stretch. An item is served by the memory
(its bytes at the processor's share of copy speed) and by the schedulers (its instructions), and waits: for memory's
latency wherever nothing hides it, for barriers, and for the latency of its own instructions. Exact mean value analysis
gives items per second for each number of customers; a last round that fills the card in part is counted with as many
customers as it has. ``RAMP`` (launch, first bytes, last block) is added to a kernel and to what it is compared with.

Columns: ``registers``; ``blocks``, that a processor can hold; ``kb_in_flight`` a processor, at most; ``slots``,
instructions a lane and element; ``share`` of copy speed, or times as fast as the dense product (``of``).
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import functools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.harness import OURS
from benchmarks.operators import SUMS
from benchmarks.places import RESULTS
from benchmarks.records import Row, key_of, number, read
from benchmarks.sass import RESULT

PREDICTIONS = RESULTS / "predictions.csv"
WARP = 32
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}  # as in csrc/common/dtype.h
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Card:
    """``copy``: bytes read and written a second, by a copy. ``shared``: bytes of a processor, and that a block may
    have."""

    name: str
    arch: int
    processors: int
    gigahertz: float
    copy: float
    shared: int
    block_shared: int

    @property
    def cycle(self) -> float:
        return 1e-9 / self.gigahertz


CARDS = {
    "A100": Card("A100", 80, 108, 1.41, 1.70e12, 164 << 10, 163 << 10),
    "H100": Card("H100", 90, 132, 1.73, 3.00e12, 228 << 10, 227 << 10),
    "H200": Card("H200", 90, 132, 1.73, 4.20e12, 228 << 10, 227 << 10),
}
RAMP = 2.5e-6  # seconds of a launch that copying does not pay either
LATENCY = 0.45e-6  # of memory
CACHED = 0.18e-6  # of L2
BARRIER = 0.06e-6
STALL = 6.0  # cycles an instruction of a warp that has its scheduler for itself
ISSUE = 0.86  # instructions a cycle that a scheduler issues at best
LINE = 1.23  # cycles of the load unit for each line that a load touches
STORED = 0.33  # of what a store takes, that its block waits for
MOST = 0.965  # of copy speed
DENSE = 0.95  # of copy speed, at which a dense product of few rows of x reads its weight
REPEATED = 250  # instructions of a row kernel's warp for the elements of its bracket, beyond those in the table


@dataclass(frozen=True)
class Work:
    """What a kernel does on one shape.

    Attributes:
        customers: of a block: itself, or its warps.
        items: of a customer; ``load`` and ``store`` are bytes of one, ``slots`` the instructions of all of its warps.
        serial: instructions of one warp for an item.
        waits: seconds in which an item has neither memory nor schedulers.
        cache: cycles of the load unit for an item.
        in_flight: bytes that a customer has on their way at most.
        ahead: items that it has on their way beside the one that it works on.
        after: seconds of what is launched behind.
        dense_bytes: of the weight that a dense product would read; 0: it is compared with a copy of the same bytes.
    """

    kernel: str
    size: tuple[int, int]
    dtype: str
    registers: int
    threads: int
    grid: int
    items: float
    load: float
    slots: float
    serial: float
    waits: float
    in_flight: float
    store: float = 0.0
    shared: int = 0
    cache: float = 0.0
    customers: int = 1
    ahead: float = 0.0
    after: float = 0.0
    dense_bytes: int = 0

    @property
    def shape(self) -> str:
        return f"{self.size[0]} x {self.size[1]}"


@dataclass(frozen=True)
class Prediction:
    work: Work
    card: str
    blocks: int  # that a processor can hold
    in_flight: float  # bytes, of those that it does hold
    slots: float  # an element
    seconds: float
    share: float  # of copy speed, or times dense


def resident(registers: int, threads: int, shared: int, card: Card) -> int:
    """Blocks that a processor can hold."""
    warps = -(-threads // WARP)
    by_registers = 65536 // (-(-registers // 8) * 8 * WARP * warps)
    by_memory = card.shared // (-(-(shared + 1024) // 128) * 128)
    return max(1, min(by_registers, by_memory, 64 // warps, 32))


def throughput(work: Work, card: Card, customers: float) -> float:
    """Items a second of a processor that holds so many customers."""
    cycle, bandwidth = card.cycle, card.copy / card.processors
    issue = work.slots * cycle / (4 * ISSUE)
    services = ((work.load + STORED * work.store) / bandwidth, issue, work.cache * cycle)
    delay = work.waits + max(0.0, work.serial * STALL * cycle - issue)
    queues, found, number = [0.0] * len(services), 0.0, 0
    while number < customers:
        number += 1
        times = [service * (1 + queue) for service, queue in zip(services, queues, strict=True)]
        rate = number / (delay + sum(times))
        found += (rate - found) * min(1.0, customers - (number - 1))  # the last may be there for a part of the time
        queues = [rate * time for time in times]
    return min(found, MOST * bandwidth / (work.load + work.store))


def predict(work: Work, card: Card) -> Prediction:
    blocks = resident(work.registers, work.threads, work.shared, card)
    rounds, rest = divmod(work.grid / card.processors, blocks)
    seconds = RAMP + work.after
    for held, turns in ((blocks, rounds), (rest, 1)):
        customers = held * work.customers
        if customers and turns:
            seconds += turns * customers * work.items / throughput(work, card, customers * (1 + work.ahead))
    items = work.items * work.customers * work.grid
    moved = (work.load + work.store) * items
    yardstick = RAMP + (work.dense_bytes / (DENSE * card.copy) if work.dense_bytes else moved / card.copy)
    return Prediction(
        work, card.name, blocks, (blocks if rounds else rest) * work.customers * work.in_flight,
        work.slots * items * WARP / (work.size[0] * work.size[1]), seconds, yardstick / seconds,
    )  # fmt: skip


@functools.cache
def _plans() -> ctypes.CDLL:
    """csrc/cuda/plan.h."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("predict needs a C++ compiler for csrc/cuda/plan.h, and found none")
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "plans.so"
        source = Path(__file__).parent / "plans.cpp"
        subprocess.run([compiler, "-std=c++17", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def _plan(name: str, *numbers: int) -> list[int]:
    out = (ctypes.c_int64 * 8)()
    getattr(_plans(), f"plan_of_{name}")(*map(ctypes.c_int64, numbers), out)
    return list(out)


@dataclass(frozen=True)
class Sass:
    """Of a line of sass.csv."""

    registers: int
    common: int
    loop: int


@functools.cache
def _table() -> dict[tuple[str, int], Sass]:
    with RESULT.open(newline="") as file:
        return {
            (row["kernel"], int(row["arch"])): Sass(*(int(row[name] or 0) for name in ("registers", "common", "loop")))
            for row in csv.DictReader(file)
        }


def _sass(kernel: str, card: Card) -> Sass:
    return _table()[kernel, card.arch]


def _named(kernel: str, sums: bool) -> str:
    return kernel + SUMS * sums


def _tokens(kernel: str, tokens: int) -> str:
    return f"{kernel}, {tokens} token{'s' * (tokens > 1)}"


def rows(card: Card, height: int, cols: int, dtype: str = "bfloat16", sums: bool = False) -> Work:
    """A block takes row after row, an item each. Its place goes to a later one from the first chunk written on: for
    about an eighth of the time that it is there."""
    path, quads, threads, halves, shared, *_ = _plan(
        "rows", height, cols, DTYPES[dtype], sums, card.processors, card.block_shared
    )
    output = "prune+sums" if sums else "prune"
    sass = _sass(f"rows_kernel<{dtype}, {quads}, {output}, {'direct' if path else 'staged'}>", card)
    serial = sass.common + REPEATED
    held = resident(sass.registers, threads, shared, card) * card.processors
    grid = -(-height // -(-height // held))
    row = cols * BYTES[dtype]
    return Work(
        _named("prune_rows_", sums), (height, cols), dtype, sass.registers, threads, grid, shared=shared,
        items=height / grid, load=row, store=row, slots=serial * threads / WARP, serial=serial,
        waits=LATENCY + 2 * CACHED + 9 * BARRIER, in_flight=row * max(halves, 2) / 2,
        ahead=max(0, halves - 2) / 2 + (not path) / 8,
    )  # fmt: skip


def nm_24(card: Card, height: int, cols: int, dtype: str = "bfloat16", sums: bool = False) -> Work:
    """Blocks of four rows; an item is a pass of all threads."""
    threads, grid, *_ = _plan("nm", height, cols, DTYPES[dtype], sums, card.processors, card.block_shared)
    sass = _sass(f"nm_kernel<{dtype}, 4, 2, {'prune+sums' if sums else 'prune'}>", card)
    passes = -(-cols * BYTES[dtype] // 16 // threads)
    item = 4 * cols * BYTES[dtype] / passes
    serial = sass.loop + (sass.common - sass.loop) / passes
    return Work(
        _named("prune_nm_ 2:4", sums), (height, cols), dtype, sass.registers, threads, grid, items=passes, load=item,
        store=item, slots=serial * threads / WARP, serial=serial, waits=LATENCY + (3 + 8 * sums) * BARRIER / passes,
        in_flight=item,
    )  # fmt: skip


def pack_24(card: Card, height: int, cols: int) -> Work:
    """A thread takes four rows of 32 columns, 16 columns of all four at a time: an item."""
    threads, grid, *_ = _plan("pack_24", height, cols)
    sass = _sass("pack_24_kernel<bfloat16, select>", card)
    load, serial = height * cols * 2 / grid / 2, sass.common / 2
    return Work(
        "prune_pack_24", (height, cols), "bfloat16", sass.registers, threads, grid, items=2, load=load,
        store=load * 1.125 / 2, slots=serial * threads / WARP, serial=serial, waits=LATENCY, in_flight=load,
    )  # fmt: skip


def bitmap(card: Card, height: int, cols: int, tokens: int = 1) -> Work:
    """Warps take 1,024 elements of the block's rows, an item, one ahead of where they multiply, as in sparse24. Before
    that they read the bitmap of the columns before theirs, and the words of their first items."""
    threads, grid, rows_of_block, room, stages, shared, *_ = _plan(
        "bitmap", height, cols, tokens, card.processors, card.block_shared
    )
    sass = _sass(f"bitmap_linear_kernel<bfloat16, {rows_of_block} rows, {room} tokens>", card)
    warps = threads // WARP
    items, load = cols * rows_of_block / 1024 / warps, 1024 * 1.125
    lead = 2 * LATENCY + CACHED + BARRIER + (sass.common - sass.loop) / 2 * STALL * card.cycle
    lines = 1024 // 64 / 2 + 2 * rows_of_block + 1024 // 128 / rows_of_block * 2 * tokens  # values, words; x
    shuffled = 1024 // 128 * 6 + 8  # takes of shared memory, and shuffles
    return Work(
        _tokens("bitmap_linear", tokens), (height, cols), "bfloat16", sass.registers, threads, grid, shared=shared,
        items=items, load=load, slots=sass.loop, serial=sass.loop * stages, waits=LATENCY + lead * stages / items,
        in_flight=load * stages, ahead=stages - 1, customers=warps, dense_bytes=2 * height * cols,
        cache=(lines + shuffled) * LINE,
    )  # fmt: skip


def sparse24(card: Card, height: int, cols: int, tokens: int = 1) -> Work:
    """Warps take 128 columns of a slice of the block's rows, an item, a few of them ahead of where they multiply. What
    a warp does itself, no item that is ahead hides."""
    threads, grid, tile, room, slices, stages, shared, _ = _plan(
        "sparse24", height, cols, tokens, card.processors, card.block_shared
    )
    sass = _sass(f"sparse24_linear_kernel<bfloat16, {tile} rows, {room} tokens>", card)
    warps = threads // WARP
    items, load = cols / slices / 128 / warps, tile * 128 * 1.125
    lead = LATENCY + BARRIER + (sass.common - sass.loop) / 2 * STALL * card.cycle
    lines = 2 * tile + 2 * tokens * slices  # of values and codes; of x
    return Work(
        _tokens("sparse24_linear", tokens), (height, cols), "bfloat16", sass.registers, threads, grid, shared=shared,
        items=items, load=load, slots=sass.loop, serial=sass.loop * stages, waits=LATENCY + lead * stages / items,
        in_flight=load * stages, ahead=stages - 1, customers=warps, dense_bytes=2 * height * cols,
        cache=(lines + tile + -(-room // 8) * 16) * LINE,  # what the matrix loads of both take from shared memory
    )  # fmt: skip


def sqnorm(card: Card, tokens: int, cols: int) -> Work:
    """Blocks of all tokens by 32 columns; a warp has eight loads a thread on their way, an item. After
    every 4,096 all blocks add their warps up at once."""
    threads, grid, shared, *_ = _plan("sqnorm", tokens, cols)
    sass = _sass("sqnorm_columns_kernel<bfloat16, 8>", card)
    load, chunks = WARP * 8 * 16, -(-tokens // 4096)
    adding = 2 * BARRIER + (sass.common - 2 * sass.loop) * STALL * card.cycle  # with and without masks
    return Work(
        "add_sqnorm_", (tokens, cols), "bfloat16", sass.registers, threads, grid, shared=shared, items=tokens / 1024,
        load=load, slots=sass.loop, serial=sass.loop, waits=LATENCY, in_flight=load, customers=threads // WARP,
        after=LATENCY + chunks * adding,
    )  # fmt: skip


def _totals(card: Card, chunks: int, cols: int) -> float:
    """Seconds of the kernel that adds partial sums, 128 chunks at a time, and of writing them. On compute capability 9
    it is there when the first one ends. It waits for that, for its first loads, and at six barriers a sum."""
    sass, turns = _sass("total_kernel", card), -(-chunks // 128)
    launch = RAMP if card.arch < 90 else 0.0
    serial = (sass.common + (turns - 1) * sass.loop) * STALL * card.cycle
    waits = 2 * LATENCY + (turns - 1) * CACHED + 6 * turns * BARRIER
    return launch + waits + serial + chunks * cols * 4 / card.copy


def rms_norm(card: Card, tokens: int, cols: int) -> Work:
    """Programs of 16 tokens; an item is the tokens of a step, and those of two more are on their way."""
    block = 1 << max(12, (cols - 1).bit_length())  # narrower ones are taken for as costly
    sass = _sass(f"rms_norm_sqnorm_kernel<bfloat16, {block}>", card)
    step = max(8192 // block, 1)
    threads, load = WARP * min(block // 256, 16), step * cols * 2
    return Work(
        "rms_norm_sqnorm", (tokens, cols), "bfloat16", sass.registers, threads, -(-tokens // 16),
        shared=2 * step * block * 2 + 1024, items=16 / step, load=load, store=load, slots=sass.loop * threads / WARP,
        serial=sass.loop, waits=LATENCY + 3 * BARRIER, in_flight=2 * load, ahead=2,
        after=_totals(card, -(-tokens // 16), cols),
    )  # fmt: skip


def silu_mul(card: Card, tokens: int, cols: int) -> Work:
    """Programs of 64 tokens by 512 columns, four tokens at a time: an item."""
    sass = _sass("act_mul_sqnorm_kernel<bfloat16, silu>", card)
    load = 2 * 4 * 512 * 2
    return Work(
        "silu_mul_sqnorm", (tokens, cols), "bfloat16", sass.registers, 128, -(-tokens // 64) * -(-cols // 512),
        shared=2048, items=16, load=load, store=load / 2, slots=sass.loop * 4, serial=sass.loop, waits=LATENCY,
        in_flight=load, after=_totals(card, -(-tokens // 64), cols),
    )  # fmt: skip


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
    return 0


if __name__ == "__main__":
    sys.exit(main())
