"""The command line: ``python -m tsugi_kpool demo`` and ``python -m tsugi_kpool doctor``."""

from __future__ import annotations

import importlib
import logging
import os
import sys

from . import __version__
from .options import read_options

INTERRUPTED = 128 + 2  # as shells count: SIGINT
OUTPUT_CLOSED = 128 + 13  # SIGPIPE


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status. Torch and PEFT are imported once the options are known to be right."""
    try:
        options = read_options(arguments, __version__)
        silence_bitsandbytes()
        return importlib.import_module(f".{options.command}", __package__).main(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # as in `... doctor | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
        return OUTPUT_CLOSED


def silence_bitsandbytes() -> None:
    """PEFT imports it where it is installed, and it says that a kernel of its own for 4-bit models is not there."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
