"""The trigger as Python sees it: against the operation's statistics and numpy, and the calibration of its threshold."""

import math
import pickle
import typing
from pathlib import Path

import numpy
import pytest
import torch

from test_sync import MODES
from tsugi_kpool import KPoolLoraConfig, _native, ops
from tsugi_kpool.distributed.aggregator import Aggregator
from tsugi_kpool.pool.config import TRIGGERS

PAGE = Path(__file__).parent.parent / "docs" / "trigger.md"


def rule(trigger="relative", threshold=1.0, **fields):
    given = {"capacity": 8, "max_hold_steps": None, "max_drift_ms": 250.0, "world_size": 3, "numel": 40, **fields}
    return _native.TriggerRule(trigger, threshold, **given)


def buffer(snapshots, weights):
    """(m, n, n2, Q, ||S||^2) and S by the operations."""
    total, stats = [torch.zeros(40)], torch.zeros(8, dtype=torch.float64)
    for g, w in zip(snapshots, weights):
        ops.sideband_accumulate_(total, stats, [torch.tensor(g, dtype=torch.float32)], w)
    m, n, q, norm2, variance, power, *_ = ops.sideband_stats(total, stats).tolist()
    return (m, n, stats[2].item(), q, norm2), total[0], variance, power


def test_one_rank_folds_to_what_the_operation_says():
    random = numpy.random.default_rng(0)
    row, _, variance, power = buffer(random.normal(1.0, 2.0, (5, 40)), [1.0, 2.0, 3.0, 1.0, 1.0])
    m, folded_variance, signal, folded_power = _native.trigger_fold([row])
    assert folded_variance == pytest.approx(variance, rel=1e-12)
    assert folded_power == pytest.approx(power, rel=1e-12)
    assert m == pytest.approx(8.0**2 / 16.0)
    assert signal == pytest.approx(power - variance / m)


def test_pooling_equals_numpy_over_all_ranks_snapshots():
    random = numpy.random.default_rng(1)
    snapshots = random.normal(0.5, 1.0, (3, 2, 40))
    rows, sums = zip(*((row, s) for row, s, _, _ in (buffer(per_rank, [1.0, 1.0]) for per_rank in snapshots)))
    norm2 = sum(sums).double().square().sum().item()
    m, variance, signal, power = _native.trigger_pool(list(rows), norm2)
    everything = snapshots.reshape(6, 40)
    assert m == 2.0
    assert variance == pytest.approx(everything.var(axis=0, ddof=1).sum(), rel=1e-5)
    assert power == pytest.approx((everything.mean(axis=0) ** 2).sum(), rel=1e-5)
    assert signal == pytest.approx(power - variance / 6)


def test_a_rank_without_snapshots_says_nothing():
    row, *_ = buffer(numpy.random.default_rng(2).normal(size=(3, 40)), [1.0] * 3)
    nothing = (0.0,) * 5
    assert _native.trigger_fold([nothing, row, nothing]) == _native.trigger_fold([row])
    assert _native.trigger_pool([nothing, row], row[4]) == _native.trigger_pool([row], row[4])
    assert _native.trigger_fold([nothing, nothing]) == (0.0, None, None, 0.0)


def test_reasons():
    at = {
        "held": 3,
        "age": 3,
        "bound": 8,
        "flush": False,
        "drift_ms": None,
        "planned": None,
        "agreed": (3.0, 9.0, 1.0, 4.0),
    }
    # V / (m world_size) = 1 against theta^2 signal = 1.
    assert rule().decide(**at) == (True, "fire", 1.0, 1.0)
    assert rule().decide(**at)._asdict() == {"fires": True, "reason": "fire", "statistic": 1.0, "threshold": 1.0}
    assert rule(threshold=0.9).decide(**at)[:2] == (False, "hold_variance")
    assert rule("variance", 9.0 / 40 + 1e-9).decide(**at)[:2] == (True, "fire")
    assert rule("variance", 9.0 / 40).decide(**at)[:2] == (False, "hold_variance")
    assert rule().decide(**{**at, "drift_ms": 251.0})[:2] == (False, "hold_drift")
    assert rule().decide(**{**at, "drift_ms": 251.0, "flush": True})[:2] == (True, "fire_flush")
    assert rule(max_hold_steps=3).decide(**{**at, "drift_ms": 251.0})[:2] == (True, "fire_deadline")
    assert rule(capacity=3).decide(**{**at, "drift_ms": 251.0})[:2] == (True, "fire_full")
    assert rule().decide(**{**at, "held": 0, "flush": True})[:2] == (False, "empty_buffer")
    fires, reason, statistic, threshold = rule().decide(**{**at, "agreed": None})
    assert (fires, reason) == (False, "hold_variance") and math.isnan(statistic) and math.isnan(threshold)


def test_what_is_returned_has_names_and_survives_a_pickle():
    agreed = _native.trigger_fold([(2.0, 2.0, 2.0, 10.0, 16.0)])
    assert agreed == (2.0, 2.0, 3.0, 4.0) and (agreed.variance, agreed.signal, agreed.power) == (2.0, 3.0, 4.0)
    plan = rule().plan(None, agreed, 2)
    assert (plan.trend.variance, plan.trend.signal, plan.length) == (2.0, 3.0, 1)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert isinstance(plan, _native.Plan) and isinstance(agreed, _native.Agreed)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match='trigger is "norm"'):
        rule("norm")
    with pytest.raises(ValueError, match="capacity is 0"):
        rule(capacity=0)


def test_what_a_fire_carried():
    # (weight sent, gradients left out) of each rank
    assert _native.trigger_nothing_to_apply([(1.0, 0.0), (0.0, 2.0)], True) is None
    assert _native.trigger_nothing_to_apply([(1.0, 0.0), (1.0, 0.0)], False) == "hold_nonfinite"
    assert _native.trigger_nothing_to_apply([(0.0, 1.0), (0.0, 0.0)], True) == "hold_nonfinite"
    assert _native.trigger_nothing_to_apply([(0.0, 0.0), (0.0, 0.0)], True) == "empty_buffer"
    assert _native.trigger_rows_without_finite([4, 4, 4], [(0.0, 3.0), (0.0, 0.0), (1.0, 3.0)]) == [7, 4, 0]
    held = {"held": 3, "age": 3, "bound": 8, "flush": False, "drift_ms": None, "planned": None, "agreed": None}
    assert rule().decide(**held, nothing_finite=True)[:2] == (False, "hold_nonfinite")


def test_every_trigger_is_a_rule_is_documented_and_runs_on_several_ranks():
    headings = [line for line in PAGE.read_text().splitlines() if line.startswith("### trigger=")]
    assert typing.get_args(typing.get_type_hints(KPoolLoraConfig)["trigger"]) == TRIGGERS
    assert sorted(heading.split('"')[1] for heading in headings) == sorted(TRIGGERS)
    assert {mode["fields"].get("trigger", "variance") for mode in MODES.values()} == set(TRIGGERS)
    for trigger in TRIGGERS:
        config = KPoolLoraConfig(aggregation_mode="buffer_convergence", trigger=trigger, lr_scaling="none")
        aggregator = Aggregator([[torch.nn.Parameter(torch.zeros(3))]], config)
        aggregator.before_step(0, [0])
        assert [decision.adapter_idx for decision in aggregator.after_backward(0, [0])] == [0]
        aggregator.close()
