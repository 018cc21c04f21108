"""``wanda-kernels speed``: tokens per second of a dense model and its pruned and packed versions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .options import Debug, Device, Dtype, usage


def speed_command(
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="The model that the others are compared with.")],
    sparse: Annotated[list[str] | None, typer.Argument(metavar="[SPARSE]...", help="Packed or other models.")] = None,
    batches: Annotated[str, typer.Option("--batches", metavar="N,N,..", help="Prompts at a time.")] = "1,4,16",
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of a prompt.")] = 128,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens to generate.")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="In which the models take turns.")] = 3,
    prefill_copy: Annotated[
        bool,
        typer.Option(
            "--prefill-copy", help="CUDA: 2:4 layers also keep torch's semi-structured tensor, for many tokens."
        ),
    ] = False,
    static: Annotated[
        bool,
        typer.Option(
            "--static",
            help="Also with a static cache, a token a graph without Python: a CUDA graph, on the CPU compiled.",
        ),
    ] = False,
    llama_bench: Annotated[
        list[Path] | None,
        typer.Option(
            "--llama-bench", metavar="FILE.gguf", help="Also by llama.cpp's llama-bench, at batch 1. May be repeated."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures there.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    debug: Debug = False,
) -> None:
    """Prefill and decode tokens per second, same prompts, in turns in one run."""
    from .._words import to_json
    from ..llama_cpp import PROGRAM, LlamaBench, check_program
    from ..models import load_model
    from ..models.load import check_choices
    from ..models.save import check_file
    from ..packed import dispatch, keep_prefill_copies
    from ..packed.model import dense_layers, linear_layers, packed_layers, stayed_dense
    from ..speed import WAYS, measure
    from ..static import CaptureError, check_static
    from .display import bar, quiet_libraries, say, screen, tell_reference, working

    names = [dense, *(sparse or [])]
    with usage():
        sizes = _parse_batches(batches)
        if len(set(names)) != len(names):
            raise ValueError("each model may be named once")
        files = {file.stem: file for file in llama_bench or []}
        if len(files) != len(llama_bench or []):
            raise ValueError(f"--{PROGRAM} must name files of different names")
        if files and 1 not in sizes:
            raise ValueError(f"--{PROGRAM} needs 1 among --batches, got {batches}")
        place = check_choices(dtype, device)
    program = check_program(list(files.values())) if files else ""
    if out is not None:
        check_file(out, "--json")
    quiet_libraries()
    tell_reference(place)
    models = {}
    for name in names:
        with working(f"loading {name}"):
            models[name] = load_model(name, dtype, device)
            if prefill_copy and linear_layers(models[name]):
                keep_prefill_copies(models[name])
        if static:
            try:
                check_static(models[name])
            except ValueError as error:
                raise ValueError(f"--static: {name}: {error}") from error
    peers = {name: LlamaBench(program, file, prompt, tokens, place) for name, file in files.items()}
    ways = WAYS if static else WAYS[:1]
    if static and place.type != "cuda":
        say("--static: each model's step is compiled first, for each batch: a minute, which later runs save")
    with bar() as shown:
        task = shown.add_task("generating", total=(len(sizes) * len(models) * len(ways) + len(peers)) * (rounds + 2))
        try:
            rows = measure(models, sizes, prompt, tokens, rounds, lambda: shown.advance(task), ways, peers)
        except CaptureError as error:
            raise ValueError(f"--static: {error}") from error
    screen(110).print(draw(rows, prompt, tokens))
    for line in [*verdicts(rows, dense), *differences(rows)]:
        say(line)
    for name, model in models.items():
        if packed_layers(model):
            for line in stayed_dense(dense_layers(model)):
                say(f"{name}: dense: {line}")
    for shape, choice in dispatch.choices().items():
        say(f"{shape}: {choice}")
    if out is not None:
        result = {"prompt": prompt, "tokens": tokens, "rounds": rounds, "rows": rows, "dispatch": dispatch.choices()}
        out.write_text(to_json(result) + "\n", encoding="utf-8")


def _parse_batches(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--batches must be numbers from 1 on, with commas between them, got '{text}'")
    return [int(part) for part in parts]


def draw(rows: list[dict[str, Any]], prompt: int, tokens: int) -> Table:
    title = f"prompts of {prompt} tokens, {tokens} generated, medians; peak: weights and what generating adds to them"
    table = Table(title=title, title_justify="left")
    ways = ["way"] if len({row["way"] for row in rows}) > 1 else []
    headings = (
        "model",
        *ways,
        "batch",
        "first token s",
        "prefill tokens/s",
        "decode tokens/s",
        "x first",
        "weights MiB",
    )
    for heading in (*headings, "peak MiB"):
        table.add_column(heading, justify="left" if heading in ("model", "way") else "right")
    shown = short_names({row["model"] for row in rows})
    for row in rows:
        peak = row["peak_bytes"]
        table.add_row(
            shown[row["model"]], *(row[way] for way in ways), str(row["batch"]),
            f"{row['first_token_s']:.3f}", f"{row['prefill_tokens_s']:.1f}",
            f"{row['decode_tokens_s']:.1f}", f"{row['decode_ratio']:.2f}", f"{row['weight_bytes'] / 2**20:.0f}",
            "not measured" if peak is None else f"{peak / 2**20:.0f}",
        )  # fmt: skip
    return table


def short_names(models: set[str]) -> dict[str, str]:
    """Folders by their last part, where all of these differ: a table is narrow."""
    names = {model: Path(model).name or model for model in models}
    return names if len(set(names.values())) == len(names) else {model: model for model in models}


def _name(row: dict[str, Any]) -> str:
    return row["model"] + ("" if row["way"] == "generate" else f", {row['way']}")


def verdicts(rows: list[dict[str, Any]], dense: str) -> list[str]:
    """Where a model decodes slower than the dense one, in words."""
    return [
        f"{_name(row)} decodes slower than {dense} at batch {row['batch']}: {row['decode_ratio']:.2f} x"
        for row in rows
        if row["decode_ratio"] < 1
    ]


def differences(rows: list[dict[str, Any]]) -> list[str]:
    """Where static tokens are not those of ``generate``: a mask makes attention add in another order, and from a tie on
    a sequence is another one."""
    static = [row for row in rows if row["way"] == "static"]
    found = [
        f"{_name(row)}: its tokens are not generate's at batch {row['batch']} from token {row['first_difference']} on"
        for row in static
        if row["first_difference"] is not None
    ]
    return found or (["static: all tokens are those of generate"] if static else [])
