"""``wanda-kernels plan``: the memory and time that pruning a model would take, from its config."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from .options import Debug, usage


def plan_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder with config.json, or a hub id.")],
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="H100s, a process each.")] = 1,
    memory: Annotated[float, typer.Option("--memory", metavar="GB", min=0, help="Of each of them.")] = 80.0,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration sequences.")] = 128,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens in each of them.")] = 2048,
    propagate: Annotated[
        str, typer.Option("--propagate", metavar="pruned|dense", help="As for prune: two forward passes, or one.")
    ] = "pruned",
    method: Annotated[str, typer.Option("--method", help="As for prune.")] = "wanda",
    refine: Annotated[bool, typer.Option("--refine", help="As for prune: Gram matrices are gathered.")] = False,
    update: Annotated[bool, typer.Option("--update", help="As for prune: the same.")] = False,
    debug: Debug = False,
) -> None:
    """Predict memory and time without loading MODEL. Memory is counted; time on a GPU is estimated, not measured."""
    from ..methods import Needs
    from ..models.load import load_config
    from ..plan import H100, predict, shape_of
    from ..pruning import PruneSpec
    from .display import quiet_libraries, working
    from .display import screen as screen_of

    with usage():
        spec = PruneSpec(method=method, propagate=propagate, refine=refine, update=update)
    quiet_libraries()
    config = load_config(model)
    with working("building the model without weights"):
        shape = shape_of(config)
    passes = 2 if spec.propagate == "pruned" else 1
    grams = spec.needs is Needs.GRAM
    copies = 3 if spec.method.needs is Needs.GRAM else 1 if spec.update else 0
    found = predict(shape, H100, gpus, samples, length, passes, grams=grams, copies=copies)
    screen = screen_of(110)
    screen.print(
        f"{shape.model_bytes / 1e9:.4g} GB in {shape.blocks} blocks of {shape.block_bytes / 1e9:.3g} GB; "
        f"{samples} x {length} tokens, {gpus} x {memory:g} GB",
    )
    if shape.experts:
        read = shape.token_weights * shape.itemsize / 1e9
        screen.print(
            f"{shape.experts} experts a layer, {shape.chosen} for a token: it reads {read:.3g} GB of a block's weights"
        )
    if grams:
        screen.print(f"Gram matrices of a block's inputs: at most {4 * shape.input_squares / 1e9:.3g} GB")
    ways = Table()
    for heading in ("way", "GB on each GPU", "fits", "command"):
        ways.add_column(heading, justify="right" if heading == "GB on each GPU" else "left")
    run = "" if gpus == 1 else f"torchrun --nproc-per-node {gpus} -m wanda_kernels prune"
    rows = [("in memory", found.bytes_in_memory, run or "wanda-kernels prune")]
    if gpus > 1:
        rows.append(("spread over GPUs, one process", found.bytes_mapped, "prune --device-map auto"))
    rows.append(("streamed", found.bytes_streamed, f"{run or 'wanda-kernels prune'} --stream"))
    for way, needed, command in rows:
        ways.add_row(way, f"{needed / 1e9:.3g}", "yes" if needed <= memory * 1e9 else "no", command)
    screen.print(ways)
    screen.print(f"streamed, each process also holds {found.host_bytes_streamed / 1e9:.1f} GB of the host's memory")
    parts = ", ".join(f"{part} {seconds:.3g} s" for part, seconds in found.seconds.items())
    screen.print(f"estimated, not measured: {found.total / 60:.2g} minutes ({parts})", soft_wrap=True)
    screen.print(f"({H100.source}; streamed, reading and writing overlap with the rest)")
