"""The pool as a PEFT method: building, saving, loading, deleting, merging."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_models import tiny_llama
from pools import TOKENS, by_hand, kpool, loss_of, pool_parameters
from tsugi_kpool import KPoolLoraConfig, KPoolModel, attach, use_backend

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def same(a: nn.Module, b: nn.Module) -> bool:
    return torch.equal(logits(a), logits(b))


def test_all_adapters_are_built_and_trainable(capsys):
    model = kpool()
    assert isinstance(model.base_model, KPoolModel)
    parameters = pool_parameters(model)
    assert len(parameters) == 4 * 2 * 2 * 2  # adapters, layers, q and v, A and B
    assert all(p.requires_grad for p in parameters.values())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(parameters)
    model.print_trainable_parameters()
    count = sum(p.numel() for p in parameters.values())
    assert f"trainable params: {count:,}" in capsys.readouterr().out
    assert len({p.data_ptr() for p in parameters.values()}) == len(parameters)


def test_it_is_the_sum_of_the_first_k_until_a_pool_is_attached():
    model = kpool()
    hand = by_hand(model, tiny_llama())
    hand.base_model.set_adapter(["adapter_0", "adapter_1"])
    assert same(model, hand)
    with model.disable_adapter():
        assert same(model, tiny_llama())
    assert same(model, hand)


def test_saved_and_loaded(tmp_path):
    model = kpool(n_adapters=12)  # adapter_1 is not adapter_11
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=trainable)
        assert loaded.peft_config["default"].n_adapters == 12
        there = pool_parameters(loaded)
        assert all(torch.equal(there[name], p) for name, p in pool_parameters(model).items())
        assert all(p.requires_grad == trainable for p in there.values())
        assert same(loaded, model)
    fewer = KPoolLoraConfig(n_adapters=4, r=3)
    with pytest.raises(ValueError, match="the checkpoint has adapter_.* the pool 4 adapters: n_adapters differs"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, config=fewer)


def test_a_second_pool(tmp_path):
    model = kpool()
    first = logits(model)
    model.add_adapter("other", KPoolLoraConfig(n_adapters=3, k_active=1, r=2, init_lora_weights=False))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.equal(second, first)
    frozen = [name for name, p in pool_parameters(model).items() if not p.requires_grad]
    assert len(frozen) == 4 * 8 and not any("other" in name for name in frozen)
    model.save_pretrained(tmp_path)
    for folder, expected in ((tmp_path, first), (tmp_path / "other", second)):
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), folder)), expected)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "other", adapter_name="renamed")
    assert torch.equal(logits(loaded), second)
    with pytest.raises(ValueError, match="'third'"):
        model.base_model.set_adapter("third")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first) and not any("other" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError):
        model.delete_adapter("other")
    model.delete_adapter("default")
    assert not pool_parameters(model)


def test_copied_and_pickled():
    model = kpool()
    with attach(model) as pool, pool.step():
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        assert pool.active == (0, 1)
        expected = logits(model)
        with pytest.raises(RuntimeError, match="before plesio_init"):
            from tsugi_kpool import get_runtime

            get_runtime(twin)
    file.seek(0)
    for copied in (twin, torch.load(file, weights_only=False)):
        torch.testing.assert_close(logits(copied), expected, rtol=1e-5, atol=1e-6)
        with attach(copied) as other:
            with other.step():
                loss_of(copied).backward()
    assert all(p.grad is None for p in pool_parameters(model).values())


def test_merging_is_the_average_over_steps():
    model = kpool(tiny_llama().double(), cast_adapters=False)
    with pytest.raises(ValueError, match=r"merge_and_unload\(\) merges all N .* K/N"):
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"tsugi_kpool.export\(\)"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")
    model.base_model.set_adapter([f"adapter_{index}" for index in range(4)])
    whole = logits(model)
    scale = [layer.scaling for layer in model.base_model._lora_layers()]
    before = copy.deepcopy(scale)
    # The deltas of one linear layer add up to all N; K / N of each is the average.
    layer = copy.deepcopy(model.base_model._lora_layers()[0])
    x = torch.randn(5, layer.in_features, dtype=torch.float64)
    average = layer.base_layer(x) + 0.5 * (layer(x) - layer.base_layer(x))
    with pytest.raises(ValueError, match="adapter_names has 'no'"):
        model.merge_and_unload(adapter_names=["no"])
    assert scale == before and torch.equal(logits(model), whole)
    merged = model.merge_and_unload()
    assert type(merged) is type(tiny_llama())
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj(x), average)


def test_unload_gives_the_base_back():
    assert torch.equal(logits(kpool().unload()), logits(tiny_llama()))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return GPT2LMHeadModel(config), ["c_attn"]


def bert():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    config = BertConfig(**sizes, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    return BertForMaskedLM(config), ["query", "value", "word_embeddings"]


def llama():
    return tiny_llama(), ["q_proj", "v_proj"]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.filterwarnings("ignore:.*tie")
@pytest.mark.parametrize("family", [llama, gpt2, bert])
def test_families_of_models(family, tmp_path):
    base, targets = family()
    model = kpool(base, target_modules=targets)
    with attach(model) as pool:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(12):
            with pool.step():
                loss = loss_of(model)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.02
        assert pool.report.fast_calls > 0
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family()[0], tmp_path)
    model.set_adapter("default")
    model.eval(), loaded.eval()
    assert same(loaded, model)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 48, compute_dtype=torch.float32, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    base = nn.Sequential(layer).to("cpu")
    setattr(base, f"is_loaded_in_{bits}bit", True)
    model = get_peft_model(
        base, KPoolLoraConfig(n_adapters=3, k_active=2, r=2, target_modules=["0"], init_lora_weights=False)
    )
    x = torch.randn(5, 64)
    with attach(model) as pool:
        with pool.step() as active:
            y = model(x)
            y.sum().backward()
        assert pool.report.fast_calls == 1
    module = model.base_model.model[0]
    with torch.no_grad():
        expected = module.base_layer(x)
        for index in active:
            a, b = (getattr(module, side)[f"adapter_{index}"].weight for side in ("lora_A", "lora_B"))
            expected = expected + module.scaling[f"adapter_{index}"] * (x @ a.T @ b.T)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert [module.lora_A[f"adapter_{index}"].weight.grad is None for index in range(3)] == [False, False, True]


def test_the_backend_takes_a_pool_without_attach():
    model = kpool()
    expected = logits(model)
    with use_backend(model, "tsugi") as report:
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert report.fast_calls == 4
