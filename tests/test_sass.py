"""What the compiler makes of the CUDA kernels: bars on the table that is checked in, and that the table is true."""

from __future__ import annotations

import csv
import itertools

import pytest

from benchmarks import sass

# Kernels whose whole traffic is W, norms, masks and packed values; x, weights and partial sums.
HOT = (
    "prune, staged>",
    "mask, staged>",
    "prune>",
    "mask>",
    "nm_any",
    "pack_24",
    "rms_norm_sqnorm_kernel",
    "act_mul_sqnorm",
    "sqnorm_kernel<",
)


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def check_bars(table: list[dict[str, str]]) -> None:
    assert {row["arch"] for row in table} == {"80", "90"}
    by_name = {(row["kernel"], row["arch"]): row for row in table}
    for row in table:
        # Spills of a few bytes, once a row, cost less than a smaller block would.
        assert int(row["local_bytes"]) <= 16, row
        if any(part in row["kernel"] for part in HOT):
            # One load of a single norm, of a listed element, is merged into lines that are not in FEW; a program of
            # segments loads where its rows begin and end, and whose they are.
            few = 3 if row["kernel"].startswith("segment_sqnorm_kernel") else 1
            assert int(row["global_all"]) - int(row["global_128"]) <= few, row
    for kernel, bar in (
        ("rows_kernel<bfloat16, 16, prune, staged>", 25),
        ("nm_kernel<bfloat16, 4, 2, prune>", 12),
        ("nm_kernel<bfloat16, 8, 4, prune>", 20),
        ("pack_24_kernel<bfloat16, select>", 12),
        ("pack_24_kernel<float16, select>", 12),
    ):
        assert float(by_name[kernel, "90"]["per_element"]) <= bar, by_name[kernel, "90"]
    # 64 elements a lane and turn of the loop. An H100's memory leaves 6.1, 3.8, 6.1, 3.8 and 9.7 instructions for each.
    for kind, bar in (
        ("int8, bitmap, rows", 4.6),
        ("int4, bitmap, groups", 5.4),
        ("int8, 2:4, rows", 2.6),
        ("int4, 2:4, groups", 3.4),
        ("int8, dense, rows", 1.4),
    ):
        for arch in ("80", "90"):
            row = by_name[f"quantized_linear_kernel<{kind}, 1 tokens>", arch]
            assert int(row["loop"]) / 64 <= bar, row
    for arch, activation in itertools.product(("80", "90"), ("silu", "gelu_tanh")):  # eight programs a processor
        assert int(by_name[f"act_mul_sqnorm_kernel<bfloat16, {activation}>", arch]["registers"]) <= 64
    # 11,008 columns take four warps of 22 quads a thread, and leave 2 % of them idle.
    common = int(by_name["rows_kernel<bfloat16, 22, prune, staged>", "90"]["common"])
    assert common * 4 * 32 / 11008 <= 25


def test_the_checked_in_table_meets_the_bars() -> None:
    check_bars(rows(sass.RESULT.read_text()))


@pytest.mark.slow
def test_the_table_is_what_the_compilers_make() -> None:
    """Rows whose sources have changed since are made anew, and the quickest always: all of them take two minutes of a
    core. For one architecture; `python -m benchmarks.sass --check` compiles everything for both."""
    if sass.missing():
        pytest.skip(f"{sass.missing()} is not installed: the kernels cannot be compiled here")
    table = rows(sass.RESULT.read_text())
    made_of = sass.sources()
    known = {row["made_of"] for row in table}
    anew = [name for name, digest in made_of.items() if digest not in known or name in ("pack_24.cu", "sqnorm.cu")]
    unchanged = {made_of[name] for name in made_of if name not in anew}
    old = [row for row in table if row["arch"] == "90" and row["made_of"] not in unchanged]
    new = rows(sass.table(sass.measure((90,), anew)))
    assert [row["kernel"] for row in old] == [row["kernel"] for row in new]
    here = (sass.nvcc_version(), sass.triton_version())
    for before, now in zip(old, new, strict=True):
        if before["compiler"] in here:  # another version makes other code
            assert before | {"made_of": now["made_of"]} == now, "run: make sass"


def test_comments_are_no_code(tmp_path) -> None:
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "a.h").write_text('#include "a.h"\nint a;  // one\n')
    kernel = tmp_path / "kernel.cu"
    kernel.write_text('#include "common/a.h"\n/* says\nwhat */ int b;')
    first = sass._code(kernel, set())
    assert "one" not in first
    assert "what" not in first
    kernel.write_text('#include "common/a.h"\n// another\n  int   b;')
    assert sass._code(kernel, set()) == first
    (tmp_path / "common" / "a.h").write_text("int a = 1;")
    assert sass._code(kernel, set()) != first
