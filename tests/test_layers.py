"""The layers of the package: imports point down only, and the kernels have few doors."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastppo"


def imported(module: Path) -> set[str]:
    """Full names of all modules and names that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_point_down_only() -> None:
    linter = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    run = subprocess.run([sys.executable, "-c", linter], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_only_ops_reaches_the_kernels() -> None:
    doors = ("fastppo.kernels", "fastppo._C")
    modules = [path for path in PACKAGE.rglob("*.py") if "kernels" not in path.parts]
    users = {path.stem for path in modules if any(name.startswith(doors) for name in imported(path))}
    assert users == {"registration"}


def test_the_kernels_import_torch_triton_and_each_other_alone() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        roots = {name.split(".")[0] for name in imported(path) if not name.startswith("fastppo.kernels.")}
        assert roots - set(sys.stdlib_module_names) <= {"torch", "triton"}, path.name


def test_no_module_hides_one_of_the_standard_library() -> None:
    # `deepspeed fastppo/train.py` puts this folder first on sys.path.
    assert not {path.stem for path in PACKAGE.iterdir()} & set(sys.stdlib_module_names)
