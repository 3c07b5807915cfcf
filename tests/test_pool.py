"""The pool as a PEFT method: built, saved, loaded, activated, deleted and merged as any other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from peft_models import TwoLinears
from pool_models import FAMILIES, adapters, belongs, family, loss_of, pool_by_hand, pool_model
from tsugi_kpool import KPoolLoraConfig, attach, export, reference, use_backend, whole_pool


def logits(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return model(torch.randn(4, 12, generator=generator))


def test_all_adapters_are_built_with_parameters_of_their_own():
    model = pool_model(n=6, k=2)
    own = adapters(model)
    assert len(own) == 6 * 2 * 2
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert all(list(layer.lora_A) == [f"adapter_{i}" for i in range(6)] for layer in layers)
    assert all(layer._active_adapter is model.base_model.active_members for layer in layers)
    assert model.base_model.active_members == ["adapter_0", "adapter_1"]
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())
    assert all(layer.accelerated for layer in use_backend(model).layers)
    values = [v for name, v in own.items() if "first.lora_A" in name]
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_trainable_parameters_are_those_of_all_n(capsys):
    model = pool_model(n=6, k=2)
    assert model.get_nb_trainable_parameters()[0] == sum(v.numel() for v in adapters(model).values())
    model.print_trainable_parameters()
    assert "trainable params: 1,062 " in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_it_computes_what_peft_does_with_the_same_adapters(k, dtype):
    model = pool_model(n=5, k=k, dtype=dtype)
    twin = pool_by_hand(n=5, base=TwoLinears().to(dtype))
    use_backend(twin, "peft")
    twin.load_state_dict({name: value for name, value in model.state_dict().items()})
    with attach(model) as pool:
        for step in range(3):
            model.zero_grad()
            twin.zero_grad()
            with pool.step() as active:
                loss = loss_of(model, step)
                loss.backward()
            twin.base_model.set_adapter([f"adapter_{i}" for i in active])
            expected = loss_of(twin, step)
            expected.backward()
            tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 3e-2)
            torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
            for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), name
                if p.grad is not None:
                    scale = q.grad.abs().max().item() or 1.0
                    torch.testing.assert_close(p.grad / scale, q.grad / scale, rtol=tolerance, atol=tolerance)


def test_dropout_is_the_reference_with_the_same_masks(monkeypatch):
    from tsugi_kpool import ops

    model = pool_model(n=4, k=2, lora_dropout=0.4)
    layer = model.base_model.model.first
    drawn = torch.tensor([3, 5])
    monkeypatch.setattr(ops, "draw_rng", lambda device: drawn)
    x = torch.randn(6, 12)
    with attach(model) as pool, pool.step() as active:
        names = [f"adapter_{i}" for i in active]
        y = layer(x)
    A, B = [layer.lora_A[n].weight for n in names], [layer.lora_B[n].weight for n in names]
    scaling = [layer.scaling[n] for n in names]
    base = layer.base_layer
    expected = reference.lora_linear(x, base.weight, base.bias, A, B, scaling, 0.4, drawn)
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, reference.lora_linear(x, base.weight, base.bias, A, B, scaling))


def test_it_is_saved_and_loaded_as_any_peft_model(tmp_path):
    model = pool_model()
    model.save_pretrained(tmp_path)
    with whole_pool(model):
        expected = logits(model)

    loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path)
    assert type(loaded.peft_config["default"]) is KPoolLoraConfig
    assert loaded.base_model.whole and not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)

    trained = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path, "other", is_trainable=True)
    assert trained.base_model.active_members == ["other_adapter_0", "other_adapter_1"]
    assert trained.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]
    assert torch.equal(logits(trained), logits(model))
    for name, value in adapters(trained).items():
        assert torch.equal(value, adapters(model)[name.replace("other_", "")])


def test_a_second_pool_is_separate(tmp_path):
    model = pool_model(n=4, k=2)
    first = logits(model)
    config = KPoolLoraConfig(r=2, n_adapters=3, k_active=1, target_modules=["first"], init_lora_weights=False)
    model.add_adapter("other", config)
    assert torch.equal(logits(model), first), "adding a pool changed what the first computes"
    assert all(p.requires_grad != ("other_" in n) for n, p in model.named_parameters() if ".lora_" in n)

    model.set_adapter("other")
    assert model.base_model.active_members == ["other_adapter_0"]
    assert all(p.requires_grad == ("other_" in n) for n, p in model.named_parameters() if ".lora_" in n)
    with attach(model) as pool:
        assert [pool.select(t) for t in range(3)] == [(0,), (1,), (2,)]
        with pool.step():
            loss_of(model, 0).backward()
    assert all(("other_adapter_0" in n) for n, p in model.named_parameters() if p.grad is not None)

    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "other" / "adapter_model.safetensors")
    assert len(saved) == 3 * 2 and all(".adapter_" in name for name in saved)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 4 * 4

    with pytest.warns(UserWarning, match="now 'default' is") as told:
        model.delete_adapter("other")
    assert [warning.filename for warning in told] == [__file__]
    assert not any("other" in name for name in model.state_dict())
    assert torch.equal(logits(model), first)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".lora_" in n)


def test_deleting_the_last_pool_leaves_the_base():
    model = pool_model()
    with model.disable_adapter():
        base = logits(model)
    model.delete_adapter("default")
    assert not adapters(model)
    # PeftModel itself cannot be called without an adapter.
    assert torch.equal(logits(model.base_model), base)


@pytest.mark.filterwarnings("ignore:delete_adapter")
def test_a_pool_that_was_deleted_while_attached_says_so():
    model = pool_model()
    model.add_adapter("other", pool_model().peft_config["default"])
    pool = attach(model)
    model.delete_adapter("default")
    with (
        pytest.raises(RuntimeError, match=r"the pool 'default' was deleted from the model; call pool.close"),
        pool.step(),
    ):
        pass
    pool.close(flush=False)
    attach(model).close()


def test_disable_adapter_gives_the_base_and_leaves_all_trainable():
    model = pool_model()
    before = logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(copy.deepcopy(model).unload()))
    assert torch.equal(logits(model), before)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".lora_" in n)


def test_a_pool_by_hand_trains_after_disable_adapter():
    model = pool_by_hand(n=4)
    with attach(model, config=KPoolLoraConfig(n_adapters=4, k_active=2)) as pool:
        with pool.step(), model.disable_adapter():
            pass
        with pool.step() as active:
            loss_of(model, 0).backward()
        assert active == (2, 3)
        assert all((p.grad is not None) == belongs(n, active) for n, p in model.named_parameters())


def test_single_adapters_can_be_activated():
    model = pool_model()
    model.base_model.set_adapter(["adapter_4"])
    assert model.base_model.active_members == ["adapter_4"] and model.base_model.active_pool == "default"
    one = logits(model)
    model.base_model.set_adapter("default")
    assert model.base_model.active_members == ["adapter_0", "adapter_1"]
    assert not torch.equal(logits(model), one)
    with pytest.raises(ValueError, match="no pool or adapter 'adapter_9'"):
        model.base_model.set_adapter("adapter_9")


def test_going_to_inference_and_back_restores_the_scaling():
    model = pool_model(n=6, k=2)
    before = logits(model)
    with whole_pool(model):
        whole = logits(model)
    model.set_adapter("default", inference_mode=True)
    torch.testing.assert_close(logits(model), whole)
    with whole_pool(model):
        torch.testing.assert_close(logits(model), whole)
    with pytest.raises(RuntimeError, match="loaded for inference"):
        attach(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), before)


def test_the_whole_pool_is_the_mean_of_its_disjoint_sets():
    model = pool_model(n=6, k=2)
    layer = model.base_model.model.first
    x = torch.randn(3, 12)
    parts = []
    with attach(model) as pool:
        for _ in range(3):
            with pool.step():
                parts.append(layer(x))
        with whole_pool(model):
            torch.testing.assert_close(layer(x), sum(parts) / 3)
        assert model.base_model.active_members == ["adapter_4", "adapter_5"]


def test_the_whole_pool_of_the_whole_pool_is_the_whole_pool():
    model = pool_model()
    with whole_pool(model):
        expected = logits(model)
        exported = export(model, mode="concat")
        with whole_pool(model):
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
    outside = export(model, mode="concat")
    assert exported.configs["default"].to_dict() == outside.configs["default"].to_dict()
    for key, value in outside.tensors["default"].items():
        assert torch.equal(exported.tensors["default"][key], value)
    assert not torch.equal(logits(model), expected)


def test_merge_and_unload_is_the_whole_pool():
    model = pool_model()
    with whole_pool(model):
        expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is TwoLinears and type(merged.first) is torch.nn.Linear
    torch.testing.assert_close(logits(merged), expected)


def test_what_a_pool_cannot_do_says_what_to_call():
    model = pool_model()
    with pytest.raises(NotImplementedError, match=r"call merge_and_unload\(\), or export\(\)"):
        model.merge_adapter()
    with pytest.raises(NotImplementedError, match="export"):
        model.add_weighted_adapter(["adapter_0"], [1.0], "x")
    with pytest.raises(ValueError, match=r"delete_adapter\('default'\)"):
        model.base_model.delete_adapter("adapter_0")
    with pytest.raises(ValueError, match="merged whole"):
        model.merge_and_unload(adapter_names=["adapter_0"])
    with pytest.raises(ValueError, match="KPOOL"):
        model.add_adapter("plain", LoraConfig(target_modules=["first"]))


def test_a_checkpoint_that_lacks_adapters_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = pool_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if ".adapter_5." not in k}, file)
    with pytest.raises(ValueError, match="4 tensors are missing, the first is first.lora_A.adapter_5.weight"):
        PeftModel.from_pretrained(TwoLinears(), tmp_path)


def test_copies_and_pickles_share_one_list_of_their_own():
    model = pool_model()
    with attach(model) as pool:
        with pool.step():
            pass
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        with pool.step():
            pass
        expected = logits(model)
        for other in copies:
            assert other.base_model.active_members == ["adapter_0", "adapter_1"], "the copy follows the original"
            with pytest.raises(RuntimeError, match="call plesio_init"):
                __import__("tsugi_kpool").get_runtime(other)
            with attach(other) as twin:
                twin.load_state_dict(pool.state_dict())
                assert torch.equal(logits(other), expected)
                assert use_backend(other).accelerated


def test_modules_to_save_travel_with_the_pool(tmp_path):
    model = pool_model(target_modules=["first"], modules_to_save=["second"])
    with torch.no_grad():
        model.base_model.model.second.modules_to_save["default"].weight.add_(1.0)
    model.save_pretrained(tmp_path)
    with whole_pool(model):
        expected = logits(model)
    base = TwoLinears()
    base.first.load_state_dict(model.base_model.model.first.base_layer.state_dict())
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path)), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_models_of_three_families(name, tmp_path):
    model = family(name, n=4, k=2)
    before = adapters(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with attach(model, optimizer=optimizer) as pool:
        with pool.step() as active:
            loss_of(model, 0).backward()
        optimizer.step()
    moved = {n for n, v in adapters(model).items() if not torch.equal(v, before[n])}
    assert moved == {n for n in before if belongs(n, active)}
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(FAMILIES[name][0](), tmp_path)
    with whole_pool(model), torch.no_grad():
        torch.testing.assert_close(loss_of(fresh, 1), loss_of(model, 1))
    report = use_backend(model)
    assert len(report.accelerated) == len(report.layers) and report.fast_calls > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases(bits):
    bnb = pytest.importorskip("bitsandbytes")
    base = TwoLinears(64, 64, 64)
    for name in ("first", "second"):
        linear = getattr(base, name)
        bias = linear.bias is not None
        if bits == 4:
            new = bnb.nn.Linear4bit(64, 64, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(64, 64, bias=bias, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        setattr(base, name, new.to("cpu"))
    setattr(base, f"is_loaded_in_{bits}bit", True)
    config = KPoolLoraConfig(r=2, n_adapters=4, k_active=2, target_modules=["first", "second"], init_lora_weights=False)
    model = get_peft_model(base, config)
    assert all(f"{bits}bit" in layer.kind for layer in use_backend(model).accelerated)
    with attach(model) as pool, pool.step() as active:
        model(torch.randn(3, 64)).square().mean().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n in adapters(model) if belongs(n, active)
    }
