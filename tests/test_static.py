"""Decoding with a static cache: the tokens of ``generate``, in steps that a CUDA graph can hold."""

from __future__ import annotations

import contextlib
import inspect
import re
from pathlib import Path

import pytest
import saved
import tiny
import torch
from test_speed import packed_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache, masking_utils
from transformers.cache_utils import StaticSlidingWindowLayer

from wanda_kernels import static
from wanda_kernels.models import save_pretrained

pytestmark = pytest.mark.usefixtures("plain_steps")


def tokens_of_generate(model, prompt, tokens):
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False
    )
    return ids[:, prompt.shape[1] :]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_tokens_are_those_of_generate(family):
    model, prompt = tiny.model(family), tiny.ids(3, 7)
    decoder = static.StaticDecoder(model, prompt, 12)  # longer than the windows of these families
    for ids in (prompt, prompt.flip(1), prompt):  # a decoder is used again
        found, times = decoder.generate(ids)
        assert static.first_difference(found, tokens_of_generate(model, ids, 12)) is None
        assert len(times) == 12
        assert times == sorted(times)


def test_the_tokens_of_a_packed_model():
    model, prompt = packed_model(), tiny.ids(2, 5)
    found, _ = static.StaticDecoder(model, prompt, 9).generate(prompt)
    assert torch.equal(found, tokens_of_generate(model, prompt, 9))


@pytest.mark.parametrize("ends", [None, 5, [5, 7]])
def test_no_token_ends_a_sequence(ends):
    """As with generate's ``min_new_tokens``: even where the model would choose nothing else."""
    model, prompt = tiny.model(), tiny.ids(2, 5)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(128))
    model.lm_head.bias.data[5], model.lm_head.bias.data[7] = 200.0, 100.0
    model.generation_config.eos_token_id = ends
    found, _ = static.StaticDecoder(model, prompt, 4).generate(prompt)
    assert torch.equal(found, tokens_of_generate(model, prompt, 4))
    assert bool((found == 5).all()) == (ends is None)
    assert bool((found == 7).all()) == (ends == 5)


class OnTheDevice(TorchDispatchMode):
    """Refuses what a graph cannot hold: values read by the host, tensors that the host makes from its own, shapes that
    depend on values."""

    FORBIDDEN = ("_local_scalar_dense", "is_nonzero", "lift_fresh", "nonzero", "equal", "masked_select", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.partition("::")[2] in self.FORBIDDEN:
            raise AssertionError(f"{func} in a step")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("attention", [None, "eager"])
def test_a_step_asks_the_host_for_nothing(family, attention, monkeypatch):
    model, prompt = tiny.model(family), tiny.ids(2, 5)
    if attention == "eager" and "torch.tensor(" in inspect.getsource(masking_utils.eager_mask):
        pytest.skip("this transformers makes the mask of eager attention on the host, and capturing it is an error")
    if attention is not None:  # Gemma 2 has no other
        model.set_attn_implementation(attention)
    decoder = static.StaticDecoder(model, prompt, 4)
    decoder.generate(prompt)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # transformers asks for it
    decoder._cache.reset()
    decoder._position.zero_()
    addresses = [tensor.data_ptr() for layer in decoder._cache.layers for tensor in (layer.keys, layer.values)]
    with torch.no_grad(), OnTheDevice():
        decoder._step()
    assert addresses == [t.data_ptr() for layer in decoder._cache.layers for t in (layer.keys, layer.values)]


def test_what_the_mode_refuses():
    with OnTheDevice(), pytest.raises(AssertionError, match="in a step"):
        bool(torch.ones(1) > 0)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "opt"])
def test_one_graph_serves_every_token(family, monkeypatch):
    """Nothing that a graph would keep comes from the host, such as a count of tokens: traced once, for all."""
    monkeypatch.setattr(static, "one_graph", static.compiled)
    monkeypatch.setattr(static, "COMPILER", "eager")
    model, prompt = tiny.model(family), tiny.ids(2, 5)
    decoder = static.StaticDecoder(model, prompt, 12)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ids in (prompt, prompt.flip(1)):
            found, _ = decoder.generate(ids)
            assert torch.equal(found, tokens_of_generate(model, ids, 12))


def test_a_step_that_counts_on_the_host_is_refused(monkeypatch):
    monkeypatch.setattr(static, "one_graph", static.compiled)
    monkeypatch.setattr(static, "COMPILER", "eager")
    monkeypatch.setattr(
        static, "static_cache", lambda model, length: StaticCache(config=model.config, max_cache_len=length)
    )
    with pytest.raises(static.CaptureError, match=r"a decode step cannot be compiled on cpu: (?s:.)*[Rr]ecompil"):
        static.StaticDecoder(tiny.model("mistral"), tiny.ids(2, 5), 12)


@pytest.mark.slow
def test_a_packed_model_compiled(monkeypatch):
    monkeypatch.setattr(static, "one_graph", static.compiled)
    model, prompt = packed_model(), tiny.ids(2, 5)
    found, _ = static.StaticDecoder(model, prompt, 9).generate(prompt)
    assert torch.equal(found, tokens_of_generate(model, prompt, 9))


def test_without_a_compiler(monkeypatch):
    def fails(step, **_):
        def call():
            raise torch._dynamo.exc.Unsupported("No working C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(static.CaptureError, match="cannot be compiled on cpu: No working C"):
        static.compiled(lambda: None, torch.device("cpu"))


def test_models_without_a_static_cache_are_refused(monkeypatch):
    model = tiny.model()
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    with pytest.raises(ValueError, match="transformers has no static cache for LlamaForCausalLM"):
        static.check_static(model)


def test_windows_beside_another_state_are_refused(monkeypatch):
    class Both(StaticSlidingWindowLayer):
        pass

    class Cache:
        def __init__(self, config, max_cache_len):
            self.layers = [Both(max_cache_len, 4)]

    monkeypatch.setattr(static, "StaticCache", Cache)
    with pytest.raises(ValueError, match="cache for LlamaForCausalLM counts tokens on the host"):
        static.check_static(tiny.model())


class FakeGraphs:
    """torch.cuda, as far as capturing goes: what runs where, in order."""

    def __init__(self, patch, fails: bool = False) -> None:
        self.log: list[str] = []
        cuda, log = torch.cuda, self.log

        class Stream:
            def __init__(self, name: str = "side") -> None:
                self.name = name

            def wait_stream(self, other):
                log.append(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self):
                log.append("replay")

        @contextlib.contextmanager
        def stream(which):
            log.append(f"on {which.name}")
            yield
            log.append("back")

        @contextlib.contextmanager
        def graph(_graph):
            log.append("capture")
            yield
            log.append("captured")
            if fails:
                raise RuntimeError("operation not permitted when stream is capturing")

        patch.setattr(cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(cuda, "Stream", Stream)
        patch.setattr(cuda, "current_stream", lambda: Stream("current"))
        patch.setattr(cuda, "stream", stream)
        patch.setattr(cuda, "CUDAGraph", Graph)
        patch.setattr(cuda, "graph", graph)


def test_the_step_is_warm_on_a_side_stream_before_it_is_captured(monkeypatch):
    fake = FakeGraphs(monkeypatch)
    replay = static.captured(lambda: fake.log.append("step"), torch.device("cuda", 0))
    before = ["side waits for current", "on side", *["step"] * static.WARM_UPS, "back", "current waits for side"]
    assert fake.log == [*before, "capture", "step", "captured"]
    replay()
    assert fake.log[-1] == "replay"


def test_a_step_that_cannot_be_captured(monkeypatch):
    FakeGraphs(monkeypatch, fails=True)
    with pytest.raises(static.CaptureError, match="cannot be captured as a CUDA graph: operation not permitted"):
        static.captured(lambda: None, torch.device("cuda", 0))


def test_first_difference():
    left = torch.arange(8).view(2, 4)
    assert static.first_difference(left, left.clone()) is None
    assert static.first_difference(left, left + (left == 6)) == 3


PAGE = Path(__file__).parent.parent / "docs" / "deploy.md"


def test_the_loop_of_the_page_runs(tmp_path, monkeypatch):
    """On the CPU: the same step, plain. Its tokens are those of generate."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(block.splitlines()) < 35  # a page that is read
    model = packed_model()
    save_pretrained(tmp_path / "packed", model, saved.tokenizer())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names: dict[str, object] = {}
    exec(compile(block, str(PAGE), "exec"), names)
    prompt, tokens = names["prompt"], names["tokens"]
    assert torch.equal(tokens, tokens_of_generate(model, prompt, tokens.shape[1]))


def test_a_compiled_step_is_called_as_a_graph_is_replayed(monkeypatch):
    """Each on tensors of its own, though it is the same code; torch looks for no compiled code again."""

    def step_of(x, factor):
        def step():
            x.mul_(factor)

        return step

    pairs = [(torch.ones(4), torch.full((4,), factor)) for factor in (2.0, 3.0)]
    advances = [static.compiled(step_of(*pair), torch.device("cpu")) for pair in pairs]
    for x, _ in pairs:
        x.fill_(1)
    torch.compiler.reset()
    monkeypatch.setattr("torch._dynamo.convert_frame.compile_frame", lambda *_: pytest.fail("torch looked again"))
    for number in (0, 1, 0):
        advances[number]()
    assert [x.tolist() for x, _ in pairs] == [[4.0] * 4, [3.0] * 4]


def test_a_step_that_reads_other_tensors_for_every_token_is_refused():
    """Its graph would go on reading those of the first."""
    held = [torch.zeros(4)]

    def step():
        held[0] = held[0] + 1

    with pytest.raises(static.CaptureError, match="it reads other tensors for every token"):
        static.compiled(step, torch.device("cpu"))
