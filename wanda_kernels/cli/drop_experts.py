"""``wanda-kernels drop-experts``: a mixture of experts with fewer of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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


def drop_experts_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write the smaller model to.")],
    share: Annotated[float, typer.Option("--share", help="Of each layer's experts, in (0, 1): so many go.")] = 0.25,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    pack: Pack = False,
    column: Column = "text",
    split: Split = "train",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it is there.")] = False,
    debug: Debug = False,
) -> None:
    """Take experts out of MODEL: those whose outputs, as the router weighs them, are the smallest (REAP)."""
    from ..models.save import check_output, check_space
    from ..pruning import PruneSpec
    from ..reap import check_share
    from ..text.calibration import check_sources, expected_length
    from .display import say
    from .session import Session

    sources = calibration or CALIBRATION
    with usage():
        check_sources(sources, samples)
        check_share("share", share)
        spec = PruneSpec(batch_size=batch_size)
        session = Session(model, dtype, device)
    check_output(out, overwrite, model)
    session.begin()
    session.check(spec, out, length=expected_length(sources, length), drop=share)
    input_ids = session.calibration(sources, samples, length, seed, pack=pack, column=column, split=split)
    check_length(input_ids.shape[1], session.config)
    check_space(out, session.model)
    report = session.drop_experts(input_ids, share, batch_size)
    session.save(out, overwrite, dropped=report)
    say(f"{report}\nsaved to {out}")
