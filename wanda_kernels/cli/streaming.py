"""``wanda-kernels prune --stream``: what its options mean, what is said where it ends early."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import ranks

if TYPE_CHECKING:
    from torch import Tensor

    from ..distributed import Processes
    from ..pruning import PruneSpec, PruningReport
    from .session import Session


def check_options(
    model: str, stream: bool, resume: bool, offload: Path | None, compress: bool, device_map: str | None
) -> None:
    """Raises ValueError for options that do not go together."""
    if device_map not in (None, "auto"):
        raise ValueError(f"--device-map must be auto, got '{device_map}'")
    if device_map is not None and (stream or ranks.launched()):
        raise ValueError(f"--device-map does not go with {'--stream' if stream else 'several processes'}")
    if stream and not Path(model).expanduser().is_dir():
        raise ValueError(f"--stream needs a local folder with safetensors files, {model} is none")
    if stream and compress:
        raise ValueError("--compress does not go with --stream: run `wanda-kernels compress` on the result")
    for name, given in (("--resume", resume), ("--offload", offload is not None)):
        if given and not stream:
            raise ValueError(f"{name} needs --stream")


def check_leftovers(out: Path, resume: bool, overwrite: bool, model: str) -> None:
    """Raises FileExistsError where an unfinished run is there, and nothing says what to do with it. Tells where there
    is none to go on with."""
    from ..streaming.run import check_leftovers, describe
    from .display import note

    check_leftovers(out, resume, overwrite, model)
    if resume and describe(out) is None:
        note(f"no unfinished run to {out}: beginning with the first block")


def prune(
    session: Session,
    out: Path,
    input_ids: Tensor | None,
    spec: PruneSpec,
    places: dict[str, Any],
    processes: Processes | None,
    resume: bool,
    overwrite: bool,
) -> PruningReport:
    """Run it, with a bar. ``places``: device, dtype, offload, activation_memory (GiB)."""
    from ..streaming import stream_prune
    from ..streaming.run import describe
    from .display import PruningDisplay, bar, note

    places = places | {"activation_memory": int(places["activation_memory"] * 2**30)}
    try:
        with bar() as shown:
            return stream_prune(
                session.name, out, input_ids, spec=spec, tokenizer=session.tokenizer, resume=resume,
                overwrite=overwrite, processes=processes, progress=PruningDisplay(shown), **places,
            )  # fmt: skip
    except BaseException:
        left = describe(out)
        if left is not None:
            note(f"{left}: --resume goes on with it")
        raise
