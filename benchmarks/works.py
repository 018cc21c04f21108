"""What each GPU kernel does on a shape, for predict.py: from what the compiler made of it (sass.csv) and how it is
launched (csrc/cuda/plan.h, by plans.cpp). A function a kernel; its docstring says what an item is."""

from __future__ import annotations

import csv
import ctypes
import functools
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cards import BARRIER, CACHED, LATENCY, LINE, RAMP, REPEATED, STALL, WARP, Card, Work, resident
from benchmarks.operators import SUMS
from benchmarks.sass import RESULT

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}  # as in csrc/common/dtype.h
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
    float64: int

    def issued(self, card: Card) -> float:
        """Of the loop: what the schedulers have to do, or the float64 units, at fewer lanes a cycle."""
        return max(self.loop, self.float64 * 4 * WARP / card.doubles)


@functools.cache
def _table() -> dict[tuple[str, int], Sass]:
    with RESULT.open(newline="") as file:
        return {
            (row["kernel"], int(row["arch"])): Sass(*(int(row[name] or 0) for name in Sass.__dataclass_fields__))
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


SWAPS = 1 / 30  # of a row, for each column: half of it pruned, correlated inputs
LEAST = 60  # instructions of a warp between two passes: the block's least cost, the next row of G


def refine_sums(card: Card, height: int, cols: int, dtype: str = "bfloat16") -> Work:
    """What swaps begin with. Blocks of 64 rows by 64 columns; an item is a tile of 16 rows of G, and the next one is on
    its way. Sums do not wait for each other."""
    threads, shared, down, across, depth, *_ = _plan("refine_sums")
    sass = _sass(f"refine_products_kernel<{dtype}>", card)
    load, tiles = depth * (across * 4 + down * (BYTES[dtype] + 1)), -(-cols // depth)
    grid = -(-height // down) * -(-cols // across)
    return Work(
        "refine_rows_ first sums", (height, cols), dtype, sass.registers, threads, grid, shared=shared, items=tiles,
        load=load, store=down * across * 8 / tiles, slots=sass.issued(card) * threads / WARP,
        serial=sass.loop - sass.float64, waits=BARRIER, in_flight=load, ahead=1,
    )  # fmt: skip


def refine_swaps(card: Card, height: int, cols: int, dtype: str = "bfloat16") -> Work:
    """A block a row; its warps take what their loads reach at once, an item, and wait for each other after each of two
    passes a swap. G comes from memory, but for what half a swap ago did; the state is in shared memory."""
    place, width, threads, shared, *_ = _plan("refine", height, cols, DTYPES[dtype], card.processors, card.block_shared)
    sass = _sass(f"refine_kernel<{dtype}, {width}, {'wide' if place else 'staged'}, rows>", card)
    warps, turn = threads // WARP, width * WARP * (2 if place else 4)
    turns = -(-cols // (turn * warps))
    read = 4 + 2 + 1 + (8 + 8 / 2 if place != 2 else 0) + (6 if place else 8 + BYTES[dtype])  # G, flags, c, the rest
    return Work(
        "refine_rows_ swaps", (height, cols), dtype, sass.registers, threads, height, shared=shared,
        items=(2 * cols * SWAPS + 4) * turns, load=turn * 4 * cols / (turns * turn * warps),
        slots=sass.issued(card) + LEAST / turns, serial=sass.loop + LEAST / turns, waits=LATENCY + BARRIER / turns,
        in_flight=turn * 6, customers=warps, cache=turn * read / 128 * LINE,
    )  # fmt: skip


SWAPS_24 = 1 / 6.7  # the same, of four sweeps over 2:4
LOOKS = 1.6  # for each swap: a warp of them goes over eight groups, of which every 6.7th has one
MOVE = 9  # instructions of moving a column of c, of the table's loops not the longest


def refine_24(card: Card, height: int, cols: int, dtype: str = "bfloat16") -> Work:
    """A block a row; an item is a swap: looks for it, of few warps, and a pass that moves c by two rows of G. These are
    taken to come from memory, though rows go over their groups in the same order."""
    place, width, threads, shared, *_ = _plan("refine", height, cols, DTYPES[dtype], card.processors, card.block_shared)
    sass = _sass(f"refine_kernel<{dtype}, {width}, {'wide' if place else 'staged'}, groups>", card)
    look = LOOKS * (sass.loop + LEAST)
    return Work(
        "refine_nm_ 2:4 swaps", (height, cols), dtype, sass.registers, threads, height, shared=shared,
        items=cols * SWAPS_24, load=8 * cols, slots=cols / WARP * MOVE + 2 * look, serial=look + cols / threads * MOVE,
        waits=LATENCY + (2 * LOOKS) * (CACHED + BARRIER), in_flight=8 * cols, cache=(8 + 16) * cols / 128 * LINE,
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


FORMS = ("bitmap", "2:4", "dense")


def quantized(
    card: Card, height: int, cols: int, form: str = "bitmap", bits: int = 8, group: int = 0, tokens: int = 1
) -> Work:
    """Up to eight tokens. Warps take 512 columns of four rows, an item; of a bitmap the next one is on its way, after a
    lead as bitmap's. x is rounded before, by a kernel that waits for x and at a barrier."""
    threads, grid, room, share, shared, *_ = _plan(
        "quantized", height, cols, bits, group, FORMS.index(form), tokens, card.processors, card.block_shared
    )
    scales = "groups" if group or bits == 4 else "rows"
    sass, rounding = _sass(f"quantized_linear_kernel<int{bits}, {form}, {scales}, {room} tokens>", card), "round_kernel"
    is_bitmap = form == "bitmap"
    stored = bits / 8 * (1 if form == "dense" else 0.5) + (form != "dense") / 8 + 2 / (group or cols)
    load, stages = 2048 * stored, 2 if is_bitmap and share > 1 else 1
    lead = (2 if is_bitmap else 1) * LATENCY + is_bitmap * CACHED + BARRIER
    lead += (sass.common - sass.loop) / 2 * STALL * card.cycle
    taken = {"bitmap": 24 * 2 + 4 + 20, "2:4": 16, "dense": 0}[form]  # takes of shared memory, and shuffles
    lines = load / 64 + 4 * bits / 8 * tokens * 2 + (4 + tokens) * (scales == "groups")  # of the weight; of x; scales
    after = RAMP / 2 + LATENCY + BARRIER + (_sass(rounding, card).loop * -(-cols // 1024)) * STALL * card.cycle
    return Work(
        _tokens(f"quantized_linear int{bits}{f'/{group}' * (group > 0)} {form}", tokens), (height, cols), "bfloat16",
        sass.registers, threads, grid, shared=shared, items=share, load=load, slots=sass.loop,
        serial=sass.loop * stages, waits=LATENCY + lead * stages / share, in_flight=load * stages, ahead=stages - 1,
        customers=threads // WARP, dense_bytes=2 * height * cols, cache=(lines + taken) * LINE, after=after,
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
