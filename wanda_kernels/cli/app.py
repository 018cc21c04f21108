"""The ``wanda-kernels`` application: its commands, and how errors end it."""

from __future__ import annotations

import os
import sys
import traceback

import typer

from . import bench, compress, info, interrupt, plan, prune, ranks, speed, study
from . import eval as evaluate
from .options import debug_wanted

INTERRUPTED = 130

app = typer.Typer(
    name="wanda-kernels",
    help="Prune language models with Wanda (arXiv 2306.11695) on compiled kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("prune")(prune.prune_command)
app.command("plan")(plan.plan_command)
app.command("compress")(compress.compress_command)
app.command("decompress")(compress.decompress_command)
app.command("eval")(evaluate.eval_command)
app.command("study")(study.study_command)
app.command("speed")(speed.speed_command)
app.command("bench")(bench.bench_command)
app.command("info")(info.info_command)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and exits: 0 on success only, 2 for wrong usage, 130 for Ctrl-C, 143 for SIGTERM, 1 for
    everything else."""
    try:
        with interrupt.remembered():
            code = app(args=arguments, prog_name="wanda-kernels", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:  # noqa: BLE001  (the top of the program: whatever it is becomes one sentence)
        if debug_wanted():
            traceback.print_exc()
        if hasattr(error, "format_message"):  # a usage error of typer's
            _fail(f"{error.format_message()} (see --help)", 2)
        _fail(str(error) or type(error).__name__, 1)
    if code == INTERRUPTED:  # newer typer returns it, older raises Abort
        _fail("interrupted; nothing was written", interrupt.exit_code())
    ranks.end(code or 0)


def _fail(message: str, code: int) -> None:
    ranks.tell(message)
    print(f"wanda-kernels: error: {ranks.prefix()}{' '.join(message.split())}", file=sys.stderr, flush=True)
    if interrupt.received() and code == interrupt.exit_code():
        # A KeyboardInterrupt that passed through exec() (a dataclass being made, say) makes Python end by the signal,
        # whatever code it is told to exit with. Everything is cleaned up by now.
        sys.stdout.flush()
        os._exit(code)
    ranks.end(code)
