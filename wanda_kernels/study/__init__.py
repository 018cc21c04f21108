"""Many pruning runs of one model, compared: ``wanda-kernels study``. It can be gone on with."""

from .plan import Run, Scale, grid, paper_plan
from .report import write_report
from .results import Results
from .runner import Runner

__all__ = ["Results", "Run", "Runner", "Scale", "grid", "paper_plan", "write_report"]
