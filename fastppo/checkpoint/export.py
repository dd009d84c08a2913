"""Exporting the trained model, the result of a run: to its place or, if that fails, to another one."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.checkpoint import atomic_dir
from fastppo.checkpoint.run_state import Run, random_state, set_random_state
from fastppo.checkpoint.save import BEST_CRITIC, Checkpoints
from fastppo.config import LoraConfig
from fastppo.distributed import World, all_gather
from fastppo.errors import FastPPOError
from fastppo.models import (
    ATTENTION,
    Backbone,
    Critic,
    ModelError,
    Policy,
    merged_state,
    save_adapters,
    save_value_model,
)
from fastppo.monitor import error_summary, flush_or_silence_stdout

log = logging.getLogger("fastppo")


class ExportError(FastPPOError):
    """A model is not in its place at the end of a run. The message says where it is, or which checkpoint has it."""


class ExportedModel(NamedTuple):
    """Where a trained model was to be written, and where it was written."""

    target: Path
    folder: Path | None  # None: it could not be written anywhere
    problem: str | None = None  # why it is not in `target`; None if it is


def write_model(
    role: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    lora: LoraConfig,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a trained model and its tokenizer so that transformers' `from_pretrained(folder)` loads them.

    LoRA adapters are merged. With `actor.lora.export` = adapters only the actor's adapters are written; peft, and
    transformers if peft is installed, then load them onto the actor's initial model. The value head of a shared critic
    is not part of a language model and is not written. The earlier content of `folder` is replaced when the new files
    are complete.

    state: weights to write instead of the model's current ones, under the same names.
    """
    model, draft = role.model, atomic_dir.begin(folder)
    if lora.rank and lora.exports_adapters:
        save_adapters(model, draft, state)
    else:
        model.set_attn_implementation("sdpa")  # fastppo's implementation is registered in this process only
        try:
            model.save_pretrained(draft, state_dict=merged_state(model, state) if lora.rank else state)
        finally:
            model.set_attn_implementation(ATTENTION)
    tokenizer.save_pretrained(draft)
    atomic_dir.replace(draft, folder)
    log.info("the trained model is in %s", folder)


def export_model(
    role: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    lora: LoraConfig,
    world: World,
    state: dict[str, Tensor] | None = None,
) -> ExportedModel:
    """Write a trained model with `write_model`, to another place if `folder` cannot be written; errors are logged.

    All ranks call it and get the same result; rank 0 writes.
    """
    exported = ExportedModel(folder, folder)
    if world.rank == 0:
        write = partial(write_model, role, tokenizer, lora=lora, state=state)
        weights = role.model.parameters() if state is None else state.values()
        exported = write_with_fallback(write, folder, sum(tensor.nbytes for tensor in weights))
    return all_gather(exported, world)[0]


def write_critic(
    role: Critic | Policy,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    run: Run,
    state: dict[str, Tensor] | None = None,
) -> str:
    """Write a trained value function and its tokenizer (`models.save_value_model`); returns how to load them.

    `about.json` in the folder says after how many steps of the run (`step`), and with which held-out score (`score`,
    null where it was not evaluated). The earlier content of `folder` is replaced when the new files are complete.

    role: with a value head; state: of the role, whole, given where its parameters are partitioned. Raises ModelError if
    transformers has no class that could load the backbone alone.
    """
    draft = atomic_dir.begin(folder)
    before = random_state()  # the form is tried on a small model, and a reward function's numbers should not change
    try:
        form = save_value_model(role, draft, state)
    finally:
        set_random_state(before)
    tokenizer.save_pretrained(draft)
    about = json.dumps({"step": run.step, "score": run.score}, indent=1)
    (draft / "about.json").write_text(about, encoding="utf-8")
    atomic_dir.replace(draft, folder)
    return form


def export_critic(
    role: Critic | Policy,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    run: Run,
    world: World,
    state: dict[str, Tensor] | None = None,
) -> ExportedModel:
    """Write a trained value function with `write_critic`, as `export_model` writes the actor. All ranks call it.

    One that no class of transformers could load is not written, and an error is logged: no other place would help.
    """

    def write(place: Path) -> None:
        try:
            log.info("the trained critic is in %s: %s", place, write_critic(role, tokenizer, place, run, state))
        except ModelError as error:
            shutil.rmtree(atomic_dir.unfinished(place), ignore_errors=True)
            log.error("the trained critic is not exported: %s", error)

    exported = ExportedModel(folder, folder)
    if world.rank == 0:
        weights = role.parameters() if state is None else state.values()
        exported = write_with_fallback(write, folder, sum(tensor.nbytes for tensor in weights))
    return all_gather(exported, world)[0]


def export_best_critic(
    role: Critic | Policy,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path,
    run: Run,
    world: World,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a trained value function into a checkpoint that is being written. Rank 0 writes.

    If that fails the error is logged, and the checkpoint is without it.
    """

    def write(folder: Path) -> None:
        form = write_critic(role, tokenizer, folder, run, state)
        log.info("the critic of step %d, the best so far, is in its checkpoint: %s", run.step, form)

    if world.rank == 0 and (problem := _attempt(write, checkpoint / BEST_CRITIC)) is not None:
        log.error("the critic of step %d, the best so far, could not be exported (%s)", run.step, problem)


def write_with_fallback(write: Callable[[Path], object], folder: Path, needed: int) -> ExportedModel:
    """Write to `folder` or, if that fails, to the first of the fallback places that works.

    write: writes to the folder it is called with; needed: bytes of its files.
    """
    problem = _attempt(write, folder)
    if problem is None:
        return ExportedModel(folder, folder)
    log.error("%s could not be written (%s); trying other places", folder, problem)
    for place in _fallback_places(folder):
        if (fallback := _free_name(place, folder, needed)) is None:
            continue
        fallback_problem = _attempt(write, fallback)
        if fallback_problem is None:
            log.error(
                "the trained model is in %s, because %s could not be written (%s). Move it there.",
                fallback,
                folder,
                problem,
            )
            return ExportedModel(folder, fallback, problem)
        log.error("%s could not be written either (%s)", fallback, fallback_problem)
    return ExportedModel(folder, None, problem)


def _attempt(write: Callable[[Path], object], folder: Path) -> str | None:
    """Call `write(folder)`; returns the error, None if there was none. After an error the incomplete files are deleted,
    since the disk may be full."""
    flush_or_silence_stdout()
    try:
        write(folder)
    except Exception as error:  # safetensors and transformers have their own exception types for a full disk
        shutil.rmtree(atomic_dir.unfinished(folder), ignore_errors=True)
        return error_summary(error)
    return None


def _fallback_places(folder: Path) -> Iterator[Path]:
    """Writable folders that may be on another disk: that of the run's folder, the temporary one, home, the current."""
    seen: set[Path] = set()
    for place in (folder.resolve().parent.parent, Path(tempfile.gettempdir()), Path.home(), Path.cwd()):
        if place not in seen and os.access(place, os.W_OK):
            yield place
        seen.add(place)


def _free_name(place: Path, folder: Path, needed: int) -> Path | None:
    """A path in `place` that does not exist yet; None if the disk has less than `needed` bytes free."""
    try:
        if shutil.disk_usage(place).free < needed:
            return None
    except OSError:
        return None
    name, n = f"{folder.resolve().parent.name}-{folder.name}", 1
    while (path := place / (name if n == 1 else f"{name}.{n}")).exists():
        n += 1
    return path


def replace_export(earlier: Sequence[ExportedModel], new: ExportedModel, world: World) -> ExportedModel:
    """Return the export of a better model, after deleting the earlier ones that are in a fallback place."""
    for old in earlier:
        if world.rank == 0 and old.folder not in (None, old.target) and new.folder not in (None, old.folder):
            shutil.rmtree(str(old.folder), ignore_errors=True)
    return new


def check_exports(exports: Sequence[ExportedModel], checkpoints: Checkpoints, run: Run) -> None:
    """Raise ExportError at the end of a run if one of its models is not in its place. All ranks call it.

    Before that, a checkpoint is saved if there is none of this step, so that the trained weights are not lost.
    """
    misplaced = [model for model in exports if model.problem is not None]
    if not misplaced:
        return
    problems = " ".join(
        f"{target} could not be written ({problem}); "
        + (f"the model is in {folder}: move it." if folder else "no other place could be written either.")
        for target, folder, problem in misplaced
    )
    error = checkpoints.save(run)
    resume = (
        f"`--resume auto` continues from {checkpoints.newest() or 'no checkpoint'}"
        if error is None
        else (f"{error} The newest checkpoint: {checkpoints.newest() or 'there is none'}")
    )
    raise ExportError(
        f"The run is complete, but its model is not in its place. {problems} Free some space or give write access;"
        f" {resume}."
    )
