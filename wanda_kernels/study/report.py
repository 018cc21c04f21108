"""The report of a study: one HTML file that needs nothing else."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from .paper import SOURCE
from .pictures import all_pictures
from .results import replace_file
from .stored import checked
from .tables import Table, all_tables, texts

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --page: #ffffff; --line: #d0d7de; --soft: #57606a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --page: #0d1117; --line: #30363d; --soft: #9aa4af; }
}
body { color: var(--ink); background: var(--page); font: 16px/1.5 system-ui, sans-serif;
  max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
.wide { overflow-x: auto; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
p.caption, figcaption, footer { color: var(--soft); font-size: 0.9rem; }
figure { margin: 1rem 0; } svg { width: 100%; height: auto; }
"""

_TITLES = {"layers": "Layer by layer", "damping": "Damping"}


def write_report(path: Path, data: dict[str, Any], published: dict[str, dict[str, float]] | None = None) -> None:
    """``data``: a study's results, with ``runs`` a list. ``published``: figures of the paper for the same model.

    Raises:
        ValueError: a field of ``data`` is not what it has to be, with its name.
    """
    data = checked(data)
    tables, pictures = all_tables(data, published), all_pictures(data)
    body = []
    for name in dict.fromkeys([*tables, *pictures]):
        table, drawn = tables.get(name), pictures.get(name, [])
        if table is None and not drawn:
            continue
        body.append(f"<h2>{escape(table.title if table else _TITLES[name])}</h2>")
        if table is not None:
            body.append(_table(table))
        body += [f"<figure>{svg}<figcaption>{escape(text)}</figcaption></figure>" for text, svg in drawn]
    model = escape(str(data["settings"]["model"]))
    source = f"<p class='caption'>Published figures: {escape(SOURCE)}.</p>" if published else ""
    damped = sum(run["damped"] for run in data["runs"])
    replace_file(
        path,
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>Pruning {model}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Pruning {model}</h1>\n{_facts(data)}{source}\n"
        + "\n".join(body)
        + "\n<footer><p>Each run is in results.json and results.csv. "
        + (f"{damped} layers needed more damping of their Hessian than asked for. " if damped else "")
        + "Made by <code>wanda-kernels study</code>.</p></footer>\n</body>\n</html>\n",
    )


def _facts(data: dict[str, Any]) -> str:
    settings, sessions = data["settings"], data["circumstances"]
    calibrated = f"{settings['calibration']}, {settings['length']} tokens a sample"
    counts = (settings["windows"], *settings["further_windows"])
    evaluated = " and ".join(
        f"{text}, {count} windows of {settings['length']} tokens"
        for text, count in zip(texts(data), counts, strict=True)
    )
    facts = [f"Calibration: {calibrated}. Perplexity: {evaluated}. Weights: {settings['dtype']}."]
    facts += ["Run on: " + ", ".join(f"{name} {value}" for name, value in session.items()) for session in sessions]
    facts.append(f"{len(data['runs'])} pruned models.")
    return "".join(f"<p class='caption'>{escape(fact)}</p>" for fact in facts)


def _table(table: Table) -> str:
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in table.heading)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f"<p class='caption'>{escape(table.caption)}</p><div class='wide'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )
