"""The gradient buffer: accumulate and measure in one pass, against a buffer that re-stacks its window every step."""

from __future__ import annotations

import argparse
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from benches.measure import in_turns, median_ms, print_machine, ratio, write
from tsugi_kpool import ops


class RestackingBuffer:
    """The plain way: keep the snapshots, stack them, take the variance over the window."""

    def __init__(self, window: int) -> None:
        self.snapshots: deque[Tensor] = deque(maxlen=window)

    def step(self, grad: Tensor) -> Tensor:
        self.snapshots.append(grad.detach().clone())
        return torch.stack(list(self.snapshots)).var(dim=0, correction=min(1, len(self.snapshots) - 1)).mean()


def table(numel: int, window: int, seconds: float) -> dict:
    torch.manual_seed(0)
    grads = [torch.randn(numel) * 1e-3 + 1e-3 for _ in range(window)]
    sums, stats = [torch.zeros(numel)], torch.zeros(8, dtype=torch.float64)
    plain = RestackingBuffer(window)
    for grad in grads:
        expected = plain.step(grad)
        ops.sideband_accumulate_(sums, stats, [grad])
    measured = ops.sideband_stats(sums, stats)[4] / numel
    error = float(abs(measured - expected.double()) / expected)
    ring = torch.stack(grads)
    error = max(error, float(abs(ops.buffer_variance(ring, window) - expected.double()) / expected))
    if not error < 1e-4:
        raise AssertionError(f"the variance is off by {error:.1e}")

    def accumulate() -> None:
        ops.sideband_accumulate_(sums, stats, [grads[0]])
        ops.sideband_stats(sums, stats)

    foreach_q = torch.zeros((), dtype=torch.float64)

    def foreach() -> None:
        torch._foreach_add_(sums, [grads[0]])
        foreach_q.add_(torch._foreach_norm([grads[0]])[0].double() ** 2)
        torch._foreach_norm(sums)

    contenders = {
        "re-stacked": lambda: plain.step(grads[0]),
        "foreach": foreach,
        "ring": lambda: ops.buffer_variance(ring, window),
        "ours": accumulate,
    }
    times = in_turns(contenders, seconds, most=2000)
    row = {
        "numel": numel,
        "window": window,
        "ours_ms": median_ms(times["ours"]),
        "restacked_over_ours": ratio(times["re-stacked"], times["ours"]),
        "foreach_over_ours": ratio(times["foreach"], times["ours"]),
        "restacked_over_ring": ratio(times["re-stacked"], times["ring"]),
    }
    print(
        f"\nelastic buffer, {numel:,} elements, window {window}: a push and its variance take {row['ours_ms']:.3f} ms; "
        f"re-stacking takes {row['restacked_over_ours']:.0f} times that, a torch._foreach chain (without the check for "
        f"NaN) {row['foreach_over_ours']:.1f} times; over a ring, buffer_variance is {row['restacked_over_ring']:.0f} "
        "times faster than re-stacking"
    )
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches buffer", description=__doc__)
    parser.add_argument("--numel", type=int, default=1_000_000, help="elements of one adapter")
    parser.add_argument("--window", type=int, default=32, help="gradients in the buffer")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for the turns")
    parser.add_argument("--json", type=Path, help="write the row here")
    o = parser.parse_args(arguments)
    print_machine()
    write(o.json, {"buffer": table(o.numel, o.window, o.seconds)})
