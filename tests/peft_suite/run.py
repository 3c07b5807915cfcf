"""Run PEFT's own LoRA tests, unchanged, on the tsugi backend.

    python tests/peft_suite/run.py [more pytest arguments]

Fetches the source distribution of the PEFT version that is installed, once, into build/peft-suite/, and runs the LoRA
part of its tests/test_custom_models.py and all of tests/test_target_parameters.py with plugin.py beside this file; models
that the second would load from a hub are made by hub.py. Fails if a test fails, and also if suspiciously
few layer calls ran on the ops: PEFT's forward, to which the backend falls back, would pass these tests alone.
"""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FILES = ["tests/test_custom_models.py", "tests/test_target_parameters.py"]
SELECTION = [*FILES, "-k", "LoraConfig and not AdaLoraConfig or test_target_parameters"]


def fetch(version: str) -> Path:
    """The unpacked tests of this PEFT version."""
    target = ROOT / "build" / "peft-suite" / f"peft-{version}"
    if target.exists():
        return target
    print(f"fetching the tests of peft {version}", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", "peft", "--dest", scratch, f"peft=={version}"]
        if subprocess.run(command).returncode != 0:
            sys.exit(f"peft_suite: could not download the source distribution of peft {version}")
        unpacked = Path(scratch) / "unpacked"
        with tarfile.open(next(Path(scratch).glob("peft-*.tar.gz"))) as archive:
            archive.extractall(unpacked, filter="data")
        source = next(unpacked.iterdir())
        # The source distribution leaves this one out, and the test files import each other relatively.
        (source / "tests" / "__init__.py").touch()
        source.rename(target)
    return target


def make_hub() -> Path:
    """A cache of the hub with the models of the tests, made anew: what they look like is this version's."""
    folder = ROOT / "build" / "peft-suite" / "hub"
    subprocess.run([sys.executable, HERE / "hub.py", folder], check=True)
    return folder


def main() -> int:
    source = fetch(importlib.metadata.version("peft"))
    hub = make_hub()
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(hub),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]),
        # The layers are tiny; threads would only wait for each other.
        "OMP_NUM_THREADS": "1",
    }
    # -o addopts: PEFT's own options want pytest plugins that its tests do not need.
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "plugin", "-o", "addopts=", "-W", "ignore"]
    command += ["-p", "no:cacheprovider", "--tb=short", *SELECTION, *sys.argv[1:]]
    return subprocess.run(command, cwd=source, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
