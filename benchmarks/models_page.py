"""docs/models.md, from benchmarks/results/models.json."""

from __future__ import annotations

from typing import Any

from benchmarks.family import BATCH, LENGTH, SAMPLES, TARGETS, Row
from benchmarks.places import RESULTS, ROOT
from benchmarks.tables import table
from benchmarks.tiny_configs import KINDS, USED_MOST

RESULT = RESULTS / "models.json"
PAGE = ROOT / "docs" / "models.md"
TITLES = {"causal": "Causal language models", "image-text": "Image-text models"}
HEADINGS = ("family", "runs", "pruned", *(f"bits that differ, {target}" for target in TARGETS), "dense", "packed",
            "streamed", "why not, and what stays dense")  # fmt: skip
LONGEST = 160  # of what a cell says; the results file has all of it
ABOUT = f"""# Models

Every family of transformers' causal and image-text mappings, on a tiny random model of it: at most six blocks, 64
wide, float32, calibrated on {SAMPLES} x {LENGTH} tokens in batches of {BATCH}. Written by `python -m
benchmarks.families`, which compares with a plain Wanda of its own that shares no code with the package
(`benchmarks/plain_wanda.py`).

- **runs**: `AutoModelForCausalLM.from_config`, or `AutoModelForImageTextToText.from_config`, gives finite logits for
  token ids alone, twice the same.
- **pruned**: `wanda_kernels.prune` does it; else the last column says why it is refused.
- **bits that differ**: of the two masks, at 50 % and at 2:4.
- **dense**: share of the blocks' weights, of two dimensions or more, that were not pruned; the last column names them.
- **packed**: `compress`, and the largest difference of the logits over the largest logit. **streamed**: `stream_prune`
  from a saved folder writes the input's tensors, with the bits of the run in memory.
- Families in bold are those that people use most.
"""


def is_equal(row: Row) -> bool:
    """Whether a pruned family has the plain Wanda's masks, for each target."""
    return all(isinstance(bits, list) and bits[0] == 0 for bits in row["bits"].values())


def page(result: dict[str, Any]) -> str:
    """The whole page."""
    about, rows = result["circumstances"], result["rows"]
    parts = [ABOUT, counts(rows)]
    parts.append(
        f"`benchmarks/results/{RESULT.name}`: transformers {about['transformers']}, torch {about['torch']}, Python "
        f"{about['python']}, {about['kernels']}, {about['date']}.\n"
    )
    for kind, title in TITLES.items():
        cells = [_cells(row) for row in sorted(_of(rows, kind), key=lambda row: row["family"])]
        parts += [f"## {title}\n", _left(table(HEADINGS, cells)), ""]
    return "\n".join(parts)


def counts(rows: list[Row]) -> str:
    """How many families there are, run, are pruned, and to which bits; a table."""
    headings = ("decoders", "families", "run", "pruned", "refused", "pruned, 0 bits differ", "packed", "streamed")
    lines = []
    for kind, title in TITLES.items():
        found = [row for row in _of(rows, kind) if not row["encoder"]]
        lines.append(_count(title, found))
        if kind == "causal":
            lines.append(_count("of them, those used most", [row for row in found if row["family"] in USED_MOST]))
    both = sum(row["encoder"] for row in rows)
    return f"{table(headings, lines)}\n\n{both} more rows are of encoder-decoders, which are not pruned.\n"


def _count(title: str, rows: list[Row]) -> list[str]:
    runs = [row for row in rows if row["runs"]]
    pruned = [row for row in rows if row["pruned"]]
    figures = (
        len(rows), len(runs), len(pruned), len(runs) - len(pruned), sum(map(is_equal, pruned)),
        sum(row["packed"]["ok"] for row in pruned), sum(row["streamed"]["ok"] for row in pruned),
    )  # fmt: skip
    return [title, *map(str, figures)]


def line(row: Row) -> str:
    """A row in words, for the screen."""
    if not row["pruned"]:
        return f"{row['kind']} {row['family']}: {'refused' if row['runs'] else 'does not run'}: {row['why']}"
    told = zip(HEADINGS[3:], _cells(row)[3:], strict=True)
    return f"{row['kind']} {row['family']}: " + "; ".join(f"{heading}: {cell}" for heading, cell in told if cell)


def _of(rows: list[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _left(markdown: str) -> str:
    """The last column is text."""
    head, rule, *lines = markdown.split("\n")
    return "\n".join([head, rule.removesuffix("---: |") + "--- |", *lines])


def _cells(row: Row) -> list[str]:
    name = row["family"]
    name = f"**{name}**" if name in USED_MOST else name
    name += ", encoder-decoder" if row["encoder"] else ""
    cells = [name, _word(row["runs"]), _word(row["pruned"])]
    if not row["pruned"]:
        return [*cells, *[""] * (len(TARGETS) + 3), _short(row["why"])]
    notes = []
    for target in TARGETS:
        bits = row["bits"][target]
        cells.append(f"{bits[0]:,} of {bits[1]:,}" if isinstance(bits, list) else "no answer")
        if not isinstance(bits, list):
            notes.append(f"{target}: {bits}")
    cells.append(f"{row['dense']['share']:.1%}")
    if row["dense"]["names"]:
        notes.append("dense: " + ", ".join(row["dense"]["names"]))
    if row["dense"]["unreported"]:
        notes.append("not in the report: " + ", ".join(row["dense"]["unreported"]))
    packed, streamed = row["packed"], row["streamed"]
    cells.append(f"{packed['difference']:.0e}" if packed["ok"] else "no")
    cells.append(_word(streamed["ok"]))
    if packed["ok"] and packed["share"] < 1:
        notes.append(f"packed: {packed['share']:.1%} of what is pruned")
    notes += [f"{what}: {one['why']}" for what, one in (("packed", packed), ("streamed", streamed)) if not one["ok"]]
    return [*cells, "; ".join(_short(note) for note in notes)]


def _word(yes: bool) -> str:
    return "yes" if yes else "no"


def _short(text: str) -> str:
    text = text.replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rstrip()} ..."


def missing_names() -> set[str]:
    """Of the most used families, those that no mapping has."""
    return set(USED_MOST) - {family for families in KINDS.values() for family in families}
