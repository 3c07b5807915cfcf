"""tools/setup.py: what it says of a machine that lacks something, and when it does a step again."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

spec = importlib.util.spec_from_file_location("setup_tool", ROOT / "tools" / "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)


def program(folder: Path, name: str, prints: str = "", status: int = 0) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\necho '{prints}'\nexit {status}\n")
    file.chmod(0o755)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine with an empty PATH, on which nothing was built yet."""
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(setup, "NATIVE", tmp_path / "none.so")
    return tools


def one_sentence(missing: list[str], *words: str) -> None:
    found = [line for line in missing if all(word in line for word in words)]
    assert len(found) == 1, missing
    assert found[0].endswith(".") and "\n" not in found[0]


def test_a_bare_machine_is_told_everything_at_once(bare, tmp_path):
    missing = setup.missing_prerequisites(tmp_path / "venv")
    one_sentence(missing, "cargo was not found", "1.88")
    one_sentence(missing, "C++ compiler", "apt-get install g++")


def test_an_old_rust_is_named_with_the_version_that_is_needed(bare):
    program(bare, "cargo", "cargo 1.70.0 (aaaa 2023-01-01)")
    program(bare, "rustc", "rustc 1.70.0 (aaaa 2023-01-01)")
    one_sentence(setup.missing_rust(), "rustc 1.70.0 is too old", "1.88")
    program(bare, "rustc", "rustc 1.88.0 (aaaa 2025-01-01)")
    assert setup.missing_rust() == []


def test_a_compiler_without_cpp20_is_named(bare):
    program(bare, "cc")
    program(bare, "c++", status=1)
    one_sentence(setup.missing_compiler(), "c++ cannot build a C++20 program")


def test_the_compiler_named_in_cxx_is_the_one_that_is_tried(bare, monkeypatch):
    program(bare, "cc")
    program(bare, "my-compiler")
    monkeypatch.setenv("CXX", "my-compiler")
    assert setup.missing_compiler() == []
    monkeypatch.setenv("CXX", "no-such-compiler")
    one_sentence(setup.missing_compiler(), "no-such-compiler")


def test_disk_space_is_asked_for_before_the_large_steps_only(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1e9})
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(setup, "NATIVE", Path(setup.__file__))
    one_sentence(setup.missing_space(tmp_path / "venv"), "1.0 GB free")
    stamp(tmp_path / "venv", "torch", [], [])
    assert setup.missing_space(tmp_path / "venv") == []


def test_another_system_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(setup.platform, "machine", lambda: "aarch64")
    one_sentence(setup.missing_prerequisites(tmp_path), "aarch64")


def test_a_python_that_does_not_fit_is_refused_by_name(bare):
    program(bare, "old-python", status=1)
    done = subprocess.run(
        ["/bin/sh", ROOT / "tools" / "python", "-V"],
        env={"PATH": str(bare), "PYTHON": "old-python"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "PYTHON=old-python is not a Python of version 3.10 to 3.14" in done.stderr
    done = subprocess.run(
        ["/bin/sh", ROOT / "tools" / "python", "-V"], env={"PATH": str(bare)}, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("No Python of version 3.10 to 3.14 was found")


# ---- resuming --------------------------------------------------------------------------------------------------------


def site_packages(venv: Path) -> Path:
    folder = venv / "lib" / "python3.11" / "site-packages"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def install(venv: Path, name: str) -> None:
    folder = site_packages(venv) / f"{name}.dist-info"
    folder.mkdir()
    (folder / "INSTALLER").touch()


def stamp(venv: Path, stage: str, files: list[str], installed: list[str]) -> None:
    file = setup.stamp_file(venv, stage)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"files": setup.digest(files), "installed": installed}))


def test_a_stage_is_done_while_its_file_and_its_packages_are_unchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "TOOLS", tmp_path)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("torch==2.11.0\nsome_package==1.0\n")
    venv = tmp_path / "venv"
    for name in ("torch-2.11.0", "some_package-1.0", "unrelated-3.0"):
        install(venv, name)
    assert not setup.holds(venv, "packages", ["requirements.txt"])
    pinned = setup.pinned(venv, ["requirements.txt"])
    assert pinned == ["some_package-1.0.dist-info", "torch-2.11.0.dist-info"]
    stamp(venv, "packages", ["requirements.txt"], pinned)
    assert setup.holds(venv, "packages", ["requirements.txt"])
    folder = site_packages(venv) / "torch-2.11.0.dist-info"
    folder.rename(folder.with_name("torch-2.15.0.dist-info"))
    assert not setup.holds(venv, "packages", ["requirements.txt"])
    folder.with_name("torch-2.15.0.dist-info").rename(folder)
    requirements.write_text("torch==2.11.0\nsome_package==1.1\n")
    assert not setup.holds(venv, "packages", ["requirements.txt"])


def test_a_package_that_was_cut_off_is_installed_again(tmp_path):
    install(tmp_path, "whole-1.0")
    (site_packages(tmp_path) / "half-1.0.dist-info").mkdir()
    setup.forget_half_installed(tmp_path)
    assert setup.installed(tmp_path) == {"whole-1.0.dist-info"}


def test_a_folder_with_other_files_is_never_taken_for_an_environment(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(setup.SetupError, match="holds other files"):
        setup.make_environment(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_two_setups_of_one_environment_take_turns(tmp_path):
    code = (
        "import importlib.util, pathlib, sys\n"
        f"spec = importlib.util.spec_from_file_location('setup_tool', {str(ROOT / 'tools' / 'setup.py')!r})\n"
        "setup = importlib.util.module_from_spec(spec); spec.loader.exec_module(setup)\n"
        f"with setup.alone(pathlib.Path({str(tmp_path)!r}) / 'folder' / 'lock'): print('second', flush=True)\n"
    )
    with setup.alone(tmp_path / "folder" / "lock"):
        second = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert "waiting for another set-up" in second.stderr.readline()
    out, _ = second.communicate(timeout=60)
    assert out == "second\n" and second.returncode == 0


def test_every_pin_is_exact():
    for file in (ROOT / "tools").glob("requirements*.txt"):
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
        assert lines and all("==" in line for line in lines), file


#: What the design asks the Rust half to be made of.
DESIGNED = {"cxx", "cxx-build", "cc", "cudarc", "half", "bytemuck", "pyo3", "numpy", "criterion", "rand"}


def test_every_crate_of_the_design_is_named():
    manifest = (ROOT / "Cargo.toml").read_text()
    tables = re.findall(r"^\[(?:build-|dev-)?dependencies\]\n(.*?)(?=^\[|\Z)", manifest, re.M | re.S)
    assert len(tables) == 3
    named = {line.split("=")[0].strip() for table in tables for line in table.splitlines() if "=" in line}
    assert DESIGNED <= named, f"Cargo.toml lacks {sorted(DESIGNED - named)}"
