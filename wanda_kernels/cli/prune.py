"""``wanda-kernels prune``: load, calibrate, prune, save."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import method_options as methods
from . import ranks, streaming
from .options import BatchSize, Debug, Device, Dtype, Model, check_length, usage


@methods.takes_method_options
def prune_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write the pruned model to.")],
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", help="Share of each row to prune, in [0, 1). \\[default: 0.5]")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", metavar="N:M", help="Keep N of every M inputs, for instance 2:4.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="wanda|magnitude|sparsegpt|ria|ablate_...",
            help="How weights are chosen. ablate_mag_seq, ablate_wanda_seq, ablate_mag_iter, ablate_wanda_iter: their "
            "mask with SparseGPT's update.",
        ),
    ] = "wanda",
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            metavar="c4|wikitext2|HUB_ID|FILE",
            help="Calibration data: a data set (owner/name or owner/name:configuration of the hub), a text file, a "
            ".jsonl file, or a .safetensors file with input_ids \\[samples, length], int64.",
        ),
    ] = "c4",
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Calibration sequences. \\[default: 128]")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=2, help="Tokens in each of them. \\[default: 2048]")
    ] = None,
    pack: Annotated[
        bool, typer.Option("--pack", help="Put documents together; otherwise those shorter than --length are skipped.")
    ] = False,
    column: Annotated[str, typer.Option("--column", help="Of a data set or .jsonl file: holds the text.")] = "text",
    split: Annotated[str, typer.Option("--split", help="Of a data set of the hub.")] = "train",
    seed: Annotated[int, typer.Option("--seed", help="Of the drawing of calibration sequences.")] = 0,
    propagate: Annotated[
        str,
        typer.Option(
            "--propagate",
            metavar="pruned|dense",
            help="What later blocks see: the pruned blocks' outputs (the paper's), or the dense model's "
            "(one forward pass, about half the time).",
        ),
    ] = "pruned",
    method_options: Any = None,
    owl: methods.UseOwl = False,
    owl_limit: methods.OwlLimit = None,
    owl_outlier: methods.OwlOutlier = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
    exact_error: Annotated[
        bool, typer.Option("--exact-error", help="Also measure each layer's output error (a pass more).")
    ] = False,
    fuse_statistics: Annotated[
        bool,
        typer.Option(
            "--fuse-statistics/--no-fuse-statistics",
            "--fuse/--no-fuse",
            help="Let RMSNorm and MLP add up the statistics of what they make, or a pass of its own.",
        ),
    ] = True,
    compress: Annotated[
        bool, typer.Option("--compress", help="Pack the pruned weights (see `wanda-kernels compress`).")
    ] = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Block by block from MODEL's files to DIR's: two blocks in memory. MODEL: a folder."
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --stream: go on with the run that ended before its end.")
    ] = False,
    offload: Annotated[
        Path | None, typer.Option("--offload", metavar="DIR2", help="With --stream: where activations go to a disk.")
    ] = None,
    activation_memory: Annotated[
        float, typer.Option("--activation-memory", metavar="GIB", min=0, help="Beyond which they do.")
    ] = 4.0,
    device_map: Annotated[
        str | None, typer.Option("--device-map", metavar="auto", help="Spread the model over all GPUs (accelerate).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it is there.")] = False,
    debug: Debug = False,
) -> None:
    """Prune MODEL and save it as a Hugging Face folder."""
    from ..models.save import check_output, check_space
    from ..pruning import PruneSpec
    from ..pruning.stopwatch import Stopwatch
    from ..text.calibration import LENGTH
    from .display import say, screen
    from .session import Session

    with usage():
        spec = PruneSpec(
            sparsity=sparsity, pattern=pattern, method=method, propagate=propagate, batch_size=batch_size,
            exact_error=exact_error, fuse_statistics=fuse_statistics,
            owl=methods.owl_of(owl, owl_limit, owl_outlier), **method_options,
        )  # fmt: skip
        session = Session(model, dtype, device, device_map)
        streaming.check_options(model, stream, resume, offload, compress, device_map)
    if stream:
        streaming.check_leftovers(out, resume, overwrite, model)
    check_output(out, overwrite, model)
    drawing = {"pack": pack, "column": column, "split": split}
    processes = None
    if ranks.launched():
        places = {"stream": stream, "dtype": dtype, "device": device, "compress": compress, "out": str(out.absolute())}
        named = {"MODEL": ranks.fingerprint(model), "calibration": ranks.fingerprint(calibration)}
        given = spec.to_dict() | {"samples": samples, "length": length, "seed": seed} | drawing | places | named
        options = given.pop("method options")
        processes = ranks.join(device, given | options)
    session.begin()
    # What the config alone can tell, before anything large is read.
    tokens = None if calibration.endswith(".safetensors") else LENGTH  # such a file has its own length
    session.check(spec, out, compress, (length or tokens) if spec.needs else None)
    outer = Stopwatch()
    with outer.measure("load"):
        input_ids = session.calibration(calibration, samples, length, seed, **drawing) if spec.needs else None
        if not stream:
            loaded = session.model
    if input_ids is not None:
        check_length(input_ids.shape[1], session.config)
    if stream:
        where = {"device": device, "dtype": dtype, "offload": offload, "activation_memory": activation_memory}
        report = streaming.prune(session, out, input_ids, spec, where, processes, resume, overwrite)
    else:
        check_space(out, loaded)
        report = session.prune(input_ids, spec, processes)
    if processes is not None and not processes.is_first:
        return  # the first one saves
    packing = session.compress() if compress else None
    if not stream:
        with outer.measure("saving"):
            session.save(out, overwrite, report)
    seconds = report.seconds
    load = {"load": seconds.pop("load", 0.0) + outer.seconds()["load"]}
    report.seconds = load | seconds | ({} if stream else {"saving": outer.seconds()["saving"]})
    screen().print(report)
    if packing is not None:
        say(f"packed {packing}")
    say(f"saved to {out}")
