"""A study's results as tables: heading, rows and a caption each, empty ones left out."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from ..methods import METHODS
from .plan import COMPARED, GROUPS

Row = dict[str, Any]
PATTERNS = ("50%", "4:8", "2:4")
STEPS = ("refinement", "update")  # parts of a run's seconds after the selection


@dataclass(frozen=True)
class Table:
    title: str
    caption: str
    heading: list[str]
    rows: list[list[str]]


def figure(value: float | None) -> str:
    """A perplexity, readable at any size."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def is_plain(run: Row) -> bool:
    """A method without options, and without what may come after it."""
    return is_by_itself(run) and not (run["refine"] or run["update"])


def is_by_itself(run: Row) -> bool:
    """A method without options; its mask may be refined, its weights updated."""
    return not (run["group"] or run["variant"] or run["owl"] or run["weight_update"] is False)


def texts(data: Row) -> list[str]:
    """What was evaluated on; the first is the one of the tables that have one."""
    return [str(text) for text in (data["settings"]["text"], *data["settings"]["further_texts"])]


def perplexities(record: Row) -> list[float]:
    """Of a run or the dense model, on each of the texts."""
    return [record["perplexity"], *record["further"]]


def by_label(runs: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """(label, target) -> the runs, of all seeds: target by target, the methods in their order."""
    targets = _targets(runs)
    found: dict[tuple[str, str], list[Row]] = {}
    for run in sorted(runs, key=lambda run: (targets.index(run["target"]), order().index(run["method"]))):
        found.setdefault((run["label"], run["target"]), []).append(run)
    return found


def base_samples(runs: list[Row]) -> int:
    """The number of samples that most runs have."""
    counts = [run["samples"] for run in runs if run["samples"]]
    return max(set(counts), key=counts.count) if counts else 0


def at_base(runs: list[Row]) -> list[Row]:
    """Runs with the usual number of samples and the first seed."""
    samples = base_samples(runs)
    return [run for run in first_seed(runs) if run["samples"] in (0, samples)]


def first_seed(runs: list[Row]) -> list[Row]:
    seed = min((run["seed"] for run in runs), default=0)
    return [run for run in runs if run["seed"] == seed]


def lookup(runs: list[Row], **wanted: Any) -> float | None:
    """The perplexity of the first run that has all of ``wanted``."""
    return next((run["perplexity"] for run in runs if all(run[k] == v for k, v in wanted.items())), None)


def order() -> list[str]:
    """Of methods: the paper's first."""
    return [*COMPARED, *(name for name in METHODS if name not in COMPARED)]


def _targets(runs: list[Row]) -> list[str]:
    found = {run["target"]: (run["pattern"] is not None, -(run["sparsity"] or 0), run["target"]) for run in runs}
    order = {target: number for number, target in enumerate(PATTERNS)}
    return sorted(found, key=lambda target: (order.get(target, len(order)), found[target]))


def _grid(runs: list[Row], along: str, columns: list[Any], least: int = 1) -> list[list[str]]:
    """A row for each method, with its perplexities where ``along`` is each of ``columns``: at the ``least`` so many."""
    cells = [
        [method, *(figure(lookup(runs, **{"method": method, along: column})) for column in columns)]
        for method in sorted({run["method"] for run in runs}, key=order().index)
    ]
    return [row for row in cells if sum(map(bool, row[1:])) >= least]


def perplexity_table(data: Row, published: dict[str, dict[str, float]] | None) -> Table:
    runs = [run for run in at_base(data["runs"]) if is_plain(run) and not METHODS[run["method"]].update]
    columns = [target for target in _targets(runs) if target in PATTERNS] or _targets(runs)
    rows = _grid(runs, "target", columns)
    dense = data["dense"]["perplexity"] if data["dense"] else None
    rows.insert(0, ["dense", *[figure(dense)] * len(columns)])
    if published is not None:
        for method in ("dense", *COMPARED):
            cells = [published.get("dense" if method == "dense" else target, {}).get(method) for target in columns]
            rows.append([f"{method}, LLaMA-2 as published", *map(figure, cells)])
    caption = "Perplexity, lower is better. The paper's main comparison (its table of pruned LLaMA and LLaMA-2)."
    return Table("Perplexity", caption, ["method", *columns], rows)


def sparsity_table(data: Row) -> Table:
    runs = [r for r in at_base(data["runs"]) if is_plain(r) and not r["pattern"] and not METHODS[r["method"]].update]
    columns = sorted(_targets(runs), key=lambda target: float(target.rstrip("%")))
    rows = _grid(runs, "target", columns, least=2)
    return Table("Sparsity", "Perplexity of unstructured pruning.", ["method", *columns], rows)


def calibration_table(data: Row) -> Table:
    runs = [run for run in first_seed(data["runs"]) if is_plain(run) and run["target"] == "50%" and run["samples"]]
    counts = sorted({run["samples"] for run in runs})
    rows = _grid(runs, "samples", counts, least=2)
    return Table("Calibration samples", "Perplexity at 50 % by number of samples.", ["method", *map(str, counts)], rows)


def group_table(data: Row) -> Table:
    runs = [run for run in at_base(data["runs"]) if run["group"] and not run["variant"] and not run["owl"]]
    runs = [run for run in runs if run["sparsity"] == 0.5]
    known = [group for group in GROUPS if any(run["group"] == group for run in runs)]
    groups = known + sorted({run["group"] for run in runs} - set(known))
    caption = (
        "Perplexity at 50 % by pruning metric and comparison group, without weight update. column is (input, 1) in the "
        "paper, column:128 (input, 128), row (output, 1), row:128 (output, 128)."
    )
    return Table("Metric and comparison group", caption, ["metric", *groups], _grid(runs, "group", groups))


def update_table(data: Row) -> Table:
    runs = [run for run in at_base(data["runs"]) if is_plain(run)]
    columns = [
        target for target in PATTERNS if any(r["target"] == target and METHODS[r["method"]].update for r in runs)
    ]
    rows = []
    updated = [(m.baseline, m.update, name) for name, m in METHODS.items() if m.baseline and m.update]
    for name in dict.fromkeys(baseline for baseline, _, _ in updated):
        for label, method in [("none", name), *((u, n) for baseline, u, n in updated if baseline == name)]:
            cells = [figure(lookup(runs, method=method, target=target)) for target in columns]
            if any(cells):
                rows.append([name, label, *cells])
    caption = "Perplexity with SparseGPT's weight update on the masks of magnitude and Wanda (the paper's ablation)."
    return Table("Weight update", caption, ["mask", "update", *columns], rows if columns else [])


def other_table(data: Row) -> Table:
    runs = at_base(data["runs"])
    plain = [run for run in runs if is_plain(run)]
    rows = []
    for run in runs:
        method = METHODS[run["method"]]
        beside = None if method.update else method.baseline
        if not run["group"] and (run["variant"] or run["owl"] or (beside and is_plain(run))):
            without = lookup(
                plain, method=run["method"] if run["owl"] else beside or run["method"], target=run["target"]
            )
            rows.append([run["label"], run["target"], figure(run["perplexity"]), figure(without)])
    caption = "The appendix's variant, RIA, and OWL's sparsity by block, beside Wanda or the method without it."
    return Table("Other methods", caption, ["method", "target", "perplexity", "without"], rows)


def text_table(data: Row) -> Table:
    """Where there is a second text, or a refined mask: all methods by themselves on all texts."""
    samples = base_samples(data["runs"])
    runs = [run for run in data["runs"] if is_by_itself(run) and run["samples"] in (0, samples)]
    if len(texts(data)) == 1 and all(is_plain(run) for run in runs):
        runs = []
    rows = []
    if runs and data["dense"]:
        rows.append(["dense", "", "", *map(figure, perplexities(data["dense"])), ""])
    for (label, target), found in by_label(runs).items():
        means = [figure(statistics.mean(values)) for values in zip(*map(perplexities, found), strict=True)]
        seconds = statistics.mean(run["seconds"] for run in found)
        rows.append([label, target, str(len(found)), *means, f"{seconds:.1f}"])
    caption = (
        "Perplexity on each text, and seconds of pruning: means over the seeds. Refined: as many weights pruned, "
        "others where that is better; updated: what is kept changes."
    )
    heading = ["method", "target", "seeds", *(f"on {text}" for text in texts(data)), "seconds"]
    return Table("Texts, refined masks, updated weights", caption, heading, rows)


def seed_table(data: Row) -> Table:
    runs = [r for r in data["runs"] if is_by_itself(r) and r["samples"] == base_samples(data["runs"])]
    rows = []
    for (label, target), found in by_label(runs).items():
        if len(found) > 1:
            cells = []
            for values in zip(*map(perplexities, found), strict=True):
                spread = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
                cells += [figure(statistics.mean(values)), f"{spread:.3f}"]
            rows.append([label, target, str(len(found)), *cells])
    heading = ["method", "target", "seeds", "mean perplexity", "standard deviation"]
    for text in texts(data)[1:]:
        heading += [f"mean on {text}", "standard deviation"]
    return Table("Seeds", "Robustness to which calibration samples are drawn.", heading, rows)


def parts_of(runs: list[Row]) -> list[str]:
    """Of the seconds of pruning, those that are shown: selection is everywhere, what comes after it where it was."""
    return ["forward", "statistics", "selection", *(p for p in STEPS if any(p in run["parts"] for run in runs))]


def cost_table(data: Row) -> Table:
    runs = [run for run in at_base(data["runs"]) if not run["group"] and run["target"] in PATTERNS]
    rows = []
    for run in runs:
        parts = [f"{run['parts'].get(part, 0.0):.1f}" for part in parts_of(runs)]
        peak = run["peak_memory_bytes"]
        memory = "not measured" if peak is None else f"{peak / 2**20:.0f}"
        rows.append([run["label"], run["target"], f"{run['seconds']:.1f}", *parts, memory])
    heading = ["method", "target", "seconds", *parts_of(runs), "peak MiB beyond the model"]
    return Table("Time and memory", "Of pruning, without loading and evaluation.", heading, rows)


def all_tables(data: Row, published: dict[str, dict[str, float]] | None) -> dict[str, Table]:
    """``data``: as :class:`Results` has it, with ``runs`` a list. Those with rows, in the report's order."""
    tables = {
        "perplexity": perplexity_table(data, published), "texts": text_table(data), "sparsity": sparsity_table(data),
        "calibration": calibration_table(data), "groups": group_table(data), "update": update_table(data),
        "others": other_table(data), "seeds": seed_table(data), "cost": cost_table(data),
    }  # fmt: skip
    return {name: table for name, table in tables.items() if table.rows}
