"""``python -m benches`` lists the benchmarks, ``python -m benches NAME --help`` says what one takes."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
#: Benchmarks in Python, a module each with ``main(arguments)``; the first line of its docstring says what it measures.
PYTHON = {
    "layer": "kernels.layer",
    "experts": "kernels.experts",
    "dora": "kernels.dora",
    "buffer": "kernels.buffer",
    "gpu": "kernels.gpu",
    "moe": "training.moe",
    "pool": "training.pool",
    "cost": "training.cost",
    "link": "training.link",
    "ablation": "training.ablation",
    "faults": "training.faults",
}


def rust() -> dict[str, str]:
    """The benchmarks in Rust, which cargo runs, and the first line of each file."""
    files = sorted(path for folder in ("kernels", "training") for path in (FOLDER / folder).glob("*.rs"))
    return {path.stem: path.read_text().splitlines()[0].removeprefix("//! ") for path in files}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark that the first argument names, with the others; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print_list()
        return 0
    name, *others = arguments
    if name in PYTHON:
        status = importlib.import_module(f"benches.{PYTHON[name]}").main(others)
        return status if isinstance(status, int) else 0
    if name in rust():
        print(f"{name} is run by cargo: cargo bench --bench {name}", file=sys.stderr)
    else:
        print(f"benches: there is no benchmark {name!r}; python -m benches lists them", file=sys.stderr)
    return 2


def print_list() -> None:
    print("python -m benches NAME [--help]:")
    for name, module in PYTHON.items():
        path = FOLDER / f"{module.replace('.', '/')}.py"
        print(f"  {name:<15} {first_sentence(ast.get_docstring(ast.parse(path.read_text())) or '')}")
    print("cargo bench --bench NAME:")
    for name, line in rust().items():
        print(f"  {name:<15} {line}")


def first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


if __name__ == "__main__":
    sys.exit(main())
