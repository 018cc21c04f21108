from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub fails at once
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the Triton kernels on the CPU; read where Triton is first imported
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # `make test`: the workers share the cores, with what their tests start
    share = max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(share)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/ is not installed

settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True
)
settings.load_profile("tests")


@pytest.fixture
def machine():
    """CUDA kernels on the CPU."""
    from simt.machine import Machine, load

    return Machine(load())


@pytest.fixture
def plain_steps(monkeypatch):
    """A static decoder's steps as they are: to compile one takes seconds."""
    monkeypatch.setattr("wanda_kernels.static.one_graph", lambda step, device: step)


@pytest.fixture(scope="module")
def one_thread():
    """Tensors of tiny models gain nothing from two, and lose much where the machine has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The tests of the backend "cuda" are tests for a GPU; those are skipped where there is none. What runs a GPU's
    kernels on the CPU is slow: to compile CUDA's takes half a minute."""
    skip = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        callspec = getattr(item, "callspec", None)
        backend = None if callspec is None else callspec.params.get("backend")
        if backend == "cuda":
            item.add_marker(pytest.mark.gpu)
        if backend in ("cuda-simt", "triton-interpreter") or item.path.stem.startswith("test_simt"):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(skip)
    if hasattr(config, "workerinput"):  # this is a worker of pytest-xdist
        from workers import turn_of

        items.sort(key=lambda item: turn_of(item.nodeid))


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist nothing calls it
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    if config.getvalue("dist") != "loadgroup":
        return None
    from workers import Groups

    return Groups(config, log)
