"""A pool that trains: who moves, what is resumed, which losses steer, and what wrong calls are told."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import math
import weakref

import pytest
import torch
from peft import LoraConfig

import tsugi_kpool
from peft_models import TwoLinears, tiny_llama
from pool_models import adapters, belongs, loss_of, pool_by_hand, pool_model
from tsugi_kpool import KPoolLoraConfig, attach, whole_pool

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, pool, optimizer, steps, micro_batches=1):
    """Trains for these steps and returns their losses."""
    losses = []
    for _ in range(steps):
        with pool.step():
            for part in range(micro_batches):
                loss = loss_of(model, pool.current_step * micro_batches + part)
                loss.backward()
                pool.record_loss(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inactive_adapters_have_no_gradient_and_do_not_move(name, by_hand, set_to_none):
    """Momentum, weight decay and zeroed gradients would all move them."""
    model = pool_by_hand(n=6) if by_hand else pool_model(n=6, k=2)
    config = KPoolLoraConfig(n_adapters=6, k_active=2) if by_hand else None
    with attach(model, config=config) as pool:
        optimizer = OPTIMIZERS[name](trainable(model))
        for _ in range(8):
            before = adapters(model)
            with pool.step() as active:
                for part in range(2):
                    loss_of(model, part).backward()
            grads = {n: p.grad for n, p in model.named_parameters() if ".lora_" in n}
            assert all((grad is not None) == belongs(n, active) for n, grad in grads.items())
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            moved = {n for n, v in adapters(model).items() if not torch.equal(v, before[n])}
            assert moved == {n for n in before if belongs(n, active)}


def test_a_pool_of_one_is_plain_lora_training():
    model, twin = pool_model(n=1, k=1), pool_by_hand(n=1)
    twin.load_state_dict(model.state_dict())
    tsugi_kpool.use_backend(twin)
    optimizers = [OPTIMIZERS["adamw"](trainable(m)) for m in (model, twin)]
    with attach(model, optimizer=optimizers[0]) as pool:
        train(model, pool, optimizers[0], 5)
    for step in range(5):
        loss_of(twin, step).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    for name, value in adapters(twin).items():
        assert torch.equal(adapters(model)[name], value), name


@pytest.mark.parametrize("strategy", ["round_robin", "random", "loss_aware"])
def test_a_resumed_run_is_the_run_that_never_stopped(strategy, tmp_path):
    from peft import PeftModel

    def start(model):
        optimizer = OPTIMIZERS["adamw"](trainable(model))
        return optimizer, attach(model, optimizer=optimizer)

    model = pool_model(n=5, k=2, routing_strategy=strategy, routing_seed=3)
    optimizer, pool = start(model)
    train(model, pool, optimizer, 7)
    model.save_pretrained(tmp_path / "model")
    torch.save({"optimizer": optimizer.state_dict(), "pool": pool.state_dict()}, tmp_path / "state")
    losses = train(model, pool, optimizer, 20)

    base = TwoLinears()
    base.load_state_dict(copy.deepcopy(model).unload().state_dict())
    resumed = PeftModel.from_pretrained(base, tmp_path / "model", is_trainable=True)
    assert resumed.peft_config["default"].routing_strategy == strategy
    optimizer, pool = start(resumed)
    state = torch.load(tmp_path / "state", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    pool.load_state_dict(state["pool"])
    resumed.train()
    assert train(resumed, pool, optimizer, 20) == losses
    for name, value in adapters(model).items():
        assert torch.equal(adapters(resumed)[name], value), name


def test_a_state_of_another_router_is_refused():
    pool, other = attach(pool_model(n=5, k=2)), attach(pool_model(n=5, k=3))
    with pytest.raises(ValueError, match="the router's k is 3 in the state, 2 here"):
        pool.load_state_dict(other.state_dict())


def test_losses_steer_loss_aware_routing():
    model = pool_model(n=6, k=2, routing_strategy="loss_aware")
    losses = {2: 5.0}
    count = [0] * 6
    with attach(model) as pool:
        for _ in range(60):
            with pool.step(loss=lambda: max(losses.get(i, 1.0) for i in pool.active)) as active:
                pass
            for i in active:
                count[i] += 1
        assert count[2] == max(count) > 40, count
        assert min(count) >= 60 // 6 - 1, "an adapter starved"


def test_a_loss_may_be_a_number_a_tensor_or_recorded():
    pools = [attach(pool_model(n=4, k=2, routing_strategy="loss_aware")) for _ in range(4)]
    buffer = torch.zeros(1)
    with pools[0].step(loss=2.0):
        pass
    with pools[1].step(loss=buffer):
        buffer += 2.0  # read when the block ends
    with pools[2].step(loss=lambda: torch.tensor(2.0, requires_grad=True)):
        pass
    with pools[3].step():
        pools[3].record_loss(1.0)
        pools[3].record_loss(torch.tensor([3.0]))  # two micro-batches
    states = [pool.state_dict()["router"]["losses"] for pool in pools]
    assert states == [[2.0, 2.0, None, None]] * 4


def test_gradient_checkpointing_recomputes_with_the_same_adapters():
    results = []
    for checkpointing in (False, True):
        model = pool_model(base=tiny_llama(), n=4, k=2, target_modules=["q_proj", "down_proj"])
        model.train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        with attach(model) as pool:
            for _ in range(2):
                model.zero_grad()
                with pool.step():
                    loss_of(model, 0).backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() and len(results[0]) == 2 * 2 * 2 * 2
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad)


def test_torch_compile_follows_the_active_adapters():
    model = pool_model(n=4, k=2)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(5, 12)
    with attach(compiled) as pool:
        for _ in range(5):
            with pool.step():
                expected = model(x)
                torch.testing.assert_close(compiled(x), expected)
        assert tsugi_kpool.get_runtime(model) is pool


def test_no_step_looks_at_the_inactive_adapters(monkeypatch):
    """The cost of a step does not depend on N: nothing walks modules or parameters of the others."""
    model = pool_model(n=8, k=2)
    optimizer = OPTIMIZERS["adamw"](trainable(model))
    pool = attach(model, optimizer=optimizer)
    train(model, pool, optimizer, 4)
    touched = []

    class Recorder(list):
        def __getitem__(self, i):
            touched.append(i)
            return super().__getitem__(i)

        def __iter__(self):
            raise AssertionError("a step walks over all adapters")

    pool.members.parameters = Recorder(pool.members.parameters)
    pool._aggregator._adapters = Recorder(pool._aggregator._adapters)
    for walk in ("modules", "named_modules", "parameters", "named_parameters"):
        monkeypatch.setattr(torch.nn.Module, walk, lambda *_, **__: pytest.fail("a step walks over the model"))
    with pool.step() as active:
        pass
    assert set(touched) <= {*active, 6, 7} and set(active) == {0, 1}


def test_the_optimizer_has_to_hold_the_whole_pool():
    model = pool_by_hand(n=4)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    config = KPoolLoraConfig(n_adapters=4, k_active=2)
    with pytest.raises(ValueError, match="3 of 4 adapters .first: 'adapter_1'"):
        attach(model, optimizer=optimizer, config=config)
    assert len(trainable(model)) == 4, "a failed attach changed the model"
    with attach(model, config=config):
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    attach(model, optimizer=optimizer, config=config).close()


def test_a_step_that_raises_can_be_repeated():
    model = pool_model()
    with attach(model) as pool:
        with pytest.raises(KeyError), pool.step() as first:
            pool.record_loss(1.0)
            raise KeyError
        with pool.step() as again:
            pass
        assert again == first == (0, 1) and pool.current_step == 1


@pytest.mark.parametrize(
    "arguments, error",
    [
        (dict(model=None), "model is a NoneType"),
        (dict(config=LoraConfig()), "config is a LoraConfig, expected a KPoolLoraConfig"),
        (dict(optimizer="adam"), "optimizer is a str"),
        (dict(max_grad_norm="1"), "max_grad_norm is '1', expected a number above 0"),
    ],
)
def test_attach_names_the_argument_that_is_wrong(arguments, error):
    with pytest.raises((TypeError, ValueError), match=f"attach: {error}"):
        attach(**(dict(model=pool_model()) | arguments))


def test_an_optimizer_from_before_the_pool_is_refused():
    base = pool_model().unload()
    optimizer = torch.optim.SGD(base.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"hold all parameters of 4 of 4 .*Make the optimizer after get_peft_model: "):
        attach(pool_model(n=4, base=base), optimizer=optimizer)


def test_wrong_calls_name_the_right_one():
    model = pool_model()
    pool = attach(model)
    for same in (model, model.base_model, model.base_model.model):  # all have the same adapters
        with pytest.raises(RuntimeError, match=r"attached already; call its close.*get_runtime\(model\).close\(\)"):
            attach(same)
        assert tsugi_kpool.get_runtime(same) is pool
    with pytest.raises(RuntimeError, match="call it inside `with pool.step"):
        pool.record_loss(1.0)
    with pool.step():
        with pytest.raises(RuntimeError, match="one step cannot be inside another"), pool.step():
            pass
        with pytest.raises(ValueError, match="shape .2., expected one element"):
            pool.record_loss(torch.zeros(2))
        for loss in ("0.5", None):
            with pytest.raises(ValueError, match=f"loss is {loss!r}, expected a number"):
                pool.record_loss(loss)
    for weight in (-1, math.nan, math.inf, None, "1"):
        with pytest.raises(ValueError, match=f"weight is {weight!r}, .* at least 0"), pool.step(weight=weight):
            pass
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="closed; call attach"), pool.step():
        pass
    with pytest.raises(RuntimeError, match="closed; call attach"):
        pool.flush()
    assert "closed" in repr(pool)


@pytest.mark.parametrize(
    "arguments, what",
    [
        (dict(config=KPoolLoraConfig(n_adapters=9)), "n_adapters is 9, the model's pool has 6"),
        (dict(max_grad_norm=0.0), "max_grad_norm is 0.0"),
    ],
)
def test_a_failed_attach_installs_nothing(arguments, what):
    model = pool_model()
    with pytest.raises(ValueError, match=what):
        attach(model, **arguments)
    attach(model).close()


def test_a_failed_attach_leaves_no_file_open(tmp_path, monkeypatch):
    opened = []

    class Recorded(tsugi_kpool.pool.training.Diagnostics):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            opened.append(self)

    monkeypatch.setattr(tsugi_kpool.pool.training, "Diagnostics", Recorded)
    settings = {"aggregation_mode": "buffer_convergence", "hold_action": "local"}
    with pytest.raises(ValueError, match="hold_action is 'local'"):
        attach(pool_model(diagnostics_dir=str(tmp_path), **settings))
    assert [diagnostics._file for diagnostics in opened] == [None]  # closed and let go of


@pytest.mark.parametrize("mode", ["synchronous", "buffer_convergence"])
@pytest.mark.parametrize("overlap", [True, False])
def test_each_adapter_is_clipped_by_itself(mode, overlap):
    model = pool_model(n=4, k=2, aggregation_mode=mode, overlap=overlap, lr_scaling="none", buffer_capacity=2)
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    start = adapters(model)
    with attach(model, optimizer=optimizer, max_grad_norm=1e-3) as pool:
        with pool.step() as active:
            loss_of(model, 0).backward()
        pool.flush()
        optimizer.step()
    moved = {name: value - start[name] for name, value in adapters(model).items()}
    for i in active:
        norm = torch.cat([v.flatten() for n, v in moved.items() if belongs(n, [i])]).norm().item()
        assert norm == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("mode", ["synchronous", "buffer_convergence"])
def test_at_weight_0_a_gradient_is_left_out(mode):
    model = pool_model(n=4, k=2, aggregation_mode=mode, lr_scaling="none")
    before = adapters(model)
    with attach(model) as pool:
        optimizer = OPTIMIZERS["adamw"](trainable(model))
        for _ in range(4):
            with pool.step(weight=0):
                loss_of(model, 0).backward()
            optimizer.step()
        pool.flush()
        optimizer.step()
    for name, value in adapters(model).items():
        assert torch.equal(value, before[name]), name


def test_models_without_a_pool_are_told_how_to_build_one():
    with pytest.raises(ValueError, match="get_peft_model"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no LoRA adapter named 'adapter_0'"):
        attach(torch.nn.Linear(2, 2), config=KPoolLoraConfig())
    with pytest.raises(ValueError, match="no LoRA adapter named 'adapter_3' .1 of 4"):
        attach(pool_by_hand(n=3), config=KPoolLoraConfig(n_adapters=4))


def test_the_registry_holds_models_weakly():
    model = pool_model()
    reference, pool = weakref.ref(model), attach(model)
    del model
    gc.collect()
    assert reference() is None and pool.current_step == 0
    pool.close()


# ---- the functions of the 0.1 releases -------------------------------------------------------------------------------


def test_the_sender_is_named_in_telemetry(tmp_path):
    model = pool_model(n=2, k=1, diagnostics_dir=str(tmp_path))
    tsugi_kpool.plesio_init(model, model.peft_config["default"], sender_id="node 7")
    active = tsugi_kpool.apply_kpool_step(model, 0)
    loss_of(model, 0).backward()
    tsugi_kpool.post_backward_step(model, 0, active)
    tsugi_kpool.plesio_shutdown(model)
    rows = [json.loads(line) for line in (tmp_path / "decisions-rank0.jsonl").read_text().splitlines()]
    assert [row["sender"] for row in rows] == ["node 7"]


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_eight_functions(by_hand):
    model = pool_by_hand(n=4) if by_hand else pool_model(n=4, k=2)
    config = KPoolLoraConfig(n_adapters=4, k_active=2)
    assert tsugi_kpool.plesio_init(model, config, sender_id="rank-0") is None
    runtime = tsugi_kpool.get_runtime(model)
    assert runtime.config is config and sorted(runtime.adapter_params) == [0, 1, 2, 3]
    optimizer = OPTIMIZERS["adamw"](trainable(model))
    for step in range(4):
        before = adapters(model)
        active = tsugi_kpool.apply_kpool_step(model, step)
        assert active == ((0, 1), (2, 3))[step % 2]
        with tsugi_kpool.pre_forward_step(model, step, active):
            loss_of(model, step).backward()
        decisions = tsugi_kpool.post_backward_step(model, step, active)
        assert [(d.adapter_idx, d.fired, d.reason) for d in decisions] == [(i, True, "fire") for i in active]
        assert all(d.variance == math.inf for d in decisions)
        optimizer.step()
        optimizer.zero_grad()
        moved = {n for n, v in adapters(model).items() if not torch.equal(v, before[n])}
        assert moved == {n for n in before if belongs(n, active)}
    assert tsugi_kpool.plesio_shutdown(model) is None
    assert tsugi_kpool.plesio_shutdown(model) is None


def test_an_adapter_without_a_gradient_is_held():
    model = pool_model(n=4, k=2)
    tsugi_kpool.plesio_init(model, model.peft_config["default"])
    active = tsugi_kpool.apply_kpool_step(model, 0)
    decisions = tsugi_kpool.post_backward_step(model, 0, active)
    assert [(d.fired, d.reason) for d in decisions] == [(False, "empty_buffer")] * 2
    tsugi_kpool.plesio_shutdown(model)


def test_the_functions_in_the_wrong_order():
    model = pool_model(n=4, k=2)
    config = model.peft_config["default"]
    calls = {
        "apply_kpool_step": lambda: tsugi_kpool.apply_kpool_step(model, 0),
        "pre_forward_step": lambda: tsugi_kpool.pre_forward_step(model, 0, (0, 1)),
        "post_backward_step": lambda: tsugi_kpool.post_backward_step(model, 0, (0, 1)),
        "get_runtime": lambda: tsugi_kpool.get_runtime(model),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=rf"{name}: .*call plesio_init\(model, config\) first"):
            call()
    tsugi_kpool.plesio_init(model, config)
    with pytest.raises(RuntimeError, match="call plesio_shutdown"):
        tsugi_kpool.plesio_init(model, config)
    for name in ("pre_forward_step", "post_backward_step"):
        with pytest.raises(RuntimeError, match=rf"{name}: .*call apply_kpool_step\(model, 0\) first"):
            calls[name]()
    tsugi_kpool.apply_kpool_step(model, 3)
    with pytest.raises(RuntimeError, match=r"step 0 has not begun; call apply_kpool_step\(model, 0\)"):
        calls["post_backward_step"]()
    tsugi_kpool.apply_kpool_step(model, 1)  # a step may be left without an end
    with pytest.raises(ValueError, match=r"active is \(0, 1\), but apply_kpool_step returned \(2, 3\)"):
        tsugi_kpool.post_backward_step(model, 1, (0, 1))
    tsugi_kpool.plesio_shutdown(model)
    with pytest.raises(RuntimeError, match="plesio_init: .*no LoRA adapter"):
        tsugi_kpool.plesio_init(torch.nn.Linear(2, 2), config)


def test_every_adapter_learns_its_part():
    """More than bookkeeping: the pool as a whole fits, from adapters that start at zero."""
    model = pool_model(n=4, k=2, init_lora_weights=True)
    x, y = torch.randn(64, 12), torch.randn(64, 7)

    def loss():
        return (model(x) - y).square().mean()

    with attach(model) as pool:
        optimizer = torch.optim.AdamW(trainable(model), lr=2e-2)
        with whole_pool(model), torch.no_grad():
            before = loss().item()
        for _ in itertools.repeat(None, 60):
            with pool.step():
                loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        with whole_pool(model), torch.no_grad():
            after = loss().item()
    assert after < 0.9 * before
    assert all(v.abs().max() > 0 for v in adapters(model).values())
