"""``wanda-kernels eval``: the perplexity of a model on a text, or its accuracy on lm-eval's tasks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .options import Debug, Device, Dtype, Model, check_length, usage

_LENGTH = 2048


def eval_command(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="wikitext2|FILE", help="What to evaluate on. \\[default: wikitext2]"),
    ] = None,
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
    """Perplexity of MODEL on a text (non-overlapping windows, exp of the mean loss: the paper's definition), or its
    accuracy on tasks."""
    from .._words import to_json
    from ..models.load import check_choices
    from ..models.save import check_file
    from ..text.tasks import parse_tasks
    from .display import quiet_libraries, tell_reference

    with usage():
        if tasks is None:
            _refuse("without --tasks", {"--few-shot": few_shot, "--limit": limit})
        else:
            _refuse("with --tasks", {"--text": text, "--length": length, "--windows": windows})
            parse_tasks(tasks)
        place = check_choices(dtype, device)
    if out is not None:
        check_file(out, "--json")
    quiet_libraries()
    tell_reference(place)
    if tasks is None:
        result = _on_text(model, text or "wikitext2", length or _LENGTH, windows, device, dtype, batch_size)
    else:
        result = _on_tasks(model, tasks, few_shot, limit, device, dtype, batch_size)
    if out is not None:
        out.write_text(to_json({"model": model, **result}) + "\n", encoding="utf-8")


def _refuse(where: str, options: dict[str, object]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} has no meaning {where}")


def _on_text(
    model: str, text: str, length: int, windows: int | None, device: str, dtype: str, batch_size: int
) -> dict[str, Any]:
    from ..models import load_model, load_tokenizer
    from ..models.load import load_config
    from ..text import evaluation_ids, perplexity, split_windows
    from .display import bar, note, say, working

    check_length(length, load_config(model))
    with working(f"loading the tokenizer of {model}"):
        tokenizer = load_tokenizer(model)
    with working(f"loading text from {text}"):
        ids = evaluation_ids(text, tokenizer)
    cut = split_windows(ids, length)[:windows]
    if len(cut) == 0:
        raise ValueError(f"text {text} has {len(ids)} tokens, one window needs {length}: lower --length")
    with working(f"loading {model}"):
        loaded = load_model(model, dtype, device)
    with bar() as shown:
        task = shown.add_task("evaluating", total=len(cut))
        value = perplexity(loaded, cut, length, batch_size, on_window=lambda done: shown.update(task, completed=done))
    say(f"perplexity {value:.4f} ({len(cut)} windows of {length} tokens, {text})")
    if math.isnan(value):
        note(f"note: {model} gives NaN: its weights are broken, or its activations overflow in {loaded.dtype}")
    return {"text": text, "windows": len(cut), "length": length, "perplexity": value}


def _on_tasks(
    model: str, tasks: str, few_shot: int | None, limit: int | None, device: str, dtype: str, batch_size: int
) -> dict[str, Any]:
    from ..models import load_model, load_tokenizer
    from ..text.tasks import TaskEvaluation, mean_accuracy, parse_tasks
    from .display import say, screen, working

    with working(f"loading tasks: {tasks}"):
        evaluation = TaskEvaluation(parse_tasks(tasks))
    with working(f"loading {model}"):
        tokenizer, loaded = load_tokenizer(model), load_model(model, dtype, device)
    rows = evaluation.run(loaded, tokenizer, few_shot, limit, batch_size)  # lm-eval draws its own bars
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
