"""Which way packed products go: timed once, remembered, fixed by a file; on a GPU by events, in a capture never."""

from __future__ import annotations

import json

import pytest
import torch

from wanda_kernels.packed import PackedLinear, dispatch


@pytest.fixture(autouse=True)
def no_choices():
    dispatch.clear()
    yield
    dispatch.clear()


def test_dispatch_times_once_remembers_and_can_be_fixed(tmp_path, monkeypatch):
    layer = PackedLinear.from_linear(torch.nn.Linear(64, 8), "bitmap")
    x = torch.randn(2, 64)
    layer(x)
    ((name, choice),) = dispatch.choices().items()
    assert name.startswith("bitmap float32 8x64 tokens 2 cpu ")
    monkeypatch.setattr(dispatch, "_fastest", lambda *_: pytest.fail("timed again"))
    layer(x)
    dispatch.save(tmp_path / "choices.json")
    other = "unpack" if choice == "packed" else "packed"
    (tmp_path / "choices.json").write_text(json.dumps({name: other}))
    dispatch.clear()
    dispatch.load(tmp_path / "choices.json")
    layer(x)
    assert dispatch.choices() == {name: other}
    dispatch.clear()
    (tmp_path / "choices.json").write_text(json.dumps({name: "semi_structured"}))  # a copy that this layer has not
    dispatch.load(tmp_path / "choices.json")
    with pytest.raises(ValueError, match=r"has 'semi_structured' for bitmap .*, it must be packed or unpack"):
        layer(x)
    (tmp_path / "choices.json").write_text(json.dumps({name: "fast"}))
    with pytest.raises(ValueError, match="must map shapes to packed, unpack, semi_structured, own or torch"):
        dispatch.load(tmp_path / "choices.json")
    (tmp_path / "choices.json").write_text("{")
    for path in ("choices.json", "none.json"):
        with pytest.raises(ValueError, match=r"dispatch file .* \(WANDA_KERNELS_DISPATCH\) could not be read"):
            dispatch.load(tmp_path / path)


def test_a_second_forward_pass_makes_no_name_and_checks_nothing_again(monkeypatch):
    for form in ("bitmap", "2:4"):
        dense = torch.nn.Linear(64, 8)
        dense.weight.data[:, ::2] = 0
        layer = PackedLinear.from_linear(dense, form)
        x = torch.randn(3, 64)
        expected = layer(x)
        with monkeypatch.context() as patch:
            for function in ("name_of", "choose", "choices"):
                patch.setattr(dispatch, function, lambda *_: pytest.fail("asked again"))
            patch.setattr(PackedLinear, "validate", lambda *_: pytest.fail("validated again"))
            assert torch.equal(layer(x), expected)
        dispatch.clear()


class FakeGPU:
    """What dispatch asks of torch.cuda, with a clock of its own that each way advances."""

    def __init__(self, milliseconds):
        self.milliseconds, self.clock, self.log = milliseconds, 0.0, []

    def install(self, patch):
        cuda, gpu = torch.cuda, self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self, stream=None):
                self.at = gpu.clock
                gpu.log.append("event")

            def elapsed_time(self, end):
                return end.at - self.at

        class Guard:
            def __init__(self, device):
                gpu.log.append(f"on {device}")

            __enter__ = __exit__ = lambda *_: None

        class Buffer:
            def __init__(self, size, dtype, device):
                gpu.log.append(f"buffer of {size * dtype.itemsize}")

            def zero_(self):
                gpu.log.append("flush")
                gpu.clock += 100

        patch.setattr(cuda, "Event", Event)
        patch.setattr(cuda, "device", Guard)
        patch.setattr(cuda, "get_device_name", lambda device: "a card")
        patch.setattr(cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(cuda, "synchronize", lambda device: gpu.log.append(f"wait for {device}"))
        patch.setattr(cuda, "get_device_properties", lambda device: type("Properties", (), {"L2_cache_size": 1000}))
        patch.setattr(torch, "empty", Buffer)

    def product(self, way):
        self.log.append(way)
        self.clock += self.milliseconds[way].pop(0)
        return torch.zeros(1)


def test_on_a_gpu_dispatch_times_by_events_of_the_tensors_device_on_cold_data(monkeypatch):
    """The first product of a way loads kernels and does not count; one wait in all, for this device."""
    gpu = FakeGPU({"packed": [900.0, 3.0, 1.0, 3.0], "unpack": [1.0, 2.0, 2.0, 2.0]})
    gpu.install(monkeypatch)
    key = ("2:4", torch.bfloat16, 64, 64, 3, torch.device("cuda", 1), 2)
    assert dispatch.choose(key, ("packed", "unpack"), gpu.product) == "packed"
    assert dispatch.choices() == {"2:4 bfloat16 64x64 tokens 8 a card": "packed"}
    assert dispatch.known(key) == "packed"
    assert gpu.log[:4] == ["on cuda:1", "packed", "unpack", "buffer of 2000"]
    assert gpu.log[4:-1] == ["flush", "event", "packed", "event", "flush", "event", "unpack", "event"] * 3
    assert gpu.log[-1] == "wait for cuda:1"


def test_dispatch_in_a_capture_times_nothing(monkeypatch):
    """What is known is taken, by key or by name; else the untimed default, which is not remembered."""
    gpu = FakeGPU({"packed": [9.0] * 4, "unpack": [1.0] * 4})
    gpu.install(monkeypatch)
    keys = [("2:4", torch.bfloat16, 64, 64, bits, torch.device("cuda", 1), 2) for bits in (0, 4, 6)]
    is_capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    assert dispatch.choose(keys[0], ("packed", "unpack"), gpu.product) == "packed"
    assert dispatch.choose(keys[2], ("packed", "unpack", "semi_structured"), gpu.product) == "unpack"
    assert not gpu.log
    assert not dispatch.choices()
    assert dispatch.known(keys[0]) is None
    dispatch.choices()[dispatch.name_of(keys[1])] = "unpack"  # as read from a file
    assert dispatch.choose(keys[1], ("packed", "unpack"), gpu.product) == "unpack"
    is_capturing = False
    assert dispatch.choose(keys[0], ("packed", "unpack"), gpu.product) == "unpack"  # timed now
    is_capturing = True
    assert dispatch.choose(keys[0], ("packed", "unpack"), gpu.product) == "unpack"
