"""Which tests one worker of pytest-xdist runs, one after the other (`make test`: -n 2 --dist loadgroup)."""

from __future__ import annotations

from pathlib import PurePath

from xdist.scheduler import LoadScopeScheduling

# Beside a module, whose fixtures are made once so: those that start ranks, which have 30 s to tell of a loss, and those
# that share a loaded model.
TOGETHER = {
    "test_distributed": "ranks", "test_ranks": "ranks", "test_soak": "ranks",
    "test_smollm2": "smollm2", "test_smollm2_methods": "smollm2",
}  # fmt: skip
# The longest, in this order: what begins last should be short. All others follow as they are collected.
FIRST = ("smollm2", "simt", "ranks", "test_gpu_suite")


def group_of(test: str) -> str:
    """``simt``: of all modules, what compiles the CUDA kernels for the CPU, which takes half a minute a process."""
    module = PurePath(test.split("::")[0]).stem
    if module.startswith("test_simt") or "cuda-simt" in test:
        return "simt"
    return TOGETHER.get(module, module)


def turn_of(test: str) -> int:
    group = group_of(test)
    return FIRST.index(group) if group in FIRST else len(FIRST)


class Groups(LoadScopeScheduling):
    """Not pytest-xdist's own: it writes groups into names that pytest 9.2 no longer reads them from."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)

    def schedule(self) -> None:
        self.config.option.loadscopereorder = False  # by how many tests a group has
        super().schedule()
