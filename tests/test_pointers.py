"""What comments, docstrings and pages name in backticks is there, or .ci/pointers.py finds it."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci/pointers.py"
SOURCES = {
    "fastppo/__init__.py": "",
    "fastppo/config.py": '''
        class PPOConfig:
            lam: float = 0.95
            """Of GAE."""

        class Config:
            ppo: PPOConfig
        ''',
    "fastppo/learning/__init__.py": """
        import importlib

        DOOR = {"update": "fastppo.learning.steps"}

        def __getattr__(name):
            return getattr(importlib.import_module(DOOR[name]), name)
        """,
    "fastppo/learning/steps.py": """
        from fastppo.config import PPOConfig

        class Update:
            loss: float

            def __init__(self):
                self.norm = 0.0

        def update(batch): ...
        """,
    "tests/test_steps.py": "def test_one(): ...",
    "docs/page.md": "",
}
RIGHT = [
    "fastppo.learning.steps",
    "fastppo.learning.steps.Update.loss",
    "fastppo.learning.update(batch)",  # through the door
    "fastppo.learning.steps.PPOConfig.lam",  # imported there
    "steps.update",
    "Update.norm",
    "ppo.lam",
    "--ppo.lam",
    "python -m fastppo.learning.steps",
    "steps.py",
    "fastppo/learning/steps.py",
    "tests/test_steps.py::test_one",
    "fastppo/learning/",
    "torch.compile",
    "metrics.jsonl",
    "runs/ppo",
    "lam / 2",
]
WRONG = [
    "fastppo.learn",
    "fastppo.learning.steps.gone",
    "fastppo.learning.gone",
    "fastppo.learning.steps.PPOConfig.gone",
    "steps.gone",
    "Update.gone",
    "ppo.gone",
    "--ppo.gone",
    "gone.py",
    "fastppo/steps.py",
    "tests/test_steps.py::test_gone",
    "fastppo/gone/",
]
PLACES = {
    "a docstring": ("fastppo/here.py", '"""About this.\n\nSee `{}`."""\n', 3),
    "a function's": ("tests/test_here.py", 'def test_two():\n    """See `{}`."""\n', 2),
    "a comment": ("bench/here.py", "import torch\n\n# See\n# `{}`.\n", 4),
    "a page": ("docs/page.md", "# A page\n\n```python\nin_code.py\n```\n\nSee `{}`.\n", 7),
}


def repository(folder: Path) -> Path:
    """A small one."""
    for name, source in SOURCES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line.removeprefix(" " * 8) for line in source.splitlines()))
    (folder / "bench").mkdir()
    return folder


def broken(folder: Path) -> list[str]:
    run = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True)
    assert not run.stderr and run.returncode == bool(run.stdout), run.stderr
    return run.stdout.splitlines()


@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_there_is_found_with_its_line_and_what_is_there_is_not(tmp_path, place):
    folder, (path, text, line) = repository(tmp_path), PLACES[place]
    words = [*RIGHT, *WRONG]
    (folder / path).write_text("".join(text.format(word) for word in words))
    lines = {word: text.count("\n") * i + line for i, word in enumerate(words)}
    found = broken(folder)
    expected = [f"{path}:{lines[word]}: `{word}`: " for word in WRONG]
    assert len(found) == len(WRONG) and all(map(str.startswith, found, expected)), "\n".join(found)


def test_names_that_a_file_imports_from_elsewhere_or_gives_itself_are_its_own(tmp_path):
    folder = repository(tmp_path)
    (folder / "fastppo/here.py").write_text('"""`steps.gone`, `ppo.gone`."""\nfrom torch import steps\nppo = 1\n')
    assert broken(folder) == []


def test_everything_here_points_at_what_is_there():
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
