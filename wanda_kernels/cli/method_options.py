"""Options of ``prune`` that belong to single methods (see :func:`wanda_kernels.prune`)."""

from __future__ import annotations

from typing import Annotated

import typer

from ..pruning.methods.options import OptionArguments
from ..pruning.methods.owl import Owl

PANEL = "Methods"

Group = Annotated[
    str | None,
    typer.Option(
        "--group",
        metavar="row|layer|column",
        rich_help_panel=PANEL,
        help="What weights are compared with (row:N, column:N: N neighbours together). \\[default: the method's own: "
        "row for wanda, layer for magnitude and ria]",
    ),
]
Variant = Annotated[
    bool, typer.Option("--variant", rich_help_panel=PANEL, help="wanda: the paper's appendix; rows of any sparsity.")
]
WeightUpdate = Annotated[
    bool | None,
    typer.Option(
        "--weight-update/--no-weight-update",
        rich_help_panel=PANEL,
        help="sparsegpt: make up for what was pruned, or prune by its metric alone. \\[default: update]",
        show_default=False,
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        "--block-size", min=1, rich_help_panel=PANEL, help="sparsegpt, ablate: columns a block. \\[default: 128]"
    ),
]
Damping = Annotated[
    float | None,
    typer.Option(
        "--damping", rich_help_panel=PANEL, help="sparsegpt, ablate: share of the Hessian's diagonal. \\[default: 0.01]"
    ),
]
RiaPower = Annotated[
    float | None, typer.Option("--ria-power", rich_help_panel=PANEL, help="ria: exponent of the norm. \\[default: 0.5]")
]
UseOwl = Annotated[
    bool, typer.Option("--owl", rich_help_panel=PANEL, help="Any method: blocks with more outliers keep more weights.")
]
OwlLambda = Annotated[
    float | None, typer.Option("--owl-lambda", rich_help_panel=PANEL, help="Half the largest spread. \\[default: 0.08]")
]
OwlOutlier = Annotated[
    float | None, typer.Option("--owl-outlier", rich_help_panel=PANEL, help="Outliers: times the mean. \\[default: 5]")
]


def owl_of(use: bool, limit: float | None, outlier: float | None) -> Owl | None:
    """Raises ValueError where OWL is told something and not asked for."""
    if not use:
        for name, value in (("--owl-lambda", limit), ("--owl-outlier", outlier)):
            if value is not None:
                raise ValueError(f"{name} {value:g} needs --owl")
        return None
    return Owl(Owl.limit if limit is None else limit, Owl.outlier if outlier is None else outlier)


def method_options(
    group: str | None,
    variant: bool,
    weight_update: bool | None,
    block_size: int | None,
    damping: float | None,
    ria_power: float | None,
    owl: Owl | None,
) -> OptionArguments:
    """As keyword arguments of :func:`wanda_kernels.prune`."""
    return {
        "group": group,
        "variant": variant,
        "weight_update": weight_update,
        "block_size": block_size,
        "damping": damping,
        "ria_power": ria_power,
        "owl": owl,
    }
