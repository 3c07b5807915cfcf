"""The router as Python sees it; its properties are tested where it is written, in src/router.rs."""

from __future__ import annotations

import numpy as np
import pytest

from tsugi_kpool._native import Router

STRATEGIES = ("round_robin", "random", "loss_aware")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_router_chooses_as_if_it_had_never_stopped(strategy):
    whole = Router(strategy, 7, 3, 11)
    chosen = []
    for step in range(40):
        if step == 17:
            losses, digest = whole.losses, whole.digest(step)
        chosen.append(whole.select(step))
        whole.record_loss(list(chosen[-1]), 1.0 / (1 + step))
    resumed = Router(strategy, 7, 3, 11)
    resumed.losses = losses
    assert resumed.digest(17) == digest
    for step in range(17, 40):
        assert resumed.select(step) == chosen[step]
        resumed.record_loss(list(chosen[step]), 1.0 / (1 + step))
    assert resumed.losses == whole.losses


def test_choices_are_tuples_and_round_robin_is_disjoint():
    router = Router("round_robin", 8, 2, 0)
    assert [router.select(t) for t in range(5)] == [(0, 1), (2, 3), (4, 5), (6, 7), (0, 1)]
    assert Router("round_robin", 3, 2, 0).select(1) == (0, 2)
    assert router.select(2**64 - 1) == (6, 7)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_table_is_what_select_says_step_by_step(strategy):
    router = Router(strategy, 7, 3, 11)
    table = router.table(2**40, 20)
    assert table.dtype == np.int64 and table.shape == (20, 3)
    assert [tuple(row) for row in table] == [router.select(2**40 + i) for i in range(20)]
    assert router.table(0, 0).shape == (0, 3)


@pytest.mark.parametrize(
    "make, what",
    [
        (lambda: Router("best", 4, 2, 0), 'strategy is "best"'),
        (lambda: Router("random", 4, 5, 0), "k is 5"),
        (lambda: Router("random", 0, 0, 0), "k is 0"),
        (lambda: Router("random", 4, 2, 0).record_loss([4], 1.0), "active holds 4"),
        (lambda: setattr(Router("random", 4, 2, 0), "losses", [None]), "holds 1 losses"),
    ],
)
def test_wrong_arguments_are_named(make, what):
    with pytest.raises(ValueError, match=what):
        make()
