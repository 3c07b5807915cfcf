"""What a pool costs as N grows, K fixed: a step's time, the choice and activation alone, and memory.

Both pools take turns in one run. The optimizer is timed too: torch's own loop over parameters without a gradient is the
one part of a step that grows with N.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import peft
import torch
from torch import nn

from benches.measure import in_turns, median_ms, print_machine, ratio, write
from tsugi_kpool import KPoolLoraConfig, attach


class Stack(nn.Module):
    def __init__(self, features: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(features, features) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Contender:
    """A model with a pool of n adapters, and its training step."""

    def __init__(self, n: int, k: int, features: int, depth: int, tokens: int, r: int):
        torch.manual_seed(0)
        config = KPoolLoraConfig(r=r, n_adapters=n, k_active=k, target_modules=r"layers\.\d+")
        self.model = peft.get_peft_model(Stack(features, depth), config)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
        self.pool = attach(self.model, optimizer=self.optimizer)
        self.x = torch.randn(tokens, features)

    def activate(self) -> None:
        """A step of the pool with nothing in it, a hundred times."""
        for _ in range(100):
            with self.pool.step():
                pass

    def backward(self) -> None:
        with self.pool.step():
            self.model(self.x).square().mean().backward()
        for i in self.pool.active:
            for parameter in self.pool.adapter_params[i]:
                parameter.grad = None

    def step(self) -> None:
        with self.pool.step():
            self.model(self.x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check(self) -> None:
        """K adapters have a gradient after a step, and no other has."""
        with self.pool.step() as active:
            self.model(self.x).square().mean().backward()
        having = {i for i, own in self.pool.adapter_params.items() if any(p.grad is not None for p in own)}
        if having != set(active):
            raise AssertionError(f"adapters {sorted(having)} have gradients, {active} are active")
        self.optimizer.zero_grad()

    def megabytes(self) -> float:
        return sum(p.numel() * p.element_size() for p in self.model.parameters()) / 1e6


def table(seconds: float, few: int = 8, many: int = 128, k: int = 2) -> dict:
    """Prints and returns medians of N = few, and the ratios of N = many to it."""
    sizes = dict(k=k, features=1024, depth=8, tokens=256, r=8)
    pools = {n: Contender(n, **sizes) for n in (few, many)}
    print(f"\npool, K = {k}, {sizes['depth']} layers 1024 x 1024, r = {sizes['r']}, M = {sizes['tokens']}, float32")
    result: dict = {"K": k, "few": few, "many": many}
    for pool in pools.values():
        pool.check()
    what = (
        ("forward_backward", "forward + backward", 1),
        ("step", "the same + AdamW + zero_grad", 1),
        ("activate", "choice and activation alone", 100),
    )
    for call, label, repeats in what:
        method = {"forward_backward": "backward"}.get(call, call)
        times = in_turns({str(n): getattr(pool, method) for n, pool in pools.items()}, seconds)
        result[f"{call}_ms"] = median_ms(times[str(few)]) / repeats
        result[f"{call}_ratio"] = ratio(times[str(many)], times[str(few)])
        print(
            f"{label:>30}: N = {few} {result[f'{call}_ms']:.3f} ms, N = {many} / N = {few} {result[f'{call}_ratio']:.3f}",
            flush=True,
        )
    result["parameter_mb"] = {n: pool.megabytes() for n, pool in pools.items()}
    sizes_mb = ", ".join(f"N = {n} {mb:.1f}" for n, mb in result["parameter_mb"].items())
    print(f"{'parameters, MB':>30}: {sizes_mb}")
    for pool in pools.values():
        pool.pool.close()
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches pool", description=__doc__)
    parser.add_argument("--few", type=int, default=8, help="adapters in the small pool")
    parser.add_argument("--many", type=int, default=128, help="adapters in the large pool")
    parser.add_argument("--active", type=int, default=2, help="K of both")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for the turns of one row")
    parser.add_argument("--json", type=Path, help="write the rows here")
    o = parser.parse_args(arguments)
    print_machine()
    # One row leaves out the optimizer, another the passes: steps that are lost here on purpose.
    warnings.filterwarnings("ignore", message="pool.step: ")
    write(o.json, {"pool": table(o.seconds, o.few, o.many, o.active)})
