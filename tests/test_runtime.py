"""A pool in a training loop, and the eight functions of the 0.1 line."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn

import tsugi_kpool
from peft_models import tiny_llama
from pools import TOKENS, by_hand, kpool, loss_of, pool_parameters, train
from tsugi_kpool import KPoolLoraConfig, attach, ops, reference

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in pool_parameters(model).items()}


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_equal_to_peft_with_the_same_adapters_active(k, dtype):
    base = tiny_llama().to(dtype)
    model = kpool(base, k_active=k, cast_adapters=False)
    hand = by_hand(model, tiny_llama().to(dtype))
    names = [f"adapter_{index}" for index in range(4)]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}[dtype]
    with attach(model) as pool:
        for _ in range(3):
            hand.zero_grad()
            with pool.step() as active:
                loss = loss_of(model)
                loss.backward()
            hand.base_model.set_adapter([names[index] for index in active])
            expected = loss_of(hand)
            expected.backward()
            torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
            ours, theirs = gradients(model), gradients(hand)
            for name, grad in ours.items():
                assert (grad is None) == (theirs[name] is None), name
                if grad is not None:
                    error = (grad - theirs[name]).double().norm() / theirs[name].double().norm()
                    assert error < 3 * tolerance, name
            model.zero_grad()
        assert pool.report.fast_calls == 12 and not pool.report.fallback_calls


def test_dropout_is_that_of_the_reference_with_the_same_masks(monkeypatch):
    drawn = []
    draw = ops.draw_rng
    monkeypatch.setattr(ops, "draw_rng", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    base = nn.Sequential(nn.Linear(12, 7)).double()
    config = KPoolLoraConfig(
        n_adapters=3, k_active=2, r=2, lora_dropout=0.5, target_modules=["0"], init_lora_weights=False
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    x = torch.randn(6, 12, dtype=torch.float64)
    with attach(model) as pool:
        for _ in range(3):
            with pool.step() as active:
                y = model(x)
            A, B = ([getattr(layer, side)[f"adapter_{i}"].weight for i in active] for side in ("lora_A", "lora_B"))
            expected = reference.lora_linear(
                x, layer.base_layer.weight, layer.base_layer.bias, A, B, [16.0, 16.0], 0.5, drawn[-1]
            )
            torch.testing.assert_close(y, expected)
    assert len(drawn) == 3 and len({tuple(rng.tolist()) for rng in drawn}) == 3


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_inactive_adapter_is_not_moved_by_any_optimizer(make, set_to_none):
    model = kpool()
    optimizer = make(model.parameters())
    with attach(model) as pool:
        for _ in range(6):
            before = {name: p.detach().clone() for name, p in pool_parameters(model).items()}
            with pool.step() as active:
                loss_of(model).backward()
            for name, grad in gradients(model).items():
                assert (grad is not None) == any(f"adapter_{index}." in name for index in active)
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            for name, parameter in pool_parameters(model).items():
                is_active = any(f"adapter_{index}." in name for index in active)
                assert torch.equal(parameter, before[name]) != is_active, name


@pytest.mark.parametrize("strategy", ["round_robin", "random", "loss_aware"])
def test_stopped_and_resumed_is_bitwise_the_same(strategy, tmp_path):
    from peft import PeftModel

    def fresh():
        return kpool(routing_strategy=strategy, n_adapters=5, routing_seed=3)

    def optimizer_of(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    whole = fresh()
    with attach(whole) as pool:
        optimizer = optimizer_of(whole)
        expected = train(whole, pool, optimizer, 20)
        digest = pool.digest
    first = fresh()
    with attach(first) as pool:
        optimizer = optimizer_of(first)
        losses = train(first, pool, optimizer, 9)
        first.save_pretrained(tmp_path)
        torch.save([pool.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    second = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    with attach(second) as pool:
        optimizer = optimizer_of(second)
        state, of_optimizer = torch.load(tmp_path / "state.pt")
        pool.load_state_dict(state)
        optimizer.load_state_dict(of_optimizer)
        losses += train(second, pool, optimizer, 11)
        assert pool.digest == digest
    assert losses == expected
    there = pool_parameters(second)
    assert all(torch.equal(there[name], p) for name, p in pool_parameters(whole).items())


def test_a_state_of_another_pool_is_refused_and_nothing_changes():
    with attach(kpool()) as pool, attach(kpool(n_adapters=5)) as other:
        before = pool.state_dict()
        with pytest.raises(ValueError, match="n_adapters is 4 here and 5 in the state"):
            pool.load_state_dict(other.state_dict())
        with pytest.raises(ValueError, match="the state has version None"):
            pool.load_state_dict({})
        assert pool.state_dict() == before


def test_loss_aware_returns_to_the_adapter_with_the_highest_loss():
    model = kpool(routing_strategy="loss_aware", n_adapters=4, k_active=1)
    used = [0] * 4
    with attach(model) as pool:
        loss = None
        for _ in range(60):
            with pool.step(loss=loss) as (index,):
                used[index] += 1
            loss = torch.tensor(7.0 if index == 2 else 1.0)
    assert used[2] > 30 and min(used) >= 2
    model = kpool(routing_strategy="loss_aware")
    with attach(model) as pool:
        with pool.step() as active:
            pool.record_loss(1.0)
            pool.record_loss(torch.tensor(3.0))
        recorded = dict(zip(range(4), pool.state_dict()["router"]))
        assert [recorded[index][1] for index in active] == [2.0, 2.0]


def test_gradients_of_micro_batches_add_up_and_checkpointing_recomputes_with_the_same_adapters():
    model = kpool()
    with attach(model) as pool:
        with pool.step():
            (loss_of(model, TOKENS[:1]) / 2).backward()
            (loss_of(model, TOKENS[1:]) / 2).backward()
        summed = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with attach(model) as pool:
        with pool.step():
            loss_of(model).backward()
        for name, grad in gradients(model).items():
            assert (grad is None) == (summed[name] is None)
            if grad is not None:
                torch.testing.assert_close(grad, summed[name], rtol=1e-4, atol=1e-6)


def test_compiled():
    base = nn.Sequential(nn.Linear(12, 7))
    config = KPoolLoraConfig(n_adapters=4, k_active=2, r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(base, config)
    x = torch.randn(3, 12)
    with attach(model) as pool:
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(4):
            with pool.step():
                expected = torch.autograd.grad(model(x).sum(), pool.parameters(pool.active[0]))
                y = compiled(x)
                y.sum().backward()
            for parameter, grad in zip(pool.parameters(pool.active[0]), expected):
                torch.testing.assert_close(parameter.grad, grad)
            model.zero_grad()


def test_a_pool_that_was_built_by_hand():
    model = kpool()
    hand = by_hand(model, tiny_llama())
    with pytest.raises(ValueError, match="config is None, and the model was not built from a KPoolLoraConfig"):
        attach(hand)
    with attach(model) as pool, attach(hand, config=model.peft_config["default"]) as other:
        a = train(model, pool, torch.optim.AdamW(model.parameters(), lr=1e-2), 8)
        b = train(hand, other, torch.optim.AdamW(hand.parameters(), lr=1e-2), 8)
    assert a == b
    assert hand.base_model.model.model.layers[0].self_attn.q_proj.active_adapters == ["adapter_2", "adapter_3"]


def test_peft_set_adapter_in_between_is_overruled_by_the_next_step():
    model = kpool()
    with attach(model) as pool:
        model.base_model.set_adapter(["adapter_3"])
        with pool.step() as active:
            loss_of(model).backward()
        assert active == (0, 1)
        assert [grad is not None for grad in list(gradients(model).values())[:4]] == [True, True, False, False]


def test_an_exception_in_a_step_leaves_that_step_to_be_done_again():
    model = kpool()
    with attach(model) as pool:
        with pytest.raises(KeyboardInterrupt), pool.step() as first:
            raise KeyboardInterrupt
        with pool.step() as again:
            pass
        assert first == again and pool.current_step == 1


def test_attaching_twice_and_failing_to_attach_leave_nothing_behind():
    model = kpool()
    with attach(model):
        with pytest.raises(RuntimeError, match=r"has a pool already: call its close\(\)"):
            attach(model)
    broken = kpool()
    for parameter in broken.parameters():
        parameter.requires_grad_(False)
    classes = [type(module) for module in broken.modules()]
    with pytest.raises(ValueError, match="config.n_adapters is 9, but pool 'default' was built with 4"):
        attach(broken, config=KPoolLoraConfig(n_adapters=9))
    with pytest.raises(ValueError, match="backend is 'no'"):
        attach(broken, backend="no")
    with pytest.raises(TypeError, match="config is a dict"):
        attach(broken, config={})
    with pytest.raises(ValueError, match="adapter_name is 'other', expected one of 'default'"):
        attach(broken, adapter_name="other")
    with pytest.raises(ValueError, match="the model has no adapter 'adapter_0'"):
        attach(tiny_llama(), config=KPoolLoraConfig())
    with pytest.raises(ValueError, match="aggregation_mode is 'buffer_convergence'"):
        attach(kpool(aggregation_mode="buffer_convergence"))
    assert [type(module) for module in broken.modules()] == classes
    assert not any(p.requires_grad for p in broken.parameters())
    attach(broken).close()


def test_close_gives_the_layers_back_and_is_heard():
    model = kpool()
    classes = [type(module) for module in model.modules()]
    pool = attach(model)
    with pool.step():
        pass
    with pool.step():
        pass
    pool.close()
    pool.close()
    assert [type(module) for module in model.modules()] == classes
    assert model.base_model._lora_layers()[0].active_adapters == ["adapter_2", "adapter_3"]
    with pytest.raises(RuntimeError, match="closed; attach"):
        with pool.step():
            pass


def test_a_pool_does_not_keep_its_model():
    model = kpool()
    pool = attach(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    pool.close()


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def test_the_eight_functions():
    model = kpool()
    hand = by_hand(model, tiny_llama())
    config = KPoolLoraConfig(r=3, lora_alpha=5, n_adapters=4)
    with pytest.raises(RuntimeError, match=r"apply_kpool_step was called before plesio_init\(model, config\)"):
        tsugi_kpool.apply_kpool_step(hand, step=0)
    assert tsugi_kpool.plesio_init(hand, config, sender_id="me") is None
    runtime = tsugi_kpool.get_runtime(Wrapped(hand))
    assert runtime.config is config and runtime.sender_id == "me"
    with pytest.raises(RuntimeError, match=r"post_backward_step was called for step 0 before apply_kpool_step"):
        tsugi_kpool.post_backward_step(hand, step=0, active=(0, 1))
    with pytest.raises(RuntimeError, match=r"pre_forward_step was called for step 0 before apply_kpool_step"):
        tsugi_kpool.pre_forward_step(hand, step=0, active=(0, 1))
    with pytest.raises(ValueError, match="step is -1, expected an integer from 0"):
        tsugi_kpool.apply_kpool_step(hand, -1)
    optimizer = torch.optim.AdamW(hand.parameters(), lr=1e-2)
    losses = []
    for step in range(6):
        active = tsugi_kpool.apply_kpool_step(hand, step=step)
        assert active == ((0, 1), (2, 3))[step % 2]
        with tsugi_kpool.pre_forward_step(hand, step=step, active=active):
            loss = loss_of(hand, (TOKENS + step) % 64)
            loss.backward()
        decisions = tsugi_kpool.post_backward_step(hand, step=step, active=active)
        assert [(d.adapter_idx, d.fired, d.reason) for d in decisions] == [(index, True, "fire") for index in active]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tsugi_kpool.apply_kpool_step(hand, step=6)
    assert tsugi_kpool.apply_kpool_step(hand, step=7) == (2, 3)  # a step that was given up
    with pytest.raises(ValueError, match=r"active is \(0, 1\), but apply_kpool_step\(model, 7\) returned \(2, 3\)"):
        tsugi_kpool.post_backward_step(hand, step=7, active=(0, 1))
    with pytest.raises(
        RuntimeError, match=r"pool.step\(\) was called inside of a step that apply_kpool_step\(\) began"
    ):
        with runtime.step():
            pass
    tsugi_kpool.plesio_shutdown(hand)
    tsugi_kpool.plesio_shutdown(hand)
    with pytest.raises(RuntimeError, match="get_runtime was called before plesio_init"):
        tsugi_kpool.get_runtime(hand)
    with attach(model) as pool:
        assert train(model, pool, torch.optim.AdamW(model.parameters(), lr=1e-2), 6) == losses


def test_weights_of_a_step():
    with attach(kpool()) as pool:
        with pytest.raises(ValueError, match="weight is 0, expected a finite number above 0"), pool.step(weight=0):
            pass
