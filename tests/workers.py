"""Which tests one worker of pytest-xdist runs, one after the other (`make test`: -n 2 --dist loadgroup)."""

from __future__ import annotations

from pathlib import PurePath

from xdist.scheduler import LoadScopeScheduling

# The longest, in this order: what begins last should be short. All others follow as they are collected.
FIRST = ("simt",)


def group_of(test: str) -> str:
    """A module, whose fixtures are made once so; or, of all modules, the tests that compile the CUDA kernels for the
    CPU, which takes half a minute a process."""
    module = PurePath(test.split("::")[0]).stem
    return "simt" if module == "test_simt" or "cuda-simt" in test else module


class Groups(LoadScopeScheduling):
    """Not pytest-xdist's own: it writes groups into names that pytest 9.2 no longer reads them from."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)

    def schedule(self) -> None:
        self.config.option.loadscopereorder = False
        super().schedule()
