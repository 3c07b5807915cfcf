"""``_native.pyi`` says what the compiled module has: every name, every argument in its order, nothing else."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import tsugi_kpool
from tsugi_kpool import _native
from tsugi_kpool.distributed import buffers

STUB = ast.parse((Path(tsugi_kpool.__file__).parent / "_native.pyi").read_text())
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef) and hasattr(_native, node.name)}
CONSTRUCTORS = {"__init__", "__new__"}


def public(names) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def declared(node: ast.FunctionDef, is_method: bool) -> list[tuple[str, str, bool]]:
    """(name, kind, whether it has a default) of each argument after ``self``."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args][int(is_method) :]
    without = len(positional) - len(arguments.defaults)
    found = [(a.arg, "positional", i >= without) for i, a in enumerate(positional)]
    return found + [(a.arg, "keyword", d is not None) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)]


def compiled(function) -> list[tuple[str, str, bool]]:
    parameters = inspect.signature(function).parameters.values()
    return [
        (p.name, "keyword" if p.kind is p.KEYWORD_ONLY else "positional", p.default is not p.empty)
        for p in parameters
        if p.name != "self"
    ]


def test_the_names_are_those_of_the_module():
    assert public({*FUNCTIONS, *CLASSES}) == public(name for name in dir(_native) if callable(getattr(_native, name)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_what_the_stub_says(name):
    assert declared(FUNCTIONS[name], False) == compiled(getattr(_native, name))


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_has_what_the_stub_says(name):
    cls, body = getattr(_native, name), CLASSES[name].body
    methods = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    attributes = {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    attributes |= {
        n for n, node in methods.items() if any(getattr(d, "id", "") == "property" for d in node.decorator_list)
    }
    assert public({*methods, *attributes}) == public(vars(cls))
    for method, node in methods.items():
        if method in CONSTRUCTORS:
            assert declared(node, True) == compiled(cls), f"{name}({method})"
        elif method not in attributes and not method.startswith("__"):
            assert declared(node, True) == compiled(getattr(cls, method)), f"{name}.{method}"


def test_the_aggregator_names_what_the_trigger_returns_as_the_library_does():
    for mine in (buffers.Agreed, buffers.Decision, buffers.Trend):
        assert mine._fields == getattr(_native, mine.__name__)._fields
