"""The house: who imports whom, what stands at the top level, and how long lines, functions and
files are. Read from the syntax trees of all .py files, so that an import inside a function counts,
too."""
import ast
import subprocess
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
METHOD = ("ode", "discriminators", "adm", "phased_dmd")
SCRIPTS = ("train_sdxl", "train_cogvideox")

# folder -> the folders it may import, itself included where it may
MAY_IMPORT = {
    "method": {"method"},
    "training": {"method", "training"},
    "families": {"method", "training", "families"},             # of families: see its own test
    "teachers": {"method", "training", "families", "teachers"},
    "tools": {"method", "training", "families", "teachers", "tools", "trainers"},
    "trainers": {"method", "training", "families", "teachers", "tools", "trainers"},
    "lesson": {"method", "training", "families", "teachers", "tools", "trainers", "lesson"},
}

# functions of more than 60 lines, each with the reason
LONG_FUNCTIONS = {
    "adm.py: adm": "Algorithm 1, to be read beside the paper's, line by line",
}


# ----------------------------------------------------------------------------------- what there is

@lru_cache
def files():
    """All .py files that are or will be committed, relative to the top level."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"], cwd=ROOT,
        capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a clone: git cannot say which files belong to the repository")
    found = sorted(set(listed.stdout.splitlines()))
    return [Path(file) for file in found if (ROOT / file).exists()]


@lru_cache
def tree_of(file):
    return ast.parse((ROOT / file).read_text())


def outside_tests():
    return [file for file in files() if file.parts[0] != "tests"]


def module_of(file):
    """training/lora.py -> training.lora, training/__init__.py -> training."""
    parts = file.with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


def room_of(module):
    """The folder of a module; the files of the top level are "method" or "trainers"."""
    if module in METHOD:
        return "method"
    if module in SCRIPTS:
        return "trainers"
    return module.split(".")[0]


def imports_of(file, modules):
    """Which of `modules` a file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            for alias in node.names:                    # a module of the folder, or a name in it
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules else node.module)
    return found & modules


@lru_cache
def graph():
    """{module: the modules of the repository that it imports}, without the tests."""
    modules = frozenset(module_of(file) for file in outside_tests())
    return {module_of(file): imports_of(file, modules) for file in outside_tests()}


def arrows():
    return [(module, imported) for module in graph() for imported in sorted(graph()[module])]


def walk(kind, among=files):
    """(file, node) of every node of a kind."""
    for file in among():
        for node in ast.walk(tree_of(file)):
            if isinstance(node, kind):
                yield file, node


# ------------------------------------------------------------------------------- who imports whom

def test_imports_run_in_no_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as e:
        pytest.fail("a circle: " + " -> ".join(reversed(e.args[1])))


def test_imports_run_down():
    """The method knows nothing of training, training nothing of a family, nothing of the lesson."""
    wrong = []
    for module, imported in arrows():
        if room_of(imported) not in MAY_IMPORT[room_of(module)]:
            wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_the_graph_sees_what_is_there():
    """Else all of these tests would pass on nothing."""
    assert {"ode", "discriminators"} <= graph()["adm"]
    assert "training.lora" in graph()["training.optimizer"]
    assert "training.stage" in graph()["train_sdxl"]
    assert set(map(room_of, graph())) == set(MAY_IMPORT)


def test_a_family_imports_no_sibling():
    """Of its folder only family.py, which imports none of them by name."""
    wrong = []
    for module, imported in arrows():
        if room_of(module) == "families" and room_of(imported) == "families":
            if imported != "families.family" or module == "families.family":
                wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_the_trainers_but_scripts():
    """train_cogvideox.py is train_sdxl.py for videos. A script of tools/ or lesson/ may start a run
    if nobody imports it in turn."""
    imported_by_some = {imported for _, imported in arrows()}
    wrong = []
    for module, imported in arrows():
        if room_of(imported) == "trainers" and module != "train_cogvideox":
            if module in imported_by_some:
                wrong.append(f"{module}, which is no script alone, imports {imported}")
    assert "train_cogvideox" not in imported_by_some
    assert not wrong, "\n".join(wrong)


def test_only_families_are_imported_by_a_computed_name():
    """Such imports are in no graph."""
    computed = set()
    for file, node in walk(ast.Call, outside_tests):
        if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            computed.add(str(file))
    assert computed <= {"families/family.py"}


# ----------------------------------------------------------------------------------- what is where

def test_the_top_level_is_six_files():
    top = {file.stem for file in files() if len(file.parts) == 1}
    assert top == {*METHOD, *SCRIPTS}


def test_folders_of_code_are_packages_of_one_docstring():
    """A folder without __init__.py would lose to an installed package of the same name."""
    folders = {file.parent for file in outside_tests() if len(file.parts) > 1}
    for folder in folders:
        init = folder / "__init__.py"
        assert (ROOT / init).exists(), f"{init} is missing"
        assert ast.get_docstring(tree_of(init)), f"{init} does not say what the folder is"
        assert len(tree_of(init).body) == 1, f"{init} holds code"


# ------------------------------------------------------------------------------ how long things are

def lines_of(file):
    return (ROOT / file).read_text().splitlines()


def test_lines_fit_100_columns():
    long = []
    for file in files():
        for number, line in enumerate(lines_of(file), 1):
            if len(line) > 100:
                long.append(f"{file}:{number}: {len(line)} columns")
    assert not long, "\n".join(long)


def test_the_method_is_read_in_one_sitting():
    lengths = {name: len(lines_of(f"{name}.py")) for name in METHOD}
    assert sum(lengths.values()) < 820, lengths


def test_functions_fit_a_screen():
    long = {}
    for file, node in walk((ast.FunctionDef, ast.AsyncFunctionDef), outside_tests):
        length = node.end_lineno - node.lineno + 1
        if length > 60:
            long[f"{file}: {node.name}"] = length
    for name, length in long.items():
        assert name in LONG_FUNCTIONS, f"{name} has {length} lines: 60 at most"
    assert set(long) == set(LONG_FUNCTIONS), "an exception is no longer needed"


# -------------------------------------------------------------------------------- what is not there

def is_condition(node):
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("bool", "int"):
        return any(is_condition(argument) for argument in node.args)
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    return isinstance(node, (ast.Compare, ast.BoolOp))


def test_no_list_is_multiplied_by_a_condition():
    """That is an `if`."""
    wrong = []
    for file, node in walk(ast.BinOp):
        if isinstance(node.op, ast.Mult):
            for one, other in ((node.left, node.right), (node.right, node.left)):
                if isinstance(one, (ast.List, ast.ListComp)) and is_condition(other):
                    wrong.append(f"{file}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def does_nothing(statement):
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)        # `...`, or a comment in quotes
    return isinstance(statement, ast.Pass)


def test_no_error_is_swallowed():
    """No bare except, and none that only passes."""
    wrong = []
    for file, node in walk(ast.ExceptHandler):
        if node.type is None:
            wrong.append(f"{file}:{node.lineno}: catches everything")
        if all(does_nothing(statement) for statement in node.body):
            wrong.append(f"{file}:{node.lineno}: only passes")
    assert not wrong, "\n".join(wrong)


def test_nothing_is_left_to_be_implemented():
    wrong = [f"{file}:{node.lineno}" for file, node in walk(ast.Name)
             if node.id == "NotImplementedError"]
    assert not wrong, "\n".join(wrong)
