"""Greedy decoding without the host: transformers' ``StaticCache`` keeps every shape and address the same, so that one
step serves every token: on CUDA captured as a graph, on a CPU compiled by torch.compile, which needs a C++ compiler.

A decode step of ``generate`` is about a thousand launches from Python, which a packed model's shorter kernels do not
make fewer. Three things cannot happen while a graph is captured, and must have happened before: the first launch of a
Triton kernel or of a cuBLAS product (they load code or take memory), the check of a loaded weight, and a first timing
by :mod:`wanda_kernels.packed.dispatch`, which would take its untimed default. Therefore the step runs eagerly
``WARM_UPS`` times, with the shapes of the graph, on a side stream, as torch's notes on CUDA graphs ask. docs/deploy.md
shows the same for a loop of one's own.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

WARM_UPS = 2  # eager steps; the shortest cache has room for three
COMPILER = "inductor"  # of a CPU's step


class CaptureError(ValueError):
    """A step does what a graph cannot hold, such as a decision, or a tensor made, on the host; or what torch.compile
    cannot compile here."""


def check_static(model: Any) -> None:
    """Raises ValueError where a step would not be the same for every token."""
    if not getattr(model, "_can_compile_fullgraph", False):  # transformers' own word for it
        raise ValueError(f"transformers has no static cache for {type(model).__name__}")
    static_cache(model, 2)  # no memory yet


def static_cache(model: Any, length: int) -> StaticCache:
    """transformers' cache for ``length`` tokens, with layers of that length where attention has a window.

    Its own layers for windows count tokens on the host, and the mask is made from that count: a captured step would
    keep the mask of one token, a compiled one be compiled again for each. With all keys there, the mask alone makes the
    window.

    Raises:
        ValueError: the model has a window together with another state.
    """
    cache = StaticCache(config=model.config, max_cache_len=length)
    for number, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer:
            cache.layers[number] = StaticLayer(max_cache_len=length)
        elif isinstance(layer, StaticSlidingWindowLayer):
            raise ValueError(f"transformers' cache for {type(model).__name__} counts tokens on the host")
    return cache


class StaticDecoder:
    """Prefill as it is, then one static step a token.

    Args:
        model: on one device.
        prompt: [batch, length], int64, on that device: what the warm-up runs on, and the shape of all later prompts.
        tokens: that will be generated, at least 2.

    Raises:
        ValueError: :func:`check_static` refuses the model, or its step cannot be captured or compiled
            (:class:`CaptureError`).
    """

    def __init__(self, model: Any, prompt: Tensor, tokens: int) -> None:
        batch, length = prompt.shape
        check_static(model)
        self._model, self._tokens = model, tokens
        self._cache = static_cache(model, length + tokens)
        named = inspect.signature(model.forward).parameters
        self._shared: dict[str, Any] = {
            "cache" if "cache" in named else "past_key_values": self._cache, "use_cache": True,
        }  # fmt: skip
        # As generate: the prefill's logits of the last token alone.
        self._last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in named else {}
        # What a step reads and writes lies at the same addresses for ever.
        self._token, self._position = (prompt.new_zeros((batch, 1)) for _ in range(2))
        # Given, since some models (OPT) would make it from the cache's length on the host.
        self._mask = torch.ones((batch, length + tokens), dtype=torch.bool, device=prompt.device)
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        self._ends = torch.tensor(ends, dtype=torch.int64, device=prompt.device)
        with torch.no_grad():
            self._prefill(prompt)  # allocates the cache, checks the weights
            self._cache.reset()
            self._position.zero_()
            self._advance = one_graph(self._step, prompt.device)

    def generate(self, prompt: Tensor) -> tuple[Tensor, list[float]]:
        """As ``generate(do_sample=False)`` with as many tokens at least as at most: none ends a sequence early.

        Returns:
            The generated tokens [batch, tokens], and for each when it was there (``time.perf_counter``).
        """
        found, times = [], []
        with torch.no_grad():
            self._cache.reset()
            for number in range(self._tokens):
                if number == 0:
                    self._prefill(prompt)
                else:
                    self._advance()
                found.append(self._token.clone())
                if prompt.device.type == "cuda":
                    torch.cuda.synchronize(prompt.device)
                times.append(time.perf_counter())
        return torch.cat(found, dim=1), times

    def _prefill(self, prompt: Tensor) -> None:
        length = prompt.shape[1]
        positions = torch.arange(length, device=prompt.device).expand_as(prompt)
        self._choose(self._forward(prompt, self._mask[:, :length], positions, self._last))
        self._position.fill_(length)

    def _step(self) -> None:
        self._choose(self._forward(self._token, self._mask, self._position, {}))
        self._position.add_(1)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, more: dict[str, Any]) -> Tensor:
        output = self._model(ids, attention_mask=mask, position_ids=positions, **self._shared, **more)
        return output.logits[:, -1]

    def _choose(self, logits: Tensor) -> None:
        scores = logits.float()  # as generate
        if self._ends.numel():
            scores = scores.index_fill(1, self._ends, -torch.inf)
        self._token.copy_(scores.argmax(-1, keepdim=True))


def one_graph(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """``step`` without Python: :func:`captured` on CUDA, elsewhere :func:`compiled`."""
    return (captured if device.type == "cuda" else compiled)(step, device)


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """``step`` as the replay of a CUDA graph, after it ran ``WARM_UPS`` times on a side stream.

    Raises:
        CaptureError: it cannot be captured.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step()
        except RuntimeError as error:
            raise CaptureError(f"a decode step cannot be captured as a CUDA graph: {error}") from error
    replay: Callable[[], None] = graph.replay
    return replay


def compiled(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """``step`` as one compiled graph, after it ran twice. torch keeps what it compiled: a step of the same shapes is
    compiled in seconds, in another process, too.

    The graph is called without torch's guards, as a CUDA graph is replayed: to look at every module of a model whether
    it is still the same took 2 of the 28 ms of a token of Qwen2.5-Coder-1.5B in int4 (Zen 5).

    Raises:
        CaptureError: it cannot be compiled; torch finds no C++ compiler, for example.
    """
    import torch._dynamo  # takes a second
    from torch._dynamo.backends.registry import lookup_backend

    calls: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = []  # a graph, and what it reads and writes

    def remembering(graph: Any, inputs: Any) -> Callable[..., Any]:
        made = lookup_backend(COMPILER)(graph, inputs)

        def call(*given: Tensor) -> Any:
            calls.append((made, given))
            return made(*given)

        return call

    whole = torch.compile(step, fullgraph=True, dynamic=False, backend=remembering)
    try:
        # The steps of all models and batches are one code, of which torch refuses the ninth graph.
        with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
            whole()
        with torch._dynamo.config.patch(error_on_recompile=True):
            whole()  # another token, the same graph
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().partition("\n\nSet TORCHDYNAMO_VERBOSE")[0]  # what follows is for torch's authors
        raise CaptureError(f"a decode step cannot be compiled on {device}: {reason}") from error
    (graph, first), (_, second) = calls
    if any(before is not after for before, after in zip(first, second, strict=True)):
        raise CaptureError(f"a decode step cannot be compiled on {device}: it reads other tensors for every token")
    return lambda: graph(*second)


def first_difference(left: Tensor, right: Tensor) -> int | None:
    """The first token, from 1 on, that differs in any sequence of [batch, tokens]; None where none does."""
    different = (left != right).any(dim=0).nonzero()
    return int(different[0]) + 1 if different.numel() else None
