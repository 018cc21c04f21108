"""``wanda-kernels compress`` and ``decompress``: packed checkpoints and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .options import Debug

Source = Annotated[str, typer.Argument(metavar="DIR", help="A folder as `prune` or save_pretrained writes it.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR2", help="Folder to write to.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace DIR2 if it is there.")]


def compress_command(
    model: Source,
    out: Out,
    format: Annotated[
        str, typer.Option("--format", metavar="auto|bitmap|2:4", help="auto: 2:4 where a weight is, else a bitmap.")
    ] = "auto",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Pack a pruned model's weights: 9/16 of their size in 16-bit types at 50 % and 2:4."""
    from ..models import load_model, load_tokenizer, save_pretrained
    from ..models.save import check_output
    from ..packed import compress
    from .display import quiet_libraries, working

    check_output(out, overwrite)
    quiet_libraries()
    with working(f"loading {model}"):
        tokenizer, loaded = load_tokenizer(model), load_model(model, "auto", "cpu")
    with working("packing"):
        report = compress(loaded, format)
    with working(f"saving to {out}"):
        save_pretrained(out, loaded, tokenizer, overwrite=overwrite)
    _tell(f"{report}\nsaved to {out}; load it after `import wanda_kernels`")


def decompress_command(model: Source, out: Out, overwrite: Overwrite = False, debug: Debug = False) -> None:
    """Unpack a packed model: a plain Hugging Face folder with the same weights."""
    from ..models import load_model, load_tokenizer, save_pretrained
    from ..models.save import check_output
    from ..packed import decompress
    from .display import quiet_libraries, working

    check_output(out, overwrite)
    quiet_libraries()
    with working(f"loading {model}"):
        tokenizer, loaded = load_tokenizer(model), load_model(model, "auto", "cpu")
    with working("unpacking"):
        decompress(loaded)
    with working(f"saving to {out}"):
        save_pretrained(out, loaded, tokenizer, overwrite=overwrite)
    _tell(f"saved to {out}")


def _tell(text: str) -> None:
    Console().print(text, highlight=False, soft_wrap=True, markup=False)
