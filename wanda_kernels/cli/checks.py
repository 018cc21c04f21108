"""What can be known to fail before a model is loaded: from its config and the sizes of its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .options import check_length

if TYPE_CHECKING:
    from ..pruning.selection import Target


def check_model(
    model: str, target: Target, dtype: str, out: Path | None, compress: bool = False, length: int | None = None
) -> None:
    """Raises ValueError or OSError where ``model`` cannot be pruned as ``target`` says, packed, called with ``length``
    tokens, or written to ``out``. The model is made without its weights.
    """
    from ..models.load import empty_model, load_config, weight_bytes
    from ..models.save import check_bytes
    from ..packed.model import refuse_unpackable
    from ..pruning.blocks import find_blocks
    from .display import working

    with working(f"checking {model}"):
        config = load_config(model)
        if length is not None:
            check_length(length, config)
        blocks = find_blocks(empty_model(config), meta=True)
        for block in blocks:
            for name, linear in block.linears.items():
                target.check(f"{block.name}.{name}", linear.weight)
        if compress:
            refuse_unpackable(blocks)
        needed = weight_bytes(model, dtype)
    if needed is not None and out is not None and not compress:
        check_bytes(out, needed)
