"""``python -m tsugi_kpool bench``: a door to the benchmarks of a checkout, which are not in the wheel."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

__all__ = ["main"]

#: Of a checkout; of an installed package it is a folder without benchmarks.
ROOT = Path(__file__).resolve().parents[3]


def main(options: argparse.Namespace) -> int:
    if not (ROOT / "benches" / "__main__.py").is_file():
        print(
            f"bench: there are no benchmarks in {ROOT}: they are not in the wheel. Clone the repository, and run "
            "python -m benches there",
            file=sys.stderr,
        )
        return 1
    sys.path.insert(0, str(ROOT))
    return importlib.import_module("benches.__main__").main(options.arguments)
