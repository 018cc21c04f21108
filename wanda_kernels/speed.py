"""How fast models generate: prefill and decode apart, the models in turns, with transformers' own ``generate`` or with
a static cache and one graph for all tokens (:mod:`wanda_kernels.static`)."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .memory import added_peak
from .packed.model import linear_layers
from .static import StaticDecoder, first_difference

BATCHES = (1, 4, 16)
WAYS = ("generate", "static")


class Generation(NamedTuple):
    """Of one greedy generation: the seconds to the first token and between the others, and the tokens."""

    first: float
    gaps: list[float]
    tokens: Tensor


class _Clock:
    """A stopping criterion that stops nothing and notes when each token was there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, _scores: Tensor, **_kwargs: Any) -> Tensor:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def time_generation(model: Any, prompt: Tensor, tokens: int) -> Generation:
    """With ``generate``, as it is by default.

    Args:
        prompt: [batch, length], int64.
        tokens: to generate, at least 2.
    """
    clock = _Clock(prompt.device)
    start = time.perf_counter()
    with torch.no_grad():
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=[clock],
        )
    return _generation(start, clock.times, ids[:, prompt.shape[1] :])


def time_static(decoder: StaticDecoder, prompt: Tensor) -> Generation:
    start = time.perf_counter()
    tokens, times = decoder.generate(prompt)
    return _generation(start, times, tokens)


def _generation(start: float, times: list[float], tokens: Tensor) -> Generation:
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return Generation(times[0] - start, gaps, tokens)


def weight_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, shared ones once, and of copies kept for prefill."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copies = sum(layer.prefill_bytes() for layer in linear_layers(model).values())
    return copies + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class Contender(Protocol):
    """What takes turns: ``turn(0)`` warms up, ``turn(1)`` measures memory, the others time. ``row()``: the figures of
    :func:`measure` but for its name and ratio."""

    way: str
    batch: int

    def turn(self, number: int) -> None: ...

    def row(self) -> dict[str, Any]: ...


class _Model:
    """A model and a way, for one batch."""

    def __init__(self, model: nn.Module, way: str, prompt: Tensor, tokens: int) -> None:
        self.model, self.way, self.batch = model, way, prompt.shape[0]
        self.device = prompt.device
        self._prompt, self._tokens = prompt, tokens
        self._decoder: StaticDecoder | None = None
        self._seconds: list[tuple[float, float]] = []
        self._peak: int | None = None
        self._first_difference: int | None = None

    def turn(self, number: int) -> None:
        if number == 1:  # apart from the timed ones: it makes every page of memory a new one
            self._decoder = None
            added = added_peak(self._generate, self.device)
            self._peak = None if added is None else weight_bytes(self.model) + added
            return
        found = self._generate()
        if number == 0 and self.way == "static":
            expected = time_generation(self.model, self._prompt, self._tokens).tokens
            self._first_difference = first_difference(found.tokens, expected)
        elif number > 1:
            self._seconds.append((found.first, statistics.median(found.gaps)))

    def _generate(self) -> Generation:
        if self.way == "generate":
            return time_generation(self.model, self._prompt, self._tokens)
        if self._decoder is None:
            self._decoder = StaticDecoder(self.model, self._prompt, self._tokens)
        return time_static(self._decoder, self._prompt)

    def row(self) -> dict[str, Any]:
        batch, length = self._prompt.shape
        first, gap = (statistics.median(run) for run in zip(*self._seconds, strict=True))
        found = {
            "way": self.way, "batch": batch, "first_token_s": first, "prefill_tokens_s": batch * length / first,
            "decode_tokens_s": batch / gap, "weight_bytes": weight_bytes(self.model), "peak_bytes": self._peak,
        }  # fmt: skip
        return found | ({"first_difference": self._first_difference} if self.way == "static" else {})


def measure(
    models: Mapping[str, nn.Module],
    batches: Sequence[int] = BATCHES,
    prompt: int = 128,
    tokens: int = 32,
    rounds: int = 3,
    on_step: Callable[[], None] = lambda: None,
    ways: Sequence[str] = WAYS[:1],
    peers: Mapping[str, Contender] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Medians over ``rounds``, in which models and ways take turns. Two rounds go before and do not count: the first
    warms up, and compares static tokens with those of ``generate``, the second measures memory.

    Args:
        models: name -> model, all on one device. The first one is what the others are compared with.
        batches: prompts at a time.
        prompt, tokens: length of the prompts, the same random ids for all models, and of what is generated.
        on_step: called after each of ``len(batches) * (rounds + 2) * len(models) * len(ways)`` generations, and each
            of ``rounds + 2`` turns of a peer.
        ways: ``generate``, eager, and ``static``: :class:`StaticDecoder`, which refuses some models.
        peers: name -> what else takes turns, at its batch (:class:`wanda_kernels.llama_cpp.LlamaBench`).

    Returns:
        One row per batch, way and model: ``first_token_s``, ``prefill_tokens_s``, ``decode_tokens_s``,
        ``weight_bytes``, ``peak_bytes`` (the weights, and what generating adds to them at its peak,
        :func:`added_peak`; None where that cannot be told) and ``decode_ratio``, to the first model's of the same way,
        of a peer to the first model's ``generate``.
        Of ``static`` ones also ``first_difference``, the first token (from 1) that is not that of ``generate``, None
        where all are.
    """
    rows = []
    for batch in batches:
        contenders: dict[tuple[str, str], Contender] = {}
        for way in ways:
            for name, model in models.items():
                vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
                ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(batch))
                device = next(model.parameters()).device
                contenders[way, name] = _Model(model, way, ids.to(device), tokens)
        contenders |= {(peer.way, name): peer for name, peer in peers.items() if peer.batch == batch}
        for number in range(rounds + 2):
            for contender in contenders.values():
                contender.turn(number)
                on_step()
        found = {key: contender.row() for key, contender in contenders.items()}
        for (way, name), row in found.items():
            reference = found[way if way in ways else ways[0], next(iter(models))]["decode_tokens_s"]
            rows.append({"model": name, **row, "decode_ratio": row["decode_tokens_s"] / reference})
    return rows
