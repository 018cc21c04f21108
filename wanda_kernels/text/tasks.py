"""Accuracy on lm-eval's tasks, with the stock library and the model that is already loaded."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .._words import need

# Wanda (arXiv 2306.11695), section 4.1 and table 2: the mean of their plain accuracies.
PAPER_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


def parse_tasks(text: str) -> list[str]:
    """``paper``, or names and paths with commas between them -> names and paths, each once."""
    if text == "paper":
        return list(PAPER_TASKS)
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) != len(names):
        raise ValueError(f"tasks must be task names or files, each once, with commas between them, got '{text}'")
    return names


class TaskEvaluation:
    """Tasks with their data, found before a model is loaded; :meth:`run` evaluates a model on them.

    Args:
        tasks: names that lm-eval knows (tasks, groups, tags), task files (``.yaml``), or folders of task files (an
            lm-eval ``include_path``), all of whose tasks are meant. A task file may name Python functions, which run.

    Raises:
        ImportError: lm-eval is not installed.
        FileNotFoundError: no such file or folder, or the data of a task cannot be had.
        ValueError: a name that lm-eval does not know, a folder without tasks.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        need("lm_eval", "eval", "tasks are evaluated by lm-eval")
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        paths = {name: Path(name).expanduser() for name in tasks if _is_path(name)}
        for name, path in paths.items():
            if not path.exists():
                raise FileNotFoundError(f"task {name} does not exist")
        folders = [str(path.absolute()) for path in paths.values() if path.is_dir()]
        # lm-eval's own 14,000 tasks take it seconds to index: only where one of them is named.
        self._manager = TaskManager(include_path=folders, include_defaults=len(paths) < len(tasks))
        self._names: list[str] = []
        for name in tasks:
            self._names += self._resolve(name, paths.get(name))
        for name in self._names:
            self._fetch(name)

    def _resolve(self, name: str, path: Path | None) -> list[str]:
        from lm_eval.tasks import TaskManager

        if path is None:
            if name not in self._manager.all_tasks:
                near = difflib.get_close_matches(name, self._manager.all_tasks, 3)
                hint = f" (near: {', '.join(near)})" if near else ""
                raise ValueError(f"lm-eval has no task '{name}'{hint}; a file or folder is given by its path, as ./x")
            return [name]
        if path.is_file():
            return [str(path.absolute())]
        found = list(TaskManager(include_path=str(path.absolute()), include_defaults=False).all_subtasks)
        if not found:
            raise ValueError(f"folder {name} holds no lm-eval task files")
        return found

    def _fetch(self, name: str) -> None:
        """Makes the task once: its data is then in the cache of ``datasets``."""
        try:
            self._manager.load([name])
        except Exception as error:
            cause = " ".join(str(error).split())[:300] or type(error).__name__
            raise FileNotFoundError(
                f"task {name} could not be loaded: {cause}. Its data comes from the Hugging Face hub; without a "
                "network, run the command once where there is one and copy the cache (HF_HOME), or give a task file "
                "whose dataset_path is 'json' and whose data_files are here"
            ) from error

    def run(
        self,
        model: nn.Module,
        tokenizer: Any,
        few_shot: int | None = None,
        limit: int | None = None,
        batch_size: int = 1,
    ) -> list[dict[str, Any]]:
        """A row per task, and per group that has a figure of its own.

        Args:
            model: dense, pruned or packed, on its device.
            tokenizer: the model's.
            few_shot: examples before each question [default: the task's own]; a task that is defined without any
                stays without.
            limit: evaluate on the first so many examples of each task [default: all].
            batch_size: requests per forward pass.

        Returns:
            Per row ``task``, ``few_shot``, ``examples``, ``metrics`` (name -> value, as ``acc`` and ``acc_norm``),
            ``errors`` (name -> standard error) and ``group`` (the group in whose figure it is, or None).
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        adapter: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, trust_remote_code=False)
        found: Any = simple_evaluate(
            adapter, tasks=self._names, num_fewshot=few_shot, limit=limit, log_samples=False,
            task_manager=self._manager,
        )  # fmt: skip
        return [_row(name, found) for name in found["results"]]


def mean_accuracy(rows: Sequence[dict[str, Any]]) -> tuple[float, int] | None:
    """The mean of plain ``acc`` and over how many tasks it is; None where fewer than two have one. A group's figure
    stands for its tasks."""
    values = [row["metrics"]["acc"] for row in rows if "acc" in row["metrics"] and row["group"] is None]
    return (sum(values) / len(values), len(values)) if len(values) > 1 else None


def _row(name: str, found: dict[str, Any]) -> dict[str, Any]:
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in found["results"][name].items():
        metric, _, rule = key.partition(",")
        if isinstance(value, int | float) and rule:
            short = metric.removesuffix("_stderr") + ("" if rule == "none" else f" ({rule})")
            (errors if metric.endswith("_stderr") else metrics)[short] = float(value)
    groups = found.get("group_subtasks", {})
    counted = (g for g, tasks in groups.items() if name in tasks and "acc,none" in found["results"].get(g, {}))
    return {
        "task": name,
        "few_shot": found.get("n-shot", {}).get(name),
        "examples": found.get("n-samples", {}).get(name, {}).get("effective"),
        "metrics": metrics,
        "errors": errors,
        "group": next(counted, None),
    }


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml")) or name in (".", "..")
