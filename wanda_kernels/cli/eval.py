"""``wanda-kernels eval``: the perplexity of a model on a text."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import BatchSize, Debug, Device, Dtype, Model, check_length


def eval_command(
    model: Model,
    text: Annotated[str, typer.Option("--text", metavar="wikitext2|FILE", help="What to evaluate on.")] = "wikitext2",
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens per window.")] = 2048,
    windows: Annotated[
        int | None, typer.Option("--windows", min=1, help="Evaluate on the first so many. [default: all]")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
    debug: Debug = False,
) -> None:
    """Perplexity of MODEL: non-overlapping windows, exp of the mean loss (the paper's definition)."""
    from ..models import load_model, load_tokenizer
    from ..text import evaluation_ids, perplexity, split_windows
    from .display import bar, quiet_libraries, working

    quiet_libraries()
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
        value = perplexity(
            loaded, cut, length, batch_size or 1, on_window=lambda done: shown.update(task, completed=done)
        )
    print(f"perplexity {value:.4f} ({len(cut)} windows of {length} tokens, {text})")
