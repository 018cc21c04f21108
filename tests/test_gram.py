"""add_gram_: every backend against float64, and the matrices of a run by any number of threads and processes."""

from __future__ import annotations

import backends
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wanda_kernels import ops
from wanda_kernels._checks import GRAM_STEP
from wanda_kernels.ops.gram import mirror_
from wanda_kernels.pruning.grams import PART, Addend, Grams, parts_of

BACKENDS = ["reference", *(name for name in backends.names() if name != "cuda-simt")]  # on CUDA cuBLAS
COLS = [1, 3, 64, 191, 192, 193, 385, 500, 769]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    cols=st.sampled_from(COLS), tokens=st.sampled_from([0, 1, 7, 64, 200]), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), is_strided=st.booleans(),
)  # fmt: skip
def test_the_lower_triangle_is_that_of_float64(backend, cols, tokens, seed, dtype, is_strided):
    torch.manual_seed(seed)
    x = torch.randn(tokens, 2 * cols).to(dtype)[:, ::2] if is_strided else torch.randn(tokens, cols).to(dtype)
    before = torch.randn(cols, cols)
    got = before.clone()
    backends.implementation(backend, "add_gram_")(got, x, 0.5, 2.0)
    wanted = 0.5 * before.double() + 2 * x.double().T @ x.double()
    torch.testing.assert_close(got.tril().double(), wanted.tril(), atol=1e-3, rtol=1e-5)
    mirror_(got)
    assert torch.equal(got, got.T)
    assert torch.equal(got.tril(), got.T.triu().T)


@pytest.mark.parametrize("cols", [64, 576, 1000, 2100])
def test_parts_of_rows_and_threads_change_no_bit(cols):
    torch.manual_seed(0)
    x, threads = torch.randn(300, cols), torch.get_num_threads()
    wanted = torch.zeros(cols, cols)
    try:
        torch.set_num_threads(1)
        ops.add_gram_(wanted, x)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            whole, parts = torch.zeros(cols, cols), torch.zeros(cols, cols)
            ops.add_gram_(whole, x)
            for first in range(0, cols, GRAM_STEP):
                stop = min(first + GRAM_STEP, cols)
                ops.add_gram_(parts[first:stop, :stop], x[:, :stop], first=first)
            assert torch.equal(whole.tril(), wanted.tril())
            assert torch.equal(parts.tril(), wanted.tril())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("count", "cols"), [(1, 64), (5, 1024), (3, 2100), (1, 11008), (2, 5000), (0, 64)])
def test_parts_hold_every_element_below_the_diagonal_once(count, cols):
    seen = torch.zeros(count, cols, cols, dtype=torch.int8)
    for part in parts_of("x", count, cols):
        view = part.view(seen)
        assert view.numel() <= max(PART, GRAM_STEP * cols)
        view += 1
    assert (seen.tril() == torch.ones(cols, cols, dtype=torch.int8).tril()).all()


class Alone:
    """Of several processes the parts of one, run one after the other: what each gives to all is kept."""

    def __init__(self, rank, size):
        self.rank, self.size, self.device = rank, size, torch.device("cpu")

    def agree_on(self, data):
        return data


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("experts", "cols"), [(None, 500), (None, 2500), (3, 100)])
def test_sums_that_go_from_process_to_process_are_those_of_one(ranks, experts, cols):
    torch.manual_seed(1)
    samples, x = 4, torch.randn(4, 20, cols)

    def add(grams, share):
        if experts is None:
            grams.add("x", x[share.start : share.stop], share.start)
        else:
            for sample in share:
                grams.add_rows("x", x[sample], [5, 5, 20], range(3), 1)

    alone = Grams(samples, lambda _: experts)
    add(alone, range(samples))
    wanted = dict(alone.whole())["x"]
    processes = [Alone(rank, ranks) for rank in range(ranks)]
    grams = [Grams(samples, lambda _: experts, process) for process in processes]
    for rank, one in enumerate(grams):
        add(one, range(rank * samples // ranks, (rank + 1) * samples // ranks))
    exchange_together(grams, processes)
    for one in grams:
        assert torch.equal(dict(one.whole())["x"], wanted)


def exchange_together(grams, processes):
    """In threads that meet at each exchange."""
    import threading

    meet, buffers = threading.Barrier(len(grams)), {}

    def exchange_rows_(rank):
        def run(tensor, rows):
            buffers[rank] = tensor
            meet.wait(30)
            for source, share in enumerate(rows):
                tensor[share.start : share.stop] = buffers[source][share.start : share.stop]
            meet.wait(30)

        return run

    for process in processes:
        process.exchange_rows_ = exchange_rows_(process.rank)
    threads = [threading.Thread(target=one.exchange) for one in grams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


def test_an_addend_of_another_expert_adds_nothing():
    (part,) = parts_of("x", 2, 8)
    sums = torch.zeros(2, 8, 8)
    Addend(1, torch.ones(3, 8), 1.0, 1.0).add_to(part, sums)
    assert not sums[0].any()
    assert (sums[1] == 3).all()
