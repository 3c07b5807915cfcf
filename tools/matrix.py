"""Proves that one wheel serves every supported torch, Python and PEFT: builds it once, installs and tests it in two cells.

    make test-matrix                          the oldest torch on the oldest Python, the newest torch on the newest
    .venv/bin/python tools/matrix.py --all    all four combinations

The pool's tests run on every supported PEFT, in the first cell: an older PEFT is a folder in front of the cell's own.

A cell is an environment of its own under build/matrix, about 6 GB. What has passed for a wheel is not run again, and an
interrupted run resumes. "Newest" is decided when a cell is made: remove build/matrix to ask again.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "matrix"
OLDEST_TORCH = "torch==2.11.0"
TESTS = ["tests/test_ops.py", "tests/test_backend.py", "tests/test_pool.py"]
# The oldest PEFT that is supported and the one after it; the cells have the newest.
OLDER_PEFTS = ("peft==0.20.0", "peft==0.21.0")
PEFT_TESTS = ["tests/test_config.py", "tests/test_pool.py", "tests/test_pool_training.py", "tests/test_export.py"]
# What the wheel is made of.
SOURCES = (
    "Cargo.toml",
    "Cargo.lock",
    "build.rs",
    "pyproject.toml",
    "src/**/*",
    "cpp/**/*",
    "kernels/**/*",
    "python/**/*.py*",
)


class MatrixError(Exception):
    """What went wrong, in one sentence."""


def say(text: str) -> None:
    print(f"matrix: {text}", flush=True)


def run(*command: str | Path, **kwargs) -> None:
    # The wheel is what is tested: nothing of the checkout may come in through the environment.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment.setdefault("OMP_WAIT_POLICY", "passive")  # as make test does
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, **kwargs)
    if done.returncode:
        raise MatrixError(f"{' '.join(str(part) for part in command[:6])} ... ended with {done.returncode}.")


def write(file: Path, facts: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".new").write_text(json.dumps(facts, indent=1))
    file.with_suffix(".new").replace(file)


def read(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def digest(paths: list[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        total.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return total.hexdigest()


# ---- the wheel -------------------------------------------------------------------------------------------------------


def build_wheel() -> Path:
    """The wheel of the sources as they are, built unless it is there already."""
    stamp, folder = FOLDER / "wheel.json", FOLDER / "wheel"
    sources = digest([path for pattern in SOURCES for path in ROOT.glob(pattern)])
    facts = read(stamp)
    if facts.get("sources") != sources or not (folder / facts.get("wheel", "none")).is_file():
        say("building the wheel")
        shutil.rmtree(folder, ignore_errors=True)
        run(sys.executable, "-m", "maturin", "build", "--release", "--out", folder)
        facts = {"sources": sources, "wheel": next(folder.glob("*.whl")).name}
        write(stamp, facts)
    say(f"one wheel for all: {facts['wheel']}")
    return folder / facts["wheel"]


# ---- the cells -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    python: str
    version: tuple[int, int]
    torch: str

    @property
    def name(self) -> str:
        which = "oldest" if self.torch == OLDEST_TORCH else "newest"
        return f"python{self.version[0]}.{self.version[1]}-{which}-torch"


def find_pythons() -> dict[tuple[int, int], str]:
    """One interpreter of each version from 3.10 to 3.14, on PATH or under pyenv."""
    names = [f"python3.{minor}" for minor in range(10, 15)] + ["python3"]
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    found = {}
    for candidate in [*names, *sorted(glob.glob(f"{pyenv}/versions/3.*/bin/python")), sys.executable]:
        code = "import sys, venv, ensurepip; print(*sys.version_info[:2], sys._base_executable or sys.executable)"
        try:
            answer = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            continue
        major, minor, path = answer.split(maxsplit=2)
        version = (int(major), int(minor))
        if (3, 10) <= version <= (3, 14):
            found.setdefault(version, path.strip())
    return found


def choose_cells(everything: bool) -> list[Cell]:
    pythons = find_pythons()
    if len(pythons) < 2:
        have = ", ".join("{}.{}".format(*version) for version in pythons) or "none"
        raise MatrixError(
            f"Two Pythons of different versions from 3.10 to 3.14 are needed, and this is all there is: {have}."
        )
    oldest, newest = min(pythons), max(pythons)
    cells = [Cell(pythons[oldest], oldest, OLDEST_TORCH), Cell(pythons[newest], newest, "torch")]
    if everything:
        cells += [Cell(pythons[oldest], oldest, "torch"), Cell(pythons[newest], newest, OLDEST_TORCH)]
    return cells


def prepare(cell: Cell, wheel: Path) -> Path:
    """The cell's environment with this wheel in it; returns its Python."""
    folder = FOLDER / cell.name
    python, stamp = folder / "bin" / "python", folder / "cell.json"
    facts = read(stamp)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    if not facts:
        say(f"{cell.name}: making the environment")
        run(cell.python, "-m", "venv", folder)
        run(*pip, "--upgrade", "pip")
        run(*pip, "--upgrade", cell.torch, "pytest", "parameterized", "scipy")
    if facts.get("wheel") != digest([wheel]):
        run(*pip, wheel)  # with what it asks for; the torch that is there satisfies it
        run(*pip, "--force-reinstall", "--no-deps", wheel)
        write(stamp, {"wheel": digest([wheel])})
    return python


def check(cell: Cell, wheel: Path) -> str:
    python = prepare(cell, wheel)
    code = (
        "import sys, torch, tsugi_kpool; print(torch.__version__, sys.version.split()[0]);"
        "assert tsugi_kpool.__file__.startswith(sys.prefix), tsugi_kpool.__file__"
    )
    versions = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True)
    if versions.returncode:
        raise MatrixError(f"{cell.name}: the wheel does not import: {versions.stderr.strip().splitlines()[-1]}")
    torch, version = versions.stdout.split()
    name = f"torch {torch}, Python {version}"
    stamp = FOLDER / cell.name / "passed.json"
    key = {"wheel": digest([wheel]), "torch": torch, "tests": digest(list((ROOT / "tests").glob("*.py")))}
    if read(stamp) == key:
        return f"{name}: passed before"
    say(f"{name}: testing")
    run(python, "-m", "tsugi_kpool", "doctor")
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "pythonpath=tests", *TESTS)
    write(stamp, key)
    return f"{name}: passed"


def check_peft(cell: Cell, wheel: Path, peft: str) -> str:
    """The pool's tests in a cell with another PEFT than its own."""
    python = prepare(cell, wheel)
    folder = FOLDER / cell.name / peft.replace("==", "-")
    stamp = folder / "passed.json"
    key = {"wheel": digest([wheel]), "tests": digest(list((ROOT / "tests").glob("*.py")))}
    name = f"{peft}, Python {'.'.join(map(str, cell.version))}"
    if read(stamp) == key:
        return f"{name}: passed before"
    say(f"{name}: testing")
    if not (folder / "peft").is_dir():
        run(
            python,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--quiet",
            "install",
            "--no-deps",
            "--target",
            folder,
            peft,
        )
    code = (
        f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT / 'tests')!r}]; import peft, pytest;"
        f"assert peft.__file__.startswith({str(folder)!r}), peft.__file__;"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-o', 'pythonpath=', *{PEFT_TESTS!r}, '-k', 'not stock']))"
    )
    run(python, "-c", code)
    write(stamp, key)
    return f"{name}: passed"


def audit(wheel: Path) -> str:
    """Every symbol that the binary takes from torch and from Python is of a stable ABI."""
    tool = Path(sys.executable).parent / "torch-abi-audit"
    if not tool.exists():
        raise MatrixError("torch-abi-audit is not installed: it needs an environment of Python 3.11 or newer.")
    folder = FOLDER / "audit"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.unpack_archive(wheel, folder, "zip")
    run(tool, "--check", "both", folder / "tsugi_kpool")
    return "torch-abi-audit: passed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="all four combinations of the two versions of each")
    options = parser.parse_args()
    try:
        cells = choose_cells(options.all)
        wheel = build_wheel()
        results = [audit(wheel), *(check(cell, wheel) for cell in cells)]
        results += [check_peft(cells[0], wheel, peft) for peft in OLDER_PEFTS]
    except MatrixError as error:
        print(f"matrix: {error}", file=sys.stderr)
        return 1
    for line in results:
        say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
