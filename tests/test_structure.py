"""The rule of the house for imports: cli -> pool -> {distributed, backend} -> ops, and no circle anywhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("imports_tool", ROOT / "tools" / "imports.py")
imports = importlib.util.module_from_spec(spec)
spec.loader.exec_module(imports)

#: What each part may import beside its own files and those that every part may (GROUND).
BELOW = {
    "cli": {"pool", "distributed", "backend", "ops"},
    "pool": {"distributed", "backend", "ops"},
    "distributed": {"ops"},
    "backend": {"ops"},
    "ops": set(),
}
GROUND = {"warn", "_version"}
#: The package's doors: what users import and start. Nothing below imports them.
DOORS = {"__init__", "__main__", "sync", "sideband"}


def violations(graph: dict[str, set[str]]) -> list[str]:
    found = []
    for name, others in graph.items():
        part = name.partition(".")[0]
        if name in DOORS:
            continue
        allowed = {part, *GROUND, *BELOW.get(part, ())} if part in BELOW else set()
        found += [f"{name} imports {other}" for other in others if other.partition(".")[0] not in allowed]
    return found


def test_every_file_imports_only_what_lies_below_it():
    graph = imports.python_graph(ROOT)
    assert {name.partition(".")[0] for name in graph} == {*BELOW, *GROUND, *DOORS}
    assert violations(graph) == []


def test_no_circle_in_python():
    assert imports.circles(imports.python_graph(ROOT)) == []


def test_no_circle_in_rust():
    assert imports.circles(imports.rust_graph(ROOT)) == []


@pytest.fixture
def house(tmp_path):
    """A checkout with these files."""

    def build(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return build


@pytest.mark.parametrize(
    "line, target",
    [
        ("from ..pool.step import Step", "pool.step"),
        ("from ..pool import step", "pool.step"),
        ("from .. import pool", "pool"),
        ("import tsugi_kpool.pool.step", "pool.step"),
        ("from tsugi_kpool.pool import step as s", "pool.step"),
        ("def f():\n    from ..pool import step", "pool.step"),
        ("if TYPE_CHECKING:\n    from ..pool.step import Step", "pool.step"),
    ],
)
def test_an_import_upwards_is_found_however_it_is_written(house, line, target):
    package = "python/tsugi_kpool"
    files = {f"{package}/{part}/__init__.py": "" for part in ("pool", "ops")}
    root = house(files | {f"{package}/__init__.py": "", f"{package}/pool/step.py": "", f"{package}/ops/low.py": line})
    assert violations(imports.python_graph(root)) == [f"ops.low imports {target}"]


@pytest.mark.parametrize(
    "line",
    [
        "use crate::b::Thing;",
        "use crate::{error::Error, b::{self, Thing}};",
        "use super::b;",
        "pub use crate::b::*;",
        "fn f() { crate::b::g() }",
        '#[cfg(feature = "extension")]\nuse crate::b;',
    ],
)
def test_a_circle_in_rust_is_found_however_it_is_written(house, line):
    root = house({"src/lib.rs": "", "src/a.rs": line, "src/b.rs": "use crate::a::A;", "src/error.rs": ""})
    assert imports.circles(imports.rust_graph(root)) == [["a", "b"]]


def test_what_the_tests_in_a_rust_file_import_is_no_circle(house):
    tests = "#[cfg(test)]\nmod tests {\n    use crate::b::B;\n}\n// use crate::b;"
    root = house({"src/lib.rs": "", "src/a.rs": tests, "src/b.rs": "use crate::a::A;"})
    assert imports.circles(imports.rust_graph(root)) == []
    assert imports.floors(imports.rust_graph(root)) == {"a": 0, "b": 1}
