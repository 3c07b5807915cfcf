"""The native library as a file: which symbols and libraries it asks for, so that one build serves every torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
