"""Measuring on machines that are shared: contenders take turns, what counts is the ratio of a turn, results name the machine."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch

from tsugi_kpool import _native
from tsugi_kpool.cli.machine import processor


def in_turns(contenders: dict[str, Callable[[], object]], seconds: float, most: int = 50) -> dict[str, list[float]]:
    """Seconds of each call, A B C A B C ..., after one warm-up each, until ``seconds`` have passed (three turns at least)."""
    for call in contenders.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for turn in range(most):
        if turn >= 3 and time.perf_counter() - start > seconds:
            break
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return times


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the turns' ratios: a slow spell of the machine touches both sides of a turn."""
    return statistics.median(a / b for a, b in zip(numerator, denominator))


def median_ms(times: list[float]) -> float:
    return statistics.median(times) * 1e3


def machine() -> dict[str, Any]:
    """What the numbers were measured on: the processor as the system names it, and the versions that matter."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        **{key: str(value) for key, value in _native.build_info().items()},
    }


def print_machine() -> None:
    print(", ".join(f"{key} {value}" for key, value in machine().items()))


def write(path: Path | None, results: dict[str, Any]) -> None:
    """The results and the machine as JSON; nothing where ``path`` is None."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    print(f"written to {path}")
