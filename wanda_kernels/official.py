"""``python -m wanda_kernels.official``: the flags of the official ``main.py`` (locuslab/wanda), and its log file.

A script that calls ``python main.py --model ... --save out/`` changes one word. What differs: ``--sparsity_type`` may
be left out, ``--save`` too, ``--nsamples`` may exceed 128; ``--calibration`` and ``--text`` take files, for machines
without network.
"""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from pathlib import Path

import torch

from .cli import interrupt, ranks
from .cli.options import CALIBRATION, UsageError, of_options, usage
from .methods import METHODS
from .models.load import choose_device
from .pruning import PruneSpec
from .pruning.blocks import count_zeros, find_blocks

# LLaMA-2's context, and the paper's windows for it; LLaMA's is 2048. Newer models announce more than fits a GPU.
LONGEST = 4096
SPARSITY_TYPES = ("unstructured", "4:8", "2:4")


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="python -m wanda_kernels.official", description=__doc__)
    add = arguments.add_argument
    add("--model", required=True, help="hub id, folder, or .gguf file")
    add("--seed", type=int, default=0, help="of the drawing of calibration data")
    add("--nsamples", type=int, default=128, help="calibration samples")
    add("--sparsity_ratio", type=float, default=0.0, help="0: prune nothing, evaluate only")
    add("--sparsity_type", choices=SPARSITY_TYPES, default="unstructured")
    add("--prune_method", choices=tuple(METHODS), default="wanda")
    add("--cache_dir", default=None, help="where the hub's files are kept [default: the hub's own]")
    add("--use_variant", action="store_true", help="the appendix's variant of wanda")
    add("--save", type=Path, default=None, help="folder for log_METHOD.txt")
    add("--save_model", type=Path, default=None, help="folder for the pruned model")
    add("--eval_zero_shot", action="store_true", help="the paper's seven tasks, by lm-eval")
    ours = arguments.add_argument_group("not in the official code")
    ours.add_argument("--calibration", action="append", help="c4, wikitext2, a hub id or a file; several are mixed, by "
                      "shares as in notes.txt=0.75 where these are not equal [default: c4]")  # fmt: skip
    ours.add_argument("--text", default="wikitext2", help="what perplexity is measured on [default: wikitext2]")
    ours.add_argument("--length", type=int, default=None, help=f"tokens a sequence [the model's context, <= {LONGEST}]")
    ours.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    ours.add_argument("--dtype", default=None, help="[default: float16 on CUDA, the checkpoint's on the CPU]")
    ours.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return arguments


def run(options: argparse.Namespace) -> None:
    """Load, prune, evaluate, log, save: in the official order."""
    from .cli.session import Session
    from .models.save import check_output, check_writable
    from .text.calibration import check_sources
    from .text.tasks import PAPER_TASKS, TaskEvaluation

    sources = options.calibration or CALIBRATION
    with usage():
        ranks.refuse("the official command")
        check_sources(sources, options.nsamples)
        spec = _spec(options)
        cuda = choose_device(options.device).type == "cuda"
        session = Session(options.model, options.dtype or ("float16" if cuda else "auto"), options.device)
    if options.save is not None:
        check_writable(options.save)
    if options.save_model is not None:
        check_output(options.save_model, overwrite=True, source=options.model)
    zero_shot = TaskEvaluation(PAPER_TASKS) if options.eval_zero_shot else None
    session.begin()
    length = options.length or min(getattr(session.config, "max_position_embeddings", LONGEST), LONGEST)
    session.check(spec, options.save_model, length=length)
    windows = session.windows(options.text, length, bos=False)
    input_ids = None
    if options.sparsity_ratio != 0 and spec.needs:
        input_ids = session.calibration(sources, options.nsamples, length, options.seed, bos=False)
    model = session.model
    print("use device ", session.place, model.dtype)
    if options.sparsity_ratio != 0:
        print("pruning starts")
        session.prune(input_ids, spec)
    sparsity = sparsity_by_layer(model)
    print("*" * 30)
    print(f"sparsity sanity check {sparsity:.4f}")
    print("*" * 30)
    value = session.perplexity(windows)
    print(f"wikitext perplexity {value}" if options.text == "wikitext2" else f"{options.text} perplexity {value}")
    if options.save is not None:
        options.save.mkdir(parents=True, exist_ok=True)
        log = options.save / f"log_{options.prune_method}.txt"
        log.write_text(f"method\tactual_sparsity\tppl_test\n{options.prune_method}\t{sparsity:.4f}\t{value:.4f}\n")
    if zero_shot is not None:
        print("*" * 32)
        print("zero_shot evaluation results")
        for row in zero_shot.run(model, session.tokenizer, few_shot=0):
            print({"task": row["task"], **row["metrics"]})
    if options.save_model is not None:
        session.save(options.save_model, overwrite=True)


def _spec(options: argparse.Namespace) -> PruneSpec:
    pattern = None if options.sparsity_type == "unstructured" else options.sparsity_type
    if pattern and options.sparsity_ratio != 0.5:
        raise ValueError(f"--sparsity_ratio must be 0.5 for {pattern}, got {options.sparsity_ratio:g}")
    sparsity = None if pattern else options.sparsity_ratio
    return PruneSpec(sparsity=sparsity, pattern=pattern, method=options.prune_method, variant=options.use_variant)


def sparsity_by_layer(model: torch.nn.Module) -> float:
    """Prints each block's share of zeros as the official code does; returns that of all blocks."""
    zeros = total = 0
    for index, block in enumerate(find_blocks(model)):
        weights = [matrix.weight for matrix in block.matrices.values()]
        mine = sum(count_zeros(weight) for weight in weights)
        size = sum(weight.numel() for weight in weights)
        print(f"layer {index} sparsity {mine / size:.6f}")
        zeros, total = zeros + mine, total + size
    return zeros / total


def _in_official_words(message: str) -> str:
    ours = {
        "--variant": "--use_variant",
        "--samples": "--nsamples",
        "--sparsity": "--sparsity_ratio",
        "--method": "--prune_method",
    }
    for name, official in ours.items():
        message = re.sub(rf"{name}(?![\w-])", official, message)
    return " ".join(message.split())


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.cache_dir is not None:
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_CACHE = options.cache_dir
    try:
        with interrupt.remembered():
            run(options)
    except KeyboardInterrupt:
        print("wanda_kernels.official: error: interrupted", file=sys.stderr)
        sys.exit(interrupt.exit_code())
    except Exception as error:  # noqa: BLE001  (the top of the program: whatever it is becomes one sentence)
        if options.debug:
            traceback.print_exc()
        print(f"wanda_kernels.official: error: {_in_official_words(of_options(str(error)))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()
