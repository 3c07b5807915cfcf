"""``python -m benches.ablation``: the relative trigger against a fixed window, in the same machinery.

Two ranks on this machine; what counts is loss at equal tokens against bytes sent, so the link does not matter. Every
method has its learning rate tuned over the same grid, by mean held-out loss over the seeds; the best rate's loss is
printed with its standard error. The sign of a difference smaller than two standard errors is not known.
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

from benches import small_gpt
from benches.small_gpt import every


def methods() -> dict[str, dict]:
    table = {"synchronous": {"aggregation_mode": "synchronous"}}
    table |= {f"every {steps}": every(steps) for steps in (2, 3, 4, 8)}
    return table | {
        f"relative {theta:g}": {"trigger": "relative", "relative_theta": theta} for theta in (3.0, 1.5, 1.0, 0.7)
    }


def rank_main(rank: int, port: int, pipe, size: SimpleNamespace, base: str, jobs: list[tuple]) -> None:
    try:
        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        table = methods()
        for name, lr, seed in jobs:
            pipe.send(("row", (name, lr, seed, small_gpt.run(rank, 2, size, Path(base), table[name], lr, seed))))
        pipe.send(("end", None))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    finally:
        os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.ablation", description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--methods", nargs="+", default=list(methods()), choices=list(methods()))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    size = SimpleNamespace(width=64, layers=2, length=64, rows=4, base_steps=300, steps=options.steps)
    base = Path("target/small_gpt_ablation.pt")
    small_gpt.pretrained(size, base)
    jobs = [(name, lr, seed) for name in options.methods for lr in options.lrs for seed in options.seeds]
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(2):
        mine, theirs = context.Pipe()
        process = context.Process(target=rank_main, args=(rank, store.port, theirs, size, str(base), jobs), daemon=True)
        process.start()
        pipes.append(mine)
        processes.append(process)
    rows = []
    try:
        while True:
            kind, value = pipes[0].recv()
            if kind == "error":
                raise RuntimeError(value)
            if kind == "end":
                break
            rows.append(value)
    finally:
        for process in processes:
            process.kill()
            process.join()

    print("| method | lr | loss | standard error | MB sent | steps a FIRE |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in options.methods:
        by_lr = {}
        for n, lr, _, result in rows:
            if n == name:
                by_lr.setdefault(lr, []).append(result)
        lr, best = min(by_lr.items(), key=lambda item: statistics.mean(r["loss"] for r in item[1]))
        losses = [r["loss"] for r in best]
        error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
        fires, holds = (sum(r[key] for r in best) for key in ("fires", "holds"))
        edge = " (edge of the grid)" if len(by_lr) > 1 and lr in (min(by_lr), max(by_lr)) else ""
        print(
            f"| {name} | {lr:g}{edge} | {statistics.mean(losses):.4f} | {error:.4f} | "
            f"{statistics.mean(r['megabytes'] for r in best):.1f} | {(fires + holds) / max(fires, 1):.2f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
