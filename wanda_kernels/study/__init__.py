"""Many pruning runs of one model, compared: ``wanda-kernels study``.

``plan`` says which runs; ``runner`` does them on one loaded model; ``results`` keeps what is done, so that a study can
be gone on with, and ``stored`` checks what it finds; ``report`` makes the HTML page, ``tables`` and ``pictures`` its
parts; ``paper`` holds published figures.
"""

from .plan import Run, Scale, grid, paper_plan
from .report import write_report
from .results import Results
from .runner import Runner

__all__ = ["Results", "Run", "Runner", "Scale", "grid", "paper_plan", "write_report"]
