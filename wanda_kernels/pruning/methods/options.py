"""What each method can be told. Anything a method would not use is refused rather than ignored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

from .groups import Group
from .owl import Owl

ABLATIONS = ("ablate_mag_seq", "ablate_wanda_seq", "ablate_mag_iter", "ablate_wanda_iter")
METHODS = ("wanda", "magnitude", "sparsegpt", "ria", *ABLATIONS)

_SOLVER = {"block_size", "damping"}
_TAKES = {
    "wanda": {"group", "variant"},
    "magnitude": {"group"},
    "ria": {"group", "ria_power"},
    "sparsegpt": {"group", "weight_update", *_SOLVER},
    **dict.fromkeys(ABLATIONS, _SOLVER),
}


class OptionArguments(TypedDict, total=False):
    """The keyword arguments that :func:`wanda_kernels.prune` takes for its methods; None is the default."""

    group: str | Group | None
    variant: bool
    weight_update: bool | None
    block_size: int | None
    damping: float | None
    ria_power: float | None
    owl: Owl | bool | None


@dataclass(frozen=True)
class MethodOptions:
    """See :func:`wanda_kernels.prune` for what they mean."""

    group: Group | None = None
    variant: bool = False
    weight_update: bool = True
    block_size: int = 128
    damping: float = 0.01
    ria_power: float = 0.5
    owl: Owl | None = None

    @classmethod
    def resolve(cls, method: str, sparsity: float, m: int | None, arguments: OptionArguments) -> MethodOptions:
        """Checks the options of ``method`` together. ``m``: of an N:M pattern, or None.

        Raises:
            ValueError: an option that the method does not take, or a value out of range.
            TypeError: an option that does not exist.
        """
        if unknown := arguments.keys() - OptionArguments.__annotations__.keys():
            raise TypeError(f"prune() got an unexpected keyword argument '{min(unknown)}'")
        given: dict[str, Any] = {name: value for name, value in arguments.items() if value is not None}
        given = {name: value for name, value in given.items() if value is not False or name == "weight_update"}
        owl = given.pop("owl", None)
        if refused := sorted(given.keys() - _TAKES[method]):
            takers = ", ".join(name for name, names in _TAKES.items() if refused[0] in names)
            raise ValueError(f"{refused[0]} is an option of {takers}, not of {method}")
        if isinstance(given.get("group"), str):
            given["group"] = Group.parse(given["group"])
        options = cls(**given, owl=Owl() if owl is True else owl)
        options._check(method, sparsity, m)
        return options

    def _check(self, method: str, sparsity: float, m: int | None) -> None:
        if m is not None:
            for name in ("group", "variant", "owl"):
                if getattr(self, name):
                    raise ValueError(f"{name} is for a sparsity, a pattern leaves it no choice: give one of them")
        solved = "block_size" in _TAKES[method] and self.weight_update
        if self.block_size < 1 or (m is not None and solved and self.block_size % m):
            what = "at least 1" if m is None else f"a multiple of the pattern's M = {m}"
            raise ValueError(f"block_size must be {what}, got {self.block_size}")
        if not 0 <= self.damping < 100:
            raise ValueError(f"damping must be in [0, 100), got {self.damping}")
        if not 0 <= self.ria_power <= 10:
            raise ValueError(f"ria_power must be in [0, 10], got {self.ria_power}")
        if self.variant and self.group is not None:
            raise ValueError("variant chooses within each row by itself: give variant or group, not both")
        if method == "sparsegpt" and self.group is not None and self.weight_update:
            raise ValueError(
                "sparsegpt compares within blocks of block_size columns: a group needs weight_update=False "
                "(--no-weight-update)"
            )
        if self.owl is not None:
            self.owl.check(sparsity)

    def to_dict(self) -> dict[str, Any]:
        """Those that are not the default, as plain data."""
        data: dict[str, Any] = {}
        for name in MethodOptions.__dataclass_fields__:
            value = getattr(self, name)
            if value != getattr(MethodOptions(), name):
                data[name] = {"limit": value.limit, "outlier": value.outlier} if name == "owl" else value
        return data | ({"group": str(self.group)} if self.group is not None else {})
