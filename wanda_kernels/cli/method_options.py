"""The options of the pruning methods, as options of a command: whatever a method can be told, `prune` takes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..methods import METHODS, options_of
from ..methods.owl import Owl

PANEL = "Methods"

UseOwl = Annotated[
    bool, typer.Option("--owl", rich_help_panel=PANEL, help="Any method: blocks with more outliers keep more weights.")
]
OwlLimit = Annotated[
    float | None,
    typer.Option(
        "--owl-limit", "--owl-lambda", rich_help_panel=PANEL, help="Half the largest spread. \\[default: 0.08]"
    ),
]
OwlOutlier = Annotated[
    float | None, typer.Option("--owl-outlier", rich_help_panel=PANEL, help="Outliers: times the mean. \\[default: 5]")
]


def owl_of(use: bool, limit: float | None, outlier: float | None) -> Owl | None:
    """Raises ValueError where OWL is told something and not asked for."""
    given = {name: value for name, value in (("limit", limit), ("outlier", outlier)) if value is not None}
    if given and not use:
        name, value = next(iter(given.items()))
        raise ValueError(f"--owl-{name} {value:g} needs --owl")
    return Owl(**given) if use else None


def takes_method_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with an option for each of any method's, in the place of its parameter ``method_options``, which
    gets what was given of them."""
    options: dict[str, dataclasses.Field[Any]] = {}
    for method in METHODS:
        options |= {name: one for name, one in options_of(method).items() if name not in options}

    @functools.wraps(command)
    def taking(**given: Any) -> None:
        mine = {name: given.pop(name) for name in options}
        command(**given, method_options={name: value for name, value in mine.items() if value is not None})

    added = [_parameter(name, one) for name, one in options.items()]
    parameters = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        parameters += added if parameter.name == "method_options" else [parameter]
    taking.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    taking.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del taking.__wrapped__  # its signature is another
    return taking


def _parameter(name: str, one: dataclasses.Field[Any]) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    kind: Any = type(one.default) if one.default is not None else str
    default = False if one.default is False else None
    declared = f"{flag}/--no-{name.replace('_', '-')}" if one.default is True else flag
    if default is None:
        kind = kind | None
    option = typer.Option(
        declared, rich_help_panel=PANEL, help=one.metadata["help"], metavar=one.metadata.get("metavar"),
        show_default=False,
    )  # fmt: skip
    return inspect.Parameter(
        name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=Annotated[kind, option]
    )
