"""The native library as a file: which symbols and libraries it asks for, so that one build serves every torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tsugi_kpool import _native


def test_only_stable_abis_of_torch_and_python_are_used():
    pytest.importorskip("torch_abi_audit", reason="torch-abi-audit needs Python 3.11")
    command = [Path(sys.executable).with_name("torch-abi-audit"), "--check", "both", "--json", _native.__file__]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2.11.0" in json.dumps(json.loads(done.stdout)), "the oldest torch it names is not 2.11.0"


def test_nothing_of_cuda_and_no_path_is_linked():
    dynamic = subprocess.run(["readelf", "--dynamic", "--wide", _native.__file__], capture_output=True, text=True)
    assert dynamic.returncode == 0, dynamic.stderr
    lines = dynamic.stdout.splitlines()
    libraries = {line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line}
    assert "libtorch_cpu.so" in libraries
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"}
    assert libraries - system == {"libtorch_cpu.so"}
    assert not [line for line in lines if "RPATH" in line or "RUNPATH" in line]


def test_without_the_library_the_import_works_and_each_call_says_why(tmp_path):
    package = Path(_native.__file__).parent
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = "import torch, tsugi_kpool.ops as ops\nassert not ops.available()\nops.lora_shrink(torch.ones(2, 2), [torch.ones(1, 2)])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "RuntimeError: lora_shrink: the native library of tsugi-kpool could not be loaded: "
        "No module named 'tsugi_kpool._native'"
    )


def test_error_texts_name_no_folder_of_the_build():
    assert str(Path(torch.__file__).parent).encode() not in Path(_native.__file__).read_bytes()


def test_numpy_is_needed_by_arrays_alone():
    code = """
import sys, torch
sys.modules["numpy"] = None
import importlib.util
spec = importlib.util.spec_from_file_location("tsugi_kpool._native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
router = native.Router("random", 4, 2, 0)
assert len(router.select(3)) == 2 and torch.ops.tsugi.lora_shrink
try:
    router.table(0, 2)
except ImportError as error:
    assert "numpy" in str(error), error
else:
    raise AssertionError("an array without NumPy")
"""
    done = subprocess.run([sys.executable, "-c", code, _native.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
