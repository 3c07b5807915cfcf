"""A device on which the operations are wrong keeps PEFT's layers."""

from __future__ import annotations

import pytest
import torch

from peft_models import lora_model
from tsugi_kpool import ops, selftest, use_backend


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    monkeypatch.setattr(selftest, "_faults", {})


def test_this_machine_is_right():
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert selftest.fault("cpu") is None
    assert torch.equal(torch.get_rng_state(), state)
    assert selftest._error(torch.device("cpu"), torch.float64, torch.float64) < 1e-12


def change_one_gradient(y):
    return y + 0.2 * y.detach().roll(1, 0)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda y: y * 1.01, "the operations are wrong on cpu: float32 with float32 adapters differ .* by 1.0e-02"),
        (change_one_gradient, "the operations are wrong on cpu"),
        (lambda y: y * float("nan"), "differ from torch's result by nan"),
    ],
)
def test_a_wrong_result_is_found_and_the_layer_left_to_peft(monkeypatch, wrong, sentence):
    right = ops.lora_linear
    model = lora_model()
    x = torch.randn(3, 12)
    expected = model(x)
    monkeypatch.setattr(ops, "lora_linear", lambda *args: wrong(right(*args)))
    with pytest.warns(UserWarning, match=sentence), use_backend(model) as report:
        assert torch.equal(model(x), expected)
    assert report.fast_calls == 0 and not report.accelerated


def test_a_model_that_moves_to_such_a_device_is_left_to_peft_there(monkeypatch):
    model = lora_model()
    x = torch.randn(3, 12)
    with use_backend(model) as report:
        monkeypatch.setattr(selftest, "_faults", {"cpu": "the operations are wrong on cpu"})
        with pytest.warns(UserWarning, match="the operations are wrong on cpu"):
            model(x)
        assert report.fallback_calls == {"the operations are wrong on cpu": 2}


def test_an_operation_that_fails_is_found(monkeypatch):
    def fail(*args):
        raise RuntimeError("lora_linear: this build holds sm_80 and sm_90a, and the device is sm_75")

    monkeypatch.setattr(ops, "lora_linear", fail)
    assert selftest.fault("cpu").startswith(
        "the operations fail on cpu (float32 with float32 adapters): lora_linear: this"
    )
