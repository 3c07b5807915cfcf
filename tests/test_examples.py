"""The examples run and do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from tsugi_kpool import reference

FOLDER = Path(__file__).resolve().parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_finetune_learns(capsys):
    first, last = load("finetune").main(steps=20)
    assert last < first - 0.5
    assert "14 of 14 LoRA layers accelerated" in capsys.readouterr().out


def test_direct_ops_learns_and_measures():
    module = load("direct_ops")
    result = module.main(steps=8)
    assert result["last"] < result["first"]
    assert result["m"] == 8 and result["V"] > 0 and result["P"] > 0

    layer = module.Pool(torch.nn.Linear(12, 7), adapters=3, r=2)
    for b in layer.B:
        torch.nn.init.normal_(b)
    x = torch.randn(5, 12)
    expected = reference.lora_linear(x, layer.base.weight, layer.base.bias, layer.A, layer.B, layer.scaling)
    torch.testing.assert_close(layer(x), expected)


def test_pool_learns_and_exports_what_it_learnt():
    before, after, exported = load("pool").main(steps=24)
    assert after < before - 0.1
    assert abs(exported - after) < 1e-4


def test_trainer_learns_and_resumes_bit_for_bit(tmp_path):
    before, after, again = load("trainer").main(tmp_path, steps=24)
    assert after < before - 0.1
    assert again == after
