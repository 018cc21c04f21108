"""``wanda-kernels compress`` and ``decompress``: packed checkpoints and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    CALIBRATION,
    BatchSize,
    Calibration,
    Column,
    Debug,
    Length,
    Pack,
    Samples,
    Seed,
    Split,
    check_length,
    usage,
)
from .streaming import Resume, check_streamed, check_unfinished
from .streaming import stream as run_streamed

if TYPE_CHECKING:
    from ..pruning import PruneSpec
    from .session import Session

Source = Annotated[str, typer.Argument(metavar="DIR", help="A folder as `prune` or save_pretrained writes it.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR2", help="Folder to write to.")]
Values = Annotated[
    str,
    typer.Option("--values", metavar="float|int8|int4", help="float: as they are; else rounded to 8 or 4 bits."),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        metavar="32|64|128|0",
        help="Columns for a scale; 0 (int8 alone): a row. \\[default: 0, int4 128]",
    ),
]
Head = Annotated[str, typer.Option("--head", metavar="float|int8", help="The output layer, too, as int8.")]
_SAVED = "saved to {}; load it after `import wanda_kernels`"
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace DIR2 if it holds a model.")]


def compress_command(
    model: Source,
    out: Out,
    format: Annotated[
        str, typer.Option("--format", metavar="auto|bitmap|2:4", help="auto: 2:4 where a weight is, else a bitmap.")
    ] = "auto",
    values: Values = "float",
    group_size: GroupSize = None,
    head: Head = "float",
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Choose int4 values by the layers' outputs on calibration data.")
    ] = False,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    pack: Pack = False,
    column: Column = "text",
    split: Split = "train",
    seed: Seed = 0,
    batch_size: BatchSize = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Block by block from DIR's files to DIR2's: two blocks in memory.")
    ] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Pack a pruned model's weights: 9/16 of their size in 16-bit types at 50 % and 2:4, less of 8 or 4 bits."""
    from ..packed import compress
    from ..packed.model import Packing
    from ..pruning import PruneSpec
    from ..text.calibration import check_sources, expected_length
    from .display import OneBar, say

    sources = calibration or CALIBRATION
    drawing = {"pack": pack, "column": column, "split": split}
    with usage():
        of_calibration = (calibration, samples, length, pack, column, split, seed, batch_size)
        if not calibrate and of_calibration != (None, None, None, False, "text", "train", 0, None):
            raise ValueError("options of the calibration data need --calibrate")
        check_sources(sources, samples)
        spec = spec_of_values(calibrate, values, group_size, batch_size=batch_size, sparsity=0)
        packing = Packing(format, values, group_size, head)
        packing.check_chosen(spec.values)
        check_streamed(model, stream, resume)
    if stream:
        check_unfinished(out, resume, overwrite, model)
    session = _begin(model, out, overwrite)
    input_ids = None
    if calibrate:
        session.check(spec, length=expected_length(sources, length), head=head)
        input_ids = session.calibration(sources, samples, length, seed, **drawing)
        check_length(input_ids.shape[1], session.config)
    if stream:
        found = run_streamed(
            session, out, lambda shown: OneBar(shown, "packing"), input_ids=input_ids,
            spec=spec if calibrate else PruneSpec(method="magnitude", sparsity=0), device="cpu", packing=packing,
            keep_reports=True, resume=resume, overwrite=overwrite,
        )  # fmt: skip
        say("\n".join([*found.about_errors(), f"{found.packed}\n{_SAVED.format(out)}"]))
        return
    if input_ids is not None:
        say("\n".join(session.choose_values(input_ids, spec).about_errors()))
    report = _convert(session, out, overwrite, "packing", lambda loaded: compress(loaded, **asdict(packing)))
    say(f"{report}\n{_SAVED.format(out)}")


def decompress_command(model: Source, out: Out, overwrite: Overwrite = False, debug: Debug = False) -> None:
    """Unpack a packed model: a plain Hugging Face folder with the same weights."""
    from ..packed import decompress
    from .display import say

    _convert(_begin(model, out, overwrite), out, overwrite, "unpacking", decompress)
    say(f"saved to {out}")


def spec_of_values(is_calibrated: bool, values: str, group_size: int | None, **arguments: Any) -> PruneSpec:
    """Of a run that chooses values on calibration data, if that is wanted. Raises ValueError where there are none."""
    from ..pruning import PruneSpec

    if not is_calibrated:
        return PruneSpec(**arguments)
    if values in ("float", "int8"):  # of 8 bits the nearest are as good
        raise ValueError(f"--calibrate needs --values int4, got {values}")
    return PruneSpec(values=values, group_size=group_size, **arguments)


def _begin(model: str, out: Path, overwrite: bool) -> Session:
    from ..models.save import check_output
    from .session import Session

    check_output(out, overwrite, model)
    session = Session(model, "auto", "cpu")
    session.begin()
    return session


def _convert(session: Session, out: Path, overwrite: bool, what: str, convert: Callable[[Any], Any]) -> Any:
    """From folder to folder; what pruning said of the model goes with it. Returns what ``convert`` does."""
    from ..models import save_pretrained
    from ..models.load import processor_files
    from ..models.save import DROP_REPORT, REPORT
    from .display import working

    model, tokenizer, loaded = session.name, session.tokenizer, session.model
    with working(what):
        result = convert(loaded)
    reports = [Path(model).expanduser() / name for name in (REPORT, DROP_REPORT)]
    extra = {report.name: report.read_text(encoding="utf-8") for report in reports if report.is_file()}
    extra |= processor_files(model, loaded.config)
    with working(f"saving to {out}"):
        save_pretrained(out, loaded, tokenizer, extra=extra, overwrite=overwrite)
    return result
