"""How the package is built: what imports what, and how long files are."""

import ast
from pathlib import Path

import pytest

import portable_mlp

ROOT = Path(portable_mlp.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
FACE = "portable_mlp"


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported(tree, modules, home):
    """Modules of the package that a module names in any import, wherever it stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if node.module == FACE and alias.name in home:
                    found.add(f"{FACE}.{home[alias.name]}")
                else:
                    found.add(submodule if submodule in modules else node.module)
    return found & modules.keys()


def circles(imports):
    """Groups of names that lead to each other (Tarjan's strongly connected components)."""
    index, low, stack, found = {}, {}, [], []

    def visit(name):
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in imports[name]:
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1 or name in imports[name]:
                found.append(sorted(group))

    for name in imports:
        if name not in index:
            visit(name)
    return found


@pytest.fixture(scope="module")
def imports():
    found = {}
    for name, path in MODULES.items():
        if name != FACE:  # which names them all, for type checkers
            tree = ast.parse(path.read_text("utf-8"))
            found[name] = imported(tree, MODULES, portable_mlp._HOME) - {FACE}
    assert sum(map(len, found.values())) > 200
    return found


def between_rooms(imports, room):
    """Which rooms import which; ``room`` gives a module's, or None."""
    found = {}
    for name, others in imports.items():
        if room(name):
            beside = {room(other) for other in others} - {None, room(name)}
            found.setdefault(room(name), set()).update(beside)
    return found


def test_modules_do_not_import_each_other_in_circles(imports):
    assert circles(imports) == []


def test_rooms_do_not_import_each_other_in_circles(imports):
    rooms = between_rooms(imports, lambda name: name.split(".")[1])
    assert {"app", "estimators", "training", "engines", "persistence", "layers"} <= rooms.keys()
    assert circles(rooms) == []


def test_of_the_engines_stages_one_stands_on_the_other(imports):
    def stage(name):
        parts = name.split(".")
        return parts[2] if parts[1] == "engines" and len(parts) == 4 else None

    stages = between_rooms(imports, stage)
    assert stages == {"graph": set(), "host": {"graph"}, "cuda": {"graph"}}


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"], ["d"]]
    tree = ast.parse("def f():\n    from portable_mlp import load\n    import portable_mlp.steps\n")
    assert imported(tree, MODULES, portable_mlp._HOME) == {
        "portable_mlp.persistence",
        "portable_mlp.steps",
    }


def test_the_top_of_the_package_can_be_overlooked():
    entries = [path for path in ROOT.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 30


@pytest.mark.parametrize("path", FILES, ids=MODULES)
def test_a_file_has_one_reason(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 550
    first, *_ = ast.get_docstring(ast.parse(text)).split("\n\n")
    assert first.endswith(".")
    assert first.count(". ") == 0  # one sentence
