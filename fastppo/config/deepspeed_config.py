"""What DeepSpeed is told: a configuration made from the settings, with a user's own JSON merged in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastppo.config.commands.ppo import AnyConfig, Config
from fastppo.config.learning import OptimConfig, ZeroConfig
from fastppo.config.run import Names
from fastppo.errors import ConfigError

JSON = dict[str, Any]

# DeepSpeed measures the gradient norm only while it clips, and the norm is a metric of every run.
NO_CLIPPING = 1e9


class _Varies:
    """In the place of a value that the settings decide, but that is not one number of the whole run."""


VARIES = _Varies()


def trained(optim: OptimConfig, zero: ZeroConfig, names: Names = Config.names) -> JSON:
    """The configuration of a role that is trained; names: for errors."""
    config = _common(optim, zero) | {
        "gradient_clipping": optim.max_grad_norm or NO_CLIPPING,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
    }
    if zero.stage == 1 and optim.dtype == "bf16":
        # Each gradient is added to an fp32 sum where it arrives and freed, and the sums travel as they are: else all
        # gradients stay in bf16 until the pass is over, and the sums are rounded to bf16 (on a single rank too).
        config["bf16"]["immediate_grad_update"] = True
        config["communication_data_type"] = "fp32"
    if zero.optimizer_on != "none":
        config["zero_optimization"]["offload_optimizer"] = _place(zero.optimizer_on, zero)
    if zero.parameters_on != "none":
        config["zero_optimization"]["offload_param"] = _place(zero.parameters_on, zero)
    return _merged(config, optim, zero, names)


def frozen(optim: OptimConfig, zero: ZeroConfig) -> JSON:
    """The configuration of a role that is only asked, at stage 3."""
    config = _common(optim, zero)
    if zero.frozen_on != "none":
        config["zero_optimization"]["offload_param"] = _place(zero.frozen_on, zero)
    return _merged(config, optim, zero, trains=False)


def _common(optim: OptimConfig, zero: ZeroConfig) -> JSON:
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's own counting of batches is not used
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": optim.dtype == "bf16"},
        "zero_optimization": {"stage": zero.stage},
        "steps_per_print": None,
    }


def _place(device: str, zero: ZeroConfig) -> JSON:
    return {"device": device} | ({"nvme_path": zero.nvme_path} if device == "nvme" else {})


def check(config: AnyConfig) -> None:
    """Raises ConfigError for a raw configuration that cannot be read or contradicts a setting."""
    trained(config.optim, config.zero, config.names)


def _decided(optim: OptimConfig, zero: ZeroConfig, names: Names) -> dict[str, tuple[str, Any]]:
    """Keys that the settings decide, with the settings and the value that follows. A key stands for all below it."""
    path = "zero_optimization"
    off = ("optim.dtype", False)
    return {
        "train_batch_size": (names.batch_size, VARIES),
        "train_micro_batch_size_per_gpu": (names.microbatch, VARIES),
        "gradient_accumulation_steps": (names.microbatch, VARIES),
        "gradient_clipping": ("optim.max_grad_norm", optim.max_grad_norm),
        "bf16.enabled": ("optim.dtype", optim.dtype == "bf16"),
        "fp16.enabled": off,
        "amp.enabled": off,
        "torch_autocast.enabled": off,
        "data_types.grad_accum_dtype": ("optim.dtype", "fp32"),
        "optimizer.type": ("optim", "AdamW"),
        "optimizer.params.lr": (names.learning_rate, VARIES),
        "optimizer.params.betas": ("optim.betas", list(optim.betas)),
        "optimizer.params.eps": ("optim.eps", optim.eps),
        "optimizer.params.weight_decay": ("optim.weight_decay", optim.weight_decay),
        "optimizer": ("optim", VARIES),
        "scheduler": ("optim.schedule and optim.warmup_steps", VARIES),
        "zero_allow_untested_optimizer": ("zero.stage", True),
        "zero_force_ds_cpu_optimizer": ("zero.offload_optimizer", True),
        f"{path}.stage": ("zero.stage", zero.stage),
        f"{path}.cpu_offload": ("zero.offload_optimizer", False),  # names of old
        f"{path}.cpu_offload_params": ("zero.offload_parameters", False),
        f"{path}.offload_optimizer.device": ("zero.offload_optimizer", zero.optimizer_on),
        f"{path}.offload_optimizer.nvme_path": ("zero.nvme_path", zero.nvme_path),
        f"{path}.offload_param.device": ("zero.offload_parameters", zero.parameters_on),
        f"{path}.offload_param.nvme_path": ("zero.nvme_path", zero.nvme_path),
    }


def _merged(
    ours: JSON, optim: OptimConfig, zero: ZeroConfig, names: Names = Config.names, *, trains: bool = True
) -> JSON:
    """`ours` with what the file `zero.deepspeed` adds; what it says of offload is for roles that train.

    Raises ConfigError where it says something else than a setting.
    """
    if zero.deepspeed is None:
        return ours
    decided = _decided(optim, zero, names)
    for path, value in _leaves(_read(zero.deepspeed)):
        name = ".".join(path)
        if any(key.startswith(f"{name}.") for key in decided) and value != {}:
            raise ConfigError(f"zero.deepspeed is {zero.deepspeed}, and {name} there is {value!r}, not a JSON object.")
        if value in ("auto", {}):
            continue
        key = next((key for key in decided if name == key or name.startswith(f"{key}.")), None)
        if key is None:
            if trains or "offload_" not in name:
                _put(ours, path, value)
            continue
        setting, made = decided[key]
        if value != made:
            makes = "" if made is VARIES else f", which makes it {json.dumps(made)}"
            raise ConfigError(
                f"zero.deepspeed is {zero.deepspeed}, and {name} there is {json.dumps(value)}, but it follows from"
                f' {setting}{makes}. Set {setting}, and take {name} out of the file or make it "auto".'
            )
    return ours


def _read(path: str) -> JSON:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"zero.deepspeed is {path}, which cannot be read as JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ConfigError(f"zero.deepspeed is {path}, which holds {type(content).__name__} and not a JSON object.")
    return content


def _leaves(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _put(tree: JSON, path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
