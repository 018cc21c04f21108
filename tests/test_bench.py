"""The benchmarks: that a wrong result gives no figure, what is written, what is compared; never how fast."""

from __future__ import annotations

import importlib.machinery
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import harness, operators, peers, products, records, shapes, suites
from benchmarks.harness import OURS, Case, Settings, WrongResultError, measure
from wanda_kernels import _backend, ops
from wanda_kernels.cli import bench
from wanda_kernels.cli.app import main

QUICK = Settings(repeats=2, quick=True)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return exit_.value.code


def case(**changes) -> Case:
    about = {
        "suite": "select", "operator": "prune_rows_", "shape": "64 x 128", "dtype": torch.float32, "backend": "cpu",
        "make": lambda: operators.weighted(64, 128, torch.float32, QUICK), "run": lambda i: ops.prune_rows_(*i, 0.5),
        "check": lambda _: "right", "bytes": 64 * 128 * 8, "in_place": True, "threads": 1,
    }  # fmt: skip
    return Case(**(about | changes))


def test_rows_of_a_case():
    seen = []

    def peer(inputs):
        seen.append(bool((inputs[0] != 0).all()))  # every repetition begins with the whole weight
        inputs[0].zero_()

    ours, other = measure(case(peers={"zero": peer}), QUICK)
    assert len(seen) == 3
    assert all(seen)
    assert (ours["implementation"], other["implementation"]) == (OURS, "zero")
    assert ours["p20_ms"] <= ours["median_ms"] <= ours["p80_ms"]
    assert ours["gb_per_s"] == pytest.approx(64 * 128 * 8 / ours["median_ms"] / 1e6)
    assert ours["copy_gb_per_s"] > 0
    assert ours["copy_ratio"] > 0
    assert ours["check"] == "right"
    assert other["ratio_to"] == OURS
    assert set(ours) | set(other) <= set(records.COLUMNS)


def test_a_program_says_its_own_time():
    said = iter([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    settings = Settings(repeats=8, quick=True)
    ours, other = measure(case(programs={"a program": lambda: next(said)}), settings)
    assert (ours["repeats"], other["repeats"]) == (8, harness.PROGRAM_TURNS)
    assert other["implementation"] == "a program"
    assert other["median_ms"] == 4000
    assert other["ratio_to"] == OURS


SAID = "  MUL_MAT(type_a=q4_K,type_b=f32,m=4096,n=1,k=14336,..):  344 runs -  2921.53 us/run - 117.44 MFLOP/run"


@pytest.mark.parametrize(("said", "code"), [(SAID, 0), ("", 0), (SAID + "\n" + SAID, 0), (SAID, 3)])
def test_llama_cpp_is_asked_for_one_product(tmp_path, said, code):
    program = tmp_path / peers.LLAMA_CPP
    program.write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/asked\necho '{said}'\nexit {code}\n")
    program.chmod(0o755)
    if said == SAID and code == 0:
        assert peers.llama_cpp_product(str(program), "q4_K") == pytest.approx(2921.53e-6)
    else:
        with pytest.raises(RuntimeError, match=f"q4_K, ended with {code}"):
            peers.llama_cpp_product(str(program), "q4_K")
    assert "perf -b CPU -o MUL_MAT -p type_a=q4_K,type_b=f32,m=4096,n=1,k=14336," in (tmp_path / "asked").read_text()


def test_a_red_check_times_nothing():
    def check(_inputs):
        raise WrongResultError("its rows differ")

    with pytest.raises(WrongResultError, match="its rows differ"):
        measure(case(check=check, run=lambda _: pytest.fail("was run")), QUICK)


def test_prefill_shapes_that_torch_refuses_are_told(capsys):
    """A CPU's torch has no semi-structured product: the reason is printed, and the rest is measured."""
    (case,) = products.prefill(QUICK)
    assert set(case.peers) == {"torch linear"}
    assert "no semi-structured tensor: " in capsys.readouterr().out
    assert [row["implementation"] for row in measure(case, QUICK)] == [OURS, "torch linear"]
    assert not list(products.prefill(Settings()))  # CUDA's


@pytest.mark.parametrize("is_right", [True, False])
def test_prefill_beside_a_semi_structured_tensor(monkeypatch, is_right):
    monkeypatch.setattr(peers, "semi_structured", lambda weight: weight if is_right else weight + 1)
    (case,) = products.prefill(QUICK)
    if is_right:
        rows = measure(case, QUICK)
        assert [row["implementation"] for row in rows] == [OURS, "torch linear", "torch semi-structured"]
        assert "semi-structured: relative error" in rows[0]["check"]
    else:
        with pytest.raises(WrongResultError, match="off by"):
            measure(case, QUICK)


@pytest.mark.parametrize("suite", ["select", "nm", "refine", "stats", "sparse"])
def test_checks_notice_wrong_results(suite, monkeypatch):
    """Each operator of each suite, made wrong in one element."""
    kernels = [*suites.KERNELS[suite](QUICK, shapes.QUICK)]
    assert kernels
    for one in kernels:
        torch.manual_seed(0)
        inputs = one.make()
        assert one.check(harness.clone(inputs))

    def spoil(function):
        def spoiled(*args, **kwargs):
            result = function(*args, **kwargs)
            target = args[0] if result is None else result[0] if isinstance(result, tuple) else result
            if target.dtype == torch.bool:
                target[0, 0] ^= True
            else:
                target.flatten()[0] += 1000  # rows of zeros would hide a factor
            return result

        return spoiled

    for name in ops.__all__:
        if name == "add_sqnorm_" or not name.startswith("unpack"):  # its first argument is what is wrong
            monkeypatch.setattr(ops, name, spoil(getattr(ops, name)))
    spoiled_formats = {
        form: (name, pack, getattr(ops, name)) for form, (name, pack, _) in products.FORMATS.items()
    }  # fmt: skip
    monkeypatch.setattr(products, "FORMATS", spoiled_formats)
    wrong = [*suites.KERNELS[suite](QUICK, shapes.QUICK)]
    for one in wrong:
        if one.operator.startswith("PackedLinear"):  # it has its own references to the operators
            continue
        torch.manual_seed(0)
        with pytest.raises(WrongResultError):
            one.check(one.make())


def test_every_suite_has_steps_and_the_operators_of_the_gpu_are_in_them():
    names = {
        one.operator.split()[0] for suite in suites.KERNELS.values() for one in suite(QUICK, shapes.QUICK)
    }  # fmt: skip
    unpacking = {name for name in ops.__all__ if name.startswith("unpack")}
    assert names >= set(ops.__all__) - unpacking - set(_backend._REFERENCE_ON_CUDA)
    for suite in suites.SUITES:
        assert suites.steps_of(suite, QUICK, None)


def test_shapes():
    assert shapes.weights_of(["7B", "3-8B"])[:4] == [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096)]
    with pytest.raises(ValueError, match="model must be one of 7B, 13B"):
        shapes.weights_of(["8B"])


def test_selection_peers_prune_the_same(monkeypatch):
    """Also FlashInfer's, by its documentation: the largest k of each row, values and indices, in any order."""
    stand_in = types.ModuleType("flashinfer")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    stand_in.top_k = lambda scores, k: torch.topk(scores, k, dim=1, sorted=False)
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    weight = torch.randperm(32 * 64, generator=torch.Generator().manual_seed(0)).view(32, 64).float() + 1  # no ties
    norm = torch.ones(64)
    expected = weight.clone()
    ops.prune_rows_(expected, norm, 0.5)
    found = peers.select_peers(torch.device("cuda")) | peers.select_peers(torch.device("cpu"))
    assert set(found) == {"sort + scatter", "topk", "kthvalue", "np.partition", "flashinfer.top_k"}
    for name, peer in found.items():
        pruned = weight.clone()
        peer((pruned, norm))
        assert torch.equal(pruned, expected), name


def test_peers_of_several_weights_run_once():
    settings = Settings(repeats=2)
    cases = suites._distinct(operators.select(settings, [(2048, 512), (4096, 512), (1024, 512)]))
    plain = [one for one in cases if one.operator == "prune_rows_" and one.dtype == torch.bfloat16]
    assert [(one.shape, bool(one.peers)) for one in plain] == [
        ("2048 x 512", False), ("1024 x 512", True), ("4096 x 512", False),
    ]  # fmt: skip


def test_command_line_writes_rows_and_compares_them(tmp_path, capsys):
    for name in ("a", "b"):
        assert run("bench", "--suite", "select", "--device", "cpu", "--quick", "--out", tmp_path / name) == 0
    shown = capsys.readouterr().out
    assert "sort + scatter" in shown
    assert f"wrote {tmp_path / 'b' / 'select.csv'}" in shown
    rows = records.read(tmp_path / "a" / "select.csv")
    assert {row["operator"] for row in rows} == {
        "prune_rows_",
        "prune_rows_ + sums",
        "prune_rows_ 64 experts",
        "row_mask",
    }
    assert all(row["device"] and row["torch"] and row["commit"] and row["date"] for row in rows)
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "select.csv"]
    assert run("bench", "--compare", tmp_path / "a" / "select.csv", tmp_path / "b" / "select.csv") == 0
    assert f"{len(rows)} rows in both" in capsys.readouterr().out


def test_wrong_results_have_no_row_and_end_the_command_with_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ops, "row_mask", lambda weight, *_: weight == 7)
    assert run("bench", "--suite", "select", "--device", "cpu", "--quick", "--out", tmp_path) == 1
    assert "2 cases are wrong and were not timed: row_mask bfloat16 64 x 128" in capsys.readouterr().err
    rows = records.read(tmp_path / "select.csv")
    assert {row["operator"] for row in rows} == {"prune_rows_", "prune_rows_ + sums", "prune_rows_ 64 experts"}


def test_comparison_flags_only_what_the_spread_does_not_explain():
    def row(median: float, **changes) -> records.Row:
        figures = {"median_ms": median, "p20_ms": median * 0.9, "p80_ms": median * 1.1}
        return {column: "" for column in records.COLUMNS} | {"operator": "x"} | figures | changes

    before = [row(10.0), row(10.0, operator="y"), row(10.0, operator="z"), row(1.0, operator="gone")]
    after = [row(11.0), row(13.0, operator="y"), row(7.0, operator="z"), row(1.0, operator="new")]
    compared = records.compare(before, after)
    assert [(r["operator"], r["verdict"]) for r in compared] == [("x", ""), ("y", "slower"), ("z", "faster")]
    assert [round(r["ratio"], 2) for r in compared] == [1.1, 1.3, 0.7]


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "select.csv"
    path.write_text("before")

    def interrupted() -> None:
        with records.writer(path) as write:
            write({"suite": "select", "median_ms": 1.5})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before"
    partial = tmp_path / "select.csv.partial"
    partial.write_text(partial.read_text() + "select,cut")
    assert [row["median_ms"] for row in records.read(partial)] == ["1.5"]
    with pytest.raises(ValueError, match="is no result file of the benchmarks"):
        records.read(path)


def test_fitted_exponents():
    sizes = [1, 2, 4, 8]
    assert suites.fitted_exponent(sizes, [3 * size**2 for size in sizes]) == pytest.approx(2)
    assert suites.fitted_exponent(sizes, [5.0] * 4) == pytest.approx(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "sparsity"], "--suite must be one of end-to-end, select, stats, nm, refine, sparse, scaling"),
        (["--models", "8B"], "model must be one of 7B"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N"),
        (["--compare", "none.csv", "none.csv"], "result file none.csv does not exist"),
    ],
)
def test_wrong_use(arguments, message, capsys):
    assert run("bench", "--quick", *arguments) == (1 if "does not exist" in message else 2)
    assert message in capsys.readouterr().err


def test_without_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "lib" / "wanda_kernels" / "cli" / "bench.py"))
    assert run("bench") == 1
    assert "run this in a checkout of the repository" in capsys.readouterr().err


IN_TURN = """
import sys
from wanda_kernels.cli.app import main
for suite in sys.argv[2:]:
    try:
        main(["bench", "--suite", suite, "--device", "cpu", "--quick", "--out", sys.argv[1]])
    except SystemExit as end:
        print(suite, end.code or 0, flush=True)
"""


@pytest.fixture(scope="module")
def results_from_another_folder(tmp_path_factory):
    """What all suites wrote, in one process, whose imports take seconds; what it printed; how it ended."""
    folder = tmp_path_factory.mktemp("elsewhere")
    root = Path(bench.__file__).parents[2]
    command = [sys.executable, "-c", IN_TURN, str(folder / "out"), *suites.SUITES]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(root)})  # fmt: skip
    return folder / "out", done


@pytest.mark.slow
@pytest.mark.parametrize("suite", suites.SUITES)
def test_a_suite_from_another_folder(suite, results_from_another_folder):
    out, done = results_from_another_folder
    assert f"{suite} 0" in done.stdout.splitlines(), done.stderr
    assert records.read(out / f"{suite}.csv")
