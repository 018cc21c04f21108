"""Result rows -> Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, median
from typing import Any

from benchmarks.harness import OURS
from benchmarks.records import Row, number

NOT_MEASURED = "not measured"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---" if number == 0 else "---:" for number in range(len(headings))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [headings, rule, *rows])


def source(path: str, row: Row) -> str:
    """Where a table comes from: its file and the circumstances of its last row."""
    driver = f"driver {row['driver']}, " if row["driver"] else ""
    where = f"{row['device']}, {row['cores']} cores" if row["device_type"] == "cpu" else row["device"]
    return (
        f"`{path}`: {where}, {driver}{row['kernels']}, torch {row['torch']}, transformers {row['transformers']}, "
        f"Python {row['python']}, {row['date']}."
    )


def native(rows: Iterable[Row]) -> list[Row]:
    """Without those of an instruction set that was forced."""
    return [row for row in rows if not row["backend"].startswith("cpu") or row["kernels"].endswith(row["backend"][4:])]


def span(values: Iterable[float | None], digits: int) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return ""
    low, high = f"{min(found):.{digits}f}", f"{max(found):.{digits}f}"
    return low if low == high else f"{low}-{high}"


def _groups(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    return found


def kernels(rows: list[Row]) -> str:
    """Selection, statistics, N:M: each operator over all its shapes."""
    cells = []
    for (operator, dtype), group in _groups(native(rows), "operator", "dtype").items():
        ours = [row for row in group if row["implementation"] == OURS and not _is_for_peers(row)]
        peers = _groups((row for row in group if row["ratio_to"] == OURS), "implementation")
        faster = ", ".join(f"{name} {_ratios(found)}" for (name,), found in peers.items())
        shapes = f"{len({row['shape'] for row in ours})}"
        spans = [span((number(row, column) for row in ours), digits) for column, digits in
                 (("gb_per_s", 0), ("copy_ratio", 2))]  # fmt: skip
        cells.append([f"`{operator}`", dtype, shapes, *spans, faster])
    headings = ["operator", "dtype", "shapes", "GB/s", "time of a copy of as many bytes", "time of others to ours"]
    return table(headings, cells)


def _is_for_peers(row: Row) -> bool:
    """The first rows of a weight, on which the CPU's peers run."""
    return row["device_type"] == "cpu" and row["shape"].startswith("1024 x ")


def _ratios(rows: list[Row]) -> str:
    values = [number(row, "ratio") for row in rows]
    return span(values, 0 if all(value is None or value >= 10 for value in values) else 1)


def products(rows: list[Row]) -> str:
    """torch's dense product and the packed ones."""
    cells = []
    operators = ("bitmap_linear", "sparse24_linear")
    chosen = [row for row in native(rows) if row["operator"] in operators]
    for (shape, threads, tokens), group in _groups(chosen, "shape", "threads", "tokens").items():
        line = [shape, threads, tokens]
        for operator in operators:
            by_name = {row["implementation"]: row for row in group if row["operator"] == operator}
            dense = by_name.get("torch linear")
            if operator == "bitmap_linear":
                line.append(_ms(dense))
            line.append(_ms(by_name.get(OURS)))
            line += [_times(by_name.get(name)) for name in ("torch linear", "dense GEMV")]
        cells.append(line)
    headings = ["weight", "threads", "batch", "torch ms"]
    for name in ("bitmap", "2:4"):
        headings += [f"{name} ms", "faster than torch", "than our dense GEMV"]
    return table(headings, sorted(cells, key=lambda line: (_area(line[0]), line[0], line[1], int(line[2]))))


def values(rows: list[Row]) -> str:
    """Values of 8 and 4 bits beside a bitmap of the weight's dtype, one token."""
    cells = []
    kinds = ("int8", "int4, groups of 128", "int4, groups of 64")
    ours = [row for row in native(rows) if row["implementation"] == OURS and row["tokens"] == "1"]
    for (shape, threads), group in _groups(ours, "shape", "threads").items():
        by_name = {row["operator"]: row for row in group}
        found = [by_name.get(f"quantized_linear {kind}") for kind in kinds]
        bitmap = by_name.get("bitmap_linear")
        if bitmap is None or not any(found):
            continue
        line = [shape, threads, _ms(bitmap)]
        for row in found:
            line += ["", ""] if row is None else [_ms(row), f"{_seconds(bitmap) / _seconds(row):.2f} x"]
        cells.append(line)
    if not cells:
        return NOT_MEASURED
    headings = ["weight", "threads", "bitmap ms"]
    for kind in kinds:
        headings += [f"{kind} ms", "faster than that"]
    return table(headings, cells)


def layers(rows: list[Row]) -> str:
    """More tokens than the packed product takes at a time: what a packed layer then does, against nn.Linear."""
    cells = []
    for row in native(rows):
        if row["operator"].startswith("PackedLinear") and row["implementation"] == "torch linear":
            form = row["operator"].removeprefix("PackedLinear ")
            cells.append([form, row["shape"], row["threads"], row["tokens"], _ms(row), _times(row)])
    if not cells:
        return NOT_MEASURED
    return table(["packed layer", "weight", "threads", "tokens", "torch ms", "faster than torch"], cells)


def _area(shape: str) -> int:
    rows, cols = shape.split(" x ")
    return int(rows) * int(cols)


def _ms(row: Row | None) -> str:
    value = None if row is None else number(row, "median_ms")
    return "" if value is None else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _times(row: Row | None) -> str:
    value = None if row is None else number(row, "ratio")
    return "" if value is None else f"{value:.2f} x"


def prune(rows: list[Row]) -> str:
    """Whole runs against the official loop."""
    cells = []
    for (operator,), group in _groups((row for row in rows if row["operator"] != "generate"), "operator").items():
        parts = {(row["implementation"], row["part"]): row for row in group}
        official = {part: _seconds(parts["official loop", part]) for part in ("total", "forward")}
        for name in dict.fromkeys(row["implementation"] for row in group):
            if name == "official loop":
                continue
            ours = {part: _seconds(parts[name, part]) for part in ("total", "forward", "statistics", "selection")}
            share = (ours["statistics"] + ours["selection"]) / ours["total"]
            cells.append([
                f"{operator.removeprefix('prune ')}, `{name}`", f"{ours['total']:.1f}", f"{ours['forward']:.1f}",
                f"{share:.1%}", f"{official['total']:.1f}", f"{official['forward']:.1f}",
                f"{official['total'] / ours['total']:.2f} x", parts[name, "total"]["check"],
            ])  # fmt: skip
    headings = ["", "seconds", "forward s", "stat. + sel.", "official s", "forward s", "faster", "checked"]
    return table(headings, cells)


def headline(rows: list[Row]) -> str:
    """The first whole run that was measured, in a sentence."""
    first = next(row for row in rows if row["operator"] != "generate")
    parts = {(r["implementation"], r["part"]): r for r in rows if r["operator"] == first["operator"]}
    official, ours = (
        parts["official loop", "total"],
        next(r for r in parts.values() if r["part"] == "total" and r["check"]),
    )
    share = sum(_seconds(parts[ours["implementation"], part]) for part in ("statistics", "selection")) / _seconds(ours)

    def seconds(row: Row) -> str:
        low, high = ((number(row, name) or 0) / 1e3 for name in ("p20_ms", "p80_ms"))
        return f"{_seconds(row):.1f} s ({low:.1f}-{high:.1f})"

    what = f"{first['operator'].removeprefix('prune ')}, {first['tokens']} tokens, {first['dtype']}"
    return (
        f"Pruning {first['shape']} ({what}) takes {seconds(ours)}, a plain"
        f" reimplementation of the paper's loop {seconds(official)}: **{number(official, 'ratio'):.2f} x**, "
        f"{ours['check']}. Statistics and selection are {share:.1%} of it; what is left are the model's own forward "
        f"passes. Medians (p20-p80) of {ours['repeats']} runs of each, in turns."
    )


def _seconds(row: Row) -> float:
    value = number(row, "median_ms")
    if value is None:
        raise ValueError(f"{row['operator']}, {row['implementation']}, {row['part']} has no time")
    return value / 1e3


def generate(rows: list[Row]) -> str:
    cells = []
    for (batch, model), group in _groups(
        (row for row in rows if row["operator"] == "generate"), "tokens", "implementation"
    ).items():
        parts = {row["part"]: row for row in group}
        first, decode = _seconds(parts["first token"]), _seconds(parts["decode"])
        peak = number(parts["first token"], "peak_bytes")
        ratio = number(parts["decode"], "ratio") or 1.0
        cells.append([
            model, batch, f"{(number(parts['decode'], 'bytes') or 0) / 2**20:.0f}",
            NOT_MEASURED if peak is None else f"{peak / 2**20:.0f}", f"{first:.2f}",
            f"{int(batch) * int(parts['decode']['size']) / first:.0f}", f"{int(batch) / decode:.1f}",
            f"{1 / ratio:.2f} x",
        ])  # fmt: skip
    headings = ["model", "batch", "weights MiB", "peak MiB", "first token s", "prefill tokens/s", "decode tokens/s",
                "of dense"]  # fmt: skip
    return table(headings, cells)


def demo(result: dict[str, Any]) -> str:
    names = [name for name in ("perplexity", "on source") if all(name in row for row in result["rows"])]
    rows = []
    for row in result["rows"]:
        seconds = row["seconds"]
        parts = [f"{seconds[p]:.2f}" if p in seconds else "" for p in ("forward", "statistics", "selection", "saving")]
        rows.append([row["model"], *(f"{row[name]:.2f}" for name in names), f"{row['sparsity']:.2%}", *parts])
    headings = ["model", *names, "sparsity", "forward s", "statistics s", "selection s", "saving s"]
    return table(headings, rows)


_METHODS = {"wanda": "Wanda", "sparsegpt": "SparseGPT"}


def _named(label: str) -> str:
    method, comma, steps = label.partition(",")
    return _METHODS.get(method, method) + comma + steps


def masks(result: dict[str, Any]) -> str:
    """A row a method, of each model its means: both texts of a target in a cell, of seconds the median over all
    targets. With the default damping alone."""
    found_labels = (row["label"] for model in result["models"] for row in model["rows"])
    labels = list(dict.fromkeys(label for label in found_labels if "(damping" not in label))
    cells = {"dense": ["dense"], **{label: [_named(label)] for label in labels}}
    headings = [""]
    for model in result["models"]:
        targets = list(dict.fromkeys(row["target"] for row in model["rows"]))
        draws = sorted({len(row["seeds"]) for row in model["rows"] if row["label"] in labels})
        counted = f"{draws[0]} draw{'s' * (draws[0] > 1)}" if len(draws) == 1 else f"{draws[0]}-{draws[-1]} draws"
        headings += [f"{model['model']}, {counted}, {targets[0]}", *targets[1:], "seconds"]
        found = {(row["label"], row["target"]): row for row in model["rows"]}
        cells["dense"] += [*[_texts(model["dense"])] * len(targets), ""]
        for label in labels:
            rows = [found.get((label, target)) for target in targets]
            cells[label] += ["not measured" if row is None else _texts(_means(row["perplexities"])) for row in rows]
            seconds = [second for row in rows if row is not None for second in row["seconds"]]
            cells[label].append(f"{median(seconds):.0f}" if seconds else "")
    return table(headings, cells.values())


def all_masks(result: dict[str, Any]) -> str:
    """A row a model, method and target, with the spread over the seeds and what it costs, medians."""
    parts = ("forward", "Gram matrices", "selection", "refinement", "update")
    rows = []
    for model in result["models"]:
        rows.append(
            [model["model"], "dense", "", "", *(f"{value:.2f}" for value in model["dense"]), "", *[""] * len(parts)]
        )
        for row in model["rows"]:
            spreads = [
                f"{mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"
                for values in zip(*row["perplexities"], strict=True)
            ]
            of_parts = [median([one.get(part, 0.0) for one in row["parts"]]) for part in parts]
            rows.append([
                model["model"], _named(row["label"]), row["target"], f"{len(row['seeds'])}", *spreads,
                f"{median(row['seconds']):.1f}", *(f"{value:.1f}" if value else "" for value in of_parts),
            ])  # fmt: skip
    texts = [result["models"][0]["settings"]["text"], *result["models"][0]["settings"]["further_texts"]]
    return table(["model", "method", "target", "seeds", *(f"on {text}" for text in texts), "seconds", *parts], rows)


# As they stand in a table: what benchmarks/deploy.py calls its models.
_DEPLOYED = {
    "dense": "dense, bfloat16", "bitmap": "50 %, bitmap, bfloat16", "bitmap-int8": "50 %, int8, head int8",
    "bitmap-int4": "50 %, int4 in groups of 64, head int8",
}  # fmt: skip


def deploy(result: dict[str, Any]) -> str:
    """A row a model, by their slowest way, the slowest first. Bits a weight: of the dense model's 16, by the bytes."""
    rows = result["rows"]
    dense = next(row["weight_bytes"] for row in rows if row["model"] == "dense")
    cells = []
    for name in dict.fromkeys(row["model"] for row in sorted(rows, key=_decodes)):
        ways = {row["way"]: row for row in rows if row["model"] == name}
        row, static = next(iter(ways.values())), ways.get("static")
        cells.append([
            _DEPLOYED.get(name, f"llama.cpp {name}"), f"{row['weight_bytes'] / 2**20:.0f}",
            f"{16 * row['weight_bytes'] / dense:.1f}", _texts(row["perplexities"]), f"{row['prefill_tokens_s']:.0f}",
            f"{row['decode_tokens_s']:.1f}", "" if static is None else f"{static['decode_tokens_s']:.1f}",
        ])  # fmt: skip
    headings = [result["model"], "weights MiB", "bits a weight", "perplexity", "prefill tokens/s", "decode tokens/s",
                "compiled step"]  # fmt: skip
    return table(headings, cells)


def _decodes(row: dict[str, Any]) -> float:
    return float(row["decode_tokens_s"])


def _means(values: Sequence[Sequence[float]]) -> list[float]:
    return [mean(column) for column in zip(*values, strict=True)]


def _texts(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.1f}" if value < 1000 else f"{value:.3g}" for value in values)


def every_row(rows: list[Row]) -> str:
    """All of a file."""
    cells = []
    for row in rows:
        name = " ".join(part for part in (row["operator"], row["part"], row["size"]) if part)
        figures = [number(row, column) for column in ("median_ms", "p20_ms", "p80_ms", "gb_per_s", "copy_ratio")]
        ms, low, high = ("" if value is None else f"{value:.4g}" for value in figures[:3])
        speed, copy = ("" if value is None else f"{value:.2f}" for value in figures[3:])
        ratio = number(row, "ratio")
        about = [row[column] for column in ("shape", "tokens", "dtype", "backend", "threads")]
        cells.append([
            name, row["implementation"], *about, ms, f"{low}-{high}" if low else "", speed, copy,
            "" if ratio is None else f"{ratio:.2f}", row["check"],
        ])  # fmt: skip
    headings = ["operator", "implementation", "shape", "tokens", "dtype", "backend", "threads", "ms", "p20-p80",
                "GB/s", "x copy", "ratio", "checked"]  # fmt: skip
    return table(headings, cells)
