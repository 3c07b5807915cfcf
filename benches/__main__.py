"""``python -m benches``: the layer, the experts, the elastic buffer and the pool, printed and written as JSON."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import peft
import torch

from benches import buffer, experts, layer, pool
from tsugi_kpool import _native


def machine() -> dict:
    """What the numbers were measured on: the processor as the system names it, and the versions that matter."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        **{key: str(value) for key, value in _native.build_info().items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benches", description=__doc__)
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
    options = parser.parse_args()

    info = machine()
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    dtypes = [getattr(torch, name) for name in options.dtypes]
    results = {"machine": info}
    results["layer"] = layer.table(
        options.tokens, options.adapters, dtypes, options.features, options.r, options.seconds, options.patience
    )
    middle = min(options.tokens, key=lambda m: abs(m - 1024))
    results["dropout"] = layer.dropout_table(middle, options.adapters, options.features, options.r, options.seconds)
    results["experts"] = experts.table([1, 64, 512, 4096], options.adapters[:2], dtypes, options.seconds)
    results["buffer"] = buffer.table(1_000_000, 32, options.seconds)
    results["pool"] = pool.table(options.seconds)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {options.json}")


if __name__ == "__main__":
    main()
