"""Where a model's weights come from, and what is wrong with places that hold no model of transformers' own."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers.utils.hub import cached_file

from fastppo.config import REWARD, SFT, Command
from fastppo.data import PREFIX, locate
from fastppo.errors import ModelError

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # on the Hugging Face hub: of a model, or of its owner and the model

WAYS = "Give a Hugging Face hub name, a directory made by save_pretrained, or a directory with gguf_file."

# What the quickstart's runs hand on, and the command that leaves it with its preset.
LEFT_BY: dict[str, tuple[Command[Any], str]] = {
    "runs/quickstart-sft/model": (SFT, "quickstart-sft"),
    "runs/quickstart-reward/reward_model": (REWARD, "quickstart-reward"),
}


@dataclass(frozen=True)
class Source:
    """Where a model's weights come from."""

    setting: str  # its name in the config, for errors
    name: str  # on the hub, a directory, or package:NAME
    gguf_file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.setting} = {self.name}"

    @property
    def place(self) -> str:
        """What transformers takes it by."""
        return str(locate(self.name))


def check_name(source: Source) -> None:
    """Raises ModelError for a path that is not there and can be no name on the hub, of which transformers' errors say
    little, and for a directory that holds an adapter, of which transformers would load another model."""
    packaged = source.name.startswith(PREFIX)
    if not packaged and not HUB_NAME.fullmatch(source.name) and not Path(source.name).exists():
        way = WAYS
        if (left_by := LEFT_BY.get(str(Path(source.name)))) is not None:
            command, preset = left_by
            way = f"It is left by `{command.call} --config {preset}`, and `make demo` runs all of the quickstart."
        raise ModelError(f"{source}: there is no such directory. {way}")
    adapter = Path(source.name) / ADAPTER
    if not packaged and adapter.is_file():
        raise ModelError(_of_adapter(source, adapter))


ADAPTER = "adapter_config.json"


def check_own_kind(source: Source, error: Exception) -> None:
    """Raises ModelError where the error of transformers' comes from an adapter on the hub, or from code of its own."""
    if "trust_remote_code" in str(error):
        raise ModelError(
            f"{source} brings code of its own (auto_map in its config), and fastppo runs none that comes with weights."
            f" Use a model of an architecture that transformers {transformers.__version__} has; of many such models"
            " there are conversions, often with -hf in their name."
        ) from error
    check_no_adapter(source)


def check_no_adapter(source: Source) -> None:
    """Raises ModelError for an adapter on the hub: beside a config.json, transformers loads the model that it names."""
    if source.name.startswith(PREFIX) or Path(source.name).exists():  # seen by `check_name`
        return
    try:
        found = cached_file(source.name, ADAPTER, revision=source.revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # there is no such place, or it cannot be reached, which its own files tell
        return
    if found is not None:
        raise ModelError(_of_adapter(source, Path(found)))


def _of_adapter(source: Source, file: Path) -> str:
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    base = base or "BASE"
    return (
        f"{source} holds an adapter ({ADAPTER}) for {base} and no model. Merge it:"
        f' peft.AutoPeftModelForCausalLM.from_pretrained("{source.name}").merge_and_unload().save_pretrained("FOLDER"),'
        " the tokenizer into the same folder, and give that. (A run with lora.export: merged leaves the whole model.)"
    )
