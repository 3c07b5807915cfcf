"""``python tools/imports.py [ROOT]``: which file imports which, of a checkout: floors, arrows, circles.

A file's floor is 0 if it imports no other file of the project, else one more than the highest that it imports. A circle is
a set of files that import each other, directly or through others. Imports inside functions and those for a type checker
count; those of tests inside a Rust file do not.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

PACKAGE = "tsugi_kpool"

Graph = dict[str, set[str]]


def python_graph(root: Path) -> Graph:
    """Modules of the package by their dotted names without ``tsugi_kpool.``; a package is its ``__init__``."""
    folder = root / "python" / PACKAGE
    files = {_module(path.relative_to(folder)): path for path in sorted(folder.rglob("*.py"))}
    return {name: _python_imports(name, path, set(files)) for name, path in files.items()}


def _module(path: Path) -> str:
    parts = list(path.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _python_imports(name: str, path: Path, modules: set[str]) -> set[str]:
    package = [PACKAGE, *name.split(".")]
    if path.name != "__init__.py" or name == "__init__":
        package.pop()
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*start, *(node.module or "").split(".")]).rstrip(".")
            # What is imported may be a module of a package, or something that a module defines.
            for alias in node.names:
                inner = f"{source}.{alias.name}".removeprefix(f"{PACKAGE}.")
                found.add(inner if inner in modules else source)
    own = {other.removeprefix(f"{PACKAGE}.") for other in found if other.startswith(PACKAGE) or other in modules}
    return (own & modules) - {name}


def rust_graph(root: Path) -> Graph:
    """Modules of the crate by their paths without ``crate::``; what a path names is the longest module that it begins with."""
    folder = root / "src"
    files = {}
    for path in sorted(folder.rglob("*.rs")):
        parts = list(path.relative_to(folder).with_suffix("").parts)
        files["::".join(parts[:-1] if parts[-1] == "mod" else parts)] = path
    files.pop("lib", None)
    return {name: _rust_imports(name, path, set(files)) for name, path in files.items()}


def _rust_imports(name: str, path: Path, modules: set[str]) -> set[str]:
    text = re.sub(r"//[^\n]*", "", path.read_text())
    text = re.split(r"#\[cfg\(test\)\]\s*(?:pub(?:\(\w+\))? )?mod ", text)[0]
    found = set()
    here = name.split("::")
    for match in re.finditer(r"\b(crate|super|self)((?:::\w+)*)(?:::(\{))?", text):
        start = {"crate": [], "super": here[:-1], "self": here}[match[1]]
        stem = [*start, *match[2].split("::")[1:]]
        for tail in _braces(text, match.end()) if match[3] else [[]]:
            found.add(_longest([*stem, *tail], modules))
    return found - {name, ""}


def _braces(text: str, start: int) -> list[list[str]]:
    """The paths inside ``{...}`` of a use, whose opening brace is before ``start``."""
    depth, end = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    paths, prefix, word = [], [[]], ""
    for token in re.findall(r"\w+|::\{|::|[{},]", text[start:end]):
        if token == "::{":
            prefix.append([*prefix[-1], *word.split("::")])
            word = ""
        elif token in ",}":
            if word:
                paths.append([*prefix[-1], *word.split("::")])
                word = ""
            if token == "}" and len(prefix) > 1:
                prefix.pop()
        else:
            word += token
    return paths


def _longest(path: list[str], modules: set[str]) -> str:
    for end in range(len(path), 0, -1):
        if "::".join(path[:end]) in modules:
            return "::".join(path[:end])
    return ""


def circles(graph: Graph) -> list[list[str]]:
    """The sets of modules that reach each other."""
    reach = {name: _reached(graph, name) for name in graph}
    found = {tuple(sorted(m for m in graph if m in reach[n] and n in reach[m])) for n in graph if n in reach[n]}
    return [list(circle) for circle in sorted(found)]


def _reached(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    left = list(graph[start])
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += graph[name]
    return seen


def floors(graph: Graph) -> dict[str, int]:
    """Each module's floor; the modules of a circle are on one floor."""
    circle_of = {name: frozenset(circle) for circle in circles(graph) for name in circle}
    found: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in found:
            circle = circle_of.get(name, frozenset({name}))
            below = {other for member in circle for other in graph[member]} - circle
            height = 1 + max(map(floor, below), default=-1)
            found.update(dict.fromkeys(circle, height))
        return found[name]

    return {name: floor(name) for name in graph}


def _print(title: str, graph: Graph, separator: str) -> None:
    height = floors(graph)
    arrows = sum(map(len, graph.values()))
    print(
        f"{title}: {len(graph)} files on {max(height.values()) + 1} floors, {arrows} arrows, {len(circles(graph))} circles"
    )
    for circle in circles(graph):
        print(f"  circle: {', '.join(circle)}")
    parts = sorted({name.partition(separator)[0] for name in graph if separator in name})
    for part in parts:
        outside = {o.partition(separator)[0] for n in graph if n.partition(separator)[0] == part for o in graph[n]} - {
            part
        }
        size = sum(name.partition(separator)[0] == part for name in graph)
        print(f"  {part:<12} {size:>3} files, imports {', '.join(sorted(outside)) or 'nothing'}")
    for level in range(max(height.values()), -1, -1):
        print(f"  floor {level:>2}: {', '.join(sorted(name for name, at in height.items() if at == level))}")


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    _print("python", python_graph(root), ".")
    print()
    _print("src", rust_graph(root), "::")


if __name__ == "__main__":
    main()
