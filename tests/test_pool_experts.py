"""A pool on the experts of a mixture: it trains, is saved and loaded, and exported for stock PEFT."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper

from moe_models import FAMILIES, small_moe, targets_of
from peft_models import tiny_llama
from plain_peft import PlainPeft
from tsugi_kpool import KPoolLoraConfig, attach, export, use_backend, whole_pool

IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, about rank_pattern and is_gradient_checkpointing


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    process = PlainPeft(tmp_path_factory.mktemp("plain"))
    yield process
    process.close()


def config_of(family, **config):
    settings = dict(r=2, lora_alpha=6, n_adapters=3, k_active=2, target_modules=[])
    return KPoolLoraConfig(**(settings | dict(target_parameters=targets_of(family)) | config))


def pool_on(base, family, name="default", **config):
    """A pool whose adapters are random; ``base`` stays as it is."""
    model = get_peft_model(copy.deepcopy(base), config_of(family, **config), adapter_name=name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def far_from(y, expected):
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()


def losses(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    found = []
    with attach(model) as pool:
        for _ in range(steps):
            with pool.step():
                loss = model(input_ids=IDS, labels=IDS).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pool_trains_experts_as_peft_would_compute_them(family):
    base = small_moe(family)
    model, twin = pool_on(base, family), pool_on(base, family)
    report = use_backend(model, "tsugi")
    use_backend(twin, "peft")
    ours, theirs = losses(model), losses(twin)
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5)
    assert report.fast_calls and not report.fallback_calls
    changed = {
        name.split(".")[-2]
        for (name, p), q in zip(model.named_parameters(), pool_on(base, family).parameters())
        if not torch.equal(p, q)
    }
    assert changed == {"adapter_0", "adapter_1", "adapter_2"}


def test_only_the_active_adapters_have_gradients():
    model = pool_on(small_moe("qwen3_moe"), "qwen3_moe")
    with attach(model) as pool, pool.step():
        model(input_ids=IDS, labels=IDS).loss.backward()
        with_gradient = {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"adapter_0", "adapter_1"}


@pytest.mark.parametrize("name", ["default", "other"])
def test_saved_and_loaded(name, tmp_path):
    base = small_moe("qwen3_moe")
    model = pool_on(base, "qwen3_moe", name=name).eval()
    model.save_pretrained(tmp_path)
    with whole_pool(model):
        expected = logits(model)
    folder = tmp_path if name == "default" else tmp_path / name
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name=name)
    assert far_from(logits(loaded), expected) < 1e-6
    trained = PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name=name, is_trainable=True)
    assert losses(trained) == pytest.approx(losses(model), rel=1e-5)


def test_a_second_pool_on_the_same_parameters():
    base = small_moe("mixtral")
    model = pool_on(base, "mixtral")
    first = logits(model)
    model.add_adapter("second", config_of("mixtral", n_adapters=2, k_active=1))
    assert sum(isinstance(m, ParamWrapper) for m in model.modules()) == 6, "no layer was put around another's"
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert far_from(logits(model), logits(base)) < 1e-6, "its B is zero"
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_merged_it_is_the_whole_pool():
    model = pool_on(small_moe("gpt_oss"), "gpt_oss").eval()
    with whole_pool(model):
        expected = logits(model)
    assert far_from(logits(model.merge_and_unload()), expected) < 1e-5


@pytest.mark.parametrize("mode", ["concat", "svd", "per_adapter"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_stock_peft_computes_what_was_exported(family, mode, plain, tmp_path):
    base = small_moe(family, "eager").eval()
    model = pool_on(base, family).eval()
    exported = export(model, tmp_path, mode=mode, **(dict(r=100) if mode == "svd" else {}))
    assert exported.energy == pytest.approx(1.0)
    if mode == "per_adapter":
        folder = tmp_path / "adapter_1"
        model.base_model.set_adapter(["adapter_1"])
        expected = logits(model)
    else:
        folder = tmp_path
        with whole_pool(model):
            expected = logits(model)
    assert far_from(logits(base), expected) > 1e-3
    assert far_from(plain.output(base, folder, IDS), expected) < 1e-5


def test_names_that_are_fused_are_exported_with_the_modules(plain, tmp_path):
    base = small_moe("qwen3_moe", "eager").eval()
    model = pool_on(base, "qwen3_moe", target_modules="all-linear", target_parameters=None).eval()
    with whole_pool(model):
        expected = logits(model)
    exported = export(model, tmp_path)
    (config,) = exported.configs.values()
    assert config.target_modules == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert config.target_parameters == ["experts.down_proj", "experts.gate_up_proj", "gate.weight"]
    assert far_from(plain.output(base, tmp_path, IDS), expected) < 1e-5


def test_a_smaller_rank_is_the_nearest_of_each_expert():
    model = pool_on(small_moe("qwen3_moe"), "qwen3_moe")
    whole, part = export(model, mode="svd", r=100), export(model, mode="svd", r=1)
    assert 0 < part.energy < 1
    key = next(name for name in whole.tensors["default"] if name.endswith("experts.lora_A.weight"))

    def deltas(exported):
        a, b = (exported.tensors["default"][k].double() for k in (key, key.replace("lora_A", "lora_B")))
        return torch.einsum("ore,eri->eoi", b.unflatten(1, (-1, 4)), a.unflatten(0, (4, -1)))

    u, s, vh = torch.linalg.svd(deltas(whole))
    nearest = s[:, :1, None] * (u[:, :, :1] @ vh[:, :1])
    assert far_from(deltas(part), nearest) < 1e-5


def test_some_parameters_of_like_names_are_named_in_full(tmp_path):
    base = tiny_llama()
    model = get_peft_model(base, KPoolLoraConfig(r=2, target_modules=[], target_parameters=["0.mlp.up_proj.weight"]))
    (config,) = export(model, tmp_path).configs.values()
    assert config.target_parameters == ["model.layers.0.mlp.up_proj.weight"]


def test_a_module_inside_of_what_has_an_adapted_parameter_is_no_lora_config():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 4))
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x @ self.weight)

    config = KPoolLoraConfig(r=2, target_modules=["inner"], target_parameters=["block.weight"])
    model = get_peft_model(torch.nn.ModuleDict({"block": Block()}), config)
    with pytest.raises(ValueError, match="block.base_layer.inner is a part of block"):
        export(model)


def test_dropout_on_parameters_is_peft_s_error():
    with pytest.raises(ValueError, match="lora_dropout"):
        get_peft_model(small_moe("qwen3_moe"), config_of("qwen3_moe", lora_dropout=0.1))
