"""One linear layer with DoRA: PEFT, ours, our plain LoRA and the frozen layer alone.

Every number is a ratio within one run, and every answer is checked before it is timed. One token is a forward pass
without gradients, as decoding takes it; the others are steps, each with factors that an optimizer has changed.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from benches.measure import in_turns, median_ms, print_machine, ratio, write
from tsugi_kpool import use_backend

#: Largest relative error against PEFT in float64 that a contender may have and still be timed.
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Layers:
    """The same frozen weight with nothing, with LoRA on ours, with DoRA on PEFT's and on ours."""

    def __init__(self, tokens: int, features: int, r: int, dtype: torch.dtype, p: float):
        torch.manual_seed(0)
        base = nn.Linear(features, features).to(dtype).requires_grad_(False)
        self.x = torch.randn(tokens, features).to(dtype).requires_grad_()
        self.grad = torch.randn(tokens, features).to(dtype)
        self.models: dict[str, nn.Module] = {"frozen": base}
        for name, use_dora in (("lora", False), ("ours", True), ("peft", True)):
            torch.manual_seed(1)
            config = peft.LoraConfig(
                r=r, target_modules=["0"], init_lora_weights=False, use_dora=use_dora, lora_dropout=p
            )
            self.models[name] = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).train()
            if name != "peft":
                use_backend(self.models[name], "tsugi")

    def step(self, name: str) -> dict[str, Tensor]:
        """Forward and backward; the output and all gradients."""
        model = self.models[name]
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.graph.increment_version(trained)
        model.zero_grad()
        self.x.grad = None
        torch.manual_seed(2)
        y = model(self.x)
        y.backward(self.grad)
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        return {"output": y.detach(), "x": self.x.grad, **gradients}

    @torch.no_grad()
    def decode(self, name: str) -> Tensor:
        return self.models[name](self.x)

    def check(self) -> None:
        model = copy.deepcopy(self.models["peft"]).double()
        x = self.x.detach().double().requires_grad_()
        torch.manual_seed(2)
        y = model(x)
        y.backward(self.grad.double())
        wanted = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        wanted |= {"output": y.detach(), "x": x.grad}
        for name in ("peft", "ours"):
            for key, value in self.step(name).items():
                error = float((value.double() - wanted[key]).norm() / wanted[key].norm())
                if not error <= LIMIT[value.dtype]:
                    raise AssertionError(f"{name}: {key} is off by {error:.1e}, more than {LIMIT[value.dtype]:.0e}")


def table(
    tokens: list[int], dtypes: list[torch.dtype], rates: list[float], features: int, r: int, seconds: float
) -> list[dict]:
    """Prints a row a cell and returns the rows."""
    warnings.filterwarnings("ignore", message=".*adapter.*")
    print(f"\nDoRA on a linear layer {features} x {features}, r = {r}; medians of the turns' ratios")
    print(
        f"{'dtype':>9} {'M':>5} {'p':>4} {'frozen ms':>10} {'PEFT/ours':>10} {'ours/frozen':>12} {'ours/our LoRA':>14}"
    )
    rows = []
    for dtype in dtypes:
        for p in rates:
            for m in tokens:
                layers = Layers(m, features, r, dtype, p)
                layers.check()
                for model in layers.models.values():
                    model.train(m > 1)
                run = layers.decode if m == 1 else layers.step
                calls = {name: lambda name=name, run=run: run(name) for name in layers.models}
                times = in_turns(calls, seconds, most=400)
                row = {
                    "dtype": str(dtype).removeprefix("torch."),
                    "M": m,
                    "p": p,
                    "turns": len(times["ours"]),
                    "frozen_ms": median_ms(times["frozen"]),
                    "peft_over_ours": ratio(times["peft"], times["ours"]),
                    "ours_over_frozen": ratio(times["ours"], times["frozen"]),
                    "ours_over_lora": ratio(times["ours"], times["lora"]),
                }
                rows.append(row)
                print(
                    f"{row['dtype']:>9} {m:>5} {p:>4} {row['frozen_ms']:>10.2f} {row['peft_over_ours']:>10.2f} "
                    f"{row['ours_over_frozen']:>12.3f} {row['ours_over_lora']:>14.3f}",
                    flush=True,
                )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches dora", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 1024], help="M (default: 1 64 1024)")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1], help="p (default: 0 0.1)")
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=6.0, help="time for the turns of one cell")
    parser.add_argument("--json", type=Path, help="write the rows here")
    o = parser.parse_args(arguments)
    print_machine()
    dtypes = [getattr(torch, name) for name in o.dtypes]
    write(o.json, {"dora": table(o.tokens, dtypes, o.dropout, o.features, o.r, o.seconds)})
