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
from .options import CALIBRATION, Calibration, Debug, Device, Dtype, Model, Text, check_texts, usage

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
    refine: Annotated[
        bool, typer.Option("--refine", help="Of the grid: also each method's mask refined, where it keeps the weights.")
    ] = False,
    refine_damping: Annotated[
        str | None,
        typer.Option("--refine-damping", metavar="D,..", help="With each of these. \\[default: as for prune]"),
    ] = None,
    update: Annotated[
        bool,
        typer.Option(
            "--update", help="Of the grid: also with updated weights, on refined masks where --refine is given."
        ),
    ] = False,
    update_damping: Annotated[
        str | None,
        typer.Option("--update-damping", metavar="D,..", help="With each of these. \\[default: as for prune]"),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers/--no-layers", help="Of the grid: each layer's error and threshold (prunes twice).")
    ] = True,
    calibration: Calibration = None,
    pack: Annotated[bool, typer.Option("--pack", help="As for prune.")] = False,
    column: Annotated[str, typer.Option("--column", help="As for prune.")] = "text",
    text: Text = None,
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
    from ..text.calibration import check_sources
    from ..text.sources import parse_sources
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
        sources, texts = calibration or CALIBRATION, check_texts(text)
        check_sources(sources, min(counts))
        names_of_texts = [_name(one) for one in texts]
        for name in names_of_texts:
            if names_of_texts.count(name) > 1:
                raise ValueError(f"--text must name files with different names, which a study shows: two are {name}")
        if paper:
            dampings = (("--refine-damping", bool(refine_damping)), ("--update-damping", bool(update_damping)))
            for name, is_given in (("--refine", refine), ("--update", update), *dampings):
                if is_given:
                    raise ValueError(f"{name} is of the grid: --paper has such rows of its own")
            if len(sources) > 1 and min(size.sizes) < len(sources):
                raise ValueError(f"--paper calibrates on {min(size.sizes)} samples, too: give one --calibration")
            if len(counts) > 1:
                raise ValueError(f"--paper varies the samples by itself: give --samples one number, got {samples}")
            plan = paper_plan(dataclasses.replace(size, samples=counts[0]))
        else:
            shares = _split("--sparsities", sparsities, float) or ([] if patterns else [0.5])
            kinds = [None if group.strip() == "own" else group.strip() for group in groups.split(",")]
            names = [name.strip() for name in methods.split(",")]
            chosen = [pattern.strip() for pattern in patterns.split(",")] if patterns else []
            plan = grid(
                names, shares, chosen, kinds, counts, _split("--seeds", seeds, int), detail=layers,
                refine=_axis("refine", refine, refine_damping), update=_axis("update", update, update_damping),
            )  # fmt: skip
            if not plan:
                raise ValueError("no run is left: groups go with sparsities, not with patterns or ablations")
        session = Session(model, dtype, device)
    check_library()
    check_folder(out)
    given = {
        "calibration": ", ".join(_name_of_source(source, len(sources)) for source in parse_sources(sources)),
        "text": names_of_texts[0], "further_texts": names_of_texts[1:], "length": tokens, "pack": pack,
    }  # fmt: skip
    if not overwrite:
        refuse_other_study(out, given)
    session.begin()
    evaluation = [session.windows(one, tokens, windows or size.windows) for one in texts]

    @functools.cache
    def calibrate(count: int, seed: int) -> Any:
        return session.calibration(sources, count, tokens, seed, pack=pack, column=column)

    largest = max((run.samples for run in plan), default=0)
    if largest:
        calibrate(largest, 0)
    loaded = session.model
    settings = {
        "model": loaded.config._name_or_path, "windows": len(evaluation[0]),
        "further_windows": [len(one) for one in evaluation[1:]], **given,
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
            evaluated = shown.add_task("evaluating", total=sum(map(len, evaluation)))
            runner = Runner(loaded, calibrate, evaluation, on_window=lambda n: shown.update(evaluated, completed=n))
            if results.data["dense"] is None:
                dense = runner.dense()
                results.set_dense(dense)
                note(f"dense: perplexity {_figures(dense)}")
            for run in missing:
                with pruning_bar(shown, run.key) as progress:
                    outcome = runner.run(run, progress)
                results.add(run, outcome)
                done += 1
                shown.update(whole, completed=done)
                note(f"{run.key}: perplexity {_figures(outcome)}, {outcome['seconds']:.1f} s")
        data = results.data | {"runs": results.runs}
        write_report(out / "report.html", data, published(loaded.config) if sources == CALIBRATION else None)
    except KeyboardInterrupt:
        note(f"interrupted; {done} of {len(plan)} runs are in {out}: the same command goes on")
        sys.exit(interrupt.exit_code())
    print(f"{len(results.runs)} runs: {out / 'report.html'}, results.json, results.csv")


def _axis(name: str, wanted: bool, dampings: str | None) -> list[float | None]:
    """The values of ``--NAME-damping`` where ``--NAME`` is given, None for the default; no value where it is not."""
    values = _split(f"--{name}-damping", dampings, float)
    if dampings is not None and not wanted:
        raise ValueError(f"--{name}-damping {dampings} needs --{name}")
    return (values or [None]) if wanted else []


def _figures(record: dict[str, Any]) -> str:
    return " / ".join(f"{value:.2f}" for value in (record["perplexity"], *record["further"]))


def _name_of_source(source: Any, count: int) -> str:
    """With its share, where there are several."""
    return _name(source.name) if count == 1 else f"{_name(source.name)}={float(source.share):.6g}"


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
