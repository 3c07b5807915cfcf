"""The command line: ``python -m tsugi_kpool demo`` and ``python -m tsugi_kpool doctor``."""

from __future__ import annotations

import argparse
import sys

from . import __version__, demo, doctor


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tsugi_kpool",
        description="LoRA fine-tuning with PyTorch and PEFT, K adapters in one pass.",
    )
    parser.add_argument("--version", action="version", version=f"tsugi-kpool {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    demo.add_command(commands)
    doctor.add_command(commands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
