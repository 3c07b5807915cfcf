"""The benchmarks run, check their answers and say what they measured; how fast anything is, no test asks."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from benches import __main__ as benches

from tsugi_kpool import ops
from tsugi_kpool.__main__ import main
from tsugi_kpool.cli import bench

#: Small sizes for those that need neither a GPU nor several processes.
SMALL = {
    "buffer": ["--numel", "1000", "--window", "3", "--seconds", "0.01"],
    "pool": ["--few", "2", "--many", "3", "--active", "1", "--seconds", "0.01"],
    "layer": ["--tokens", "2", "--adapters", "1", "2", "--dtypes", "float32", "--features", "32", "--seconds", "0.01"],
}


def programs() -> set[str]:
    """The modules with a ``main``, as they are named in the table."""
    found = set()
    for path in benches.FOLDER.glob("*/*.py"):
        names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        if "main" in names:
            found.add(f"{path.parent.name}.{path.stem}")
    return found


def test_every_benchmark_is_listed_with_a_line(capsys):
    assert set(benches.PYTHON.values()) == programs()
    assert benches.main([]) == 0
    printed = capsys.readouterr().out
    for name in (*benches.PYTHON, *benches.rust()):
        line = next(line for line in printed.splitlines() if line.split()[:1] == [name])
        assert len(line.split()) > 4, line


def test_cargo_has_every_benchmark_in_rust():
    text = (benches.FOLDER.parent / "Cargo.toml").read_text()
    assert all(f'path = "benches/{folder}/{name}.rs"' in text for name, folder in rust_folders().items())


def rust_folders() -> dict[str, str]:
    return {path.stem: path.parent.name for path in benches.FOLDER.glob("*/*.rs")}


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs_and_writes_what_it_measured_and_where(name, tmp_path, capsys):
    assert benches.main([name, *SMALL[name], "--json", str(tmp_path / "new" / "rows.json")]) == 0
    results = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert results["machine"]["torch"] == torch.__version__ and results["machine"]["processor"]
    assert results[name] and results["machine"]["processor"] in capsys.readouterr().out


def test_a_wrong_answer_is_not_timed(monkeypatch):
    right = ops.lora_linear
    monkeypatch.setattr(ops, "lora_linear", lambda *args: right(*args) * 1.01)
    with pytest.raises(AssertionError, match="ours: output is off by"):
        benches.main(["layer", *SMALL["layer"]])


def test_a_name_that_is_none_is_refused(capsys):
    assert benches.main(["nothing"]) == 2
    assert "there is no benchmark 'nothing'" in capsys.readouterr().err


def test_the_command_runs_them(capsys):
    assert main(["bench", "buffer", *SMALL["buffer"]]) == 0
    assert "a push and its variance take" in capsys.readouterr().out


def test_outside_of_a_checkout_the_command_says_where_they_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "ROOT", Path(tmp_path))
    assert main(["bench", "layer"]) == 1
    assert "they are not in the wheel" in capsys.readouterr().err
