"""The operations without PEFT: a layer of one's own over lora_linear, and the gradient statistics of an adapter.

PYTHONPATH=python .venv/bin/python examples/direct_ops.py
"""

import torch
from torch import Tensor, nn

from tsugi_kpool import ops


class Pool(nn.Module):
    """A frozen linear layer with K adapters that are all active."""

    def __init__(self, base: nn.Linear, adapters: int, r: int, alpha: float = 16.0, dropout: float = 0.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.ParameterList(torch.randn(r, base.in_features) * base.in_features**-0.5 for _ in range(adapters))
        self.B = nn.ParameterList(torch.zeros(base.out_features, r) for _ in range(adapters))
        self.scaling, self.dropout = [alpha / r] * adapters, dropout

    def forward(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        rng = ops.draw_rng(x.device) if p else None
        return ops.lora_linear(x, self.base.weight, self.base.bias, list(self.A), list(self.B), self.scaling, p, rng)


def main(steps: int = 20) -> dict[str, float]:
    """Fits a layer to another one, and measures how noisy the gradients of its adapters were on the way."""
    torch.manual_seed(0)
    teacher = nn.Linear(256, 128)
    layer = Pool(nn.Linear(256, 128), adapters=4, r=8, dropout=0.1)
    parameters = [*layer.A, *layer.B]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)

    sums = [torch.zeros_like(p) for p in parameters]  # S, float32
    stats = torch.zeros(8, dtype=torch.float64)
    first = last = 0.0
    for step in range(steps):
        x = torch.randn(64, 256)
        loss = (layer(x) - teacher(x)).square().mean()
        loss.backward()
        ops.sideband_accumulate_(sums, stats, [p.grad for p in parameters])
        optimizer.step()
        optimizer.zero_grad()
        first, last = (loss.item() if step == 0 else first), loss.item()
    # m snapshots, their total variance V and the squared norm P of their mean: S and eight numbers carry it all.
    m, _, _, _, V, P, numel, _ = ops.sideband_stats(sums, stats).tolist()
    print(f"loss {first:.3f} -> {last:.3f}; {m:.0f} snapshots of {numel:.0f} elements, V / P = {V / P:.1f}")
    return {"first": first, "last": last, "m": m, "V": V, "P": P}


if __name__ == "__main__":
    main()
