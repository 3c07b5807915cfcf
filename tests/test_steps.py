"""What users' loops do in and around a step: each is right, or told with the sentence that says what to write."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings

import pytest
import torch
from accelerate import Accelerator

from peft_models import tiny_llama
from pool_models import adapters, belongs, loss_of, pool_by_hand, pool_model
from tsugi_kpool import KPoolLoraConfig, attach, export, plesio_init, plesio_shutdown, whole_pool
from tsugi_kpool import apply_kpool_step as begin_step
from tsugi_kpool import post_backward_step as end_step

HELD = dict(aggregation_mode="buffer_convergence", buffer_convergence_eps=1e-12, lr_scaling="none")


def build(**settings):
    """A pool that trains, and an optimizer of all its adapters."""
    model = pool_model(**(dict(n=4, k=2) | settings))
    model.train()
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def with_gradient(model):
    return {int(name.split("adapter_")[1].split(".")[0]) for name in gradients(model)}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, msg=name)


# ---- another adapter in a step -----------------------------------------------------------------------------------


def by_set_adapter(model):
    before = model.active_adapter
    model.set_adapter("ref")
    with torch.no_grad():
        loss_of(model, 1)
    model.set_adapter(before)


def by_disabling(model):
    with model.disable_adapter(), torch.no_grad():
        loss_of(model, 1)


def by_the_whole_pool(model):
    with whole_pool(model), torch.no_grad():
        loss_of(model, 1)


def by_one_of_its_adapters(model):
    if "adapter_0" in model.peft_config:  # by hand: PEFT's names are the adapters'
        return by_set_adapter(model)
    model.base_model.set_adapter(["adapter_3"])
    model.set_adapter("default")


SWITCHES = [by_set_adapter, by_disabling, by_the_whole_pool, by_one_of_its_adapters]


def llama_pool(by_hand, checkpointing):
    base = tiny_llama(layers=1)
    targets = dict(target_modules=["q_proj", "down_proj"])
    model = pool_by_hand(n=4, base=base, **targets) if by_hand else pool_model(n=4, k=2, base=base, **targets)
    model.add_adapter("ref", copy.deepcopy(model.peft_config[model.active_adapter]))
    model.train()
    if checkpointing is not None:
        base.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        base.enable_input_require_grads()
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "recomputed", "recomputed, reentrant"])
@pytest.mark.parametrize("by_hand", [False, True], ids=["pool", "by hand"])
def test_a_look_at_another_adapter_changes_no_gradient(by_hand, checkpointing):
    """Before the forward pass and, as DPO does, between it and the backward pass."""
    config = KPoolLoraConfig(n_adapters=4, k_active=2)
    model, twin = llama_pool(by_hand, checkpointing), llama_pool(by_hand, None)
    with attach(model, config=config) as pool, attach(twin, config=config) as other:
        for switch in SWITCHES:
            for when in ("before", "between"):
                for each in (model, twin):
                    each.zero_grad()
                with other.step() as expected:
                    loss_of(twin, 0).backward()
                with pool.step() as active:
                    if when == "before":
                        switch(model)
                    loss = loss_of(model, 0)
                    if when == "between":
                        switch(model)
                    loss.backward()
                assert active == expected and with_gradient(model) == set(active), (switch.__name__, when)
                assert_same_gradients(gradients(model), gradients(twin))
                for checks in (pool.checks, other.checks):
                    checks.left = ()  # nothing is stepped here


def away_at_another(stack, model):
    model.set_adapter("ref")


def away_disabled(stack, model):
    stack.enter_context(model.disable_adapter())


def away_whole(stack, model):
    stack.enter_context(whole_pool(model))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("away", [away_at_another, away_disabled, away_whole])
@pytest.mark.parametrize("by_hand", [False, True], ids=["pool", "by hand"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_a_backward_pass_away_from_the_step_is_refused(checkpointing, by_hand, away):
    model = llama_pool(by_hand, checkpointing)
    with attach(model, config=KPoolLoraConfig(n_adapters=4, k_active=2)) as pool:
        refused = pytest.raises(RuntimeError, match="computed by adapter_0, adapter_1, but active is now .*Switch back")
        with refused, pool.step(), contextlib.ExitStack() as stack:
            loss = loss_of(model, 0)
            away(stack, model)
            loss.backward()
        assert not gradients(model)
        if away is away_at_another:
            model.set_adapter("adapter_0" if by_hand else "default")
        with pool.step() as active:
            loss_of(model, 0).backward()
        assert active == (0, 1) and with_gradient(model) == {0, 1}


def test_each_pool_remembers_its_own_adapters():
    model, optimizer = build()
    model.add_adapter("other", KPoolLoraConfig(r=2, n_adapters=6, k_active=3, target_modules=["first"]))
    with attach(model, optimizer=optimizer) as pool:
        for active in ((0, 1), (2, 3)):
            with pool.step():
                loss_of(model, 0).backward()
            optimizer.step()
            assert pool.active == active
    model.set_adapter("other")
    with attach(model) as other:
        with other.step():
            pass
        with other.step():
            loss_of(model, 0).backward()
    for _ in range(2):
        model.set_adapter("default")
        assert model.base_model.active_members == ["adapter_2", "adapter_3"]
        model.set_adapter("other")
        assert model.base_model.active_members == [f"other_adapter_{i}" for i in (3, 4, 5)]
    with pytest.warns(UserWarning, match="now 'default' is"):
        model.delete_adapter("other")
    assert model.base_model.active_members == ["adapter_2", "adapter_3"]


def test_a_step_activates_the_pool_that_trains():
    model, optimizer = build()
    model.add_adapter("ref", copy.deepcopy(model.peft_config["default"]))
    with attach(model) as pool:
        model.set_adapter("ref", inference_mode=True)
        with pool.step() as active:
            loss_of(model, 0).backward()
        optimizer.step()
        assert with_gradient(model) == set(active) and not any("ref_" in name for name in gradients(model))
        assert model.active_adapter == "default" and not model.base_model.whole


# ---- loops that would lose gradients, or let ranks differ --------------------------------------------------------


def steps_inside(model, optimizer, pool):
    with pool.step():
        loss_of(model, 0).backward()
        optimizer.step()


def scaler_steps_inside(model, optimizer, pool):
    scaler = torch.amp.GradScaler("cpu")
    with pool.step():
        scaler.scale(loss_of(model, 0)).backward()
        scaler.step(optimizer)


def accelerate_steps_inside(model, optimizer, pool):
    optimizer = Accelerator(cpu=True).prepare(optimizer)
    with pool.step():
        loss_of(model, 0).backward()
        optimizer.step()


def closure_inside(model, optimizer, pool):
    lbfgs = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad])
    with pool.step():
        lbfgs.step(lambda: loss_of(model, 0).backward())


def closure_after(model, optimizer, pool):
    with pool.step():
        loss_of(model, 0).backward()
    optimizer.step(lambda: loss_of(model, 0).backward())


def never_enters_a_step(model, optimizer, pool):
    loss_of(model, 0).backward()


def calls_step_without_with(model, optimizer, pool):
    pool.step()
    loss_of(model, 0).backward()


def backward_after(model, optimizer, pool):
    with pool.step():
        loss = loss_of(model, 0)
    loss.backward()


def forward_before(model, optimizer, pool):
    with pool.step():
        loss_of(model, 0).backward()
    optimizer.step()
    loss = loss_of(model, 0)
    with pool.step():
        loss.backward()


def steps_every_second(model, optimizer, pool):
    for t in range(4):
        with pool.step():
            loss_of(model, t).backward()
        if t % 2:
            optimizer.step()
            optimizer.zero_grad()


def continues_past_the_optimizer(model, optimizer, pool):
    for t in range(4):
        with pool.step():
            loss_of(model, t).backward()
            if t == 0:
                continue
        optimizer.step()


def accumulates_around(model, optimizer, pool):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = accelerator.prepare(optimizer)
    for t in range(4):
        with accelerator.accumulate(model), pool.step():
            accelerator.backward(loss_of(model, t))
        optimizer.step()
        optimizer.zero_grad()


def clears_at_the_end(model, optimizer, pool):
    with pool.step():
        loss_of(model, 0).backward()
        optimizer.zero_grad()


def clears_between_micro_batches(model, optimizer, pool):
    with pool.step():
        for t in range(2):
            model.zero_grad()
            loss_of(model, t).backward()


def zeroes_at_the_end(model, optimizer, pool):
    with pool.step():
        loss_of(model, 0).backward()
        optimizer.zero_grad(set_to_none=False)


def zeroes_between_micro_batches(model, optimizer, pool):
    with pool.step():
        for t in range(2):
            optimizer.zero_grad(set_to_none=False)
            loss_of(model, t).backward()


def nested(model, optimizer, pool):
    with pool.step(), pool.step():
        pass


def inside_the_whole_pool(model, optimizer, pool):
    with whole_pool(model), pool.step():
        pass


def flushes_inside(model, optimizer, pool):
    with pool.step():
        pool.flush()


def closes_inside(model, optimizer, pool):
    with pool.step():
        pool.close()


def no_loss(model, optimizer, pool):
    for t in range(9):
        with pool.step():
            loss_of(model, t).backward()
        optimizer.step()
        assert t < 2, "three steps without a loss"


REFUSED = {
    steps_inside: "SGD.step.. inside .*Call opt.step.. after the block",
    scaler_steps_inside: "SGD.step.. inside .*Call opt.step.. after the block",
    accelerate_steps_inside: "SGD.step.. inside .*Call opt.step.. after the block",
    closure_inside: "LBFGS.step.. inside .*Call opt.step.. after the block",
    closure_after: "backward: step 1 of the pool has not begun.*call loss.backward.. inside",
    never_enters_a_step: "backward: step 0 of the pool has not begun.*call loss.backward.. inside",
    calls_step_without_with: "backward: step 0 of the pool has not begun.*call loss.backward.. inside",
    backward_after: "backward: step 1 of the pool has not begun.*call loss.backward.. inside",
    forward_before: "computed by adapter_0, adapter_1, but active is now adapter_2, adapter_3",
    steps_every_second: r"never applied: adapters \(0, 1\) .*put all its micro-batches",
    continues_past_the_optimizer: r"never applied: adapters \(0, 1\) .*after each block",
    accumulates_around: r"never applied: adapters \(0, 1\) .*accelerator.accumulate too",
    clears_at_the_end: "gradients of step 0 were cleared inside the block",
    clears_between_micro_batches: "gradients of step 0 were cleared inside the block",
    zeroes_at_the_end: "gradients of step 0 were cleared inside the block",
    zeroes_between_micro_batches: "gradients of step 0 were cleared inside the block",
    nested: "one step cannot be inside another",
    inside_the_whole_pool: "begin the step outside of it",
    flushes_inside: "pool.flush: step 0 is open; call it after",
    closes_inside: "pool.close: step 0 is open; call it after",
    no_loss: "'loss_aware', but 3 steps had no loss: call pool.record_loss",
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("by_hand", [False, True], ids=["pool", "by hand"])
@pytest.mark.parametrize("loop", REFUSED, ids=lambda loop: loop.__name__)
def test_loops_that_would_train_something_else_are_refused(loop, by_hand):
    config = KPoolLoraConfig(
        n_adapters=4, k_active=2, routing_strategy="loss_aware" if loop is no_loss else "round_robin"
    )
    model = pool_by_hand(n=4) if by_hand else pool_model(n=4, k=2)
    pool = attach(model, config=config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(RuntimeError, match=re.compile(REFUSED[loop], re.DOTALL)):
        loop(model, optimizer, pool)
    pool.close(flush=False)
    loss_of(model, 0).backward()  # a closed pool watches nothing
    optimizer.step()


def test_accelerates_optimizer_that_will_not_step_is_seen_at_the_end_of_the_block():
    """With a reduce in flight the pool would step at each micro-batch."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(*build(**HELD))
    with attach(model, optimizer=optimizer) as pool:
        with pytest.raises(RuntimeError, match="around all micro-batches of a step, and accelerator.accumulate inside"):
            with accelerator.accumulate(model), pool.step():
                accelerator.backward(loss_of(model, 0))
        assert not gradients(model) and pool.current_step == 0
        with pool.step() as active:
            for part in range(3):  # accelerate counted the one that was refused
                with accelerator.accumulate(model):
                    accelerator.backward(loss_of(model, part))
        assert pool.held == [int(i in active) for i in range(4)]


def test_a_step_that_raises_leaves_no_gradient_to_the_next_try():
    (model, _), (twin, _) = build(), build()
    with attach(model) as pool, attach(twin) as other:
        with contextlib.suppress(KeyError), pool.step():
            loss_of(model, 7).backward()
            raise KeyError
        with pool.step():
            loss_of(model, 0).backward()
        with other.step():
            loss_of(twin, 0).backward()
        assert pool.current_step == 1
        assert_same_gradients(gradients(model), gradients(twin))


# ---- loops that are right, however they are written --------------------------------------------------------------


def decorated(model, optimizer, pool):
    @pool.step()
    def train(t):
        loss_of(model, t).backward()

    for t in range(3):
        train(t)
        optimizer.step()
        optimizer.zero_grad()


def one_object_again_and_again(model, optimizer, pool):
    step = pool.step()
    for t in range(3):
        with step:
            loss_of(model, t).backward()
        optimizer.step()
        optimizer.zero_grad()


def left_by_return(model, optimizer, pool):
    def train(t):
        with pool.step():
            loss_of(model, t).backward()
            return

    for t in range(3):
        train(t)
        optimizer.step()
        optimizer.zero_grad()


def zero_grad_first(model, optimizer, pool):
    for t in range(3):
        with pool.step():
            optimizer.zero_grad()
            loss_of(model, t).backward()
        optimizer.step()


def in_eval_mode(model, optimizer, pool):
    for t in range(3):
        with pool.step():
            model.eval()
            loss_of(model, t).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def with_a_look_at_the_input(model, optimizer, pool):
    for t in range(3):
        with pool.step():
            loss_of(model, t).backward()
        x = torch.ones(2, 12, requires_grad=True)
        torch.autograd.grad(model(x).sum(), x)
        optimizer.step()
        optimizer.zero_grad()


def with_another_model(model, optimizer, pool):
    second, its_optimizer = build()
    with attach(second) as its_pool:
        for t in range(3):
            with pool.step():
                loss_of(model, t).backward()
                with its_pool.step():
                    loss_of(second, t).backward()
                its_optimizer.step()
            optimizer.step()
            optimizer.zero_grad()
            its_optimizer.zero_grad()


def through_the_old_functions(model, optimizer, pool):
    for t in range(3):
        active = begin_step(model, t)
        loss_of(model, t).backward()
        end_step(model, t, active)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "loop",
    [
        decorated,
        one_object_again_and_again,
        left_by_return,
        zero_grad_first,
        in_eval_mode,
        with_a_look_at_the_input,
        with_another_model,
        through_the_old_functions,
    ],
    ids=lambda loop: loop.__name__,
)
def test_loops_that_are_right_train_alike_and_in_silence(loop):
    (model, optimizer), (twin, its_optimizer) = build(), build()
    with attach(twin) as pool:
        for t in range(3):
            with pool.step():
                loss_of(twin, t).backward()
            its_optimizer.step()
            its_optimizer.zero_grad()
    with warnings.catch_warnings(), attach(model) as pool:
        warnings.simplefilter("error", UserWarning)
        loop(model, optimizer, pool)
        assert pool.current_step == 3
    for name, value in adapters(twin).items():
        assert torch.equal(adapters(model)[name], value), name


# ---- what is told, and where -------------------------------------------------------------------------------------


def told(function, *arguments):
    """The warnings of ours that a call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments)
    assert all(w.filename == __file__ for w in caught if w.category is UserWarning), "a warning points at a library"
    return [str(w.message) for w in caught if w.category is UserWarning]


def test_steps_without_gradients_and_gradients_that_are_cleared_are_told_once():
    model, optimizer = build()

    def cleared():
        for t in range(4):
            with pool.step():
                loss_of(model, t).backward()
            optimizer.zero_grad()

    def empty():
        for _ in range(3):
            with pool.step():
                pass

    with attach(model) as pool:
        assert [m[:70] for m in told(empty)] == [
            "pool.step: no active adapter has a gradient at the end of step 0: call"
        ]
        (message,) = told(cleared)
        assert "cleared without optimizer.step()" in message and "record_found_inf" in message
        (message,) = told(lambda: pool.step() and None)
        assert "write `with pool.step():`" in message


def test_a_scaler_that_skips_is_not_told():
    model, optimizer = build()
    scaler = torch.amp.GradScaler("cpu")

    def overflows():
        for t in range(2):
            with pool.step():
                optimizer.zero_grad()
                (scaler.scale(loss_of(model, t)) * float("inf")).backward()
            scaler.step(optimizer)
            scaler.update()

    with attach(model) as pool:
        assert told(overflows) == []


def test_a_pool_that_nobody_attached_is_told_at_the_first_backward_pass_and_not_exported(tmp_path):
    model, optimizer = build()

    def train():
        for t in range(3):
            loss_of(model, t).backward()
            optimizer.step()
            optimizer.zero_grad()

    def look():
        model.eval()
        with torch.no_grad():
            loss_of(model, 0)
        x = torch.ones(2, 12, requires_grad=True)
        torch.autograd.grad(model(x).sum(), x)
        export(model)

    assert told(look) == []
    (message,) = told(train)
    assert "is not attached: adapter_0, adapter_1 train, and the others never do" in message and "attach(" in message
    with pytest.raises(RuntimeError, match="trained without attach .*trained_unattached=True"):
        export(model)
    export(model, trained_unattached=True)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="merge_and_unload: .*trained without attach"):
        merged = model.merge_and_unload()
    assert not merged._forward_hooks


@pytest.mark.filterwarnings("ignore:the pool 'default' gets gradients")
@pytest.mark.parametrize("attach_first", [True, False])
def test_a_pool_that_is_attached_is_exported(attach_first):
    """Also after its end, where somebody looks at gradients, and where the pool was attached after a look at them."""
    model, optimizer = build()

    def look():
        loss_of(model, 0).backward()
        optimizer.zero_grad()

    if not attach_first:
        look()
    with attach(model) as pool:
        for t in range(2):
            with pool.step():
                loss_of(model, t).backward()
            optimizer.step()
            optimizer.zero_grad()
    look()
    export(model)


def test_held_gradients_are_told_where_weights_are_saved(tmp_path):
    model, optimizer = build(**HELD)
    with attach(model, optimizer=optimizer) as pool:
        with pool.step():
            loss_of(model, 0).backward()
        for save in (lambda: model.save_pretrained(tmp_path), lambda: export(model)):
            (message,) = told(save)
            assert "holds gradients of [1, 1, 0, 0] steps that are not in the weights: call pool.flush()" in message
        pool.state_dict()
        assert told(model.save_pretrained, tmp_path) == []
        with pool.step():
            loss_of(model, 0).backward()
        assert told(export, model) != []
        pool.flush()
        assert told(export, model) == told(model.save_pretrained, tmp_path) == []


def test_close_does_not_drop_what_is_the_callers_to_step_with():
    model, optimizer = build(**HELD)
    before = adapters(model)
    pool = attach(model)
    with pool.step() as active:
        loss_of(model, 0).backward()
    with pytest.raises(
        RuntimeError, match=r"close: gradients of \[1, 1, 0, 0\] .*flush.., opt.step.., then pool.close"
    ):
        pool.close()
    pool.flush()
    with pytest.raises(RuntimeError, match="never applied"), pool.step():
        pass
    optimizer.step()
    pool.close()
    moved = {name for name, value in adapters(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if belongs(name, active)}


def test_the_old_shutdown_leaves_what_was_held_in_grad_and_says_so():
    model, optimizer = build(**HELD)
    plesio_init(model, model.peft_config["default"])
    before = adapters(model)
    active = begin_step(model, 0)
    loss_of(model, 0).backward()
    end_step(model, 0, active)
    optimizer.step()
    (message,) = told(plesio_shutdown, model)
    assert "[1, 1, 0, 0] steps were held and are in .grad now: call optimizer.step()" in message
    optimizer.step()
    moved = {name for name, value in adapters(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if belongs(name, active)}


def test_a_second_pool_on_the_same_layers_is_refused_by_any_handle():
    model, _ = build()
    with attach(model):
        for handle in (model, model.base_model, model.get_base_model()):
            with pytest.raises((RuntimeError, ValueError), match="attached already|no KPoolLoraConfig"):
                attach(handle)
    attach(model.base_model).close()
    with whole_pool(model), pytest.raises(RuntimeError, match="inside `with whole_pool.model.:`; attach outside"):
        attach(model)
