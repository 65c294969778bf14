"""The house rules that a reader relies on: who imports whom, how long a function may be."""

import ast

import pytest
from conftest import ROOT

SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("support/*.py")])


def imported(path):
    """Names of the modules that a file imports anywhere, "support.cli" for `from support.cli`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_support_imports_nothing_from_the_root_but_the_model():
    root = {path.stem for path in ROOT.glob("*.py")} - {"model"}
    for path in ROOT.glob("support/*.py"):
        assert not imported(path) & root, path.name


def test_imports_run_one_way():
    names = {path: (f"support.{path.stem}" if path.parent.name == "support" else path.stem)
             for path in SCRIPTS}
    needs = {name: imported(path) & set(names.values()) for path, name in names.items()}
    while needs:
        ready = {name for name, others in needs.items() if not others}
        assert ready, f"a circle among {sorted(needs)}"
        needs = {name: others - ready for name, others in needs.items() if name not in ready}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_function_fits_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_training_script_and_the_readme_can_be_read_in_one_sitting():
    assert len((ROOT / "train_identity.py").read_text().splitlines()) <= 420
    assert len((ROOT / "README.md").read_bytes()) <= 10_000
