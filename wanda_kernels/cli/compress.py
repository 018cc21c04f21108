"""``wanda-kernels compress`` and ``decompress``: packed checkpoints and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Debug, usage

Source = Annotated[str, typer.Argument(metavar="DIR", help="A folder as `prune` or save_pretrained writes it.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR2", help="Folder to write to.")]
Values = Annotated[
    str,
    typer.Option("--values", metavar="float|int8|int4", help="float: as they are; else the nearest of 8 or 4 bits."),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size", metavar="32|64|128|0", help="Columns for a scale; 0: a row. \\[default: 0, int4: 128]"
    ),
]
Head = Annotated[str, typer.Option("--head", metavar="float|int8", help="The output layer, too, as int8.")]
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
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Pack a pruned model's weights: 9/16 of their size in 16-bit types at 50 % and 2:4, less of 8 or 4 bits."""
    from ..packed import compress
    from ..packed.format import check_format
    from ..packed.model import check_head
    from ..packed.values import ValueType
    from .display import say

    with usage():
        check_format(format)
        ValueType.parse(values, group_size)
        check_head(head)
    how: dict[str, Any] = {"format": format, "values": values, "group_size": group_size, "head": head}
    _begin(model, out, overwrite)
    report = _convert(model, out, overwrite, "packing", lambda loaded: compress(loaded, **how))
    say(f"{report}\nsaved to {out}; load it after `import wanda_kernels`")


def decompress_command(model: Source, out: Out, overwrite: Overwrite = False, debug: Debug = False) -> None:
    """Unpack a packed model: a plain Hugging Face folder with the same weights."""
    from ..packed import decompress
    from .display import say

    _begin(model, out, overwrite)
    _convert(model, out, overwrite, "unpacking", decompress)
    say(f"saved to {out}")


def _begin(model: str, out: Path, overwrite: bool) -> None:
    from ..models.load import choose_device
    from ..models.save import check_output
    from .display import quiet_libraries, tell_reference

    check_output(out, overwrite, model)
    quiet_libraries()
    tell_reference(choose_device("cpu"))


def _convert(model: str, out: Path, overwrite: bool, what: str, convert: Callable[[Any], Any]) -> Any:
    """From folder to folder; what pruning said of the model goes with it. Returns what ``convert`` does."""
    from ..models import load_model, load_tokenizer, save_pretrained
    from ..models.load import processor_files
    from ..models.save import DROP_REPORT, REPORT
    from .display import working

    with working(f"loading {model}"):
        tokenizer, loaded = load_tokenizer(model), load_model(model, "auto", "cpu")
    with working(what):
        result = convert(loaded)
    reports = [Path(model).expanduser() / name for name in (REPORT, DROP_REPORT)]
    extra = {report.name: report.read_text(encoding="utf-8") for report in reports if report.is_file()}
    extra |= processor_files(model, loaded.config)
    with working(f"saving to {out}"):
        save_pretrained(out, loaded, tokenizer, extra=extra, overwrite=overwrite)
    return result
