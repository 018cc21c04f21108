"""The faults of one command that the soak test knows. Each is a function of a run whose inputs are saved; it raises
AssertionError where the promise is broken."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import streaming_child
from safetensors.torch import load_file, save_file
from soak_run import (
    OF_THE_MODEL,
    Run,
    copy_inputs,
    digest,
    is_of_killed,
    last_line,
    tensors,
    wait,
    wait_until_it_speaks,
)

from wanda_kernels.models.checkpoint import INDEX
from wanda_kernels.streaming import workfolder

CODES = {"none": {0}, "SIGTERM": {0, 143}, "SIGINT": {0, 130}, "SIGKILL": {0, -signal.SIGKILL}}
SAYS = {
    "disk full": "too large|no space|could not be written",
    "truncated": r"damaged or truncated",
    "wrong index": r"index\.json",
    "NaN": "holds NaN or inf",
    "SIGTERM": "interrupted",
    "SIGINT": "interrupted",
}


def old_faults(run: Run) -> None:
    """Nothing, a damaged model, a full disk, a signal."""
    run.save_model()
    damage(run)
    limit = int(10 ** run.draw.uniform(3, 5.3)) if run.fault == "disk full" else None
    process = run.start(file_limit=limit)
    if run.fault.startswith("SIG"):
        wait_until_it_speaks(process, run.said)
        time.sleep(run.draw.uniform(0, 0.9) ** 2)
        if process.is_alive():
            os.kill(process.pid or 0, getattr(signal, run.fault))
    code = wait(process)
    run.outcome = f"{code} {last_line(run.said)[:150]}"
    assert code in CODES.get(run.fault, {0, 1}), run.outcome
    if run.out.exists():
        assert run.fault not in ("NaN", "truncated"), "a damaged model was pruned"
        assert code == 0 or run.fault.startswith("SIG"), run.outcome
        run.check_output()
    else:
        assert code != 0, "no output, and it says that all is well"
        if not is_of_killed(code):
            said = run.check_error(code)
            assert re.search(SAYS[run.fault], said), f"it does not say what is wrong: {said}"
    left = run.left()
    if run.stream and left:
        assert left == {".out.partial"}, left
        assert run.fault not in OF_THE_MODEL, "left a state that nothing can be done with"
        assert not run.out.exists() or is_of_killed(code), "left a state beside the output"
        assert run.go("--resume", *overwrite(run)) == 0, last_line(run.said)
        run.outcome += " | went on"
        run.check_output()
        assert not run.left(), run.left()
    elif left:
        assert is_of_killed(code), left
        assert_staging(left)


def overwrite(run: Run) -> list[str]:
    return ["--overwrite"] if run.out.exists() else []


def assert_staging(left: set[str]) -> None:
    """Only what a killed run in memory cannot take away."""
    assert all(name.startswith(".out.partial-") for name in left), left


def damage(run: Run) -> None:
    shards = sorted(run.model.glob("*.safetensors"))
    if run.fault == "truncated":
        path = run.draw.choice(shards)
        os.truncate(path, run.draw.randrange(path.stat().st_size))
    elif run.fault == "NaN":
        path, name = run.draw.choice(
            [
                (path, name)
                for path in shards
                for name in load_file(path)
                if name.endswith(("q_proj.weight", "up_proj.weight", "fc1.weight"))
            ]
        )
        held = load_file(path)
        held[name].view(-1)[run.draw.randrange(held[name].numel())] = run.draw.choice((float("nan"), float("inf")))
        save_file(held, path, {"format": "pt"})
    elif run.fault == "wrong index" and (run.model / INDEX).exists():
        index = json.loads((run.model / INDEX).read_text())
        places = index["weight_map"]
        name = run.draw.choice(sorted(places))
        kind = run.draw.choice(("elsewhere", "missing file", "missing tensor", "unknown tensor", "no map"))
        if kind == "elsewhere":
            places[name] = run.draw.choice(sorted(set(places.values())))
        elif kind == "missing file":
            places[name] = "model-00099-of-00099.safetensors"
        elif kind == "missing tensor":
            del places[name]
        elif kind == "unknown tensor":
            places["model.layers.7.nothing.weight"] = places[name]
        else:
            del index["weight_map"]
        (run.model / INDEX).write_text(json.dumps(index))


def kill_while_publishing(run: Run) -> None:
    """At a drawn file operation from the writing of config.json on, in memory and streamed, with and without a model
    that is to be replaced: what is at the output's place is whole, and the next run ends in the right files."""
    run.save_model()
    before: dict[str, str] = {}
    if run.draw.random() < 0.5:
        shutil.copytree(run.model, run.out)
        before = digest(run.out)
    step = run.draw.randrange(41)
    code = run.go(*overwrite(run), die_at=step)
    assert code == 0 or is_of_killed(code), f"exit code {code}: {last_line(run.said)}"
    is_new = run.out.exists() and digest(run.out) != before
    if is_new:
        run.check_output()
    assert is_new or code != 0, "no output, and it says that all is well"
    run.outcome = f"{code} step {step}, {'new' if is_new else 'old' if before else 'no'} output"
    left = run.left()
    if not run.stream:
        assert_staging(left)
        if code:
            assert run.go(*overwrite(run)) == 0, last_line(run.said)
            run.check_output()
        assert run.left() == left, run.left()
        return
    assert left <= {".out.partial"}, left
    assert code or not left, left
    if code:
        anew = run.draw.random() < 0.3
        extra = ["--overwrite"] if anew else ["--resume", *overwrite(run)]
        assert run.go(*extra) == 0, last_line(run.said)
        run.outcome += " | anew" if anew else " | went on"
        run.check_output()
    assert not run.left(), run.left()


JUNK: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 4, 10**6, 2**70, 0.5, "", "x", "0", "bfloat16", "float32", "/etc/passwd",
    [], {}, [0, 0], [None], [[]], [{}], {"turn": 0}, {"a": 1}, [[1, 24, 64]],
)  # fmt: skip


def wrong_state(run: Run) -> None:
    """One field, at any depth, of the state of a killed run is another; half of them with the digest made right."""
    run.stream = True
    run.write_arguments()
    run.save_model()
    done = run.draw.randint(1, 3)  # of 3: after the last the output is published
    code = run.go(die_at=0) if done == 3 else run.go(state=(done + 1, streaming_child.die, ()))
    assert is_of_killed(code), f"exit code {code}: {last_line(run.said)}"
    path = run.work / "state.json"
    state = json.loads(path.read_text())
    assert state["done"] == done, state["done"]
    insider = run.turn % 2 == 1
    before = json.dumps(state)
    place = change(run, state)
    if insider and place != "digest":
        state["digest"] = workfolder._digest(state)
    path.write_text(json.dumps(state))
    run.outcome = f"{done} done, {place}{', digest right' if insider else ''}"
    run.recover()
    is_same = json.dumps(state) == before
    assert insider or is_same or "refused" in run.outcome, f"a state that was changed was believed: {run.outcome}"


def change(run: Run, state: dict[str, Any]) -> str:
    """Gives one field another value: which, and what. Half of them at the top, where each comes up in turn."""
    holder: Any = state
    # who makes the digest right lies about what decides something
    fields = sorted(state) if run.turn % 2 == 0 else sorted({*state} - {"digest", "version"})
    key: Any = fields[run.turn // 2 % len(fields)]
    place = [str(key)]
    while isinstance(holder[key], dict | list) and holder[key] and run.draw.random() < 0.85:
        holder = holder[key]
        key = run.draw.choice(sorted(holder)) if isinstance(holder, dict) else run.draw.randrange(len(holder))
        place.append(str(key))
    if run.draw.random() < 0.1:
        del holder[key]
        return f"{'.'.join(place)} taken out"
    value = run.draw.choice([value for value in JUNK if json.dumps(value) != json.dumps(holder[key])])
    if type(holder[key]) is int and run.draw.random() < 0.5:
        value = holder[key] + run.draw.choice((-2, -1, 1, 2))
    holder[key] = value
    return f"{'.'.join(place)} = {value}"


PRECIOUS = b"precious" * 10_000


def spoil(folder: Path, draw: float, how: str, victim: Path) -> None:
    """One shard of ``folder`` is removed, shortened, or replaced by a link to ``victim``. ``draw``: which, in [0, 1).
    It never raises: it is called within the run's own file operations."""
    shards = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not shards:
        return
    path = shards[int(draw * len(shards))]
    if how == "shortened":
        os.truncate(path, int(path.stat().st_size * draw))
        return
    path.unlink()
    if how == "a link":
        path.symlink_to(victim)
    elif how == "a hard link":
        os.link(victim, path)


def shard_vanishes(run: Run) -> None:
    """Of the output so far, during the run or between it and the next; or of the model, during the run."""
    when = ("output, during", "output, between", "input, during")[run.turn % 3]
    run.stream = run.stream or when != "input, during"
    how = run.draw.choice(("removed", "shortened") if when == "input, during" else HOW)
    run.write_arguments()
    run.save_model()
    copy_inputs(run)
    victim = run.base / "victim.txt"
    victim.write_bytes(PRECIOUS)
    place = run.work / "folder" if when.startswith("output") else run.model
    spoiling = (place, run.draw.random(), how, victim)
    count = run.draw.randint(1, 3)
    if not run.stream:  # where it is mapped, a shortened file is a SIGBUS that no program can tell of
        how, spoiling = "removed", (place, spoiling[1], "removed", victim)
        process = run.start()
        wait_until_it_speaks(process, run.said)
        time.sleep(run.draw.uniform(0, 0.9) ** 2)
        spoil(*spoiling)
        code = wait(process)
    elif when.endswith("during"):
        code = run.go(state=(count, spoil, spoiling))
    else:
        code = run.go(state=(min(count, 2) + 1, streaming_child.die, ()))
        assert is_of_killed(code), f"exit code {code}: {last_line(run.said)}"
        spoil(*spoiling)
    run.outcome = f"{code} {when}, {how} at {count}: {last_line(run.said)[:150]}"
    assert (code == 0) == run.out.exists(), f"exit code {code}, output {run.out.exists()}"
    if not is_of_killed(code) and code:
        run.check_error(code)
    if run.out.exists():
        run.check_output()
    if when == "input, during":
        shutil.rmtree(run.model)
        shutil.copytree(run.base / "inputs", run.model)
    run.recover()
    assert victim.read_bytes() == PRECIOUS, "a file elsewhere was changed through a link"


HOW = ("removed", "shortened", "a link", "a hard link")
KINDS = {  # what is taken out -> the ends of its names, and the families that have it
    "embedding": (("embed_tokens.weight",), ("llama", "llama biases", "llama tied", "gemma2", "opt")),
    "norm": (("norm.weight", "layer_norm.weight"), ("llama", "llama tied", "gemma2", "opt")),
    "q_proj": (("q_proj.weight",), ("llama", "llama biases", "gemma2", "opt")),
    "up_proj": (("up_proj.weight", "fc1.weight"), ("llama", "llama tied", "gemma2", "opt")),
    "bias": ((".bias",), ("llama biases", "opt")),
    "lm_head": (("lm_head.weight",), ("llama", "llama biases")),
    "module.": ((), ("llama", "llama biases", "llama tied", "gemma2", "opt")),
    "_orig_mod.": ((), ("llama", "llama biases", "llama tied", "gemma2", "opt")),
}


def missing_tensor(run: Run) -> None:
    """A tensor is not in the files, or all have a name of a wrapped model: an error that names it."""
    kind = sorted(KINDS)[run.turn % len(KINDS)]
    ends, families = KINDS[kind]
    run.family = run.draw.choice(families)
    run.save_model()
    if ends:
        name = run.draw.choice([name for name in sorted(tensors(run.model)) if name.endswith(ends)])
        rename = {name: None}
    else:
        rename = {name: f"{kind}{name}" for name in tensors(run.model)}
    for path in run.model.glob("*.safetensors"):
        held = {rename.get(name, name): tensor for name, tensor in load_file(path).items()}
        held.pop(None, None)
        save_file(held, path, {"format": "pt"})
    if (run.model / INDEX).exists():
        index = json.loads((run.model / INDEX).read_text())
        places = {rename.get(name, name): file for name, file in index["weight_map"].items()}
        places.pop(None, None)
        (run.model / INDEX).write_text(json.dumps(index | {"weight_map": places}))
    for run.stream in (False, True):
        run.write_arguments()
        code = run.go()
        assert not run.out.exists(), "a model that lacks tensors was pruned"
        said = run.check_error(code)
        assert any(name in said for name in rename), f"no tensor is named: {said}"
        assert not run.left(), run.left()
        run.outcome += f"{kind}: {said[:150]} | "
