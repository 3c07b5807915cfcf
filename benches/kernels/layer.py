"""One linear layer with K adapters, forward and backward: PEFT, eager torch with the adapters stacked, and ours.

Every number is a ratio within one run, and every answer is checked before it is timed.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from benches.measure import in_turns, median_ms, print_machine, ratio, write
from tsugi_kpool import ops

#: Largest relative error against float64 that a contender may have and still be timed.
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass
class Layer:
    """A PEFT layer with K active adapters of x's dtype, and the tensors it is made of."""

    peft: nn.Module
    frozen: nn.Linear
    A: list[nn.Parameter]
    B: list[nn.Parameter]
    scaling: list[float]
    x: Tensor
    grad: Tensor

    @classmethod
    def make(cls, tokens: int, features: int, r: int, k: int, dtype: torch.dtype, dropout_p: float = 0.0) -> Layer:
        torch.manual_seed(0)
        base = nn.Linear(features, features, bias=False)
        config = peft.LoraConfig(r=r, target_modules=["0"], init_lora_weights=False, lora_dropout=dropout_p)
        model = peft.get_peft_model(nn.Sequential(base), config, adapter_name="0")
        for name in range(1, k):
            model.add_adapter(str(name), config)
        model.to(dtype)
        names = [str(name) for name in range(k)]
        model.base_model.set_adapter(names)
        layer = model.base_model.model[0]
        return cls(
            peft=layer,
            frozen=layer.base_layer,
            A=[layer.lora_A[name].weight for name in names],
            B=[layer.lora_B[name].weight for name in names],
            scaling=[layer.scaling[name] for name in names],
            x=torch.randn(tokens, features, dtype=dtype, requires_grad=True),
            grad=torch.randn(tokens, features, dtype=dtype),
        )

    def ours(self, x: Tensor) -> Tensor:
        return ops.lora_linear(x, self.frozen.weight, None, self.A, self.B, self.scaling)

    def ours_dropout(self, x: Tensor) -> Tensor:
        p = self.peft.lora_dropout["0"].p
        return ops.lora_linear(x, self.frozen.weight, None, self.A, self.B, self.scaling, p, ops.draw_rng())

    def stacked(self, x: Tensor) -> Tensor:
        """What a careful user writes in eager torch: the adapters side by side."""
        scale = torch.cat([b * s for b, s in zip(self.B, self.scaling)], dim=1)
        return self.frozen(x) + (x @ torch.cat(self.A).t()) @ scale.t()

    def step(self, forward) -> list[Tensor]:
        """Forward and backward; the output and all gradients."""
        tensors = [self.x, *self.A, *self.B]
        for tensor in tensors:
            tensor.grad = None
        y = forward(self.x)
        y.backward(self.grad)
        return [y.detach(), *(t.grad for t in tensors if t.grad is not None)]

    def saved_bytes(self, forward) -> int:
        """Bytes kept for the backward pass beside x and the parameters."""
        known = {t.untyped_storage().data_ptr() for t in (self.x, self.frozen.weight, *self.A, *self.B)}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            forward(self.x)
        return sum(kept.values())

    def check(self, forward, name: str) -> None:
        """Against float64 on a few rows of the same values; adapters' gradients against their formulas."""
        with torch.no_grad():
            rows = self.x[: min(len(self.x), 16)].double()
            expected = rows @ self.frozen.weight.double().t()
            for a, b, s in zip(self.A, self.B, self.scaling):
                expected += s * (rows @ a.double().t()) @ b.double().t()
            h = self.x.double() @ self.A[0].double().t()
            db = self.scaling[0] * self.grad.double().t() @ h
        y, dx, *rest = self.step(forward)
        limit = LIMIT[self.x.dtype]
        for label, actual, want in (("output", y[: len(rows)], expected), ("gradient of B[0]", rest[len(self.A)], db)):
            error = float((actual.double() - want).norm() / want.norm())
            if not error <= limit:
                raise AssertionError(f"{name}: {label} is off by {error:.1e}, more than {limit:.0e}")


def table(
    tokens: list[int],
    adapters: list[int],
    dtypes: list[torch.dtype],
    features: int,
    r: int,
    seconds: float,
    patience: float,
) -> list[dict]:
    """Prints a row a cell and returns the rows. A call that would take longer than ``patience`` is left out, and said."""
    warnings.filterwarnings("ignore", message=".*adapter.*")
    rows = []
    print(
        f"\nlinear {features} x {features}, r = {r}, forward + backward; ratios to the frozen layer, medians of turns"
    )
    print(
        f"{'dtype':>9} {'M':>5} {'K':>2} {'frozen ms':>10} {'PEFT':>7} {'stacked':>8} {'ours':>7} {'PEFT/ours':>10}   saved MB PEFT | ours"
    )
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        per_token = None
        for m in tokens:
            if per_token is not None and per_token * m > patience:
                print(
                    f"{name:>9} {m:>5}  left out: one call of torch's {name} layer would take {per_token * m:.0f} s here (--patience)"
                )
                continue
            for k in adapters:
                layer = Layer.make(m, features, r, k, dtype)
                calls = {
                    "frozen": lambda: layer.step(layer.frozen),
                    "peft": lambda: layer.step(layer.peft),
                    "stacked": lambda: layer.step(layer.stacked),
                    "ours": lambda: layer.step(layer.ours),
                }
                layer.check(layer.ours, "ours")
                begin = time.perf_counter()
                calls["frozen"]()
                slow = time.perf_counter() - begin
                per_token = slow / m if m >= 64 else None
                if slow > 1.0:
                    times = {label: [_once(call)] for label, call in calls.items()}
                else:
                    layer.check(layer.peft, "PEFT")
                    layer.check(layer.stacked, "stacked")
                    times = in_turns(calls, seconds)
                row = {
                    "dtype": name,
                    "M": m,
                    "K": k,
                    "turns": len(times["ours"]),
                    "frozen_ms": median_ms(times["frozen"]),
                    **{f"{c}_over_frozen": ratio(times[c], times["frozen"]) for c in ("peft", "stacked", "ours")},
                    "peft_over_ours": ratio(times["peft"], times["ours"]),
                    "saved_mb_peft": layer.saved_bytes(layer.peft) / 1e6,
                    "saved_mb_ours": layer.saved_bytes(layer.ours) / 1e6,
                }
                rows.append(row)
                print(
                    f"{name:>9} {m:>5} {k:>2} {row['frozen_ms']:>10.2f} {row['peft_over_frozen']:>7.3f} "
                    f"{row['stacked_over_frozen']:>8.3f} {row['ours_over_frozen']:>7.3f} {row['peft_over_ours']:>10.2f}   "
                    f"{row['saved_mb_peft']:>13.2f} | {row['saved_mb_ours']:.2f}",
                    flush=True,
                )
    return rows


def dropout_table(tokens: int, adapters: list[int], features: int, r: int, seconds: float) -> list[dict]:
    """Dropout 0.1 in float32: PEFT's masked copies against masks drawn while X is read."""
    print(f"\nthe same with dropout 0.1, float32, M = {tokens}")
    rows = []
    for k in adapters:
        layer = Layer.make(tokens, features, r, k, torch.float32, dropout_p=0.1)
        layer.peft.train()
        contenders = {
            "frozen": lambda: layer.step(layer.frozen),
            "peft": lambda: layer.step(layer.peft),
            "ours": lambda: layer.step(layer.ours_dropout),
        }
        times = in_turns(contenders, seconds)
        row = {
            "K": k,
            "peft_over_frozen": ratio(times["peft"], times["frozen"]),
            "ours_over_frozen": ratio(times["ours"], times["frozen"]),
            "peft_over_ours": ratio(times["peft"], times["ours"]),
            "saved_mb_peft": layer.saved_bytes(layer.peft) / 1e6,
            "saved_mb_ours": layer.saved_bytes(layer.ours_dropout) / 1e6,
        }
        rows.append(row)
        print(
            f"K = {k}: PEFT {row['peft_over_frozen']:.3f}, ours {row['ours_over_frozen']:.3f} of frozen, "
            f"PEFT/ours {row['peft_over_ours']:.2f}; saved MB {row['saved_mb_peft']:.2f} | {row['saved_mb_ours']:.2f}",
            flush=True,
        )
    return rows


def _once(call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches layer", description=__doc__)
    integers = {"type": int, "nargs": "+"}
    parser.add_argument("--tokens", **integers, default=[1, 64, 1024, 8192], help="M (default: 1 64 1024 8192)")
    parser.add_argument("--adapters", **integers, default=[1, 2, 4, 8], help="K (default: 1 2 4 8)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=6.0, help="time for the turns of one cell")
    parser.add_argument(
        "--patience", type=float, default=10.0, help="longest single call in seconds that is still measured"
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    o = parser.parse_args(arguments)
    print_machine()
    dtypes = [getattr(torch, name) for name in o.dtypes]
    rows = table(o.tokens, o.adapters, dtypes, o.features, o.r, o.seconds, o.patience)
    middle = min(o.tokens, key=lambda m: abs(m - 1024))
    write(o.json, {"layer": rows, "dropout": dropout_table(middle, o.adapters, o.features, o.r, o.seconds)})
