"""The ``wanda-kernels`` application: its commands, and how errors end it."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from .._version import __version__
from . import bench, compress, drop_experts, info, interrupt, plan, prune, ranks, speed, study
from . import eval as evaluate
from .options import UsageError, debug_wanted, of_options, usage

INTERRUPTED = 130

app = typer.Typer(
    name="wanda-kernels",
    help="Prune language models with Wanda (arXiv 2306.11695) on compiled kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"wanda-kernels {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What belongs to no command."""
    if context.invoked_subcommand not in ("prune", "info"):
        with usage():
            ranks.refuse(f"wanda-kernels {context.invoked_subcommand}")


app.command("prune")(prune.prune_command)
app.command("plan")(plan.plan_command)
app.command("drop-experts")(drop_experts.drop_experts_command)
app.command("compress")(compress.compress_command)
app.command("decompress")(compress.decompress_command)
app.command("eval")(evaluate.eval_command)
app.command("study")(study.study_command)
app.command("speed")(speed.speed_command)
app.command("bench", context_settings=bench.PASSED_ON)(bench.bench_command)
app.command("info")(info.info_command)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and exits, with a code of docs/exit-codes.md."""
    try:
        _run(arguments)
    except Exception as error:  # noqa: BLE001  (the loss of another process, while an error of this one was told)
        _fail(ranks.lost() or str(error) or type(error).__name__, 1)


def _run(arguments: list[str] | None) -> None:
    try:
        with interrupt.remembered():
            code = app(args=arguments, prog_name="wanda-kernels", standalone_mode=False)
            if not code:
                ranks.goodbye()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:  # noqa: BLE001  (the top of the program: whatever it is becomes one sentence)
        if debug_wanted():
            traceback.print_exc()
        if hasattr(error, "format_message"):  # a usage error of typer's
            if not error.format_message():  # no arguments: the help was shown
                ranks.end(2)
            _fail(f"{error.format_message()} (see --help)", 2)
        _fail(ranks.lost() or str(error) or type(error).__name__, 2 if isinstance(error, UsageError) else 1)
    if code == INTERRUPTED:  # newer typer returns it, older raises Abort
        _fail("interrupted; no output was written", interrupt.exit_code())
    ranks.end(code or 0)


def _fail(message: str, code: int) -> None:
    message = of_options(message)
    ranks.tell(message)
    print(f"wanda-kernels: error: {ranks.prefix()}{' '.join(message.split())}", file=sys.stderr, flush=True)
    if interrupt.received() and code == interrupt.exit_code():
        # A KeyboardInterrupt that passed through exec() (a dataclass being made, say) makes Python end by the signal,
        # whatever code it is told to exit with. Everything is cleaned up by now.
        sys.stdout.flush()
        os._exit(code)
    ranks.end(code)
