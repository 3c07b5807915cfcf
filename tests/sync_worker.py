"""What the processes of tests/test_sync.py run: a small pool with its own round-robin, and the scenarios.

``launch`` starts one process a rank from a fork server that has torch loaded already; the job's store is in the caller, so
that any rank may be killed.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import random
import signal
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from tsugi_kpool import KPoolLoraConfig
from tsugi_kpool.distributed.aggregator import Aggregator
from tsugi_kpool.distributed.ranks import SyncError

DEFAULTS = {
    "aggregation_mode": "buffer_convergence",
    "buffer_convergence_eps": 5e-3,
    "relative_theta": 1.0,
    "buffer_capacity": 6,
    "sync_timeout_s": 20.0,
}


def config(**fields):
    return KPoolLoraConfig(**{**DEFAULTS, **fields})


class Toy(nn.Module):
    """Two frozen layers, N adapters on each; ``active`` is a list of indices."""

    def __init__(self, n=4, r=2, width=6, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator) * 0.4)

        self.base = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        for layer in self.base:
            layer.weight.data.copy_(draw(width, width))
            layer.bias.data.zero_()
            layer.requires_grad_(False)
        self.A = nn.ParameterList(draw(r, width) for _ in range(2 * n))
        self.B = nn.ParameterList(draw(width, r) for _ in range(2 * n))
        self.n, self.active = n, []

    def forward(self, x):
        for k, layer in enumerate(self.base):
            y = layer(x)
            for i in self.active:
                y = y + x @ self.A[2 * i + k].T @ self.B[2 * i + k].T
            x = torch.tanh(y)
        return x

    def adapters(self):
        return [[p for k in (0, 1) for p in (self.A[2 * i + k], self.B[2 * i + k])] for i in range(self.n)]

    def trained(self):
        return [p for params in self.adapters() for p in params]


def round_robin(step, n=4, k=2):
    return tuple((step * k + j) % n for j in range(k))


def batch(seed, rank, step, micro=0, rows=4, width=6):
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step * 1009 + rank * 31 + micro)
    x = torch.randn(rows, width, generator=generator)
    return x, torch.sin(x.flip(1)) + 0.7 * torch.randn(rows, width, generator=generator)


def fingerprint(tensors):
    digest = hashlib.blake2b(digest_size=8)
    for t in tensors:
        digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_optimizer(params, name="adamw", lr=1e-2):
    if name == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=0.9)
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.1)


def train(
    fields,
    *,
    steps,
    attached=True,
    optimizer="adamw",
    accumulation=1,
    amp=False,
    router="round_robin",
    delay=0.0,
    weighted=False,
    seed=0,
    drift=None,
    model=None,
    stop_at=None,
    states=None,
    schedule=False,
    max_grad_norm=None,
    flush=True,
    before=None,
    group=None,
):
    """Train this rank's Toy; a dict of what the tests look at."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = model or Toy()
    opt = make_optimizer(model.trained(), optimizer)
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.2, steps) if schedule else None
    aggregator = Aggregator(
        model.adapters(),
        config(**fields),
        optimizer=opt if attached else None,
        group=group,
        max_grad_norm=max_grad_norm if attached else None,
        drift_ms=lambda: drift,
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=5) if amp else None
    noise, choice = random.Random(seed * 97 + rank), random.Random(seed)
    went_in = [0.0] * model.n
    came_out, windows = [], []
    weights = [0.0] * model.n
    decisions, longest, start = [], 0, 0
    # What the loss-aware router of this test knows: losses agreed so far.
    known = [0.0] * model.n
    aggregator.on_agreed_loss = lambda step, active, loss: [known.__setitem__(i, loss) for i in active]
    if states is not None:
        model.load_state_dict(states["model"])
        opt.load_state_dict(states["optimizer"])
        aggregator.load_state_dict(states["aggregator"])
        start = states["step"]
        known[:] = states["known"]
        if scheduler:
            scheduler.load_state_dict(states["scheduler"])
        for _ in range(start):
            choice.sample(range(model.n), 2)

    for step in range(start, steps):
        if router == "round_robin":
            active = round_robin(step)
        else:
            active = tuple(choice.sample(range(model.n), 2))
            if router == "loss_aware":
                worst = max(range(model.n), key=lambda i: (known[i], i))
                active = (worst, next(i for i in active if i != worst))
        if stop_at == step:
            state = {"aggregator": aggregator.state_dict(), "model": model.state_dict(), "step": step}
            state |= {"optimizer": opt.state_dict(), "known": list(known)}
            if scheduler:
                state["scheduler"] = scheduler.state_dict()
            return {"state": state}
        if delay and noise.random() < 0.4:
            time.sleep(noise.random() * delay)
        if before:
            before(step, aggregator)
        model.active = list(active)
        aggregator.before_step(step, active)
        weight = float(1 + (step + rank) % 3) if weighted else 1.0
        if weighted and (step + rank) % 5 == 4:
            weight = 0.0  # a rank whose data ran out
        if weight:
            for micro in range(accumulation):
                x, y = batch(seed, rank, step, micro)
                loss = (model(x) - y).square().mean() / accumulation
                (scaler.scale(loss) if scaler else loss).backward()
        found = False
        if scaler:
            if step % 7 == 3 and rank == 0:
                model.A[2 * active[0]].grad[0, 0] = float("inf")
            scaler.unscale_(opt)
            # The scaler's own tensor: what is agreed on is what its step() and update() see.
            (found,) = scaler._found_inf_per_device(opt).values()
        for i in active:
            for p in model.adapters()[i]:
                if p.grad is not None and bool(torch.isfinite(p.grad).all()):
                    went_in[i] += weight * p.grad.double().sum().item()
            weights[i] += weight
        out = aggregator.after_backward(step, active, weight=weight, loss=loss.item() * accumulation, found_inf=found)
        decisions.append([(d.adapter_idx, d.fired, d.reason) for d in out])
        longest = max(longest, *aggregator.held)
        if not attached:
            for d in out:
                if d.fired:
                    grads = [p.grad for p in model.adapters()[d.adapter_idx]]
                    applied = sum(g.double().sum().item() for g in grads) if grads[0] is not None else 0.0
                    came_out.append(applied)
                    windows.append(weights[d.adapter_idx])
                    weights[d.adapter_idx] = 0.0
        if scaler:
            scaler.step(opt)
            scaler.update()
        else:
            opt.step()
        opt.zero_grad()
        if scheduler:
            scheduler.step()
    aggregator.finish()
    held = aggregator.held
    left = [a.flat.double().sum().item() for a in aggregator._adapters]
    result_before = fingerprint(model.trained())
    flushed = [(d.adapter_idx, d.fired, d.reason) for d in aggregator.flush()] if flush else []
    if flush and not attached:
        opt.step()
        opt.zero_grad()
    result = {
        "params": fingerprint(model.trained()),
        "before_flush": result_before,
        "values": [p.detach().clone() for p in model.trained()],
        "decisions": decisions,
        "flushed": flushed,
        "held": held,
        "left": left,
        "longest": longest,
        "went_in": went_in,
        "came_out": came_out,
        "windows": windows,
        "scale": scaler.get_scale() if scaler else None,
        "bytes": (aggregator.payload_bytes, aggregator.control_bytes),
        "losses": list(aggregator.agreed_losses),
    }
    aggregator.close()
    return result


# ---- processes -----------------------------------------------------------------------------------------------------------


def launch(size, scenario, *arguments, timeout=60.0, expect_dead=()):
    """Run ``scenario(rank, *arguments)`` on ``size`` ranks; their results, None for those in ``expect_dead``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "torch.distributed", "tsugi_kpool.distributed.aggregator", "sync_worker"]
    )
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(size):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_main, args=(rank, size, store.port, theirs, scenario, _pack(arguments)), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    results, deadline = [None] * size, time.monotonic() + timeout
    try:
        for rank, pipe in enumerate(pipes):
            if rank in expect_dead:
                continue
            if not pipe.poll(max(deadline - time.monotonic(), 0.0)):
                raise TimeoutError(f"rank {rank} of {size} gave no result within {timeout} s: a hang")
            kind, value = _unpack(pipe.recv_bytes())
            assert kind == "result", f"rank {rank}: {value}"
            results[rank] = value
    finally:
        for process in processes:
            process.kill()
            process.join()
    return results


def _pack(value):
    """Bytes, so that no tensor is left in memory shared with a process that has ended."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data):
    return torch.load(io.BytesIO(data), weights_only=False)


def _main(rank, size, port, pipe, scenario, arguments):
    torch.set_num_threads(1)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
        value = ("result", scenario(rank, *_unpack(arguments)))
    except BaseException:
        value = ("error", traceback.format_exc())
    pipe.send_bytes(_pack(value))
    pipe.close()
    # Without the interpreter's end: after a failure, groups wait for exchanges that never finish.
    os._exit(0)


def runs(rank, list_of_keywords):
    """One training run after the other in the same processes."""
    return [train(**dict(keywords)) for keywords in list_of_keywords]


def delayed(rank, seeds, steps):
    rng_fields = [
        {"trigger": "relative"},
        {"trigger": "variance", "buffer_convergence_eps": 1e-2},
        {"trigger": "variance", "decision_delay": 0},
        {"aggregation_mode": "synchronous"},
    ]
    return [
        train(rng_fields[seed % 4], steps=steps, delay=0.004, seed=seed, router="loss_aware")["params"]
        for seed in seeds
    ]


def failing(rank, how, timeout_s, fields):
    """The last rank is killed or stopped in step 5; the others say what they saw."""

    def before(step, aggregator):
        nonlocal kept
        kept = aggregator
        if step == 5 and rank == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

    kept = None
    started = time.monotonic()
    try:
        train({**fields, "sync_timeout_s": timeout_s}, steps=50, before=before)
    except SyncError as error:
        took = time.monotonic() - started
        state = kept.state_dict()
        again = None
        try:
            kept.before_step(99, (0,))
        except SyncError as second:
            again = str(second)
        return {
            "message": str(error),
            "missing": error.missing,
            "first": error.first,
            "took": took,
            "again": again,
            "kept": [(e["held"], None if e["sum"] is None else float(e["sum"].norm())) for e in state["adapters"]],
            "snapshots": [float(e["stats"][0]) for e in state["adapters"]],
        }
    return {"message": "no error"}


def mismatched(rank, fields):
    """Rank 1's router has another seed from step 3 on."""
    model = Toy()
    aggregator = Aggregator(model.adapters(), config(**fields), router_digest=lambda step: int(rank == 1 and step >= 3))
    for step in range(10):
        active = round_robin(step)
        model.active = list(active)
        try:
            aggregator.before_step(step, active)
            x, y = batch(0, rank, step)
            (model(x) - y).square().mean().backward()
            aggregator.after_backward(step, active)
        except SyncError as error:
            held = [float(a.stats[0]) for a in aggregator._adapters]
            return {"step": step, "message": str(error), "held": held}
    return {"message": "no error"}


def different_configs(rank):
    try:
        Aggregator(Toy().adapters(), config(buffer_capacity=6 + rank))
    except ValueError as error:
        return str(error)
    return "no error"


def with_ddp(rank, steps):
    from torch.nn.parallel import DistributedDataParallel

    results = []
    for wrapped in (True, False):
        model = Toy()
        opt = make_optimizer(model.trained())
        call = DistributedDataParallel(model, find_unused_parameters=True) if wrapped else model
        aggregator = None if wrapped else Aggregator(model.adapters(), config(aggregation_mode="synchronous"))
        for step in range(steps):
            active = round_robin(step)
            model.active = list(active)
            x, y = batch(0, rank, step)
            if aggregator:
                aggregator.before_step(step, active)
            (call(x) - y).square().mean().backward()
            if aggregator:
                aggregator.after_backward(step, active)
            for i, params in enumerate(model.adapters()):
                if i not in active:
                    for p in params:
                        p.grad = None  # DDP leaves zeros for what was used before
            opt.step()
            opt.zero_grad()
        results.append(fingerprint(model.trained()))
        if aggregator:
            aggregator.close()
    return results


def ddp_kept_local(rank, steps):
    """Under a DDP that somebody else put around the model, the result is that of the bare model."""
    from torch.nn.parallel import DistributedDataParallel

    from tsugi_kpool.distributed.wrapping import check_wrapping
    from tsugi_kpool.pool.ddp import keep_ddp_local

    results, refusals = [], []
    for wrapped in (True, False):
        model = Toy()
        opt = make_optimizer(model.trained())
        call = model
        if wrapped:
            try:
                keep_ddp_local(DistributedDataParallel(Toy()))
            except ValueError as error:
                refusals.append(str(error))
            call = DistributedDataParallel(model, find_unused_parameters=True)
            try:
                check_wrapping(call)
            except TypeError as error:
                refusals.append(str(error))
            keep_ddp_local(call)
            check_wrapping(call)
        aggregator = Aggregator(model.adapters(), config(trigger="relative"), optimizer=opt)
        for step in range(steps):
            active = round_robin(step)
            model.active = list(active)
            aggregator.before_step(step, active)
            x, y = batch(0, rank, step)
            (call(x) - y).square().mean().backward()
            aggregator.after_backward(step, active)
            opt.zero_grad()
        aggregator.flush()
        results.append(fingerprint(model.trained()))
        aggregator.close()
    return results, refusals


def with_fsdp2(rank, steps):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    from tsugi_kpool.distributed.wrapping import check_wrapping

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plain = train({"trigger": "relative"}, steps=steps)
    model = Toy()
    adapters = set(model.trained())
    for layer in model.base:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=adapters)
    sharded = type(model.base[0].weight).__name__, type(model.A[0].data).__name__
    ours = train({"trigger": "relative"}, steps=steps, model=model)

    refusals = []
    whole = Toy()
    fully_shard(whole, mesh=mesh)
    for make in (
        lambda: Aggregator(whole.adapters(), config()),
        lambda: check_wrapping(FullyShardedDataParallel(Toy(), use_orig_params=True, device_id=torch.device("cpu"))),
    ):
        try:
            make()
            refusals.append("none")
        except TypeError as error:
            refusals.append(str(error))
    return plain["values"], ours["values"], sharded, refusals


def saved(rank, keywords, stop_at):
    """A run to the end, and the same run stopped and resumed in new objects."""
    whole = train(**keywords)
    half = train(**keywords, stop_at=stop_at)["state"]
    buffer = io.BytesIO()
    torch.save(half, buffer)
    buffer.seek(0)
    rest = train(**keywords, states=torch.load(buffer, weights_only=True))
    return whole["params"], rest["params"], whole["decisions"][stop_at:] == rest["decisions"]


def stopped(rank, keywords, stop_at):
    return train(**keywords, stop_at=stop_at)["state"]


def resumed(rank, keywords, states):
    """On another number of ranks: what is held right after loading, and the rest of the run."""
    first = states[0]
    model = Toy()
    opt = make_optimizer(model.trained())
    aggregator = Aggregator(model.adapters(), config(**keywords["fields"]), optimizer=opt)
    aggregator.load_state_dict([s["aggregator"] for s in states])
    sums = [a.flat.clone() for a in aggregator._adapters]
    stats = [a.stats.clone() for a in aggregator._adapters]
    aggregator.close()
    result = train(**keywords, states={**first, "aggregator": [s["aggregator"] for s in states]})
    return {"sums": sums, "stats": stats, "params": result["params"]}


def in_parts(rank, steps):
    """A 2 x 2 mesh: each row exchanges on its own; twice, since groups of parts are named by their ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "data"))
    results = []
    for _ in range(2):
        results.append(train({"trigger": "relative"}, steps=steps, group=mesh["data"])["params"])
    return results
