"""The habits of tests: who is marked `gpu` and `slow`, what the marks do, and where types are written."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch

TESTS = Path(__file__).parent
MAKEFILE = (TESTS.parent / "Makefile").read_text()
SIZES = {"one": 1, "few": 4, "large": 1000}  # of tables of cases
SKIPS = {"skip", "skipif", "importorskip", "skipTest"}


def recipe(target: str) -> str:
    """The commands of a target."""
    return re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]


def test_quick_leaves_out_what_is_slow_and_test_leaves_out_nothing():
    assert "-m 'not slow'" in recipe("quick")
    assert recipe("test").replace("$(share)", "").split() == recipe("quick").replace("-m 'not slow'", "").split()


def test_a_share_has_the_first_case_of_each_test_and_about_as_many_of_the_others():
    tables = {name: [f"tests/{name}.py::test[{case}]" for case in range(size)] for name, size in SIZES.items()}
    names = ["tests/alone.py::test", *(case for table in tables.values() for case in table)]
    assert conftest.share_of(names, 1) == names
    kept = conftest.share_of(names, 3)
    assert kept == [name for name in names if name in {*kept}] and kept[0] == names[0]
    for table in tables.values():
        assert table[0] in kept
    large = [int(re.search(r"\[(\d+)\]", name)[1]) for name in kept if "large" in name]
    assert 250 < len(large) < 420
    assert all({case % 3 for case in large if case // 100 == part} == {0, 1, 2} for part in range(10))


def test_pytest_runs_the_share_it_is_asked_for():
    def count(*options: str) -> int:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *options]
        command += ["tests/rewards/test_final_answers.py"]
        return subprocess.run(command, cwd=TESTS.parent, stdout=subprocess.PIPE, text=True).stdout.count("::")

    assert 0 < count("--share", "4") < count()


def test_what_is_marked_gpu_is_skipped_where_there_is_none(request):
    request.node.add_marker("gpu")
    conftest.pytest_collection_modifyitems([request.node])
    assert (request.node.get_closest_marker("skip") is None) == torch.cuda.is_available()


def test_what_forks_whole_runs_is_slow(request):
    for using in (False, True):
        request.node.fixturenames.extend(["forks"] * using)
        conftest.pytest_collection_modifyitems([request.node])
        assert (request.node.get_closest_marker("slow") is not None) == using


def skips_without_cuda(source: str) -> list[int]:
    """Lines of skips that ask for CUDA, in their own words or by a name that the module gave to such a question."""
    module = ast.parse(source)
    asking = {
        target.id
        for node in module.body
        if isinstance(node, ast.Assign) and "cuda" in ast.unparse(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    lines = []
    for node in ast.walk(module):
        condition = node.test if isinstance(node, ast.If) else node
        inner = node.body if isinstance(node, ast.If) else [node]
        calls = [c for part in inner for c in ast.walk(part) if isinstance(c, ast.Call)]
        if not any(isinstance(c.func, ast.Attribute) and c.func.attr in SKIPS for c in calls):
            continue
        if isinstance(node, ast.If) or (isinstance(node, ast.Call) and node.func.attr in SKIPS):
            names = {n.id for n in ast.walk(condition) if isinstance(n, ast.Name)}
            if "cuda.is_available" in ast.unparse(condition) or names & asking:
                lines.append(node.lineno)
    return lines


FORMS = {
    "a mark": "@pytest.mark.skipif(not torch.cuda.is_available(), reason='')\ndef test(): ...",
    "a name": "CUDA = torch.cuda.is_available()\n@pytest.mark.skipif(not CUDA, reason='')\ndef test(): ...",
    "a call": "def test():\n    if not torch.cuda.is_available():\n        pytest.skip('')",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_skip_that_asks_for_cuda_is_found(form):
    assert len(skips_without_cuda(FORMS[form])) == 1


@pytest.mark.parametrize("path", sorted({*TESTS.rglob("*.py")} - {TESTS / "conftest.py"}), ids=lambda path: path.stem)
def test_only_the_mark_gpu_asks_for_cuda(path):
    """So that `pytest -m gpu` selects everything that a machine without a GPU skips."""
    assert skips_without_cuda(path.read_text()) == []


def annotated(source):
    """Names of tests and fixtures with type annotations."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [
        f.name
        for f in functions
        if (f.name.startswith("test_") or any("fixture" in ast.unparse(d) for d in f.decorator_list))
        and (f.returns is not None or any(a.annotation is not None for a in (*f.args.args, *f.args.kwonlyargs)))
    ]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.stem)
def test_helpers_say_their_types_and_tests_and_fixtures_do_not(path):
    assert annotated("def test_it(x: int): ...") and annotated("@pytest.fixture\ndef it() -> int: ...")
    assert annotated(path.read_text()) == []
