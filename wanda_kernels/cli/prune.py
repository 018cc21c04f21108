"""``wanda-kernels prune``: load, calibrate, prune, save."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from . import method_options as methods
from . import ranks
from .compress import GroupSize, Head, Values, spec_of_values
from .options import (
    CALIBRATION,
    BatchSize,
    Calibration,
    Column,
    Debug,
    Device,
    Dtype,
    Length,
    Model,
    Pack,
    Samples,
    Seed,
    Split,
    check_length,
    usage,
)
from .streaming import Resume, check_streamed, check_unfinished
from .streaming import stream as run_streamed


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
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    pack: Pack = False,
    column: Column = "text",
    split: Split = "train",
    seed: Seed = 0,
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
    experts: Annotated[
        str,
        typer.Option(
            "--experts",
            metavar="routed|all",
            help="What a fused expert's statistics come from: the tokens that the router sends it, or every token.",
        ),
    ] = "routed",
    min_tokens: Annotated[
        int,
        typer.Option("--min-tokens", min=1, help="Experts with fewer take the mean over their layer's; 1: idle ones."),
    ] = 1,
    require_all: Annotated[
        bool,
        typer.Option(
            "--require-all", help="Refuse models in whose blocks something stays dense (routers, convolutions)."
        ),
    ] = False,
    refine: Annotated[
        bool, typer.Option("--refine", help="Swap what is pruned where that makes a layer's error smaller.")
    ] = False,
    refine_damping: Annotated[
        float | None,
        typer.Option("--refine-damping", min=0, help="The larger, the nearer to the method's mask. \\[default: 0.3]"),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Then change the kept weights so that it is least, on the same mask.")
    ] = False,
    update_damping: Annotated[
        float | None,
        typer.Option("--update-damping", min=0, help="The larger, the nearer to the dense weights. \\[default: 0.3]"),
    ] = None,
    update_steps: Annotated[
        int | None, typer.Option("--update-steps", min=1, help="Conjugate gradient steps. \\[default: 10]")
    ] = None,
    drop_experts: Annotated[
        float | None,
        typer.Option("--drop-experts", metavar="SHARE", help="First, as `wanda-kernels drop-experts --share SHARE`."),
    ] = None,
    compress: Annotated[
        bool, typer.Option("--compress", help="Pack the pruned weights (see `wanda-kernels compress`).")
    ] = False,
    values: Values = "float",
    group_size: GroupSize = None,
    head: Head = "float",
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Choose int4 values by the layers' outputs, not the nearest. \\[default: where --refine, --update or "
            "the method gathers Gram matrices anyway]",
        ),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Block by block from MODEL's files to DIR's: two blocks in memory. MODEL: a folder."
        ),
    ] = False,
    resume: Resume = False,
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
    from ..methods import Needs
    from ..models.save import check_output, check_space
    from ..packed.model import Packing
    from ..pruning import PruneSpec
    from ..pruning.stopwatch import Stopwatch
    from ..reap import check_share
    from ..text.calibration import check_sources, expected_length
    from .display import PruningDisplay, say, screen
    from .session import Session

    sources = calibration or CALIBRATION
    with usage():
        check_sources(sources, samples)
        arguments = dict(
            sparsity=sparsity, pattern=pattern, method=method, propagate=propagate, batch_size=batch_size,
            exact_error=exact_error, fuse_statistics=fuse_statistics, experts=experts, min_tokens=min_tokens,
            require_all=require_all, refine=refine, refine_damping=refine_damping, update=update,
            update_damping=update_damping, update_steps=update_steps,
            owl=methods.owl_of(owl, owl_limit, owl_outlier), **method_options,
        )  # fmt: skip
        spec = PruneSpec(**arguments)
        if calibrate is None:
            calibrate = values == "int4" and spec.needs is Needs.GRAM
        spec = spec_of_values(calibrate, values, group_size, **arguments)
        packing = Packing(values=values, group_size=group_size, head=head)
        if not compress and packing != Packing():
            raise ValueError("--values, --group-size and --head need --compress")
        session = Session(model, dtype, device, device_map)
        _check_streaming(model, stream, resume, offload, device_map)
        if drop_experts is not None:
            check_share("drop_experts", drop_experts)
        if drop_experts is not None and (stream or ranks.launched()):
            other = "--stream" if stream else "several processes"
            raise ValueError(f"--drop-experts does not go with {other}: run `wanda-kernels drop-experts` first")
    needs_text = bool(spec.needs) or drop_experts is not None
    if stream:
        check_unfinished(out, resume, overwrite, model)
    check_output(out, overwrite, model)
    drawing = {"pack": pack, "column": column, "split": split}
    processes = dropped = None
    if ranks.launched():
        places = {"stream": stream, "dtype": dtype, "device": device, "compress": compress, "out": str(out.absolute())}
        named = {"MODEL": ranks.fingerprint(model), "calibration": ranks.fingerprint_of_sources(sources)}
        given = spec.to_dict() | {"samples": samples, "length": length, "seed": seed} | drawing | places | named
        options = given.pop("method options")
        processes = ranks.join(device, given | options)
    session.begin()
    # What the config alone can tell, before anything large is read.
    tokens = expected_length(sources, length) if needs_text else None
    session.check(spec, out, compress, tokens, drop_experts, "drop_experts", head)
    outer = Stopwatch()
    with outer.measure("load"):
        input_ids = session.calibration(sources, samples, length, seed, **drawing) if needs_text else None
        if not stream:
            loaded = session.model
    if input_ids is not None:
        check_length(input_ids.shape[1], session.config)
    if stream:
        report = run_streamed(
            session, out, PruningDisplay, input_ids=input_ids, spec=spec, dtype=dtype, device=device, offload=offload,
            activation_memory=int(activation_memory * 2**30), resume=resume, overwrite=overwrite, processes=processes,
            packing=packing if compress else None,
        )  # fmt: skip
    else:
        check_space(out, loaded)
        if drop_experts is not None and input_ids is not None:
            dropped = session.drop_experts(input_ids, drop_experts, batch_size)
            say(f"{dropped}")
        report = session.prune(input_ids, spec, processes)
    if processes is not None and not processes.is_first:
        return  # the first one saves
    packed = report.packed
    if not stream:
        if compress:
            packed = session.compress(**asdict(packing))
        with outer.measure("saving"):
            session.save(out, overwrite, report, dropped)
    seconds = report.seconds
    load = {"load": seconds.pop("load", 0.0) + outer.seconds()["load"]}
    report.seconds = load | seconds | ({} if stream else {"saving": outer.seconds()["saving"]})
    screen().print(report)
    if packed is not None:
        say(f"packed {packed}")
    say(f"saved to {out}")


def _check_streaming(model: str, stream: bool, resume: bool, offload: Path | None, device_map: str | None) -> None:
    """Raises ValueError for options that do not go together."""
    if device_map not in (None, "auto"):
        raise ValueError(f"--device-map must be auto, got '{device_map}'")
    if device_map is not None and (stream or ranks.launched()):
        raise ValueError(f"--device-map does not go with {'--stream' if stream else 'several processes'}")
    check_streamed(model, stream, resume)
    if offload is not None and not stream:
        raise ValueError("--offload needs --stream")
