"""The experts of a mixture with K adapters, forward and backward: torch's frozen grouped products alone, the adapters as
more grouped products in plain torch, and ours.

Every number is a ratio within one run, and every answer is checked before it is timed. One token is a forward pass
without gradients, as decoding takes it; the others are steps.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benches.measure import in_turns, median_ms, print_machine, ratio, write
from tsugi_kpool import ops

#: Largest relative error against float64 that a contender may have and still be timed.
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass
class Adapters:
    """K adapters of one weight [E, O, I] in PEFT's layout: A as [E r, I], B as [O, r E] with the expert running fastest."""

    a: list[Tensor]
    b: list[Tensor]
    experts: int
    scaling: float = 2.0

    @classmethod
    def make(cls, experts: int, inputs: int, outputs: int, r: int, k: int, dtype: torch.dtype) -> Adapters:
        def leaf(*sizes, fan):
            return (torch.randn(*sizes) * fan**-0.5).to(dtype).requires_grad_()

        return cls(
            [leaf(experts * r, inputs, fan=inputs) for _ in range(k)],
            [leaf(outputs, r * experts, fan=r) for _ in range(k)],
            experts,
        )

    def factors(self) -> tuple[list[Tensor], list[Tensor]]:
        a = [t.view(self.experts, -1, t.shape[1]) for t in self.a]
        b = [t.view(t.shape[0], -1, self.experts).permute(2, 0, 1) for t in self.b]
        return a, b

    def ours(self, base: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        return ops.lora_experts(base, x, ends, *self.factors(), [self.scaling] * len(self.a))

    def grouped(self, base: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        """What a careful user writes in plain torch: two more grouped products an adapter, of a copy of B."""
        for a, b in zip(*self.factors()):
            h = F.grouped_mm(x, a.mT, offs=ends)
            base = base + self.scaling * F.grouped_mm(h, b.contiguous().mT, offs=ends)
        return base

    @staticmethod
    def frozen(base: Tensor, _x: Tensor, _ends: Tensor) -> Tensor:
        return base


class Experts:
    """Gated experts with tokens routed at random, ``top_k`` experts a token, sorted by expert."""

    def __init__(self, tokens: int, top_k: int, experts: int, hidden: int, inner: int, r: int, k: int, dtype):
        torch.manual_seed(0)
        chosen = torch.rand(tokens, experts).argsort(dim=1)[:, :top_k].flatten()
        self.ends = chosen.bincount(minlength=experts).cumsum(0).to(torch.int32)
        self.x = torch.randn(tokens * top_k, hidden).to(dtype).requires_grad_()
        self.grad = torch.randn(tokens * top_k, hidden).to(dtype)
        self.gate_up = (torch.randn(experts, 2 * inner, hidden) * hidden**-0.5).to(dtype)
        self.down = (torch.randn(experts, hidden, inner) * inner**-0.5).to(dtype)
        self.up_adapters = Adapters.make(experts, hidden, 2 * inner, r, k, dtype)
        self.down_adapters = Adapters.make(experts, inner, hidden, r, k, dtype)

    def forward(self, how: str) -> Tensor:
        up, down = getattr(self.up_adapters, how), getattr(self.down_adapters, how)
        gate, value = up(F.grouped_mm(self.x, self.gate_up.mT, offs=self.ends), self.x, self.ends).chunk(2, dim=-1)
        inner = F.silu(gate) * value
        return down(F.grouped_mm(inner, self.down.mT, offs=self.ends), inner, self.ends)

    def leaves(self) -> list[Tensor]:
        return [self.x, *(t for side in (self.up_adapters, self.down_adapters) for t in (*side.a, *side.b))]

    def step(self, how: str) -> list[Tensor]:
        """Forward and backward; the output and all gradients."""
        for tensor in self.leaves():
            tensor.grad = None
        y = self.forward(how)
        y.backward(self.grad)
        return [y.detach(), *(t.grad for t in self.leaves() if t.grad is not None)]

    @torch.no_grad()
    def decode(self, how: str) -> Tensor:
        return self.forward(how)

    def exact(self) -> list[Tensor]:
        """Output and gradients in float64, from a merged weight for each expert."""
        leaves = [t.detach().double().requires_grad_() for t in self.leaves()]
        x, *factors = leaves
        count = len(self.up_adapters.a)
        parts = [factors[i : i + count] for i in range(0, 4 * count, count)]
        merged = []
        for weight, a, b in ((self.gate_up, *parts[:2]), (self.down, *parts[2:])):
            a, b = Adapters(a, b, len(weight)).factors()
            merged.append(weight.double() + sum(2.0 * right @ left for left, right in zip(a, b)))
        rows = zip(x.split(self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()), *merged)
        out = []
        for of_expert, gate_up, down in rows:
            gate, value = (of_expert @ gate_up.mT).chunk(2, dim=-1)
            out.append(F.silu(gate) * value @ down.mT)
        y = torch.cat(out)
        y.backward(self.grad.double())
        return [y.detach(), *(t.grad for t in leaves)]

    def check(self, how: str) -> None:
        limit = LIMIT[self.x.dtype]
        for at, (actual, wanted) in enumerate(zip(self.step(how), self.exact(), strict=True)):
            error = float((actual.double() - wanted).norm() / wanted.norm())
            if not error <= limit:
                raise AssertionError(f"{how}: result {at} is off by {error:.1e}, more than {limit:.0e}")


def table(
    tokens: list[int], adapters: list[int], dtypes: list[torch.dtype], inner: int, r: int, seconds: float
) -> list[dict]:
    """Prints a row a cell and returns the rows."""
    sizes = {"top_k": 4, "experts": 16, "hidden": 512, "inner": inner, "r": r}
    print(f"\nexperts, {', '.join(f'{name} {value}' for name, value in sizes.items())}; ratios to the frozen experts")
    print(f"{'dtype':>9} {'tokens':>6} {'K':>2} {'frozen ms':>10} {'grouped':>8} {'ours':>7} {'grouped/ours':>13}")
    rows = []
    for dtype in dtypes:
        for m in tokens:
            for k in adapters:
                layer = Experts(m, k=k, dtype=dtype, **sizes)
                for how in ("grouped", "ours"):
                    layer.check(how)
                run = layer.decode if m == 1 else layer.step
                calls = {how: lambda how=how, run=run: run(how) for how in ("frozen", "grouped", "ours")}
                times = in_turns(calls, seconds, most=400)
                row = {
                    "dtype": str(dtype).removeprefix("torch."),
                    "tokens": m,
                    "K": k,
                    "turns": len(times["ours"]),
                    "frozen_ms": median_ms(times["frozen"]),
                    **{f"{how}_over_frozen": ratio(times[how], times["frozen"]) for how in ("grouped", "ours")},
                    "grouped_over_ours": ratio(times["grouped"], times["ours"]),
                }
                rows.append(row)
                print(
                    f"{row['dtype']:>9} {m:>6} {k:>2} {row['frozen_ms']:>10.2f} {row['grouped_over_frozen']:>8.3f} "
                    f"{row['ours_over_frozen']:>7.3f} {row['grouped_over_ours']:>13.2f}",
                    flush=True,
                )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches experts", description=__doc__)
    integers = {"type": int, "nargs": "+"}
    parser.add_argument("--tokens", **integers, default=[1, 64, 512, 4096], help="(default: 1 64 512 4096)")
    parser.add_argument("--adapters", **integers, default=[1, 2], help="K (default: 1 2)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--inner", type=int, default=256, help="features between gate_up and down (default: 256)")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=6.0, help="time for the turns of one cell")
    parser.add_argument("--json", type=Path, help="write the rows here")
    o = parser.parse_args(arguments)
    print_machine()
    dtypes = [getattr(torch, name) for name in o.dtypes]
    write(o.json, {"experts": table(o.tokens, o.adapters, dtypes, o.inner, o.r, o.seconds)})
