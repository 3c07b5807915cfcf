"""Everything that a CUDA device can say of this build, in one call of a few minutes.

Correctness first (tests/cuda_checks.py), then compute-sanitizer on small shapes where it is installed, then speed: the
Llama-3-8B layer with K adapters against PEFT, compiled PEFT, a hand-written in-place layer and the frozen layer; gradient
accumulation against a ``torch._foreach`` chain; the variance of a ring against a copy. Writes one JSON file and, where
matplotlib is there, one PNG under benches/results/, with the device's name, clocks and its copy and matrix-product ceilings measured in the same run.

Needs Python, torch and this package alone. ``--device cpu --tiny`` runs the whole of it on small shapes without a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from tsugi_kpool import _native, ops

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

#: Llama-3-8B: name, in-features, out-features, how many of it a layer has.
LLAMA = [("q,o", 4096, 4096, 2), ("k,v", 4096, 1024, 2), ("gate,up", 4096, 14336, 2), ("down", 14336, 4096, 1)]
TINY = [("q,o", 64, 64, 2), ("k,v", 64, 16, 2), ("gate,up", 64, 224, 2), ("down", 224, 64, 1)]
R = 16


class Clock:
    """Times calls on the device with events, its cache flushed before each; on the CPU with the host's clock."""

    def __init__(self, device: str, repeats: int):
        self.device, self.repeats = torch.device(device), repeats
        self.cuda = self.device.type == "cuda"
        self.flush = torch.empty(2**28 if self.cuda else 1, dtype=torch.uint8, device=device)

    def once(self, call: Callable[[], object]) -> float:
        self.flush.zero_()
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def in_turns(self, contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each; they take turns, so a change of clocks meets them all."""
        for call in contenders.values():
            for _ in range(3 if self.cuda else 1):
                call()
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(self.repeats):
            for name, call in contenders.items():
                times[name].append(self.once(call))
        return {name: statistics.median(values) for name, values in times.items()}


class InPlace(torch.autograd.Function):
    """The adapters stacked, every product accumulating in place: the best that eager torch does without a kernel of its own."""

    @staticmethod
    def forward(ctx, x, weight, a, b):
        h = x @ a.t()
        y = torch.mm(x, weight.t())
        y.addmm_(h, b.t())
        ctx.save_for_backward(x, weight, a, b, h)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b, h = ctx.saved_tensors
        dh = dy @ b
        dx = torch.mm(dy, weight)
        dx.addmm_(dh, a)
        return dx, None, dh.t() @ x, dy.t() @ h


class Layer:
    def __init__(self, tokens: int, inputs: int, outputs: int, k: int, p: float, dtype: torch.dtype, device: str):
        torch.manual_seed(0)
        base = nn.Linear(inputs, outputs, bias=False)
        config = peft.LoraConfig(r=R, target_modules=["0"], init_lora_weights=False, lora_dropout=p)
        model = peft.get_peft_model(nn.Sequential(base), config, adapter_name="0")
        for name in range(1, k):
            model.add_adapter(str(name), config)
        names = [str(name) for name in range(k)]
        model.base_model.set_adapter(names)
        model.to(device, dtype).train()
        self.peft = model.base_model.model[0]
        self.p = p
        self.frozen = self.peft.base_layer
        self.A = [self.peft.lora_A[name].weight for name in names]
        self.B = [self.peft.lora_B[name].weight for name in names]
        self.scaling = [self.peft.scaling[name] for name in names]
        self.x = torch.randn(tokens, inputs, device=device, dtype=dtype, requires_grad=True)
        self.dy = torch.randn(tokens, outputs, device=device, dtype=dtype)

    def ours(self, x: Tensor) -> Tensor:
        rng = ops.draw_rng(x.device) if self.p else None
        return ops.lora_linear(x, self.frozen.weight, None, self.A, self.B, self.scaling, self.p, rng)

    def in_place(self, x: Tensor) -> Tensor:
        b = torch.cat([b * s for b, s in zip(self.B, self.scaling)], dim=1)
        return InPlace.apply(x, self.frozen.weight, torch.cat(self.A), b)

    def step(self, forward: Callable[[Tensor], Tensor]) -> Tensor:
        for tensor in (self.x, *self.A, *self.B):
            tensor.grad = None
        y = forward(self.x)
        y.backward(self.dy)
        return y.detach()

    def check(self, forward: Callable[[Tensor], Tensor], name: str) -> None:
        """Output, and gradients of x, A[0] and B[0], against PEFT's in fp32."""
        with torch.no_grad():
            w, x, dy = self.frozen.weight.float(), self.x.float(), self.dy.float()
            a, b = torch.cat(self.A).float(), torch.cat([b * s for b, s in zip(self.B, self.scaling)], 1).float()
            h, dh = x @ a.t(), dy @ b
            expected = [x @ w.t() + h @ b.t(), dy @ w + dh @ a, (dh.t() @ x)[:R], self.scaling[0] * (dy.t() @ h)[:, :R]]
        y = self.step(forward)
        for what, got, want in zip(("y", "dx", "dA", "dB"), (y, self.x.grad, self.A[0].grad, self.B[0].grad), expected):
            error = float((got.float() - want).norm() / want.norm())
            if not error <= 2e-2:
                raise AssertionError(f"{name}: {what} is off by {error:.1e}")


def ceilings(clock: Clock, tiny: bool) -> dict[str, float]:
    n = 2**16 if tiny else 2**30
    source, target = (torch.empty(n, dtype=torch.uint8, device=clock.device).random_() for _ in range(2))
    size = 64 if tiny else 8192
    dtype = torch.bfloat16
    a, b = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
    times = clock.in_turns({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    return {"copy_gb_s": 2 * n / times["copy"] / 1e9, "product_tflop_s": 2 * size**3 / times["product"] / 1e12}


def layer_table(clock: Clock, shapes, tokens: int, adapters: list[int], compiled: bool) -> list[dict]:
    """One row a (K, dropout): the layer's linears added up, forward and backward, over the frozen ones."""
    warnings.filterwarnings("ignore", message=".*adapter.*")
    rows = []
    device = str(clock.device)
    print(f"\nlayer of {', '.join(s[0] for s in shapes)}; M = {tokens}, r = {R}, bf16, forward + backward over frozen")
    for k in adapters:
        for p in (0.0, 0.1):
            totals: dict[str, float] = {}
            parts = {}
            for name, inputs, outputs, count in shapes:
                layer = Layer(tokens, inputs, outputs, k, p, torch.bfloat16, device)
                calls = {
                    "frozen": lambda: layer.step(layer.frozen),
                    "peft": lambda: layer.step(layer.peft),
                    "ours": lambda: layer.step(layer.ours),
                }
                if p == 0:
                    calls["in_place"] = lambda: layer.step(layer.in_place)
                    layer.check(layer.ours, "ours")
                    layer.check(layer.in_place, "in place")
                    if compiled and k == 2:
                        torch.compiler.reset()
                        forward = torch.compile(layer.peft)
                        calls["peft_compiled"] = lambda: layer.step(forward)
                times = clock.in_turns(calls)
                parts[name] = {c: t / times["frozen"] for c, t in times.items()} | {"frozen_us": times["frozen"] * 1e6}
                for contender, seconds in times.items():
                    totals[contender] = totals.get(contender, 0.0) + count * seconds
            row = {"K": k, "dropout": p, "frozen_us": totals["frozen"] * 1e6, "shapes": parts}
            row |= {c: t / totals["frozen"] for c, t in totals.items() if c != "frozen"}
            rows.append(row)
            print(
                f"K = {k}, p = {p}: frozen {row['frozen_us']:.0f} us, "
                + ", ".join(f"{c} {row[c]:.3f}" for c in ("ours", "in_place", "peft", "peft_compiled") if c in row),
                flush=True,
            )
    return rows


def sideband_table(clock: Clock, tiny: bool, copy_gb_s: float) -> list[dict]:
    rows = []
    layers = 2 if tiny else 32
    shapes = [(R, 64), (64, R)] * 3 if tiny else [(R, 4096), (4096, R), (R, 4096), (1024, R), (R, 14336), (4096, R)] * 2
    for dtype in (torch.bfloat16, torch.float32):
        grads = [torch.randn(s, device=clock.device, dtype=dtype) for s in shapes * layers]
        sums = [torch.zeros(g.shape, device=clock.device) for g in grads]
        stats = torch.zeros(8, dtype=torch.float64, device=clock.device)
        numel = sum(g.numel() for g in grads)

        def foreach() -> None:
            wide = [g.float() for g in grads]
            norms = torch.stack(torch._foreach_norm(wide))
            finite = torch.isfinite(norms).all()
            torch._foreach_mul_(wide, finite.float())
            torch._foreach_add_(sums, wide)
            stats[3] += (norms.double() ** 2).sum()

        times = clock.in_turns({"ours": lambda: ops.sideband_accumulate_(sums, stats, grads), "foreach": foreach})
        useful = numel * (8 + grads[0].element_size())
        row = {
            "what": f"accumulate {str(dtype).removeprefix('torch.')}, {numel / 1e6:.1f} M elements in {len(grads)} tensors",
            "gb_s": useful / times["ours"] / 1e9,
            "over_foreach": times["foreach"] / times["ours"],
        }
        rows.append(row)
        print(
            f"{row['what']}: {row['gb_s']:.0f} GB/s of useful bytes, {row['over_foreach']:.2f}x a foreach chain",
            flush=True,
        )
    window, numel = (4, 1000) if tiny else (32, 13_600_000)
    ring = torch.randn(window, numel, device=clock.device, dtype=torch.bfloat16)
    seconds = clock.in_turns({"ours": lambda: ops.buffer_variance(ring, window)})["ours"]
    gb_s = ring.numel() * 2 / seconds / 1e9
    rows.append({"what": f"variance of {window} x {numel}", "gb_s": gb_s, "of_copy": gb_s / copy_gb_s})
    print(f"{rows[-1]['what']}: {gb_s:.0f} GB/s, {gb_s / copy_gb_s:.0%} of the copy bandwidth")
    return rows


def sanitize() -> dict[str, str]:
    """compute-sanitizer over the small checks; what it said, or that it is not there."""
    tool = shutil.which("compute-sanitizer")
    if not tool:
        return {"compute-sanitizer": "not found"}
    result = {}
    for check in ("memcheck", "racecheck"):
        command = [
            tool,
            "--tool",
            check,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "benches.kernels.gpu",
            "--only-small-checks",
        ]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
            result[check] = "clean" if done.returncode == 0 else done.stdout[-2000:] + done.stderr[-500:]
        except subprocess.TimeoutExpired:
            result[check] = "not finished within 90 s"
        print(f"{check}: {result[check]}", flush=True)
    return result


def small_checks(device: str) -> None:
    import cuda_checks

    cuda_checks.check_strides_and_alignment(device)
    cuda_checks.check_masks_are_those_of_the_cpu(device)


def clocks() -> str:
    query = [
        "nvidia-smi",
        "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def picture(results: dict, path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["layer"]
    contenders = [c for c in ("peft", "peft_compiled", "in_place", "ours") if any(c in row for row in rows)]
    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    for i, contender in enumerate(contenders):
        heights = [(row.get(contender, 1.0) - 1.0) * 100 for row in rows]
        axes.bar([x + i * 0.2 for x in range(len(rows))], heights, 0.2, label=contender.replace("_", " "))
    axes.set_xticks([x + 0.3 for x in range(len(rows))], [f"K={row['K']}\ndropout {row['dropout']}" for row in rows])
    axes.set_ylabel("time over the frozen layer, %")
    axes.set_title(f"LoRA layer, forward + backward, {results['device']['name']}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return True


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(prog="python -m benches gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the program itself")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--results", type=Path, default=ROOT / "benches" / "results")
    parser.add_argument("--only-small-checks", action="store_true", help="what compute-sanitizer runs")
    options = parser.parse_args(arguments)
    on_gpu = torch.device(options.device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu --tiny tries the program without one")
    if on_gpu and not _native.build_info()["cuda_kernels"]:
        raise SystemExit("this build has no CUDA kernels; build it with the cuda feature")
    if options.only_small_checks:
        small_checks(options.device)
        return {}

    begin = time.perf_counter()
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    info = {
        "name": name,
        "torch": torch.__version__,
        "clocks_before": clocks() if on_gpu else "",
        "build": _native.build_info(),
    }
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    results: dict = {"device": info}
    if on_gpu:
        import cuda_checks

        results["checks"] = {}
        for label, check in cuda_checks.CHECKS.items():
            check(options.device)
            results["checks"][label] = "passed"
            print(f"{label}: passed", flush=True)
        results["sanitizer"] = sanitize()
    clock = Clock(options.device, 3 if options.tiny else 20)
    results["ceilings"] = ceilings(clock, options.tiny)
    print(", ".join(f"{key} {value:.1f}" for key, value in results["ceilings"].items()))
    shapes, tokens = (TINY, 32) if options.tiny else (LLAMA, 8192)
    results["layer"] = layer_table(clock, shapes, tokens, options.adapters, compiled=on_gpu)
    results["sideband"] = sideband_table(clock, options.tiny, results["ceilings"]["copy_gb_s"])
    info["clocks_after"] = clocks() if on_gpu else ""
    info["seconds"] = time.perf_counter() - begin
    options.results.mkdir(parents=True, exist_ok=True)
    stem = options.results / re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1, default=str) + "\n")
    drawn = picture(results, stem.with_suffix(".png"))
    print(f"written to {stem}.json" + (f" and {stem}.png" if drawn else "; no picture: matplotlib is not installed"))
    return results


if __name__ == "__main__":
    main()
