"""The rooms of the package: imports point down only and through doors, and rooms stay small."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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


def test_imports_point_down_only():
    linter = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    run = subprocess.run([sys.executable, "-c", linter], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_room_has_a_door_that_nobody_goes_past():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    guarded = {module for contract in settings["contracts"] for module in contract.get("protected_modules", ())}
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert guarded == {f"fastppo.{room}.*" for room in rooms}


def test_a_door_loads_a_module_only_when_something_of_it_is_wanted():
    code = (
        "import sys; from fastppo.config import Config, HealthConfig, validate; import fastppo.report.__main__;"
        "from fastppo.monitor import begin_folder, trend; raise SystemExit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "room", sorted(path.parent for path in PACKAGE.rglob("__init__.py")), ids=lambda room: room.name
)
def test_rooms_have_at_most_a_dozen_modules_and_modules_350_lines(room):
    modules = list(room.glob("*.py"))
    assert len(modules) <= (16 if room.name == "report" else 12)
    for module in modules:
        assert lines(module) <= 350, module


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_files_of_kernels_and_csrc_have_at_most_350_lines():
    files = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "csrc").iterdir()]
    assert len(files) > 20 and max(map(lines, files)) <= 350


def test_only_ops_reaches_the_kernels():
    doors = ("fastppo.kernels", "fastppo._C")
    modules = [path for path in PACKAGE.rglob("*.py") if "kernels" not in path.parts]
    users = {path.stem for path in modules if any(name.startswith(doors) for name in imported(path))}
    assert users == {"registration"}


def test_the_kernels_import_torch_triton_each_other_and_log_once_alone():
    allowed = ("fastppo.kernels.", "fastppo.errors.log_once")
    for path in (ROOT / "kernels").rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path) if not name.startswith(allowed)}
        assert roots - set(sys.stdlib_module_names) <= {"torch", "triton"}, path.name


def test_no_module_hides_one_of_the_standard_library():
    # `deepspeed fastppo/train.py` puts this folder first on sys.path.
    assert not {path.stem for path in PACKAGE.iterdir()} & set(sys.stdlib_module_names)
