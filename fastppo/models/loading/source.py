"""The source of a model's weights, and errors for sources that are no model of the transformers library."""

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

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # on the Hugging Face hub: MODEL or OWNER/MODEL

WAYS = "Give a Hugging Face hub name, a directory made by save_pretrained, or a directory with gguf_file."

# The models that the quickstart passes from one command to the next: the command that exports each, and its preset.
EXPORTED_BY: dict[str, tuple[Command[Any], str]] = {
    "runs/quickstart-sft/model": (SFT, "quickstart-sft"),
    "runs/quickstart-reward/reward_model": (REWARD, "quickstart-reward"),
}


@dataclass(frozen=True)
class Source:
    """The source of a model's weights."""

    setting: str  # that names the model, for messages
    name: str  # on the hub, a directory, or package:NAME
    gguf_file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.setting} = {self.name}"

    @property
    def place(self) -> str:
        """The name or path for transformers."""
        return str(locate(self.name))


def check_name(source: Source) -> None:
    """Raises ModelError for a path that does not exist and is no name on the hub, and for a directory with an adapter.

    For the first the error of transformers would say little; for the second it would load another model, the base.
    """
    packaged = source.name.startswith(PREFIX)
    if not packaged and not HUB_NAME.fullmatch(source.name) and not Path(source.name).exists():
        way = WAYS
        if (exported_by := EXPORTED_BY.get(str(Path(source.name)))) is not None:
            command, preset = exported_by
            way = f"`{command.call} --config {preset}` exports it, and `make demo` runs all commands of the quickstart."
        raise ModelError(f"{source}: there is no such directory. {way}")
    adapter = Path(source.name) / ADAPTER
    if not packaged and adapter.is_file():
        raise ModelError(_adapter_message(source, adapter))


ADAPTER = "adapter_config.json"


def check_library_model(source: Source, error: Exception) -> None:
    """Raises ModelError if the cause of transformers' error is an adapter on the hub, or code that a model contains."""
    if "trust_remote_code" in str(error):
        raise ModelError(
            f"{source} contains Python code (auto_map in its config), and fastppo does not run code that comes with"
            f" weights. Use a model of an architecture that transformers {transformers.__version__} has; many such"
            " models have a converted version, often with -hf in its name."
        ) from error
    check_no_adapter(source)


def check_no_adapter(source: Source) -> None:
    """Raises ModelError for an adapter on the hub, for which transformers would load its base model if it can."""
    if source.name.startswith(PREFIX) or Path(source.name).exists():  # checked by `check_name`
        return
    try:
        file = cached_file(source.name, ADAPTER, revision=source.revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # it does not exist or cannot be reached; loading it reports that
        return
    if file is not None:
        raise ModelError(_adapter_message(source, Path(file)))


def _adapter_message(source: Source, file: Path) -> str:
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    base = base or "BASE"
    return (
        f"{source} contains an adapter ({ADAPTER}) for {base} and no model. Merge it:"
        f' peft.AutoPeftModelForCausalLM.from_pretrained("{source.name}").merge_and_unload().save_pretrained("FOLDER"),'
        " save the tokenizer in the same folder, and give that. (A run with lora.export: merged exports a whole model.)"
    )
