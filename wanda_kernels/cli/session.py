"""What commands do with a model: check, load, calibrate, prune, evaluate, save; each step is shown."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._words import to_json
from ..models import load_model, load_tokenizer, save_pretrained
from ..models.load import check_choices, empty_model, load_config, processor_files, weight_bytes
from ..models.save import DROP_REPORT, REPORT, check_bytes
from ..packed import compress
from ..packed.model import head_of, packed_layers
from ..pruning import PruneSpec, PruningReport, prune
from ..pruning.blocks import find_blocks
from ..pruning.driver import check_blocks
from ..reap import DropReport, check_drop, drop_experts
from ..text import evaluation_windows, load_calibration, perplexity
from ..text.windows import needs_bos
from .display import PruningDisplay, bar, pruning_bar, quiet_libraries, tell_reference, tell_slow_dtype, working
from .options import check_length

if TYPE_CHECKING:
    from ..distributed import Processes


class Session:
    """One model on a command line. Steps that are not asked for are not done; the model is loaded when it is needed.

    Args:
        model: a hub id, a folder, or a .gguf file.
        dtype, device, device_map: as :func:`wanda_kernels.models.load_model` takes them.

    Raises:
        ValueError, ImportError: for choices that no model can be loaded with.
    """

    def __init__(self, model: str, dtype: str, device: str, device_map: str | None = None) -> None:
        self.place = check_choices(dtype, device, device_map)
        self.name, self._dtype, self._device, self._device_map = model, dtype, device, device_map
        self._is_told = False

    def begin(self) -> None:
        """From here on files are read."""
        quiet_libraries()
        tell_reference(self.place)

    @functools.cached_property
    def config(self) -> Any:
        return load_config(self.name)

    def check(
        self,
        spec: PruneSpec,
        out: Path | None = None,
        packed: bool = False,
        length: int | None = None,
        drop: float | None = None,
        drop_named: str = "share",
        head: str = "float",
    ) -> None:
        """What can be known to fail before the model is loaded, from its config and the sizes of its files.

        Raises:
            ValueError, OSError: it cannot be pruned as ``spec`` says, packed (its output layer as ``head``), called
                with ``length`` tokens, lose the share ``drop`` of its experts (called ``drop_named``), or be written to
                ``out``.
        """
        with working(f"checking {self.name}"):
            if length is not None:
                check_length(length, self.config)
            empty = empty_model(self.config)
            blocks = find_blocks(empty, meta=True)
            check_blocks(blocks, spec)
            if head != "float":
                head_of(empty)
            if drop is not None:
                check_drop(empty, drop, meta=True, named=drop_named)
            needed = weight_bytes(self.name, self._dtype)
        if needed is not None and out is not None and not packed:
            check_bytes(out, needed)

    @functools.cached_property
    def tokenizer(self) -> Any:
        with working(f"loading the tokenizer of {self.name}"):
            return load_tokenizer(self.name)

    @functools.cached_property
    def model(self) -> Any:
        with working(f"loading {self.name}"):
            return load_model(self.name, self._dtype, self._device, self._device_map)

    def _to_compute(self) -> Any:
        """The model; the first time with a line where its dtype is slow here. Packed layers have their own products."""
        model = self.model
        if not self._is_told and not packed_layers(model):
            tell_slow_dtype(model.dtype, model.device)
        self._is_told = True
        return model

    def copy(self) -> Session:
        """Of the same model as it is now; what is done to one does not change the other."""
        other = copy.copy(self)
        other.__dict__["model"] = copy.deepcopy(self.model)
        return other

    def calibration(
        self, sources: Sequence[str], samples: int | None, length: int | None, seed: int, **how: Any
    ) -> torch.Tensor:
        """[samples, length], int64; ``how``: as for :func:`wanda_kernels.load_calibration`."""
        how = {"bos": needs_bos(self.config)} | how
        tokenizer = self.tokenizer
        with working(f"loading calibration data from {', '.join(sources)}"):
            return load_calibration(sources, tokenizer, samples, length, seed, **how)

    def windows(self, text: str, length: int, count: int | None = None, bos: bool | None = None) -> torch.Tensor:
        """The first ``count`` (None: all) of ``text``, [windows, length]; ``bos``: None chooses by model."""
        check_length(length, self.config)
        bos = needs_bos(self.config) if bos is None else bos
        tokenizer = self.tokenizer
        with working(f"loading text from {text}"):
            return evaluation_windows(text, tokenizer, length, count, bos=bos)

    def prune(
        self, input_ids: torch.Tensor | None, spec: PruneSpec, processes: Processes | None = None
    ) -> PruningReport:
        model = self.model if input_ids is None else self._to_compute()
        with bar() as shown:
            return prune(model, input_ids, spec=spec, processes=processes, progress=PruningDisplay(shown))

    def choose_values(self, input_ids: torch.Tensor, spec: PruneSpec) -> PruningReport:
        """Of a model that is pruned already: ``spec`` prunes nothing."""
        model = self.model  # in the dtype that it is packed in: another is no choice here
        with bar() as shown, pruning_bar(shown, "choosing values") as progress:
            return prune(model, input_ids, spec=spec, progress=progress)

    def drop_experts(self, input_ids: torch.Tensor, share: float, batch_size: int | None) -> DropReport:
        model = self._to_compute()
        with bar() as shown, pruning_bar(shown, "scoring experts") as progress:
            return drop_experts(model, input_ids, share, batch_size=batch_size, progress=progress)

    def perplexity(self, windows: torch.Tensor, batch_size: int = 1) -> float:
        model = self._to_compute()
        with bar() as shown:
            task = shown.add_task("evaluating", total=len(windows))
            return perplexity(
                model, windows, windows.shape[1], batch_size, on_window=lambda n: shown.update(task, completed=n)
            )

    def save(
        self, out: Path, overwrite: bool, report: PruningReport | None = None, dropped: DropReport | None = None
    ) -> None:
        # Without the seconds, so that the same command gives the same bytes.
        extra = {} if report is None else {REPORT: to_json(report.to_dict(seconds=False))}
        if dropped is not None:
            extra[DROP_REPORT] = dropped.to_json()
        extra |= processor_files(self.name, self.config)
        with working(f"saving to {out}"):
            save_pretrained(out, self.model, self.tokenizer, extra=extra, overwrite=overwrite)

    def compress(self, **how: Any) -> Any:
        with working("packing"):
            return compress(self.model, **how)
