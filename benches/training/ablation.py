"""The trigger against a fixed window, in the same machinery.

Two ranks on this machine; what counts is loss at equal tokens against bytes sent, so the link does not matter. Every
method has its learning rate tuned over the same grid, by mean held-out loss over the seeds; the best rate's loss is
printed with its standard error, and for each trigger its difference, seed by seed, to what fixed windows reach with the
same bytes (on the line through the two fixed windows around it). The sign of a difference smaller than two standard
errors is not known.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from benches.training import small_gpt
from benches.training.small_gpt import every, noise_scale

FIXED = {f"every {steps}": every(steps) for steps in (2, 3, 4, 6, 8)}


def methods() -> dict[str, dict]:
    return {
        "synchronous": {"aggregation_mode": "synchronous"},
        **FIXED,
        **{f"noise scale {cost:g}": noise_scale(cost) for cost in (0.5, 1, 2, 4, 8)},
        **{f"relative {theta:g}": {"trigger": "relative", "relative_theta": theta} for theta in (3, 1.5, 1, 0.7)},
        **{f"{name}, linear rate": {**fields, "lr_scaling": "linear"} for name, fields in FIXED.items()},
    }


def rank_main(rank: int, port: int, pipe, size: SimpleNamespace, base: str, jobs: list[tuple], decay: bool) -> None:
    try:
        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        table = methods()
        for name, lr, seed in jobs:
            result = small_gpt.run(rank, 2, size, Path(base), table[name], lr, seed, decay)
            pipe.send(("row", [name, lr, seed, result]))
        pipe.send(("end", None))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    finally:
        os._exit(0)


def measure(size: SimpleNamespace, base: Path, jobs: list[tuple], decay: bool):
    """Yields [method, lr, seed, rank 0's results] of each job."""
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(2):
        mine, theirs = context.Pipe()
        arguments = (rank, store.port, theirs, size, str(base), jobs, decay)
        process = context.Process(target=rank_main, args=arguments, daemon=True)
        process.start()
        pipes.append(mine)
        processes.append(process)
    try:
        while True:
            kind, value = pipes[0].recv()
            if kind == "error":
                raise RuntimeError(value)
            if kind == "end":
                return
            yield value
    finally:
        for process in processes:
            process.kill()
            process.join()


def tuned(rows: list[list], name: str) -> tuple[float, bool, dict[int, dict]]:
    """(best learning rate, whether it is at the edge of the grid, results by seed at that rate)."""
    by_lr: dict[float, dict[int, dict]] = {}
    for n, lr, seed, result in rows:
        if n == name:
            by_lr.setdefault(lr, {})[seed] = result
    most = max(len(results) for results in by_lr.values())
    complete = {lr: results for lr, results in by_lr.items() if len(results) == most}
    lr = min(complete, key=lambda rate: statistics.mean(r["loss"] for r in complete[rate].values()))
    return lr, len(complete) > 1 and lr in (min(complete), max(complete)), complete[lr]


def fixed_loss(table: dict[str, dict[int, dict]], seed: int, megabytes: float) -> float | None:
    """What fixed windows reach for ``megabytes``: between two of them on a line in log bytes; None beyond them."""
    points = sorted(
        (table[name][seed]["megabytes"], table[name][seed]["loss"])
        for name in ("synchronous", *FIXED)
        if seed in table.get(name, {})
    )
    for (low, at_low), (high, at_high) in zip(points, points[1:]):
        if low <= megabytes <= high:
            share = math.log(megabytes / low) / math.log(high / low)
            return at_low + share * (at_high - at_low)
    return None


def mean_and_error(values: list[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def show(rows: list[list], names: list[str]) -> None:
    best = {name: tuned(rows, name) for name in names if any(row[0] == name for row in rows)}
    table = {name: results for name, (_, _, results) in best.items()}
    print("| method | lr | seeds | loss | MB sent | steps a FIRE | against fixed windows of the same bytes |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (lr, edge, results) in best.items():
        loss, error = mean_and_error([r["loss"] for r in results.values()])
        megabytes = statistics.mean(r["megabytes"] for r in results.values())
        fires, holds = (sum(r[key] for r in results.values()) for key in ("fires", "holds"))
        gaps = [
            r["loss"] - at
            for seed, r in results.items()
            if name not in FIXED and (at := fixed_loss(table, seed, r["megabytes"])) is not None
        ]
        against = "{:+.4f} ± {:.4f}".format(*mean_and_error(gaps)) if gaps and name != "synchronous" else ""
        print(
            f"| {name} | {lr:g}{' (edge of the grid)' if edge else ''} | {len(results)} | {loss:.4f} ± {error:.4f} | "
            f"{megabytes:.1f} | {(fires + holds) / max(fires, 1):.2f} | {against} |"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches ablation", description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=[4e-3, 5.6e-3, 8e-3, 1.12e-2])
    parser.add_argument("--methods", nargs="+", default=list(methods()), choices=list(methods()))
    parser.add_argument("--decay", action="store_true", help="lower the learning rate to 0 in a straight line")
    parser.add_argument("--json", type=Path, help="a line a run; runs that stand there already are not repeated")
    options = parser.parse_args(arguments)
    size = SimpleNamespace(width=64, layers=2, length=64, rows=4, base_steps=300, steps=options.steps)
    base = Path("target/small_gpt_ablation.pt")
    small_gpt.pretrained(size, base)
    rows = []
    if options.json and options.json.exists():
        rows = [json.loads(line) for line in options.json.read_text().splitlines()]
    done = {tuple(row[:3]) for row in rows}
    jobs = [(name, lr, seed) for seed in options.seeds for name in options.methods for lr in options.lrs]
    jobs = [job for job in jobs if job not in done]
    for row in tqdm(measure(size, base, jobs, options.decay), total=len(jobs), unit="run"):
        rows.append(row)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
    show(rows, options.methods)


if __name__ == "__main__":
    main()
