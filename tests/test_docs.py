"""The reference of settings in docs/: each setting that a command has, as its config class says it."""

import json
import sys
from pathlib import Path

import pytest

from fastppo.config.command_line import GENERATE, PPO, REWARD, SFT

sys.path.insert(0, str(Path(__file__).parent.parent / "docs" / "_ext"))

reference = pytest.importorskip("settings_reference", reason="Sphinx is not installed")


@pytest.mark.parametrize("command", [PPO, REWARD, SFT, GENERATE], ids=lambda command: command.script)
def test_every_setting_is_there_with_its_meaning_and_its_default(command):
    rows = {
        name.replace("[]", ""): (kind, default, said) for name, kind, default, said in reference.settings(command.root)
    }
    assert set(rows) == set(command.settings)
    assert all(said for _, _, said in rows.values())
    for name, (_, default, _) in rows.items():
        holder = command.root()
        for part in name.split(".")[:-1]:
            holder = getattr(holder, part)
        if not isinstance(holder, tuple):  # an item of a list has its own class
            expected = getattr(holder, name.rpartition(".")[2])
            assert json.loads(default) == json.loads(json.dumps(expected)), name
