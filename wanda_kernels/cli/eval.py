"""``wanda-kernels eval``: the perplexity of a model on a text, or its accuracy on lm-eval's tasks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .options import Debug, Device, Dtype, Model, Text, check_texts, usage

if TYPE_CHECKING:
    from .session import Session

_LENGTH = 2048


def eval_command(
    model: Model,
    text: Text = None,
    length: Annotated[int | None, typer.Option("--length", min=2, help="Tokens per window. \\[default: 2048]")] = None,
    windows: Annotated[
        int | None, typer.Option("--windows", min=1, help="Evaluate on the first so many. \\[default: all]")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="paper|TASK,TASK,..",
            help="lm-eval's tasks instead of a text: names, task files or folders of them (a task file may name Python "
            "functions, which run); paper: the paper's seven.",
        ),
    ] = None,
    few_shot: Annotated[
        int | None, typer.Option("--few-shot", min=0, help="Examples before each question. \\[default: the task's own]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="The first so many examples of each task. \\[default: all]")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures there.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Windows, or a task's requests, per forward pass.")
    ] = 1,
    debug: Debug = False,
) -> None:
    """Perplexity of MODEL on each text (non-overlapping windows, exp of the mean loss: the paper's definition; Gemma's
    windows begin with BOS), or its accuracy on tasks."""
    from .._words import to_json
    from ..models.save import check_file
    from ..text.tasks import parse_tasks
    from .session import Session

    with usage():
        texts = check_texts(text)
        if tasks is None:
            _refuse("without --tasks", {"--few-shot": few_shot, "--limit": limit})
        else:
            _refuse("with --tasks", {"--text": text, "--length": length, "--windows": windows})
            parse_tasks(tasks)
        session = Session(model, dtype, device)
    if out is not None:
        check_file(out, "--json")
    session.begin()
    if tasks is None:
        result = _on_texts(session, texts, length or _LENGTH, windows, batch_size)
    else:
        result = _on_tasks(session, tasks, few_shot, limit, batch_size)
    if out is not None:
        out.write_text(to_json({"model": model, **result}) + "\n", encoding="utf-8")


def _refuse(where: str, options: dict[str, object]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} has no meaning {where}")


def _on_texts(session: Session, texts: list[str], length: int, windows: int | None, batch_size: int) -> dict[str, Any]:
    """The first text's figures as those of one text, and all of them in ``texts``."""
    from .display import note, say

    cuts = [session.windows(text, length, windows) for text in texts]
    found: list[dict[str, Any]] = []
    for text, cut in zip(texts, cuts, strict=True):
        value = session.perplexity(cut, batch_size)
        say(f"perplexity {value:.4f} ({len(cut)} windows of {length} tokens, {text})")
        found.append({"text": text, "windows": len(cut), "perplexity": value})
    if any(math.isnan(one["perplexity"]) for one in found):
        dtype = session.model.dtype
        note(f"note: {session.name} gives NaN: its weights are broken, or its activations overflow in {dtype}")
    return {**found[0], "length": length, "texts": found}


def _on_tasks(session: Session, tasks: str, few_shot: int | None, limit: int | None, batch_size: int) -> dict[str, Any]:
    from ..text.tasks import TaskEvaluation, mean_accuracy, parse_tasks
    from .display import say, screen, working

    with working(f"loading tasks: {tasks}"):
        evaluation = TaskEvaluation(parse_tasks(tasks))
    # lm-eval draws its own bars
    rows = evaluation.run(session.model, session.tokenizer, few_shot, limit, batch_size)
    screen(80).print(_draw(rows))
    mean = mean_accuracy(rows)
    if mean is not None:
        say(f"mean acc {mean[0]:.4f} over {mean[1]} tasks")
    return {"limit": limit, "tasks": rows, "mean_acc": mean[0] if mean else None}


def _draw(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="lm-eval, value +- standard error", title_justify="left")
    for heading in ("task", "few-shot", "examples", "metric", "value", "+-"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for row in rows:
        for number, (metric, value) in enumerate(row["metrics"].items()):
            about = [row["task"], *("" if row[key] is None else str(row[key]) for key in ("few_shot", "examples"))]
            error = row["errors"].get(metric)
            table.add_row(
                *(about if number == 0 else ("", "", "")), metric, f"{value:.4f}", f"{error:.4f}" if error else ""
            )
    return table
