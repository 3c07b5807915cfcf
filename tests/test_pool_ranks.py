"""A pool on several ranks: real processes, gloo."""

from __future__ import annotations

import socket
import time

import pytest
import torch
import torch.distributed as dist

from pool_models import pool_model
from sync_worker import launch
from tsugi_kpool import attach
from tsugi_kpool.distributed.sideband import STATES

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


def by_rank(step: int, rank: int) -> float:
    return 1.0 + rank


def data_runs_out(step: int, rank: int) -> float:
    """Rank 1 has data in every third step only."""
    return 0.0 if rank == 1 and step % 3 else 1.0


def train(rank: int, settings: dict, hidden: bool, weights=by_rank):
    """(parameters after the last step and the flush, decisions of each step); at weight 0 a rank runs neither pass."""
    model = model_of(**settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    decisions = []
    with attach(model, optimizer=optimizer if hidden else None) as pool:
        for step in range(STEPS):
            weight = weights(step, rank)
            with pool.step(weight=weight):
                if weight > 0:
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


def alone(settings: dict, weights=by_rank) -> torch.Tensor:
    """One process with the batches that the two ranks have, weighted as the ranks are."""
    model = model_of(**settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with attach(model) as pool:
        for step in range(STEPS):
            with pool.step():
                parts = [(weights(step, rank), rank) for rank in range(2)]
                losses = [weight * loss_of(model, batch(step, rank)) for weight, rank in parts if weight > 0]
                (sum(losses) / sum(weight for weight, _ in parts)).backward()
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


@pytest.mark.parametrize("hidden", [False, True])
def test_a_rank_without_data_takes_part_at_weight_0(hidden):
    settings = {"aggregation_mode": "synchronous"}
    (first, _), (second, _) = launch(2, train, settings, hidden, data_runs_out)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone(settings, data_runs_out), rtol=1e-4, atol=1e-5)


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


def with_sideband(rank: int, ports: list[int], key: str):
    """Two nodes on one host, each with a port of its own; rank 1 reaches each step later."""
    own, other = (f"tcp://127.0.0.1:{port}" for port in (ports[rank], ports[1 - rank]))
    model = model_of(
        aggregation_mode="buffer_convergence",
        trigger="variance",
        buffer_convergence_eps=1e3,
        buffer_capacity=4,
        sideband_enabled=True,
        sideband_addr=own,
        sideband_peers=(other,),
        sideband_heartbeat_ms=10,
        sideband_psk_file=key,
        max_drift_ms=15,
    )
    decisions = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with attach(model, optimizer=optimizer) as pool:
        for step in range(40):
            with pool.step():
                loss_of(model, batch(step, rank)).backward()
            time.sleep(0.03 if rank else 0.0)
            decisions.append([(d.fired, d.reason) for d in pool.decisions])
        snapshot = pool.sideband.snapshot()
        sideband = pool.sideband
    assert sideband.stop() and sideband.snapshot()["node"].size == 0
    return (
        decisions,
        STATES[snapshot["state"][0]],
        snapshot["step"][0],
        snapshot["drift_ms"][0],
        snapshot["bound_ms"][0],
    )


def test_measured_drift_enters_the_decisions_alike_on_all_ranks(tmp_path):
    key = tmp_path / "key"
    key.write_text("5a" * 32 + "\n")
    key.chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
        ports = [server.getsockname()[1] for server in (a, b)]
    first, second = launch(2, with_sideband, ports, str(key))
    assert first[0] == second[0]
    for _, state, step, drift, bound in (first, second):
        assert state == "alive" and step > 0
        assert abs(drift) < 5000 and 0 <= bound < 5000
    assert "hold_drift" in {reason for step in first[0] for _, reason in step}


def test_a_sideband_that_cannot_start_leaves_nothing_behind():
    config = dict(aggregation_mode="buffer_convergence", sideband_enabled=True, lr_scaling="none")
    model = model_of(**config, sideband_peers=("tcp://127.0.0.1:9",))
    with pytest.raises(ValueError, match="peers are given but no key: set KPOOL_PSK_FILE or psk_file"):
        attach(model)
    alone = model_of(**config)
    with attach(alone) as pool:
        assert pool.sideband is None  # one process without peers
    with pytest.raises(ValueError, match="no key"):
        attach(model)


def wrapped(rank: int) -> str:
    model = torch.nn.parallel.DistributedDataParallel(model_of())
    with pytest.raises(TypeError) as caught:
        attach(model)
    assert dist.get_world_size() == 1
    return str(caught.value)


def test_ddp_around_a_pool_is_refused_with_what_to_do():
    (sentence,) = launch(1, wrapped)
    assert "keep_ddp_local" in sentence
