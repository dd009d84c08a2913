"""What a run leaves behind: checkpoints to resume from bit for bit, and the actor as a Hugging Face directory.

A checkpoint is a folder `output`/checkpoints/step-N (N steps done) or step-N-update-U (and U updates of the next one,
where a run was told to stop). DeepSpeed writes weights, master weights and optimizer of each trained role and rank into
`actor` and `critic`; `progress.pt` and `rank-R.pt` hold the rest, `about.json` what it belongs to. `durable` makes it
whole or absent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo import __version__, durable
from fastppo.attention import ATTENTION
from fastppo.config import ActorLoraConfig, AnyConfig, Config, LoraConfig
from fastppo.engine import Engine, World, all_gather
from fastppo.errors import FastPPOError
from fastppo.feedback import RewardError
from fastppo.folder import LINES, sizes
from fastppo.lora import merged_state, save_adapters
from fastppo.models import Backbone
from fastppo.progress import Run, set_random_state
from fastppo.stop import Stopped

log = logging.getLogger("fastppo")

NAME = re.compile(r"step-\d{8}(-update-\d{4})?")

# Settings that may differ on resuming, since the run that comes out does not depend on them ...
WHERE = ("output", "timeout", "checkpoint.", "track.", "zero.nvme_path", "zero.offload_frozen", "actor.lora.export")
FREE = (*WHERE, "plan", "sampling.cuda_graphs", "resume", "eval.show", "optim.max_skipped")
FREE_IN_PPO = ("eval.every",)  # before PPO, evaluations decide what is exported
OF_URL = ("timeout", "retries", "request_size", "concurrency")
# ... or only in how it is rounded.
ROUNDING = (
    *("attention", "threads", "ppo.microbatch_tokens", "sampling.rows", "optim.activation_checkpointing"),
    *("microbatch_tokens", "keep_trunk_gb"),  # before PPO
    "zero.deepspeed",
)


class CheckpointError(FastPPOError):
    """A checkpoint that cannot be used or written. The message says why, and the way out."""


R = TypeVar("R", bound=Run)


@dataclasses.dataclass(frozen=True)
class Found:
    """A whole checkpoint that fits this run's settings and ranks."""

    folder: Path
    about: Mapping[str, Any]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the run's files of lines at that time."""
        return {name: int(self.about["bytes"][name]) for name in LINES}


def find_checkpoint(config: AnyConfig, world: World) -> Found | None:
    """The checkpoint that `resume` asks for; None for a run from the start. All ranks call it.

    Raises CheckpointError if there are checkpoints and none can be used: beginning anew is for the user to decide.
    """
    if config.resume is None:
        return None
    candidates = all_gather(_candidates(config), world)[0]
    problems = []
    for folder in candidates:
        found = all_gather(durable.problem(folder, world.rank, world.ranks), world)
        problem = next((p for p in found if p is not None), None)
        if problem is None:
            about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
            _check_fit(folder, about, config, world)
            log.info("going on from %s", folder)
            return Found(folder, about)
        problems.append(f"{folder} cannot be used: {problem}.")
        log.error(problems[-1])
    if problems:
        raise CheckpointError(
            f"resume is {config.resume}, but no checkpoint is whole. {' '.join(problems)} Restore one of them, or give"
            " --resume null to begin anew."
        )
    log.info("resume is auto and %s has no checkpoint: the run begins at step 0", config.output)
    return None


def _candidates(config: AnyConfig) -> list[Path]:
    """The checkpoints to try, the newest first."""
    assert config.resume is not None
    folder = Path(config.output) / "checkpoints"
    if config.resume == "auto":
        return sorted((p for p in folder.glob("step-*") if NAME.fullmatch(p.name)), reverse=True)
    chosen = Path(config.resume)
    if not chosen.is_dir():
        raise CheckpointError(
            f"resume is {chosen}, and there is no such folder. Give auto, or one of {_names(folder)}."
        )
    if chosen.resolve().parent != folder.resolve() or not NAME.fullmatch(chosen.resolve().name):
        raise CheckpointError(
            f"resume is {chosen}, which is no checkpoint of output = {config.output}; a run goes on in its own folder."
            f" Give auto, one of {_names(folder)}, or the --output that the checkpoint belongs to."
        )
    return [folder / chosen.resolve().name]


def _names(folder: Path) -> str:
    found = sorted(str(p) for p in folder.glob("step-*") if NAME.fullmatch(p.name))
    return ", ".join(found) or f"those in {folder} (it has none)"


def _check_fit(folder: Path, about: Mapping[str, Any], config: AnyConfig, world: World) -> None:
    """Refuse a checkpoint of another number of ranks or of settings that make another run."""
    if about["ranks"] != world.ranks:
        raise CheckpointError(
            f"{folder} was written by {about['ranks']} rank(s), and this run has {world.ranks}: optimizer states are"
            f" split by rank. Resume with --num_accelerators {about['ranks']}; to go on with {world.ranks}, begin a new"
            " run from the actor's weights (--actor.model, with the first actor as --reference.model)."
        )
    then, now, fresh = dict(about["config"]), settings(config), settings(type(config)())
    free = (*FREE, *FREE_IN_PPO) if isinstance(config, Config) else FREE
    for name in sorted({*then, *now}):
        old, new = then.get(name, fresh.get(name)), now.get(name, fresh.get(name))
        if old == new or name.startswith(free) or (name == "rewards" and _said_alike(old) == _said_alike(new)):
            continue
        if name in ROUNDING:
            log.warning("%s was %s and is %s: the run goes on, but not bit for bit as it would have", name, old, new)
        elif name == "steps" and config.optim.schedule == "constant":
            log.info("steps was %s and is %s", old, new)
        else:
            hint = " (the learning rate falls to 0 at the last step; set from the start, optim.schedule constant lets"
            hint = f"{hint} steps change)" if name == "steps" else ""
            raise CheckpointError(
                f"{name} is {json.dumps(new)}, but {folder} was made with {json.dumps(old)}{hint}. Resume with"
                f" --{name} {json.dumps(old)}, or give --resume null to begin anew."
            )
    for library, old in about["versions"].items():
        if old != (new := _versions()[library]):
            log.warning("%s was %s and is %s: bits may differ", library, old, new)


def _said_alike(rewards: Any) -> list[dict[str, Any]]:
    """The sources without where a service is and how it is asked: it may have moved, and says what it said."""
    return [{k: v is not None if k == "url" else v for k, v in r.items() if k not in OF_URL} for r in rewards]


def settings(config: AnyConfig) -> dict[str, Any]:
    """Every setting by its dotted name, as JSON has it."""

    def flat(group: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in group.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield prefix + name, json.loads(json.dumps(value))

    return dict(flat(dataclasses.asdict(config), ""))


def _versions() -> dict[str, str]:
    return {"fastppo": __version__, "torch": torch.__version__, "deepspeed": version("deepspeed")}


class Checkpoints:
    """Saves and loads the checkpoints of a run. All ranks call each method at the same place."""

    def __init__(
        self,
        config: AnyConfig,
        engines: Mapping[str, Engine],
        data: Iterable[Sequence[Sequence[int]]],
        world: World,
        *,
        enter: Callable[[str], None] = lambda stage: None,
    ):
        """engines: what trains, by name; data: tokens for training and held-out; on resuming it must be what it was.

        enter: called with `checkpoint` before engines are saved or loaded (`Residency.enter`).
        """
        self._config, self._engines, self._world, self._enter = config, engines, world, enter
        self._output = Path(config.output)
        self._folder = self._output / "checkpoints"
        digest, counts = hashlib.sha256(), []
        for part in data:
            counts.append(str(len(part)))
            for tokens in part:
                digest.update(array("q", [len(tokens), *tokens]))
        self._prompts = f"{'+'.join(counts)}-{digest.hexdigest()[:16]}"

    def load(self, found: Found | None, run: R) -> R:
        """The run, as it begins or goes on, with the engines' weights and optimizers as they were there."""
        if self._world.rank == 0:
            durable.remove_unfinished(self._folder)
        if found is None:
            return run
        if found.about["prompts"] != self._prompts:
            raise CheckpointError(
                f"{found.folder} was made with other data ({found.about['prompts']}, number and hash) than that of"
                f" data.path = {self._config.data.path} now ({self._prompts}). Give the data as it was, or"
                " --resume null to begin anew."
            )
        self._enter("checkpoint")
        try:
            for name, engine in self._engines.items():
                engine.load(found.folder, name)
            state = torch.load(found.folder / "progress.pt", weights_only=False)
            own = torch.load(found.folder / f"rank-{self._world.rank:05d}.pt", weights_only=False)
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{found.folder} does not fit the models ({error}). If a model changed since, give"
                " them as they were, or --resume null to begin anew."
            ) from error
        run.restore(state, own)
        if self._world.rank == 0:
            self._set_aside_newer(found.folder)
        set_random_state(run.random)
        return run

    def _set_aside_newer(self, folder: Path) -> None:
        """Checkpoints beyond the one resumed from, damaged or not wanted, must not be what `auto` takes next time."""
        for path in self._folder.glob("step-*"):
            if NAME.fullmatch(path.name) and path.name > folder.name:
                n = 1
                while (aside := path.with_name(f"aside-{path.name}.{n}")).exists():
                    n += 1
                path.rename(aside)
                log.warning("%s is beyond where this run goes on; it is now %s", path, aside.name)

    def save_if_due(self, run: Run) -> None:
        """A checkpoint every `checkpoint.every` steps. A failure is logged, unless `checkpoint.on_error` says stop."""
        every = self._config.checkpoint.every
        if every and run.step % every == 0:
            error = self._save(run)
            if error is not None and self._config.checkpoint.on_error == "stop":
                raise CheckpointError(f"{error} checkpoint.on_error is stop, so the run ends here.")
            if error is not None:
                log.error("%s The run goes on; %s stays.", error, self._newest() or "no older checkpoint")

    @contextmanager
    def saved_when_stopped(self, run: Run) -> Iterator[None]:
        """When told to stop or failed by a source of reward, save the run as it stands; the exception goes on.

        Raises CheckpointError if that fails. A source that fails in the first step has cost nothing yet.
        """
        try:
            yield
        except (Stopped, RewardError) as reason:
            if isinstance(reason, RewardError) and run.step == 0:
                raise
            why = "told to stop" if isinstance(reason, Stopped) else "a source of reward failed"
            log.info("%s at step %d; saving", why, run.step)
            error = self._save(run)
            if error is not None:
                newest = self._newest()
                raise CheckpointError(f"{error} What is left is {newest or 'nothing to resume from'}.") from None
            log.info("saved; --resume auto goes on from %s", self._folder / run.name)
            raise

    def _save(self, run: Run) -> str | None:
        """Write a checkpoint; returns what went wrong, the same on every rank. Nothing older is deleted then."""
        folder = self._folder / run.name
        if self._agree(str(folder.exists()) if self._world.rank == 0 else None) == "True":
            return None  # written before, or resumed from
        error = self._agree(self._attempt(lambda: durable.begin(folder)))
        if error is None:
            writer = durable.Writer(durable.unfinished(folder))
            self._enter("checkpoint")
            for name, engine in self._engines.items():
                engine.save(writer.folder, name, writer.save)
            writer.save(run.random, writer.folder / f"rank-{self._world.rank:05d}.pt")
            failed = self._attempt(lambda: self._save_shared(run, writer))
            parts = all_gather((failed or writer.error, writer.files), self._world)
            error = next((e for e, _ in parts if e is not None), None)
            if error is None:
                files = [file for _, part in parts for file in part]
                error = self._agree(self._attempt(lambda: self._finish(writer.folder, folder, files)))
        if error is None:
            return None
        self._attempt(lambda: durable.remove_unfinished(self._folder))
        return f"The checkpoint {folder} could not be written ({error})."

    def _save_shared(self, run: Run, writer: durable.Writer) -> None:
        writer.save(run.state(), writer.folder / "progress.pt")
        writer.save_text(json.dumps(self._about(run), indent=1), writer.folder / "about.json")

    def _agree(self, said: str | None) -> str | None:
        """What the first rank with something to say says, on every rank."""
        return next((x for x in all_gather(said, self._world) if x is not None), None)

    def _attempt(self, work: Callable[[], object]) -> str | None:
        """Let rank 0 do it; returns the error."""
        if self._world.rank == 0:
            try:
                work()
            except OSError as error:
                return f"{error.strerror or error}"
        return None

    def _finish(self, draft: Path, folder: Path, files: list[durable.File]) -> None:
        for name in LINES:
            if (self._output / name).exists():
                durable.sync(self._output / name)
        durable.finish(draft, folder, files)
        self._prune()

    def _about(self, run: Run) -> dict[str, Any]:
        return {
            "step": run.step,
            "ranks": self._world.ranks,
            "score": run.score,
            "bytes": sizes(self._output),
            "prompts": self._prompts,
            "versions": _versions(),
            "config": settings(self._config),
        }

    def _newest(self) -> Path | None:
        return max((p for p in self._folder.glob("step-*") if NAME.fullmatch(p.name)), default=None)

    def _prune(self) -> None:
        """Keep the newest and the best; a checkpoint that cannot be deleted is none the worse for it."""
        keep = self._config.checkpoint
        names = sorted(p.name for p in self._folder.glob("step-*") if NAME.fullmatch(p.name))
        scores = {name: self._score(name) for name in names} if keep.keep_best else {}
        best = sorted((name for name, score in scores.items() if score is not None), key=lambda n: (scores[n], n))
        kept = {*names[-keep.keep_last :], *best[max(len(best) - keep.keep_best, 0) :]}
        for name in names:
            if name not in kept:
                try:
                    durable.remove(self._folder / name)
                except OSError as error:
                    log.warning("%s could not be deleted (%s)", self._folder / name, error.strerror)

    def _score(self, name: str) -> float | None:
        try:
            about = json.loads((self._folder / name / "about.json").read_text(encoding="utf-8"))
            return None if about["score"] is None else float(about["score"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def export(
    role: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    lora: LoraConfig,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a trained model and its tokenizer so that transformers' `from_pretrained(folder)` loads them.

    Adapters are merged, or of an actor written alone: then peft, and where it is installed transformers too, loads them
    onto the model that the actor began as. A shared critic's value head is no part of a language model and stays
    behind. What is in `folder` gives way once the new files are whole.

    state: weights to write in the place of the model's own, under the same names.
    """
    model, draft = role.model, durable.begin(folder)
    if lora.rank and isinstance(lora, ActorLoraConfig) and lora.export == "adapters":
        save_adapters(model, draft)
    else:
        model.set_attn_implementation("sdpa")  # ours is known in this process alone
        try:
            model.save_pretrained(draft, state_dict=merged_state(model, state) if lora.rank else state)
        finally:
            model.set_attn_implementation(ATTENTION)
    tokenizer.save_pretrained(draft)
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)
    log.info("the trained model is in %s", folder)
