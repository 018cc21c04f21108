"""``wanda-kernels eval``: the perplexity of a model on a text, or its accuracy on lm-eval's tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .options import BatchSize, Debug, Device, Dtype, Model, check_length

_LENGTH = 2048


def eval_command(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="wikitext2|FILE", help="What to evaluate on. [default: wikitext2]"),
    ] = None,
    length: Annotated[int | None, typer.Option("--length", min=2, help="Tokens per window. [default: 2048]")] = None,
    windows: Annotated[
        int | None, typer.Option("--windows", min=1, help="Evaluate on the first so many. [default: all]")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="paper|TASK,TASK,..",
            help="lm-eval's tasks instead of a text: names, task files or folders of them; paper: the paper's seven.",
        ),
    ] = None,
    few_shot: Annotated[
        int | None, typer.Option("--few-shot", min=0, help="Examples before each question. [default: the task's own]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="The first so many examples of each task. [default: all]")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures there.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
    debug: Debug = False,
) -> None:
    """Perplexity of MODEL on a text (non-overlapping windows, exp of the mean loss: the paper's definition), or its
    accuracy on tasks."""
    from .display import quiet_libraries

    if out is not None and not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {out}: its folder does not exist")
    quiet_libraries()
    if tasks is None:
        _refuse("without --tasks", {"--few-shot": few_shot, "--limit": limit})
        result = _on_text(model, text or "wikitext2", length or _LENGTH, windows, device, dtype, batch_size or 1)
    else:
        _refuse("with --tasks", {"--text": text, "--length": length, "--windows": windows})
        result = _on_tasks(model, tasks, few_shot, limit, device, dtype, batch_size or 1)
    if out is not None:
        out.write_text(json.dumps({"model": model, **result}, indent=2) + "\n")


def _refuse(where: str, options: dict[str, object]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} has no meaning {where}")


def _on_text(
    model: str, text: str, length: int, windows: int | None, device: str, dtype: str, batch_size: int
) -> dict[str, Any]:
    from ..models import load_model, load_tokenizer
    from ..text import evaluation_ids, perplexity, split_windows
    from .display import bar, working

    with working(f"loading the tokenizer of {model}"):
        tokenizer = load_tokenizer(model)
    with working(f"loading text from {text}"):
        ids = evaluation_ids(text, tokenizer)
    with working(f"loading {model}"):
        loaded = load_model(model, dtype, device)
    check_length(length, loaded.config)
    cut = split_windows(ids, length)[:windows]
    if len(cut) == 0:
        raise ValueError(f"text {text} has {len(ids)} tokens, one window needs {length}: lower --length")
    with bar() as shown:
        task = shown.add_task("evaluating", total=len(cut))
        value = perplexity(loaded, cut, length, batch_size, on_window=lambda done: shown.update(task, completed=done))
    print(f"perplexity {value:.4f} ({len(cut)} windows of {length} tokens, {text})")
    return {"text": text, "windows": len(cut), "length": length, "perplexity": value}


def _on_tasks(
    model: str, tasks: str, few_shot: int | None, limit: int | None, device: str, dtype: str, batch_size: int
) -> dict[str, Any]:
    from ..models import load_model, load_tokenizer
    from ..text.tasks import TaskEvaluation, mean_accuracy, parse_tasks
    from .display import working

    with working(f"loading tasks: {tasks}"):
        evaluation = TaskEvaluation(parse_tasks(tasks))
    with working(f"loading {model}"):
        tokenizer, loaded = load_tokenizer(model), load_model(model, dtype, device)
    rows = evaluation.run(loaded, tokenizer, few_shot, limit, batch_size)  # lm-eval draws its own bars
    screen = Console()
    screen.width = max(screen.width, 80)  # not folded in a log
    screen.print(_draw(rows))
    mean = mean_accuracy(rows)
    if mean is not None:
        print(f"mean acc {mean[0]:.4f} over {mean[1]} tasks")
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
