"""``python -m tsugi_kpool``: what it says before torch is there, and when it is stopped."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tsugi_kpool
from tsugi_kpool.cli import demo, options
from tsugi_kpool.pool import config

PACKAGES = Path(tsugi_kpool.__file__).parent.parent
ROOT = PACKAGES.parent


def start(folder: Path, *arguments: str, torch: str, ignoring: bool = False, **variables: str) -> subprocess.Popen:
    """The command line in a process whose ``torch`` is a file with this text.

    ``ignoring`` interrupts is what a shell makes of a program in the background, and so perhaps of these tests.
    """
    handler = signal.SIG_IGN if ignoring else signal.SIG_DFL
    (folder / "torch.py").write_text(torch)
    return subprocess.Popen(
        [sys.executable, "-m", "tsugi_kpool", *arguments],
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{PACKAGES}", **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )


IMPORTED = "raise SystemExit('torch was imported')"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--version"], 0, f"tsugi-kpool {tsugi_kpool.__version__}"),
        (["--help"], 0, "what is on, and why"),
        ([], 2, "the following arguments are required: command"),
        (["demon"], 2, "invalid choice: 'demon'"),
        (["demo", "--help"], 0, "--pool-active K"),
        (["demo", "--steps", "-3"], 2, "argument --steps: -3 is not a whole number of at least 1"),
        (["demo", "--routing", "robin"], 2, "invalid choice: 'robin'"),
        (["doctor", "--help"], 0, "which versions, processor features and devices"),
        (["doctor", "--fast"], 2, "unrecognized arguments: --fast"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_are_read_before_torch_is_imported(tmp_path, arguments, status, says):
    process = start(tmp_path, *arguments, torch=IMPORTED)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert says in out + err


def test_a_command_imports_torch(tmp_path):
    _, err = start(tmp_path, "doctor", torch=IMPORTED).communicate(timeout=60)
    assert err == "torch was imported\n"


#: What libraries make of an interrupt in the middle of their imports.
IMPORTS = {
    "let through": "time.sleep(60)",
    "taken for a missing module": "try:\n    time.sleep(60)\nexcept BaseException:\n    raise ImportError('torch')",
    "swallowed": "try:\n    time.sleep(60)\nexcept BaseException:\n    time.sleep(60)",
}


@pytest.mark.parametrize("kind", IMPORTS)
def test_an_interrupt_while_torch_is_imported(tmp_path, kind):
    process = start(tmp_path, "doctor", torch=f"import time\nprint('importing', flush=True)\n{IMPORTS[kind]}")
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "\ninterrupted\n")


def test_an_interrupt_that_is_ignored_stays_ignored(tmp_path):
    program = "import sys\nprint('importing', flush=True)\nsys.exit(sys.stdin.read())"
    process = start(tmp_path, "doctor", torch=program, ignoring=True)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate("read on", timeout=30)[1] == "read on\n"


def test_a_closed_output_is_no_traceback(tmp_path):
    process = start(tmp_path, "doctor", torch="import sys\nprint(sys.stdin.readline())\nprint('x' * 10**6)")
    process.stdout.close()
    process.stdin.close()
    process.wait(60)
    assert (process.returncode, process.stderr.read()) == (141, "")


def test_bitsandbytes_does_not_speak_first(tmp_path):
    speaks = "import logging\nlogging.getLogger('bitsandbytes.backends.cpu.ops').warning('Failed to load')\n"
    _, err = start(tmp_path, "doctor", torch=speaks + IMPORTED).communicate(timeout=60)
    assert err == "torch was imported\n"


def test_the_choices_of_the_options_are_those_of_the_commands():
    assert options.DTYPES == tuple(demo.DTYPES)
    assert options.ROUTING_STRATEGIES == config.ROUTING_STRATEGIES


def test_every_command_has_a_module_and_is_in_the_readme(monkeypatch):
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, arguments: parser)
    parser = options.read_options([], "0")
    commands = next(action for action in parser._actions if action.dest == "command").choices
    readme = (ROOT / "README.md").read_text()
    assert {"demo", "doctor"} <= set(commands)
    for name in commands:
        assert callable(importlib.import_module(f"tsugi_kpool.cli.{name}").main)
        assert f"`python -m tsugi_kpool {name}`" in readme, name


SITE = """
import os
if "TSUGI_BACKEND" in os.environ:
    import tsugi_kpool
    tsugi_kpool.use_backend(backend=os.environ["TSUGI_BACKEND"])
"""
PROGRAM = """
import peft
from torch import nn
model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
print(type(model.base_model.model[0]).__module__)
"""


def test_a_program_that_knows_nothing_of_it_is_accelerated_through_sitecustomize(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    (tmp_path / "tsugi_program.py").write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, "-m", "tsugi_program"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PACKAGES}", "TSUGI_BACKEND": "tsugi"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.stdout == "tsugi_kpool.backend.swap\n", result.stderr


def test_all_names_are_offered_for_completion_and_come_with_a_star():
    assert set(tsugi_kpool.__all__) <= set(dir(tsugi_kpool))
    names = {}
    exec("from tsugi_kpool import *", names)
    assert {"KPoolCallback", "attach", "use_backend", "ops"} <= set(names)
