"""What a pool exports is loaded by PEFT without this package, and is the whole pool."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel

from peft_models import TwoLinears
from pool_models import FAMILIES, family, pool_by_hand, pool_model
from tsugi_kpool import KPoolLoraConfig, attach, export, whole_pool


def output(model, x):
    with torch.no_grad():
        y = model(x)
    return getattr(y, "logits", y)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, "plain"])
def test_concat_is_exact(name, rslora, tmp_path):
    if name == "plain":
        model, x = pool_model(n=5, k=3, rank_pattern={"second": 2}, use_rslora=rslora), torch.randn(4, 12).double()
    else:
        model, x = family(name, n=5, k=3, use_rslora=rslora), torch.randint(64, (2, 7))
    model = model.double()
    with whole_pool(model):
        expected = output(model, x)
    result = export(model, tmp_path, mode="concat")
    assert result.energy == 1.0 and result.configs["default"].r == 15
    base = copy.deepcopy(model).unload()
    without = output(base, x)
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    assert type(loaded.peft_config["default"]) is LoraConfig and loaded.peft_config["default"].r == 15
    assert expected.dtype is torch.float64
    torch.testing.assert_close(output(loaded, x), expected, rtol=1e-12, atol=1e-13)
    assert (expected - without).abs().max() > 1e-3, "the adapters change nothing, so nothing was compared"


@pytest.mark.parametrize("by_hand", [False, True], ids=["pool", "by hand"])
def test_a_pool_inside_a_module_of_the_users_own(by_hand, tmp_path):
    model = pool_by_hand(n=3) if by_hand else pool_model(n=3, k=2)
    outer = torch.nn.ModuleDict({"policy": model, "value_head": torch.nn.Linear(3, 1)})
    config = KPoolLoraConfig(n_adapters=3, k_active=2)
    expected = export(model, config=config).tensors["default"]
    with attach(outer, config=config), whole_pool(outer):
        found = export(outer, tmp_path).tensors["default"]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_svd_is_the_closest_and_says_how_close(tmp_path):
    model = pool_model(n=4, k=2).double()
    layer = model.base_model.model.first
    whole = sum(0.5 * layer.get_delta_weight(f"adapter_{i}") for i in range(4))
    singular = torch.linalg.svdvals(whole)
    result = export(model, tmp_path, mode="svd", r=3)
    a = result.tensors["default"]["base_model.model.first.lora_A.weight"]
    b = result.tensors["default"]["base_model.model.first.lora_B.weight"]
    assert a.shape == (3, 12) and b.shape == (20, 3)
    left = (whole - b @ a).square().sum()
    torch.testing.assert_close(left, singular[3:].square().sum())
    kept = (singular[:3].square().sum() / singular.square().sum()).item()
    assert result.layer_energy["first"] == pytest.approx(kept, rel=1e-10)
    assert 0 < min(result.layer_energy.values()) <= result.energy <= max(result.layer_energy.values()) < 1
    loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(loaded.base_model.model.first.get_delta_weight("default"), b @ a)


def test_svd_of_full_rank_is_the_whole_pool(tmp_path):
    model, x = pool_model(n=3, k=2).double(), torch.randn(4, 12).double()
    with whole_pool(model):
        expected = output(model, x)
    assert export(model, tmp_path, mode="svd", r=9).energy == pytest.approx(1.0)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path, autocast_adapter_dtype=False)
    assert loaded.base_model.model.second.r["default"] == 7, "no more than the layer has"
    torch.testing.assert_close(output(loaded, x), expected, rtol=1e-10, atol=1e-12)


def test_per_adapter_gives_each_as_it_is(tmp_path):
    model, x = pool_model(n=3, k=2, use_rslora=True).double(), torch.randn(4, 12).double()
    with whole_pool(model):
        result = export(model, tmp_path, mode="per_adapter")
    assert sorted(result.configs) == [f"adapter_{i}" for i in range(3)]
    for i in range(3):
        model.base_model.set_adapter([f"adapter_{i}"])
        base = copy.deepcopy(model).unload()
        loaded = PeftModel.from_pretrained(base, tmp_path / f"adapter_{i}", autocast_adapter_dtype=False)
        torch.testing.assert_close(output(loaded, x), output(model, x), rtol=1e-12, atol=1e-13)


def test_a_pool_by_hand_and_one_loaded_for_inference(tmp_path):
    model, x = pool_by_hand(n=4), torch.randn(4, 12)
    with pytest.raises(ValueError, match="pass config="):
        export(model)
    with attach(model, config=KPoolLoraConfig(n_adapters=4, k_active=2)), whole_pool(model):
        expected = output(model, x)
    base = copy.deepcopy(model).unload()
    export(model, tmp_path / "hand", config=KPoolLoraConfig(n_adapters=4, k_active=2))
    torch.testing.assert_close(output(PeftModel.from_pretrained(base, tmp_path / "hand"), x), expected)

    model = pool_model(n=4, k=2)
    model.save_pretrained(tmp_path / "pool")
    base = copy.deepcopy(model).unload()
    with whole_pool(model):
        expected = output(model, x)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "pool")
    export(loaded, tmp_path / "lora")
    torch.testing.assert_close(output(PeftModel.from_pretrained(base, tmp_path / "lora"), x), expected)


def test_modules_to_save_are_exported_too(tmp_path):
    model, x = pool_model(n=3, k=1, target_modules=["first"], modules_to_save=["second"]), torch.randn(4, 12)
    with torch.no_grad():
        model.base_model.model.second.modules_to_save["default"].weight.mul_(2.0)
    export(model, tmp_path)
    with whole_pool(model):
        expected = output(model, x)
    base = TwoLinears()
    base.first.load_state_dict(model.base_model.model.first.base_layer.state_dict())
    torch.testing.assert_close(output(PeftModel.from_pretrained(base, tmp_path), x), expected)


@pytest.mark.parametrize(
    "make, arguments, what",
    [
        (pool_model, dict(mode="sum"), "mode is 'sum'"),
        (pool_model, dict(mode="concat", r=3), "r is 3 with mode 'concat'"),
        (pool_model, dict(mode="svd", r=0), "r is 0"),
        (pool_model, dict(mode="svd", r=2.5), "r is 2.5"),
        (pool_model, dict(save_embedding_layers="yes"), "save_embedding_layers is 'yes'"),
        (lambda: pool_model(use_dora=True), {}, "use_dora is True"),
        (lambda: pool_model(lora_bias=True), {}, "lora_bias"),
        (TwoLinears, {}, "pass config="),
        (TwoLinears, dict(config=KPoolLoraConfig()), "no LoRA adapter named 'adapter_0'"),
    ],
)
def test_what_cannot_be_exported_is_named(make, arguments, what, tmp_path):
    with pytest.raises(ValueError, match=what):
        export(make(), tmp_path, **arguments)
    assert not list(tmp_path.iterdir())
