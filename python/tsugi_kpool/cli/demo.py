"""``python -m tsugi_kpool demo``: fine-tunes a model on PEFT's backend and on this one, from the same seed, and compares.

The two runs share the frozen weights (race.py). A pool of adapters on several plays follows (pool_run.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .. import ops
from .._version import __version__
from ..backend import BackendReport, use_backend
from . import doctor
from .common import DemoError, first_line
from .machine import machine
from .pictures import draw, draw_pool
from .pool_run import PoolRun, print_pool, run_pool
from .race import (
    PEFT,
    TOLERANCE,
    TSUGI,
    UNTIMED_STEPS,
    Curve,
    build,
    comparable,
    distance,
    ratio,
    save_and_reload,
    take_turns,
)
from .workload import DTYPES, Data, load


def main(options: argparse.Namespace) -> int:
    try:
        return demo(options)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


# ---- the story -------------------------------------------------------------------------------------------------------


def demo(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    print(f"tsugi-kpool {__version__}, PEFT's backend against this one", flush=True)
    check(options)
    print(f"on {machine(options.device)}", flush=True)

    base, plays, titles = load(options.model, options.text, options.device, options.dtype)
    tokens = plays[titles[1]] if titles[1] in plays else torch.cat(list(plays.values()))
    data = Data(tokens, batch=options.batch, length=options.length, seed=options.seed)
    contenders = build(base, options)
    report = use_backend(contenders[1].model)
    print(report)
    if not report.accelerated:
        raise DemoError("no LoRA layer of this model can be accelerated; the table above says why.")

    print(f"\n{options.steps} steps with K={options.active} of N={options.adapters} adapters active, in turns, {data}")
    races = {options.active: take_turns(contenders, data, options, options.active, options.steps)}
    same_logits = save_and_reload(base, contenders[1].model, data, options)
    for k in sorted(set(options.also) - {options.active}):
        races[k] = take_turns(contenders, data, options, k, options.short_steps)
    races = dict(sorted(races.items()))

    print_table(races)
    failures = verdicts(races, same_logits, options)
    if len(plays) == 1:
        plays = {f"part {i + 1}": part for i, part in enumerate(tokens.tensor_split(4))}
    print(
        f"\n{options.pool_steps} steps of a pool with K={options.pool_active} of N={options.pool_adapters} adapters active, "
        f"{options.routing}, on {', '.join(plays)}"
    )
    pool = run_pool(base, plays, options)
    print_pool(pool)
    failures += pool_verdicts(pool, options)
    results = summary(races, same_logits, report, options, titles)
    results["pool"] = vars(pool)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(races, results, options)
    draw_pool(pool, titles[0], options)
    print(
        f"\nWritten to {options.out}: demo.png, pool.png, results.json, adapters/ ({options.adapters} ordinary PEFT "
        "adapters), exported/ (the pool as one ordinary adapter)"
    )
    print(
        f"The whole demo took {time.perf_counter() - started:.0f} s. In your own script, after get_peft_model, add:\n"
    )
    print("    import tsugi_kpool; tsugi_kpool.use_backend(model)\n")
    for failure in failures:
        print(f"demo: {failure}", file=sys.stderr)
    return 1 if failures else 0


def check(options: argparse.Namespace) -> None:
    """Refuse wrong options before anything is loaded."""
    if not ops.available():
        raise DemoError(ops.unavailable_reason)
    for k in (options.active, *options.also):
        if not 1 <= k <= options.adapters:
            raise DemoError(f"K={k} adapters cannot be active in a model with N={options.adapters} (--adapters).")
    if options.pool_active > options.pool_adapters:
        raise DemoError(
            f"K={options.pool_active} adapters cannot be active in a pool of N={options.pool_adapters} (--pool-adapters)."
        )
    if not importlib.util.find_spec("transformers"):
        raise DemoError("the demo needs transformers: pip install 'tsugi-kpool[demo]'.")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise DemoError(f"--device {options.device} cannot be used: {first_line(error)}") from error
    if why := doctor.why_not(options.device, DTYPES[options.dtype], torch.float32):
        raise DemoError(
            f"--device {options.device} with --dtype {options.dtype} is not accelerated by this build: {why}."
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {options.out} cannot be written: {error.strerror}.") from error


# ---- what came out ---------------------------------------------------------------------------------------------------


def print_table(races: dict[int, dict[str, Curve]]) -> None:
    print(f"\n{'':10}{'steps':>6}  {'held-out loss, before -> after':^40}  {'largest':>10}  {'seconds a step':^20}")
    print(f"{'':10}{'':6}  {PEFT:^19}  {TSUGI:^19}  {'difference':>10}  {PEFT:>8} {TSUGI:>12}  {'ratio':>6}")
    for k, race in races.items():
        ends = [f"{race[name].ends[0]:.4f} -> {race[name].ends[1]:.4f}" for name in (PEFT, TSUGI)]
        times = f"{race[PEFT].step_time:8.3f} {race[TSUGI].step_time:12.3f}"
        print(
            f"K={k:<8}{len(race[PEFT].loss):>6}  {ends[0]:^19}  {ends[1]:^19}  {distance(race):>10.1e}  "
            f"{times}  {ratio(race):>5.2f}x"
        )
    print(
        f"Seconds a step are medians, the ratio is that of each pair of steps; the first {UNTIMED_STEPS} of each run are "
        "not counted."
    )


def verdicts(races: dict[int, dict[str, Curve]], same_logits: bool, options: argparse.Namespace) -> list[str]:
    """One sentence for each check that failed, and a line for each that held."""
    failures = []
    for k, race in races.items():
        for name, curve in race.items():
            before, after = curve.ends
            if not after < before:
                failures.append(
                    f"held-out loss did not fall on {name}'s backend at K={k}: {before:.4f} to {after:.4f}."
                )
    if not failures:
        print("\n[ok] held-out loss fell in every run")
    worst = max(distance(race) for race in races.values())
    if not comparable(options):
        why = "dropout draws other masks" if options.dropout else f"{options.dtype} rounds each sum"
        print(f"[--] the two runs differ by at most {worst:.1e}; not checked, since {why}")
    elif worst <= TOLERANCE:
        print(f"[ok] the two runs agree: every loss within {worst:.1e} (allowed: {TOLERANCE:g})")
    else:
        failures.append(f"the two runs differ by {worst:.1e} in a loss, more than {TOLERANCE:g}.")
    if same_logits:
        print("[ok] adapters saved and loaded again give the same logits, bit for bit")
    else:
        failures.append("the adapters that were saved and loaded again give other logits.")
    return failures


def pool_verdicts(pool: PoolRun, options: argparse.Namespace) -> list[str]:
    """The same for the pool."""
    failures = []
    before, after = pool.ends
    if after < before:
        print(f"[ok] the whole pool's held-out loss fell, over all texts: {before:.4f} to {after:.4f}")
    else:
        failures.append(f"the pool's held-out loss did not fall: {before:.4f} to {after:.4f}.")
    if options.dtype != "float32":
        print(
            f"[--] PEFT's logits of the export differ by {pool.concat_difference:.1e}; not checked in {options.dtype}"
        )
    elif pool.concat_difference <= TOLERANCE:
        print(f"[ok] PEFT computes the pool from its export: logits within {pool.concat_difference:.1e}")
    else:
        failures.append(
            f"PEFT's logits of the exported pool differ by {pool.concat_difference:.1e}, more than {TOLERANCE:g}."
        )
    print(f"     compressed to rank {options.r} by SVD it would keep {pool.svd_energy:.1%} of its energy")
    return failures


def summary(
    races: dict[int, dict[str, Curve]],
    same_logits: bool,
    report: BackendReport,
    options: argparse.Namespace,
    titles: tuple[str, str],
) -> dict[str, Any]:
    """The content of results.json."""
    settings = {key: value for key, value in vars(options).items() if key not in ("run", "command")}
    return {
        "version": __version__,
        "torch": torch.__version__,
        "machine": machine(options.device),
        "model": titles[0],
        "text": titles[1],
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
        "layers_accelerated": len(report.accelerated),
        "layers": len(report.layers),
        "calls_by_tsugi": report.fast_calls,
        "calls_by_peft": report.fallback_calls,
        "reloaded_logits_identical": same_logits,
        "runs": {
            f"K={k}": {
                "ratio": ratio(race),
                "largest_difference": distance(race),
                **{
                    name: {
                        "seconds_a_step": curve.step_time,
                        "held_out": curve.held_out,
                        "loss": curve.loss,
                        "seconds": curve.seconds,
                    }
                    for name, curve in race.items()
                },
            }
            for k, race in races.items()
        },
    }
