"""States of several ranks: real processes, gloo; accelerate's save_state; DDP that somebody else put around the model."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pool_models import adapters
from sync_worker import launch
from test_state import HELD, Run, content, signed
from tsugi_kpool import attach
from tsugi_kpool.distributed import state as state_
from tsugi_kpool.distributed.ranks import SyncError

#: Seconds for a launch: processes start slowly on a loaded machine.
LIMIT = 300.0

SETTINGS = {
    "synchronous": dict(),
    "planned": HELD,
    "stepwise": HELD | dict(trigger="variance", buffer_convergence_eps=1e-3),
}


def loss_of(model, step: int, rank: int) -> torch.Tensor:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1000 * step + rank))
    return (model(x) - x[:, :7].sin()).square().mean()


def train(run: Run, steps: int, call=None) -> Run:
    for _ in range(steps):
        with run.pool.step():
            loss_of(call or run.model, run.pool.current_step, run.pool.rank).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    return run


def flat(model) -> torch.Tensor:
    return torch.cat([value.flatten() for value in adapters(model).values()])


def refusal(call, *arguments) -> str:
    try:
        call(*arguments)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# ---- files of several ranks --------------------------------------------------------------------------------------------


def save(rank, folder, settings, steps):
    """A run that saved after ``steps``, with reduces in flight, and where it was then and in the end."""
    run = train(Run(**settings), steps)
    others = run.others()
    run.pool.save(folder, finish=False)
    held = [a.flat.clone() for a in run.pool._aggregator._adapters]
    run.pool.finish()
    train(run, 8).pool.flush()
    return {"others": others, "held": held, "end": flat(run.model)}


def load(rank, folder, settings, others):
    """Go on from all ranks' files, whatever their number was."""
    run = Run(**settings).put_back(others)
    run.pool.load(folder)
    held = [a.flat.clone() for a in run.pool._aggregator._adapters]
    train(run, 8).pool.flush()
    return {"held": held, "end": flat(run.model)}


def refuse(rank, folder, settings, others):
    """What each rank says where one rank's file is damaged, gone, or of another step; nothing may have changed."""
    run = train(Run(**settings), 2)
    run.pool.finish()
    before, said = content(run.pool.state_dict()), {}
    mine = Path(folder) / f"kpool_state_rank{rank}.pt"
    good = mine.read_bytes()
    run_at_3 = signed({**state_.read(mine), "step": 3, "aggregator": {**state_.read(mine)["aggregator"], "step": 2}})
    dist.barrier()
    for damage in ("cut", "gone", "another step"):
        if rank == 1:
            if damage == "cut":
                mine.write_bytes(good[:1000])
            elif damage == "gone":
                mine.unlink()
            elif damage == "another step":
                for entry in run_at_3["aggregator"]["adapters"]:
                    entry.update(held=0, flight=None, first_step=0)
                run_at_3["aggregator"]["pending"] = None
                state_.write(signed(run_at_3), mine)
        dist.barrier()
        said[damage] = refusal(run.pool.load, folder)
        assert content(run.pool.state_dict()) == before
    if rank == 1:
        mine.write_bytes(good)
    dist.barrier()
    run.pool.load(folder)
    # From the pair of states, by hand.
    pair = [state_.read(Path(folder) / f"kpool_state_rank{r}.pt") for r in (0, 1)]
    run.pool.load_state_dict(pair)
    said["order"] = refusal(run.pool.load_state_dict, pair[::-1])
    said["alone"] = refusal(run.pool.load_state_dict, pair[0])
    return said


def saved_and_loaded(rank, folder, settings):
    first = save(rank, folder, settings, 6)
    dist.barrier()
    again = load(rank, folder, settings, first["others"])
    dist.barrier()
    return first, again, refuse(rank, folder, settings, first["others"])


@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_go_on_bit_for_bit_and_refuse_together(name, tmp_path):
    results = launch(2, saved_and_loaded, str(tmp_path), SETTINGS[name], timeout=LIMIT)
    (first, again, said), (_, other, other_said) = results
    assert torch.equal(first["end"], again["end"]) and torch.equal(first["end"], other["end"])

    assert "rank 1 refused its state, so no rank loaded any" in said["cut"] and "cut off" in said["cut"]
    assert "rank1.pt is cut off or damaged" in other_said["cut"]
    assert "rank 1 refused its state" in said["gone"] and "FileNotFoundError" in other_said["gone"]
    both = "ValueError: the ranks' states differ in step: rank 0 is at step 6, rank 1 is at step 3. Nothing"
    assert said["another step"].startswith(both) and other_said["another step"].startswith(both)
    assert "state has the ranks [1, 0], not 0 to 1 in order" in said["order"]
    # Rank 0 may, and hears that rank 1 may not.
    assert "rank 1 refused its state" in said["alone"] and "all_ranks=True" in other_said["alone"]


@pytest.mark.parametrize(("then", "now"), [(3, 2), (2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on(then, now, tmp_path):
    saved = launch(then, save, str(tmp_path), HELD, 5, timeout=LIMIT)
    loaded = launch(now, load, str(tmp_path), HELD, saved[0]["others"], timeout=LIMIT)
    assert all(torch.equal(each["end"], loaded[0]["end"]) for each in loaded)
    for i in range(4):
        before, after = (torch.stack([each["held"][i] for each in results]).sum(0) for results in (saved, loaded))
        torch.testing.assert_close(after, before)
    # All or nothing: with one file gone, no rank loads any.
    if then > 1:
        os.unlink(tmp_path / f"kpool_state_rank{then - 1}.pt")
        (said, *_) = launch(now, only_refused, str(tmp_path), timeout=LIMIT)
        assert f"kpool_state_rank{then - 1}.pt" in said


def only_refused(rank, folder):
    run = train(Run(**HELD), 2)
    before = content(run.pool.state_dict())
    said = refusal(run.pool.load, folder)
    assert content(run.pool.state_dict()) == before
    return said


# ---- accelerate --------------------------------------------------------------------------------------------------------


def accelerator_of(rank, **handlers):
    from accelerate import Accelerator, DistributedDataParallelKwargs

    size = str(dist.get_world_size())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    return Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(**handlers)] if handlers else None)


def with_accelerate(rank, folder, settings):
    """prepare, then attach to the model inside; save_state in the middle of a run, load_state in a new one."""
    accelerator = accelerator_of(rank, find_unused_parameters=True)
    ends = []
    for resume in (False, True):
        run = Run(**settings)
        run.pool.close(flush=False)
        call, optimizer = accelerator.prepare(run.model, run.optimizer)
        run.pool = attach(run.model, optimizer=run.optimizer)
        accelerator.register_for_checkpointing(run.pool)
        if resume:
            accelerator.load_state(folder)
            assert run.pool.current_step == 6
        else:
            train(run, 6, call)
            accelerator.save_state(folder)
            own = run.pool.state_dict(finish=False)
            assert own["aggregator"]["rank"] == rank and "ranks" not in own
        train(run, 8, call).pool.flush()
        ends.append(flat(run.model))
        run.pool.close()
        accelerator._custom_objects.clear()
        accelerator._models.clear()
        accelerator._optimizers.clear()
    bare = train(Run(**settings), 14)
    bare.pool.flush()
    return ends, flat(bare.model)


@pytest.mark.parametrize("name", ["planned", "stepwise"])
def test_accelerate_saves_and_loads_the_state_of_every_rank(name, tmp_path):
    results = launch(2, with_accelerate, str(tmp_path), SETTINGS[name], timeout=LIMIT)
    (whole, resumed), bare = results[0]
    assert all(torch.equal(end, whole) for ends, _ in results for end in ends)
    assert torch.equal(whole, resumed) and torch.equal(whole, bare)
    # What accelerate wrote is a state like any other, of both ranks.
    run = Run(**SETTINGS[name])
    run.pool.load_state_dict(torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True))
    assert run.pool.current_step == 6


def beside_ddp(rank):
    """A head that trains beside the pool is averaged; without find_unused_parameters a sentence comes, at once."""
    from torch.nn.parallel import DistributedDataParallel

    said = []
    run = Run(modules_to_save=["second"], target_modules=["first"])
    train(run, 6, DistributedDataParallel(run.model, find_unused_parameters=True))
    head = [p.detach().clone() for n, p in run.model.named_parameters() if "modules_to_save" in n]
    pooled = flat(run.model)
    run.pool.close()
    for keywords in ({}, {"find_unused_parameters": True, "static_graph": True}):
        run = Run()
        call = DistributedDataParallel(run.model, **keywords)
        said.append(refusal(train, run, 1, call))
    return head, pooled, said


def test_ddp_around_the_model_leaves_the_pool_alone_and_averages_the_rest():
    (head, pooled, said), (other_head, other_pooled, _) = launch(2, beside_ddp, timeout=LIMIT)
    assert head and all(torch.equal(mine, theirs) for mine, theirs in zip(head, other_head))
    assert torch.equal(pooled, other_pooled)
    assert "DistributedDataParallelKwargs(find_unused_parameters=True)" in said[0]
    assert "static_graph=True" in said[1] and "leave it out" in said[1]


# ---- Ctrl-C ------------------------------------------------------------------------------------------------------------


def interrupted(rank, folder, settings, after_s):
    """Ctrl-C on both ranks at some moment of a run; its handler saves."""
    run = Run(**settings, sync_timeout_s=5.0)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    dist.barrier()
    signal.setitimer(signal.ITIMER_REAL, after_s)
    try:
        while True:
            train(run, 1)
    except (KeyboardInterrupt, SyncError):
        signal.setitimer(signal.ITIMER_REAL, 0)
    run.pool.save(folder)
    state = run.pool.state_dict()
    assert state["step"] == state["aggregator"]["step"] + 1 == run.pool.current_step
    return state["step"], run.others()


def go_on(rank, folder, settings, others):
    run = Run(**settings).put_back(others[rank])
    said = refusal(run.pool.load, folder)
    if said == "no error":
        train(run, 5).pool.flush()
    return said, run.pool.current_step, flat(run.model)


@pytest.mark.parametrize("after_s", [0.05, 0.11])
def test_what_ctrl_c_saved_goes_on_or_says_why_not(after_s, tmp_path):
    results = launch(2, interrupted, str(tmp_path), HELD, after_s, timeout=LIMIT)
    steps, others = [step for step, _ in results], [other for _, other in results]
    (said, now, first), (other_said, _, second) = launch(2, go_on, str(tmp_path), HELD, others, timeout=LIMIT)
    if said == "no error":
        assert other_said == said and now == steps[0] + 5
        (alone,) = launch(1, go_on, str(tmp_path), HELD, others, timeout=LIMIT)
        assert alone[0] == "no error"
    else:
        assert "use an earlier checkpoint" in said and "use an earlier checkpoint" in other_said
