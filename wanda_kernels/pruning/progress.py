"""What the driver tells while it works. The command line draws it; the default is silent."""

from __future__ import annotations

from .report import LayerReport


class Progress:
    """Override what you want to hear of."""

    def start(self, steps: int) -> None:
        """The run will take ``steps`` steps, each one batch through one block."""

    def advance(self) -> None:
        """One step is done."""

    def block(self, name: str, layers: list[LayerReport]) -> None:
        """The block ``name`` is pruned."""
