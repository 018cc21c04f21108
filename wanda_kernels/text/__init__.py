"""Text in, token windows out: calibration data and perplexity."""

from .calibration import load_calibration
from .perplexity import evaluation_ids, evaluation_windows, perplexity
from .windows import sample_windows, split_windows

__all__ = ["evaluation_ids", "evaluation_windows", "load_calibration", "perplexity", "sample_windows", "split_windows"]
