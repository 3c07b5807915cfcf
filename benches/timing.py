"""Timing for machines that are shared: contenders take turns, and what counts is the ratio of a turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


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
