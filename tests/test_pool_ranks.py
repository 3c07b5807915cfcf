"""A pool on several ranks: real processes, gloo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from pool_models import pool_model
from sync_worker import launch
from tsugi_kpool import attach

STEPS = 24


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(1000 * step + rank))


def loss_of(model, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x[:, :7].sin()).square().mean()


def model_of(**settings):
    torch.manual_seed(0)  # for the base, which is every rank's
    return pool_model(**settings)


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_" in name])


def train(rank: int, settings: dict, hidden: bool, steps: int = STEPS, first: int = 0, state=None):
    """(parameters after the last step and the flush, decisions of each step, state of a stop)."""
    model = model_of(**settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    decisions = []
    with attach(model, optimizer=optimizer if hidden else None) as pool:
        for step in range(steps):
            with pool.step(weight=1.0 + rank):
                loss = loss_of(model, batch(step, rank))
                loss.backward()
                pool.record_loss(loss)
            decisions.append([(d.adapter_idx, d.fired, d.reason) for d in pool.decisions])
            optimizer.step()
            optimizer.zero_grad()
        pool.flush()
        optimizer.step()  # what the flush left for the caller, where it did
        assert pool.held == [0] * 6
    return flat(model), decisions


def alone(settings: dict) -> torch.Tensor:
    """One process with both ranks' batches, weighted as the ranks are."""
    model = model_of(**settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with attach(model) as pool:
        for step in range(STEPS):
            with pool.step():
                losses = [loss_of(model, batch(step, rank)) for rank in range(2)]
                ((losses[0] * 1.0 + losses[1] * 2.0) / 3.0).backward()
            optimizer.step()
            optimizer.zero_grad()
    return flat(model)


@pytest.mark.parametrize("hidden", [False, True])
def test_synchronous_is_one_process_with_all_the_data(hidden):
    settings = {"aggregation_mode": "synchronous"}
    (first, decisions), (second, _) = launch(2, train, settings, hidden)
    assert torch.equal(first, second)
    assert all(fired for step in decisions for _, fired, _ in step)
    torch.testing.assert_close(first, alone(settings), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "hidden"),
    [
        ({"trigger": "relative", "relative_theta": 1.0}, True),
        ({"trigger": "relative", "relative_theta": 1.0, "routing_strategy": "loss_aware"}, True),
        ({"trigger": "variance", "buffer_convergence_eps": 1e-2, "lr_scaling": "none"}, False),
        (
            {"trigger": "variance", "buffer_convergence_eps": 1e-9, "buffer_capacity": 3, "routing_strategy": "random"},
            True,
        ),
    ],
    ids=["planned", "planned, loss-aware", "stepwise", "stepwise, never below"],
)
def test_ranks_stay_equal_while_gradients_are_held(settings, hidden):
    settings = {"aggregation_mode": "buffer_convergence", "buffer_capacity": 4} | settings
    (first, decisions), (second, others) = launch(2, train, settings, hidden)
    assert torch.equal(first, second)
    assert decisions == others
    fired = [fired for step in decisions for _, fired, _ in step]
    assert True in fired and False in fired
    assert not torch.equal(first, flat(model_of(**settings)))


def routers_that_differ(rank: int) -> str:
    model = model_of(aggregation_mode="synchronous", routing_strategy="random", routing_seed=rank)
    pool = attach(model)
    try:
        with pool.step():
            loss_of(model, batch(0, rank)).backward()
    except RuntimeError as error:
        pool.close(flush=False)
        return str(error)
    return "no error"


def test_ranks_that_choose_differently_stop_with_a_sentence():
    for sentence in launch(2, routers_that_differ):
        assert "rank" in sentence and ("adapter" in sentence or "router" in sentence), sentence


def wrapped(rank: int) -> str:
    model = torch.nn.parallel.DistributedDataParallel(model_of())
    with pytest.raises(TypeError) as caught:
        attach(model)
    assert dist.get_world_size() == 1
    return str(caught.value)


def test_ddp_around_a_pool_is_refused_with_what_to_do():
    (sentence,) = launch(1, wrapped)
    assert "keep_ddp_local" in sentence
