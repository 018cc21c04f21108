"""How fast models generate: prefill and decode apart, the models in turns, with transformers' own ``generate``."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .memory import added_peak
from .packed.model import packed_layers

BATCHES = (1, 4, 16)


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


def time_generation(model: Any, prompt: Tensor, tokens: int) -> tuple[float, list[float]]:
    """(seconds to the first token, seconds between the others) of one greedy generation.

    Args:
        prompt: [batch, length], int64.
        tokens: to generate, at least 2.
    """
    clock = _Clock(prompt.device)
    start = time.perf_counter()
    with torch.no_grad():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=[clock],
        )
    gaps = [later - earlier for earlier, later in zip(clock.times, clock.times[1:], strict=False)]
    return clock.times[0] - start, gaps


def weight_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, shared ones once, and of copies kept for prefill."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copies = sum(layer.prefill_bytes() for layer in packed_layers(model).values())
    return copies + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def measure(
    models: Mapping[str, nn.Module],
    batches: Sequence[int] = BATCHES,
    prompt: int = 128,
    tokens: int = 32,
    rounds: int = 3,
    on_step: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Medians over ``rounds``, in which the models take turns. Two rounds go before and do not count: the first warms
    up, the second measures memory.

    Args:
        models: name -> model, all on one device. The first one is what the others are compared with.
        batches: prompts at a time.
        prompt, tokens: length of the prompts, the same random ids for all models, and of what is generated.
        on_step: called after each of ``len(batches) * (rounds + 2) * len(models)`` generations.

    Returns:
        One row per batch and model: ``first_token_s``, ``prefill_tokens_s``, ``decode_tokens_s``, ``weight_bytes``,
        ``peak_bytes`` (the weights, and what generating adds to them at its peak, :func:`added_peak`; None where that
        cannot be told) and ``decode_ratio``, to the first model's.
    """
    rows = []
    for batch in batches:
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        peaks: dict[str, int | None] = {}
        for number in range(rounds + 2):
            for name, model in models.items():
                device = next(model.parameters()).device
                vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
                ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(batch))
                generate = functools.partial(time_generation, model, ids.to(device), tokens)
                if number == 1:  # apart from the timed ones: it makes every page of memory a new one
                    added = added_peak(generate, device)
                    peaks[name] = None if added is None else weight_bytes(model) + added
                else:
                    first, gaps = generate()
                    if number > 1:
                        seconds[name].append((first, statistics.median(gaps)))
                on_step()
        reference = None
        for name, model in models.items():
            first = statistics.median(run[0] for run in seconds[name])
            gap = statistics.median(run[1] for run in seconds[name])
            reference = reference or gap
            rows.append({
                "model": name, "batch": batch, "first_token_s": first, "prefill_tokens_s": batch * prompt / first,
                "decode_tokens_s": batch / gap, "decode_ratio": reference / gap, "weight_bytes": weight_bytes(model),
                "peak_bytes": peaks[name],
            })  # fmt: skip
    return rows
