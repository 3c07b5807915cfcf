"""Held and exchanged gradients: with real processes over gloo, and in one process.

TSUGI_LONG=1 runs 1,000 steps where 40 are run otherwise, and 100 runs with delays where 8 are.
"""

import json
import math
import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sync_worker
from peft_models import lora_model
from sync_worker import Toy, batch, config, fingerprint, launch, make_optimizer, round_robin, train
from tsugi_kpool.distributed.aggregator import Aggregator
from tsugi_kpool.distributed.diagnostics import Diagnostics

LONG = os.environ.get("TSUGI_LONG") == "1"
STEPS = 1000 if LONG else 40
ALWAYS, NEVER = 1e9, 1e-30

# fields, and what else of a run
MODES = {
    "synchronous": {"fields": {"aggregation_mode": "synchronous"}},
    "synchronous bf16": {"fields": {"aggregation_mode": "synchronous", "wire_dtype": "bfloat16"}},
    "variance always": {"fields": {"buffer_convergence_eps": ALWAYS}},
    "variance never": {"fields": {"buffer_convergence_eps": NEVER}},
    "variance between": {"fields": {"buffer_convergence_eps": 5e-3}, "accumulation": 3},
    "variance at once": {"fields": {"buffer_convergence_eps": 5e-3, "decision_delay": 0}, "router": "random"},
    "variance planned": {"fields": {"buffer_convergence_eps": 5e-3, "agreement": "planned"}},
    "relative": {"fields": {"trigger": "relative"}, "router": "loss_aware"},
    "relative strict": {"fields": {"trigger": "relative", "relative_theta": 1e-3}},
    "noise scale": {"fields": {"trigger": "noise_scale"}},
    "noise scale stepwise": {"fields": {"trigger": "noise_scale", "agreement": "stepwise", "lr_scaling": "linear"}},
    "relative lax": {"fields": {"trigger": "relative", "relative_theta": 1e3, "stagger": False}},
    "relative stepwise": {"fields": {"trigger": "relative", "agreement": "stepwise"}, "router": "loss_aware"},
    "relative bf16": {"fields": {"trigger": "relative", "wire_dtype": "bfloat16"}, "schedule": True},
    "deadline": {"fields": {"buffer_convergence_eps": NEVER, "max_hold_steps": 5}},
    "drift": {"fields": {"buffer_convergence_eps": ALWAYS}, "drift": 1e4},
    "drift planned": {"fields": {"trigger": "relative"}, "drift": 1e4},
    "first way": {"fields": {"trigger": "relative", "overlap": False}, "attached": False},
    "weights": {"fields": {"trigger": "relative"}, "weighted": True},
    "amp": {"fields": {"trigger": "relative"}, "amp": True},
    "amp first way": {"fields": {"buffer_convergence_eps": 5e-3}, "amp": True, "attached": False, "accumulation": 2},
    "clipped sgd": {"fields": {"lr_scaling": "sqrt"}, "optimizer": "sgd", "max_grad_norm": 0.1},
    "discard": {"fields": {"trigger": "relative", "hold_action": "discard"}},
    "local": {"fields": {"trigger": "relative", "hold_action": "local"}},
    "local stepwise": {"fields": {"hold_action": "local"}, "accumulation": 2},
}


pytestmark = pytest.mark.filterwarnings("ignore:lr_scaling is")


@pytest.fixture(scope="module")
def three_ranks():
    """Every mode on three ranks, one after the other in the same processes: name -> the ranks' results."""
    results = launch(3, sync_worker.runs, [{**mode, "steps": STEPS} for mode in MODES.values()], timeout=60 + STEPS)
    return {name: [r[k] for r in results] for k, name in enumerate(MODES)}


@pytest.mark.parametrize("name", MODES)
def test_ranks_never_differ(three_ranks, name):
    ranks = three_ranks[name]
    assert len({r["params"] for r in ranks}) == 1
    # Between exchanges, "local" ranks are apart; all others are bitwise equal at any time.
    assert (len({r["before_flush"] for r in ranks}) == 1) == (not name.startswith("local"))
    assert all(r["decisions"] == ranks[0]["decisions"] for r in ranks)
    assert all(r["scale"] == ranks[0]["scale"] for r in ranks)
    assert all(r["losses"] == ranks[0]["losses"] for r in ranks)
    assert ranks[0]["params"] != fingerprint(Toy().trained())


@pytest.mark.parametrize("name", MODES)
def test_a_hold_is_bounded_and_ends(three_ranks, name):
    result = three_ranks[name][0]
    assert result["longest"] <= config().buffer_capacity
    held = [i for i, steps in enumerate(result["held"]) if steps]
    # What a flush is asked to send, it sends; what is in flight needs nothing more.
    assert {i for i, _, _ in result["flushed"]} <= set(held)


def reasons(result):
    return {reason for step in result["decisions"] for _, _, reason in step}


def fires(result):
    return sum(fired for step in result["decisions"] for _, fired, _ in step)


def test_reasons_are_those_of_the_configuration(three_ranks):
    seen = {name: reasons(ranks[0]) for name, ranks in three_ranks.items()}
    assert seen["synchronous"] == {"fire"}
    assert seen["variance always"] == {"fire", "hold_variance"}  # the first of a window has nothing to go by
    assert seen["variance never"] == {"fire_full", "hold_variance"}
    # Windows of one step, which only a plan can have.
    assert (
        fires(three_ranks["relative lax"][0])
        > fires(three_ranks["relative"][0])
        > fires(three_ranks["relative strict"][0])
    )
    assert fires(three_ranks["relative lax"][0]) > STEPS
    assert "fire_full" in seen["relative strict"]
    assert seen["deadline"] == {"fire_deadline", "hold_variance"}
    assert seen["drift"] <= {"fire_full", "hold_drift", "hold_variance", "fire"} and "hold_drift" in seen["drift"]
    assert "hold_drift" in seen["drift planned"] and "fire_full" in seen["drift planned"]
    assert "hold_nonfinite" in seen["amp"] and "hold_nonfinite" in seen["amp first way"]


def test_adapters_take_turns_to_fire(three_ranks):
    """Staggered, the first full buffers are in different steps."""
    full = [k for k, step in enumerate(three_ranks["variance never"][0]["decisions"]) for _, fired, _ in step if fired]
    assert len(full) == len(set(full))


def test_a_plan_costs_no_control_traffic_and_a_record_little(three_ranks):
    for name, ranks in three_ranks.items():
        payload, control = ranks[0]["bytes"]
        assert payload > 0
        if "stepwise" in name or name in ("variance between", "variance at once", "deadline"):
            assert 0 < control / STEPS < 1000
        elif "planned" in name or "relative" in name or name in ("synchronous", "weights", "noise scale"):
            assert control == 0
    # bfloat16 halves what is sent.
    assert three_ranks["synchronous bf16"][0]["bytes"][0] * 2 == three_ranks["synchronous"][0]["bytes"][0]


@pytest.mark.parametrize("fields", [{"trigger": "relative"}, {}, {"agreement": "planned"}], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_gradient_is_accounted_for(fields, weighted):
    """What went into S over ranks and steps is what was applied, times its weight, plus what is still in S."""
    run = {"fields": fields, "steps": 31, "attached": False, "flush": False, "weighted": weighted}
    ranks = launch(2, sync_worker.runs, [run])
    ranks = [r[0] for r in ranks]
    windows = [sum(w) for w in zip(*(r["windows"] for r in ranks))]
    assert ranks[0]["came_out"] == ranks[1]["came_out"] and len(windows) > 4
    applied = math.fsum(g * n for g, n in zip(ranks[0]["came_out"], windows))
    left = math.fsum(x for r in ranks for x in r["left"])
    entered = math.fsum(x for r in ranks for x in r["went_in"])
    assert left != 0
    scale = math.fsum(abs(x) for r in ranks for x in r["went_in"])
    assert applied + left == pytest.approx(entered, abs=2e-6 * scale)


def test_no_hang_under_random_delays():
    seeds = list(range(100 if LONG else 8))
    results = launch(3, sync_worker.delayed, seeds, 15, timeout=60 + 3 * len(seeds))
    assert all(r == results[0] for r in results) and len(set(results[0])) == len(seeds)


def test_hidden_reduces_give_bitwise_the_waited_result():
    modes = [
        {"fields": {"aggregation_mode": "synchronous", "overlap": False}, "attached": False},
        {"fields": {"aggregation_mode": "synchronous"}},
        {"fields": {"trigger": "relative", "lr_scaling": "none", "overlap": False}, "attached": False},
        {"fields": {"trigger": "relative", "lr_scaling": "none"}},
    ]
    # A flush would use the rate of its moment in one way and of the last step in the other.
    runs = [
        {**mode, "steps": 24, "flush": False, "schedule": scheduled} for scheduled in (False, True) for mode in modes
    ]
    results = [r["params"] for r in launch(2, sync_worker.runs, runs)[0]]
    for waited, hidden, held, held_hidden in (results[:4], results[4:]):
        assert waited == hidden
        assert held == held_hidden != waited


def test_synchronous_is_bitwise_ddp():
    results = launch(2, sync_worker.with_ddp, 20)
    assert len({fingerprint for rank in results for fingerprint in rank}) == 1


def test_a_ddp_around_the_model_can_be_kept_out():
    for (wrapped, bare), refusals in launch(2, sync_worker.ddp_kept_local, 12):
        assert wrapped == bare
        assert "find_unused_parameters=False" in refusals[0] and "keep_ddp_local" in refusals[1]


def test_fsdp2_keeps_adapters_whole_and_fsdp1_is_refused():
    for plain, ours, sharded, refusals in launch(2, sync_worker.with_fsdp2, 12):
        assert sharded == ("DTensor", "Tensor")
        for a, b in zip(plain, ours):
            torch.testing.assert_close(a, b)
        assert "ignored_params" in refusals[0]
        assert "FSDP2" in refusals[1] and "fully_shard" in refusals[1]


def test_a_mesh_dimension_exchanges_on_its_own():
    first, second, third, fourth = launch(4, sync_worker.in_parts, 12)
    assert first == second and third == fourth and first[0] != third[0]
    assert first[0] == first[1]


# ---- failure -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("fields", [{"trigger": "relative"}, {}, {"aggregation_mode": "synchronous"}], ids=str)
def test_the_others_name_a_rank_that_is_gone_and_keep_what_they_held(how, fields):
    timeout = 3.0
    results = launch(3, sync_worker.failing, how, timeout, fields, timeout=40, expect_dead=(2,))
    for result in results[:2]:
        assert result["missing"] == (2,), result["message"]
        assert {"killed": "rank 2 was killed", "stopped": "rank 2 did not answer"}[how] in result["message"]
        assert result["first"] == 2 and "is kept" in result["message"]
        assert result["took"] < timeout + 8.0
        # What was in flight or held is in the state, with as many snapshots as its steps.
        kept = [norm for steps, norm in result["kept"] if steps]
        assert kept and all(norm > 0 for norm in kept)
        assert [steps for steps, _ in result["kept"]] == result["snapshots"]
        assert "failed before" in result["again"]


@pytest.mark.parametrize(
    "fields",
    [{"trigger": "relative"}, {}, {"decision_delay": 0}, {"aggregation_mode": "synchronous"}],
    ids=str,
)
def test_routers_that_differ_stop_every_rank_at_the_same_step(fields):
    results = launch(3, sync_worker.mismatched, fields)
    assert len({r["step"] for r in results}) == 1 and 3 <= results[0]["step"] <= 6
    for result in results:
        assert "chose different adapters" in result["message"] and "rank 1 has" in result["message"]
        assert any(result["held"])


def test_configurations_that_differ_are_refused_on_every_rank():
    for message in launch(2, sync_worker.different_configs):
        assert message.startswith("the ranks differ in buffer_capacity: rank 0 has 6, rank 1 has 7. ")


# ---- checkpoints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keywords",
    [
        {"fields": {"trigger": "relative"}, "router": "loss_aware", "schedule": True},
        {"fields": {"buffer_convergence_eps": 5e-3}, "router": "loss_aware"},
        {"fields": {"aggregation_mode": "synchronous"}},
        {"fields": {"trigger": "relative", "hold_action": "local"}},
    ],
    ids=str,
)
def test_a_resumed_run_is_bitwise_the_run(keywords):
    for whole, rest, same in launch(2, sync_worker.saved, {**keywords, "steps": 24}, 13):
        assert whole == rest and same


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3), (2, 1)])
def test_another_number_of_ranks_takes_over_every_gradient(before, after):
    keywords = {"fields": {"trigger": "relative"}, "steps": 20}
    states = launch(before, sync_worker.stopped, keywords, 11)
    results = launch(after, sync_worker.resumed, keywords, states)
    assert len({r["params"] for r in results}) == 1
    held = 0
    for i in range(4):
        entries = [s["aggregator"]["adapters"][i] for s in states]
        if entries[0]["sum"] is not None:
            held += 1
            want = sum(e["sum"].double() for e in entries)
            torch.testing.assert_close(sum(r["sums"][i].double() for r in results), want, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(sum(r["stats"][i] for r in results), sum(e["stats"] for e in entries))
    assert held > 0


def test_states_that_do_not_fit_are_refused():
    model = Toy()
    aggregator = Aggregator(model.adapters(), config(), optimizer=make_optimizer(model.trained()))
    state = aggregator.state_dict()
    # What the state of one rank of two looks like.
    rows = [{**entry, "rows_without_finite": [0, 0]} for entry in state["adapters"]]
    of_two = {**state, "world_size": 2, "adapters": rows}
    other = Toy(r=3)
    with pytest.raises(ValueError, match="state has adapters of"):
        Aggregator(other.adapters(), config(), optimizer=make_optimizer(other.trained())).load_state_dict(state)
    with pytest.raises(ValueError, match="state is of rank 1 of 2, but this is rank 0 of 1"):
        aggregator.load_state_dict({**of_two, "rank": 1})
    with pytest.raises(ValueError, match=r"ranks \[0\], not 0 to 1"):
        aggregator.load_state_dict([of_two])
    with pytest.raises(ValueError, match="empty list"):
        aggregator.load_state_dict([])
    with pytest.raises(ValueError, match="hold_action='local'"):
        aggregator.load_state_dict({**state, "hold_action": "local"})
    with pytest.raises(ValueError, match="differ in step"):
        aggregator.load_state_dict([of_two, {**of_two, "rank": 1, "step": 7}])


# ---- one process -------------------------------------------------------------------------------------------------------------


def plain_loop(steps, optimizer="adamw"):
    model = Toy()
    opt = make_optimizer(model.trained(), optimizer)
    for step in range(steps):
        model.active = list(round_robin(step))
        x, y = batch(0, 0, step)
        (model(x) - y).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return fingerprint(model.trained())


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_alone_and_synchronous_is_bitwise_the_plain_loop(attached, optimizer):
    ours = train({"aggregation_mode": "synchronous"}, steps=15, attached=attached, optimizer=optimizer)
    assert ours["params"] == plain_loop(15, optimizer)


def one_step(model, aggregator, step, active=(0, 1), **keywords):
    model.active = list(active)
    aggregator.before_step(step, active)
    x, y = batch(0, 0, step)
    (model(x) - y).square().mean().backward()
    return aggregator.after_backward(step, active, **keywords)


def test_a_held_parameter_does_not_move_under_adamw():
    model = Toy()
    opt = make_optimizer(model.trained())
    fields = {"lr_scaling": "none", "buffer_convergence_eps": NEVER, "stagger": False}
    aggregator = Aggregator(model.adapters(), config(**fields))
    # A step first, so that AdamW has momentum that would move what has a gradient of zero.
    one_step(model, aggregator, 0)
    aggregator.flush()
    opt.step()
    opt.zero_grad()
    start = fingerprint(model.trained())
    for step in range(1, 6):
        decisions = one_step(model, aggregator, step)
        assert [(d.fired, d.reason) for d in decisions] == [(False, "hold_variance")] * 2
        assert all(p.grad is None for p in model.trained())
        opt.step()
    assert fingerprint(model.trained()) == start
    one_step(model, aggregator, 6)
    opt.step()
    assert fingerprint(model.trained()) != start


def test_what_is_never_active_again_is_flushed_at_the_end():
    model = Toy()
    opt = make_optimizer(model.trained())
    aggregator = Aggregator(model.adapters(), config(buffer_convergence_eps=NEVER), optimizer=opt)
    one_step(model, aggregator, 0, (2, 3))
    for step in range(1, 4):
        one_step(model, aggregator, step, (0, 1))
    untouched = fingerprint(model.adapters()[2])
    assert aggregator.held == [3, 3, 1, 1]
    flushed = aggregator.flush()
    assert [(d.adapter_idx, d.fired, d.reason) for d in flushed] == [(i, True, "fire_flush") for i in range(4)]
    assert aggregator.held == [0] * 4 and fingerprint(model.adapters()[2]) != untouched
    assert aggregator.flush() == []


def test_the_mean_gradient_is_applied_at_the_rate_of_its_step_times_its_length():
    for scaling, factor in [("linear", 3.0), ("sqrt", math.sqrt(3.0)), ("none", 1.0)]:
        model = Toy()
        opt = torch.optim.SGD(model.trained(), lr=0.5)
        fields = {"lr_scaling": scaling, "buffer_capacity": 3, "buffer_convergence_eps": NEVER, "stagger": False}
        aggregator = Aggregator(model.adapters(), config(**fields), optimizer=opt)
        start = [p.detach().clone() for p in model.adapters()[0]]
        gradients = []
        for step in range(3):
            model.active = [0, 1]
            aggregator.before_step(step, (0, 1))
            x, y = batch(0, 0, step)
            (model(x) - y).square().mean().backward()
            gradients.append([p.grad.clone() for p in model.adapters()[0]])
            aggregator.after_backward(step, (0, 1))
        assert all(torch.equal(p, s) for p, s in zip(model.adapters()[0], start))  # in flight
        opt.param_groups[0]["lr"] = 1e6  # a scheduler went on meanwhile
        aggregator.before_step(3, (0, 1))
        for k, (p, s) in enumerate(zip(model.adapters()[0], start)):
            mean = sum(g[k] for g in gradients) / 3
            torch.testing.assert_close(p.detach(), s - 0.5 * factor * mean)
        assert opt.param_groups[0]["lr"] == 1e6 and len(opt.param_groups[0]["params"]) == 16
        assert aggregator.lr_factors[0] == factor


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_a_window_under_adam_is_the_step_that_the_docs_define(kind, amsgrad):
    lr, (b1, b2), decay, eps = 0.02, (0.8, 0.95), 0.1, 1e-8
    p = nn.Parameter(torch.linspace(-1.0, 1.0, 12).reshape(3, 4))
    opt = kind([p], lr=lr, betas=(b1, b2), weight_decay=decay, eps=eps, amsgrad=amsgrad)
    aggregator = Aggregator(
        [[p]], config(buffer_capacity=3, buffer_convergence_eps=NEVER, stagger=False), optimizer=opt
    )
    want, first, second, highest, t = p.detach().double(), 0.0, 0.0, torch.zeros(3, 4, dtype=torch.float64), 0
    generator = torch.Generator().manual_seed(0)
    step = 0
    for m in (3, 1, 2, 3, 3, 1, 1):  # what is shorter than the capacity is flushed
        held = 0.0
        for _ in range(m):
            aggregator.before_step(step, (0,))
            p.grad = torch.randn(3, 4, generator=generator)
            held = held + p.grad.double()
            aggregator.after_backward(step, (0,))
            step += 1
        aggregator.flush()
        t += m
        g = m**0.5 * held / m
        if kind is torch.optim.Adam:
            g = g + decay * m**0.5 * want
        else:
            want = want * (1 - lr * m * decay)
        first = b1**m * first + (1 - b1**m) * g
        second = b2**m * second + (1 - b2**m) * g**2
        highest = torch.maximum(highest, second) if amsgrad else second
        want = want - lr * m**0.5 * first / (1 - b1**t) / ((highest / (1 - b2**t)).sqrt() + eps)
        torch.testing.assert_close(p.detach().double(), want, rtol=1e-5, atol=1e-6)
        assert opt.state[p]["step"] == t
    group = opt.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (lr, (b1, b2), decay)


def test_held_steps_move_as_far_as_adams_own_do_in_mean_and_in_spread():
    def moved(**fields):
        p = nn.Parameter(torch.zeros(20_000))
        opt = torch.optim.AdamW([p], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
        aggregator = Aggregator([[p]], config(**fields), optimizer=opt)
        generator = torch.Generator().manual_seed(0)
        for step in range(240):
            aggregator.before_step(step, (0,))
            p.grad = 0.1 + torch.randn(20_000, generator=generator)
            aggregator.after_backward(step, (0,))
            opt.step()
            opt.zero_grad()
        aggregator.flush()
        return p.detach().mean().item(), p.detach().std().item()

    mean, spread = moved(aggregation_mode="synchronous")
    held = {"buffer_capacity": 4, "buffer_convergence_eps": NEVER}
    adam = moved(**held)
    assert adam == (pytest.approx(mean, rel=0.05), pytest.approx(spread, rel=0.05))
    # Adam divides by the size of its gradients, and means of four are half as large.
    assert moved(**held, lr_scaling="linear")[0] / mean > 1.5


def test_scaling_follows_the_optimizer_and_refuses_what_it_cannot_do():
    model = Toy()
    held = {"buffer_capacity": 3, "buffer_convergence_eps": NEVER, "stagger": False}
    for optimizer, factor in ((torch.optim.AdamW, math.sqrt(3.0)), (torch.optim.SGD, 3.0)):
        aggregator = Aggregator(model.adapters(), config(**held), optimizer=optimizer(model.trained(), lr=0.1))
        for step in range(3):
            one_step(model, aggregator, step)
        aggregator.flush()
        assert aggregator.lr_factors[0] == factor
    with pytest.raises(ValueError, match="lr_scaling is 'adam'.* but this is a SGD"):
        Aggregator(model.adapters(), config(lr_scaling="adam"), optimizer=torch.optim.SGD(model.trained(), lr=0.1))
    with pytest.raises(ValueError, match="lr_scaling is 'adam'.* but there is none to step"):
        Aggregator(model.adapters(), config(lr_scaling="adam"))


def test_clipping_is_of_one_adapters_aggregated_gradient():
    model = Toy()
    opt = torch.optim.SGD(model.trained(), lr=1.0)
    aggregator = Aggregator(model.adapters(), config(aggregation_mode="synchronous"), optimizer=opt, max_grad_norm=1e-3)
    start = [p.detach().clone() for p in model.trained()]
    one_step(model, aggregator, 0)
    opt.step()  # one rank, nothing in flight
    for i in (0, 1):
        pairs = zip(model.adapters()[i], start[4 * i : 4 * i + 4])
        moved = torch.cat([(p.detach() - s).flatten() for p, s in pairs]).norm()
        assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_discard_throws_the_held_gradient_away():
    model = Toy()
    fields = {"hold_action": "discard", "buffer_capacity": 3, "buffer_convergence_eps": NEVER, "stagger": False}
    aggregator = Aggregator(model.adapters(), config(**fields))
    for step in range(3):
        model.active = [0]
        aggregator.before_step(step, (0,))
        x, y = batch(0, 0, step)
        (model(x) - y).square().mean().backward()
        last = [p.grad.clone() for p in model.adapters()[0]]
        fired = aggregator.after_backward(step, (0,))[0].fired
    assert fired
    for p, g in zip(model.adapters()[0], last):
        torch.testing.assert_close(p.grad, g)
    one_step(model, aggregator, 3, (0,))
    assert [(d.fired, d.reason) for d in aggregator.flush()] == [(False, "fire_flush")] and aggregator.held[0] == 0


def test_a_step_that_is_not_finite_is_left_out():
    model = Toy()
    aggregator = Aggregator(model.adapters(), config(lr_scaling="none", buffer_convergence_eps=NEVER))
    one_step(model, aggregator, 0)
    held = [a.flat.clone() for a in aggregator._adapters]
    found = torch.tensor(1.0)
    decisions = one_step(model, aggregator, 1, found_inf=found)
    assert [d.reason for d in decisions] == ["hold_nonfinite"] * 2 and found == 1.0
    assert aggregator.held == [1, 1, 0, 0] and all(p.grad is None for p in model.trained())
    assert all(torch.equal(a.flat, h) for a, h in zip(aggregator._adapters, held))
    # Without a scaler: the operation sees the NaN.
    model.active = [0, 1]
    aggregator.before_step(2, (0, 1))
    x, y = batch(0, 0, 2)
    (model(x) - y).square().mean().backward()
    model.adapters()[0][0].grad[0, 0] = math.nan
    aggregator.after_backward(2, (0, 1))
    assert torch.equal(aggregator._adapters[0].flat, held[0])
    assert [a.stats[0].item() for a in aggregator._adapters] == [1.0, 2.0, 0.0, 0.0]


def test_wrong_arguments_are_named():
    model = Toy()
    opt = make_optimizer(model.trained())
    adapters = model.adapters()
    for arguments, said in [
        (([], config()), "adapters is empty"),
        (([adapters[0], []], config()), r"adapters\[1\] has no parameters"),
        (([adapters[0], adapters[0]], config()), "another adapter, has already"),
        ((adapters, config(hold_action="local")), "pass optimizer="),
    ]:
        with pytest.raises(ValueError, match=said):
            Aggregator(*arguments)
    with pytest.raises(ValueError, match=r"adapters\[2\] has parameters that the optimizer does not hold"):
        Aggregator(adapters, config(), optimizer=make_optimizer(adapters[0] + adapters[1]))
    with pytest.raises(ValueError, match="max_grad_norm is -1"):
        Aggregator(adapters, config(), optimizer=opt, max_grad_norm=-1.0)
    aggregator = Aggregator(adapters, config(max_hold_steps=1), optimizer=opt)  # fires at every step
    with pytest.raises(ValueError, match="adapter twice"):
        aggregator.before_step(0, (1, 1))
    with pytest.raises(ValueError, match="adapters are 0 to 3"):
        aggregator.before_step(0, (4,))
    with pytest.raises(ValueError, match="weight is -1"):
        one_step(model, aggregator, 0, weight=-1.0)
    one_step(model, aggregator, 0)
    with pytest.raises(ValueError, match="step is 0, not above the step before, 0"):
        aggregator.after_backward(0, (2, 3))
    with pytest.raises(ValueError, match="call before_step"):
        aggregator.after_backward(1, (1, 2))


@pytest.mark.filterwarnings("default:lr_scaling is")
def test_who_steps_the_optimizer_alone_is_told_about_the_rate():
    with pytest.warns(UserWarning, match="lr_scaling is 'linear', but the optimizer is yours"):
        Aggregator(Toy().adapters(), config())


def test_diagnostics_say_what_was_decided(tmp_path):
    model = Toy()
    log = Diagnostics(tmp_path, rank=3)
    fields = {"buffer_capacity": 3, "buffer_convergence_eps": NEVER, "stagger": False}
    aggregator = Aggregator(
        model.adapters(), config(**fields), optimizer=make_optimizer(model.trained()), diagnostics=log
    )
    for step in range(4):
        one_step(model, aggregator, step)
    aggregator.flush()
    scalars = log.scalars()
    aggregator.close()
    rows = [json.loads(line) for line in (tmp_path / "decisions-rank3.jsonl").read_text().splitlines()]
    assert scalars["kpool/fire"] == 4 and scalars["kpool/hold"] == 6 and scalars["kpool/steps_a_fire"] == 2.0
    assert [r["reason"] for r in rows if r["adapter"] == 0] == [
        "hold_variance", "hold_variance", "fire_full", "hold_variance", "fire_flush",
    ]  # fmt: skip
    full = next(r for r in rows if r["reason"] == "fire_full")
    assert (full["step"], full["active"], full["m"], full["bytes"]) == (2, [0, 1], 3, 0)
    assert full["V"] > 0 and full["P"] > 0 and full["threshold"] == NEVER and full["statistic"] > NEVER
    assert set(rows[0]) == {
        "step", "active", "adapter", "decision", "reason", "V", "P", "signal", "statistic", "threshold", "m", "planned",
        "nonfinite", "bytes", "waited_ms",
    }  # fmt: skip


@pytest.mark.parametrize("how", ["plain", "checkpointing", "autocast", "compile"])
def test_a_peft_model(how):
    """LoRA layers of PEFT, with what training loops put around them."""
    model = lora_model(count=4)
    adapters = [[p for name, p in model.named_parameters() if f".a{i}." in name] for i in range(4)]
    opt = torch.optim.AdamW([p for params in adapters for p in params], lr=1e-2)
    aggregator = Aggregator(adapters, config(trigger="relative"), optimizer=opt)
    call = torch.compile(model, backend="eager") if how == "compile" else model
    data, losses = torch.randn(16, 12, generator=torch.Generator().manual_seed(0)), []
    for step in range(8):
        active = round_robin(step)
        model.base_model.set_adapter([f"a{i}" for i in active])
        aggregator.before_step(step, active)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            if how == "checkpointing":
                out = checkpoint(call, data, use_reentrant=False)
            else:
                out = call(data)
            loss = out.float().square().mean()
        loss.backward()
        aggregator.after_backward(step, active, loss=loss)
        losses.append(loss.item())
    aggregator.flush()
    # Each pair of adapters has been trained since it was active first.
    assert losses[6] < losses[0] and losses[7] < losses[1]
    assert all(p.grad is None for params in adapters for p in params)
    assert min(losses[::2]) <= aggregator.agreed_losses[0] <= max(losses[::2])
