"""``wanda-kernels study``: many pruning runs of one model, compared in one report."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import interrupt
from .options import Debug, Device, Dtype, Model, usage

Scale = Annotated[
    str,
    typer.Option(
        "--scale",
        metavar="full|small|tiny",
        help="Of --paper: full is the paper's (128 x 2048 tokens, up to 2048 samples); small, tiny: 16 x 512 and 8 x "
        "256 tokens, 8 windows, for small models on a CPU.",
    ),
]


def _split(name: str, text: str | None, kind: type) -> list[Any]:
    try:
        return [kind(part.strip()) for part in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"{name} must be numbers with commas between them, got '{text}'") from None


def study_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for results and report.html.")],
    paper: Annotated[bool, typer.Option("--paper", help="The paper's tables and figures, instead of a grid.")] = False,
    scale: Scale = "full",
    methods: Annotated[
        str, typer.Option("--methods", metavar="METHOD,..", help="Of the grid.")
    ] = "magnitude,sparsegpt,wanda",
    sparsities: Annotated[
        str | None, typer.Option("--sparsities", metavar="S,..", help="\\[default: 0.5, where no patterns are given]")
    ] = None,
    patterns: Annotated[str | None, typer.Option("--patterns", metavar="N:M,..")] = None,
    groups: Annotated[
        str, typer.Option("--groups", metavar="GROUP,..", help="Comparison groups; own: each method's.")
    ] = "own",
    samples: Annotated[
        str | None, typer.Option("--samples", metavar="N,..", help="\\[default: 128; with --paper: the scale's]")
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="SEED,..", help="Of the drawing; of the grid.")] = "0",
    calibration: Annotated[
        str, typer.Option("--calibration", metavar="c4|wikitext2|HUB_ID|FILE", help="As for prune.")
    ] = "c4",
    pack: Annotated[bool, typer.Option("--pack", help="As for prune.")] = False,
    column: Annotated[str, typer.Option("--column", help="As for prune.")] = "text",
    text: Annotated[str, typer.Option("--text", metavar="wikitext2|FILE", help="As for eval.")] = "wikitext2",
    length: Annotated[
        int | None,
        typer.Option("--length", min=2, help="Tokens a sample and a window. \\[default: 2048, or the scale's]"),
    ] = None,
    windows: Annotated[
        int | None, typer.Option("--windows", min=1, help="Evaluate on so many. \\[default: all, or the scale's]")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, whatever is in DIR.")] = False,
    debug: Debug = False,
) -> None:
    """Prune MODEL in many ways and compare. The same command again goes on where it was ended."""
    from ..study import Results, Runner, grid, paper_plan, write_report
    from ..study.paper import published
    from ..study.pictures import check_library
    from ..study.plan import SCALES
    from ..study.results import FILES, check_folder, refuse_other_study
    from .display import bar, note, pruning_bar
    from .session import Session

    with usage():
        if scale not in SCALES:
            raise ValueError(f"--scale must be one of {', '.join(SCALES)}, got '{scale}'")
        size = SCALES[scale]
        counts = _split("--samples", samples, int) or [size.samples]
        if min(counts) < 1:
            raise ValueError(f"--samples must be at least 1, got {samples}")
        tokens = length or size.length
        if paper:
            if len(counts) > 1:
                raise ValueError(f"--paper varies the samples by itself: give --samples one number, got {samples}")
            plan = paper_plan(dataclasses.replace(size, samples=counts[0]))
        else:
            shares = _split("--sparsities", sparsities, float) or ([] if patterns else [0.5])
            kinds = [None if group.strip() == "own" else group.strip() for group in groups.split(",")]
            names = [name.strip() for name in methods.split(",")]
            chosen = [pattern.strip() for pattern in patterns.split(",")] if patterns else []
            plan = grid(names, shares, chosen, kinds, counts, _split("--seeds", seeds, int))
            if not plan:
                raise ValueError("no run is left: groups go with sparsities, not with patterns or ablations")
        session = Session(model, dtype, device)
    check_library()
    check_folder(out)
    given = {"calibration": _name(calibration), "text": _name(text), "length": tokens, "pack": pack}
    if not overwrite:
        refuse_other_study(out, given)
    session.begin()
    evaluation = session.windows(text, tokens, windows or size.windows)

    @functools.cache
    def calibrate(count: int, seed: int) -> Any:
        return session.calibration(calibration, count, tokens, seed, pack=pack, column=column)

    largest = max((run.samples for run in plan), default=0)
    if largest:
        calibrate(largest, 0)
    loaded = session.model
    settings = {
        "model": loaded.config._name_or_path, "windows": len(evaluation), **given,
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }  # fmt: skip
    if overwrite:
        for name in FILES:
            (out / name).unlink(missing_ok=True)
    results = Results(out, settings, _circumstances(loaded))
    missing = [run for run in plan if run not in results]
    done = len(plan) - len(missing)
    if done:
        note(f"{done} of {len(plan)} runs are in {out} already")
    try:
        with bar() as shown:
            whole = shown.add_task("study", total=len(plan), completed=done)
            evaluated = shown.add_task("evaluating", total=len(evaluation))
            runner = Runner(loaded, calibrate, evaluation, on_window=lambda n: shown.update(evaluated, completed=n))
            if results.data["dense"] is None:
                dense = runner.dense()
                results.set_dense(dense)
                note(f"dense: perplexity {dense['perplexity']:.2f}")
            for run in missing:
                with pruning_bar(shown, run.key) as progress:
                    outcome = runner.run(run, progress)
                results.add(run, outcome)
                done += 1
                shown.update(whole, completed=done)
                note(f"{run.key}: perplexity {outcome['perplexity']:.2f}, {outcome['seconds']:.1f} s")
        data = results.data | {"runs": results.runs}
        write_report(out / "report.html", data, published(loaded.config) if calibration == "c4" else None)
    except KeyboardInterrupt:
        note(f"interrupted; {done} of {len(plan)} runs are in {out}: the same command goes on")
        sys.exit(interrupt.exit_code())
    print(f"{len(results.runs)} runs: {out / 'report.html'}, results.json, results.csv")


def _name(source: str) -> str:
    """Of a file, its name: where it lies is not part of what was measured."""
    return Path(source).name if Path(source).expanduser().exists() else source


def _circumstances(model: Any) -> dict[str, Any]:
    import torch
    import transformers

    from .info import processor_name

    device = next(model.parameters()).device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
