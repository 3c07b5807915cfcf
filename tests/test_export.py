"""A pool as ordinary LoRA."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from peft_models import tiny_llama
from pools import TOKENS, by_hand, kpool
from tsugi_kpool import KPoolLoraConfig, export
from tsugi_kpool.pool import KPoolModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def base():
    return tiny_llama().double()


@pytest.fixture
def model():
    return kpool(base(), cast_adapters=False)


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def average(model) -> torch.Tensor:
    """The logits with all N adapters active, each with K/N of its scaling."""
    config = model.peft_config["default"]
    model.base_model.set_adapter([f"adapter_{index}" for index in range(config.n_adapters)])
    layers = model.base_model._lora_layers()
    for factor in (config.k_active / config.n_adapters, config.n_adapters / config.k_active):
        if factor > 1:
            result = logits(model)
        for layer in layers:
            for name in layer.scaling:
                layer.scaling[name] *= factor
    return result


def load(folder, fresh=base):
    loaded = PeftModel.from_pretrained(fresh(), folder, autocast_adapter_dtype=False)
    assert type(loaded.peft_config["default"]) is LoraConfig
    return loaded


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"layers.0.*v_proj": 2}}], ids=str)
def test_concatenation_is_exact(settings, tmp_path):
    model = kpool(base(), cast_adapters=False, n_adapters=3, **settings)
    report = export(model, tmp_path)
    assert report.r == 9 and report.folders == [tmp_path] and not report.energy
    torch.testing.assert_close(logits(load(tmp_path)), average(model), rtol=1e-12, atol=1e-12)


def test_svd_is_the_best_approximation_and_says_what_it_kept(model, tmp_path):
    report = export(model, tmp_path / "whole", "svd", r=12)
    assert all(kept == pytest.approx(1.0) for kept in report.energy.values()) and len(report.energy) == 4
    torch.testing.assert_close(logits(load(tmp_path / "whole")), average(model), rtol=1e-10, atol=1e-10)
    report = export(model, tmp_path / "small", "svd", r=2)
    layer = dict(model.named_modules())[name := next(iter(report.energy))]
    delta = sum(0.5 * layer.get_delta_weight(f"adapter_{index}") for index in range(4))
    u, s, v = torch.linalg.svd(delta.detach())
    small = dict(load(tmp_path / "small").named_modules())[name].get_delta_weight("default")
    torch.testing.assert_close(small, (u[:, :2] * s[:2]) @ v[:2], rtol=1e-9, atol=1e-9)
    assert report.energy[name] == pytest.approx((s[:2].square().sum() / s.square().sum()).item())
    assert "of rank 2" in str(report) and "%" in str(report)
    assert export(model, tmp_path / "default", "svd").r == 3


def test_per_adapter_is_each_one_alone(model, tmp_path):
    report = export(model, tmp_path, "per_adapter")
    assert [folder.name for folder in report.folders] == [f"adapter_{index}" for index in range(4)]
    for index, folder in enumerate(report.folders):
        model.base_model.set_adapter(f"adapter_{index}")
        torch.testing.assert_close(logits(load(folder)), logits(model), rtol=1e-12, atol=1e-12)


def test_a_pool_that_was_built_by_hand_is_exported_too(model, tmp_path):
    hand = by_hand(model, base())
    export(model, tmp_path / "a")
    export(hand, tmp_path / "b", config=model.peft_config["default"])
    assert torch.equal(logits(load(tmp_path / "a")), logits(load(tmp_path / "b")))


def test_embeddings_convolutions_and_transposed_layers(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.conv = nn.Embedding(9, 6), nn.Conv1d(6, 4, 3)

        def forward(self, x):
            return self.conv(self.embed(x).transpose(1, 2))

    model = kpool(Net().double(), cast_adapters=False, target_modules=["embed", "conv"])
    assert isinstance(model.base_model, KPoolModel)
    x = torch.arange(9)[None]
    export(model, tmp_path)
    model.base_model.set_adapter([f"adapter_{index}" for index in range(4)])
    for layer in model.base_model._lora_layers():
        for name in layer.scaling:
            layer.scaling[name] *= 0.5
    torch.testing.assert_close(load(tmp_path, lambda: Net().double())(x), model(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="mode 'svd' is for linear layers"):
        export(model, tmp_path, "svd")


def test_stock_peft_loads_it_without_this_package(model, tmp_path):
    export(model, tmp_path / "adapter")
    torch.save([base().state_dict(), base().config.to_dict(), TOKENS], tmp_path / "base.pt")
    code = f"""
import sys, torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM
weights, config, tokens = torch.load({str(tmp_path / "base.pt")!r}, weights_only=False)
model = LlamaForCausalLM(LlamaConfig(**config)).double()
model.load_state_dict(weights)
model = PeftModel.from_pretrained(model, {str(tmp_path / "adapter")!r}, autocast_adapter_dtype=False).eval()
torch.save(model(input_ids=tokens).logits.detach(), {str(tmp_path / "logits.pt")!r})
assert not any(name.startswith("tsugi") for name in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), average(model), rtol=1e-12, atol=1e-12)
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and "n_adapters" not in saved


def test_what_cannot_be_exported_is_named(model, tmp_path):
    for arguments, sentence in [
        ({"mode": "sum"}, "mode is 'sum', expected one of 'concat', 'svd', 'per_adapter'"),
        ({"r": 3}, "r is 3, expected an integer from 1, and only with mode='svd'"),
        ({"mode": "svd", "r": 0}, "r is 0, expected an integer from 1"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            export(model, tmp_path / "no", **arguments)
    with pytest.raises(ValueError, match="is not plain LoRA"):
        export(kpool(tiny_llama(), use_dora=True), tmp_path / "no")
    with pytest.raises(ValueError, match="has a bias"):
        export(kpool(tiny_llama(), lora_bias=True), tmp_path / "no")
    with pytest.raises(ValueError, match="modules_to_save"):
        export(kpool(tiny_llama(), modules_to_save=["lm_head"]), tmp_path / "no")
    with pytest.raises(ValueError, match="the model has no adapter 'adapter_0'"):
        export(tiny_llama(), tmp_path / "no", config=KPoolLoraConfig())
    assert not (tmp_path / "no").exists()
