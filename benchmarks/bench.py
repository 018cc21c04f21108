"""``wanda-kernels bench``: its options and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import records
from benchmarks.circumstances import RESULTS, folder_name
from benchmarks.harness import Settings
from benchmarks.shapes import weights_of
from benchmarks.suites import SUITES
from benchmarks.suites import run as run_suite
from wanda_kernels.cli.display import bar, quiet_libraries, tell_reference
from wanda_kernels.cli.display import screen as screen_of
from wanda_kernels.cli.options import Debug, Device, usage
from wanda_kernels.models.load import choose_device
from wanda_kernels.models.save import check_writable

_SHORT = {"bfloat16": "bf16", "float32": "fp32"}
_HELP = "end-to-end|select|stats|nm|sparse|scaling"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.command()
def bench(
    suite: Annotated[list[str] | None, typer.Option("--suite", metavar=_HELP, help="May be given again.")] = None,
    device: Device = "auto",
    models: Annotated[
        str | None, typer.Option("--models", metavar="7B,3-70B,..", help="Whose shapes. \\[default: by device]")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Of each candidate at most, in turns.")] = 15,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="For the rows. \\[default: benchmarks/results/<device>]"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny shapes, to see that all runs; written only to --out.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option("--compare", metavar="A.csv B.csv", help="Measure nothing; B against A.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure the kernels and whole runs, each checked first, against their peers, side by side."""
    screen = screen_of(130)
    if compare is not None:
        _compare(*compare, screen)
        return
    _measure(suite or [], device, models.split(",") if models else None, repeats, out, quick, screen)


def _measure(
    suites: list[str], device: str, models: list[str] | None, repeats: int, out: Path | None, quick: bool,
    screen: Console,
) -> None:  # fmt: skip
    unknown = [name for name in suites if name not in SUITES]
    with usage():
        if unknown:
            raise ValueError(f"--suite must be one of {', '.join(SUITES)}, got '{unknown[0]}'")
        if models:
            weights_of(models)
        target = choose_device(device)
    if out is not None:
        check_writable(out)
    quiet_libraries()
    tell_reference(target)
    settings = Settings(device=target, repeats=min(repeats, 2) if quick else repeats, quick=quick)
    if out is None and not quick:
        out = RESULTS / folder_name(target)
    wrong: list[str] = []
    with bar() as shown:
        for name in (name for name in SUITES if name in suites or not suites):
            rows, found = run_suite(name, settings, models, out, shown)
            wrong += found
            screen.print(draw(name, rows))
            if out is not None:
                screen.print(f"wrote {out / name}.csv", highlight=False, soft_wrap=True)
    if wrong:
        raise RuntimeError(f"{len(wrong)} cases are wrong and were not timed: {'; '.join(wrong)}")


def _compare(before: Path, after: Path, screen: Console) -> None:
    old, new = records.read(before), records.read(after)
    compared = records.compare(old, new)
    if not compared:
        raise ValueError(f"{before} and {after} have no measured row in common")
    screen.print(records.draw_comparison(compared))
    devices = {row["device"] for row in (*old, *new)}
    if len(devices) > 1:
        screen.print(f"note: measured on different devices: {', '.join(sorted(devices))}", highlight=False)
    counts = {word: sum(row["verdict"] == word for row in compared) for word in ("slower", "faster")}
    screen.print(
        f"{len(compared)} rows in both; beyond the spread {counts['slower']} slower, {counts['faster']} faster",
        highlight=False,
    )


def draw(suite: str, rows: list[dict[str, Any]]) -> Table:
    title = f"{suite}: medians; x copy: time a byte, of a copy's; ratio: time, of ours or what is named"
    table = Table(title=title, title_justify="left")
    for heading in ("case", "implementation"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "p20-p80", "GB/s", "x copy", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        case = [row["operator"], _SHORT.get(row["dtype"], row["dtype"]), row["shape"]]
        case += [f"x {row['tokens']}"] if row.get("tokens") else []
        case += [f"{row['threads']} thr."] if row.get("threads") else []
        case += [str(row[key]) for key in ("part", "size") if row.get(key)]
        spread = f"{_ms(row['p20_ms'])}-{_ms(row['p80_ms'])}" if row.get("p20_ms") is not None else ""
        to = "" if row.get("ratio_to") in (None, "wanda_kernels") else f" {row['ratio_to']}"
        ratio = f"{row['ratio']:.2f}{to}" if row.get("ratio") is not None else ""
        table.add_row(
            " ".join(case), row["implementation"], _ms(row["median_ms"]), spread, _figure(row, "gb_per_s"),
            _figure(row, "copy_ratio"), ratio,
        )  # fmt: skip
    return table


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _figure(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    return "" if value is None else f"{value:.2f}"
