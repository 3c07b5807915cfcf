"""The command line: ``python -m tsugi_kpool`` or ``tsugi-kpool``, with demo, doctor or bench."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator

from ._version import __version__
from .cli.options import read_options

INTERRUPTED = 128 + 2  # as shells count: SIGINT
OUTPUT_CLOSED = 128 + 13  # SIGPIPE


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status. Torch and PEFT are imported once the options are known to be right."""
    try:
        options = read_options(arguments, __version__)
        silence_bitsandbytes()
        with interrupts_end_the_process():
            command = importlib.import_module(f".cli.{options.command}", __package__)
        return command.main(options)
    except KeyboardInterrupt:
        say_interrupted()
        return INTERRUPTED
    except BrokenPipeError:  # as in `... doctor | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
        return OUTPUT_CLOSED


def say_interrupted() -> None:
    print("\ninterrupted", file=sys.stderr, flush=True)


@contextlib.contextmanager
def interrupts_end_the_process() -> Iterator[None]:
    """For imports: libraries take a KeyboardInterrupt in theirs for a module that is missing, and go on for a minute."""

    def leave(*_: object) -> None:
        say_interrupted()
        os._exit(INTERRUPTED)

    in_charge = threading.current_thread() is threading.main_thread()
    if not in_charge or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # somebody else's process, or one that was told to ignore interrupts
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def silence_bitsandbytes() -> None:
    """PEFT imports it where it is installed, and it says that a kernel of its own for 4-bit models is not there."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
