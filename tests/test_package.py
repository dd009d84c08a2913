"""What is installed: the extension, the symlinked kernels, the pins."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import fastppo
from fastppo import _C

ROOT = Path(__file__).parent.parent


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_version_is_the_installed_one():
    assert fastppo.__version__ == importlib.metadata.version("fastppo")


def test_the_extension_tells_what_was_built():
    built = _C.built()
    assert built["torch"] == torch.__version__.split("+")[0]
    assert built["compiler"] and built["simd"][-1] == "baseline" and built["simd_used"] in built["simd"]
    assert built["cuda_archs"] == ()


def test_importing_the_extension_registers_the_ops():
    schema = str(torch.ops.fastppo.attend_cached.default._schema)
    assert "Tensor(a!) key_cache, Tensor(b!) value_cache" in schema


def test_the_extension_uses_nothing_of_torch_but_its_stable_interface():
    nm = shutil.which("nm")
    assert nm, "nm comes with g++"
    symbols = subprocess.run([nm, "-D", "-C", "-u", _C.__file__], capture_output=True, text=True, check=True).stdout
    unstable = re.findall(r"\bU ((?:at|c10|torch|caffe2)::.*)", symbols)
    assert not unstable
    assert "torch_parallel_for" in symbols


def test_an_import_leaves_torch_alone():
    # --help answers at once.
    code = "import sys, fastppo; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_kernels_is_a_symlink_and_no_top_level_package():
    assert (ROOT / "fastppo/kernels").is_symlink() and (ROOT / "fastppo/kernels").samefile(ROOT / "kernels")
    assert not (ROOT / "kernels/__init__.py").exists()
    assert "kernels" not in (importlib.metadata.distribution("fastppo").read_text("top_level.txt") or "").split()


def test_every_folder_of_the_package_is_installed():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    modules = {path.parent.relative_to(ROOT) for path in (ROOT / "fastppo").rglob("*.py")}
    kernels = {Path("fastppo") / path.parent.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    assert set(named) == {".".join(folder.parts) for folder in modules | kernels} | {"fastppo.presets"}


@pytest.mark.parametrize("where", ["build-system", "Makefile"])
def test_torch_has_one_version_everywhere(where):
    text = (ROOT / "pyproject.toml" if where == "build-system" else ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"torch==([\w.]+)", text)) == {pins()["torch"]}


def test_what_is_installed_is_what_is_pinned():
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in pins()}
    assert installed == pins()
