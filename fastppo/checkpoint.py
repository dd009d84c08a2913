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
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastppo import __version__, durable
from fastppo.attention import ATTENTION
from fastppo.config import Config
from fastppo.data import PromptSet
from fastppo.engine import World, all_gather
from fastppo.errors import FastPPOError
from fastppo.estimate import recall_trunk
from fastppo.microbatch import plan_step
from fastppo.models import Policy
from fastppo.progress import Progress, set_random_state
from fastppo.roles import Roles
from fastppo.stop import Stopped
from fastppo.track import METRICS

log = logging.getLogger("fastppo")

NAME = re.compile(r"step-\d{8}(-update-\d{4})?")

# Settings that may differ on resuming, since the run that comes out does not depend on them, or (health) since a user
# whose run an alarm has ended may think better of it ...
FREE: tuple[str, ...] = ("output", "resume", "timeout", "checkpoint.", "track.", "eval.every", "eval.show")
FREE += ("optim.max_skipped", "health.alarms", "health.window", "health.raise_kl", "health.roll_backs")
# ... or only in how it is rounded.
ROUNDING = ("threads", "ppo.microbatch_tokens", "sampling.rows", "optim.activation_checkpointing")


class CheckpointError(FastPPOError):
    """A checkpoint that cannot be used or written. The message says why, and the way out."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A whole checkpoint that fits this run's settings and ranks."""

    folder: Path
    about: Mapping[str, Any]

    @property
    def position(self) -> int:
        """The size of the run's metrics.jsonl at that time, in bytes."""
        return int(self.about["metrics_bytes"])


def find_checkpoint(config: Config, world: World) -> Found | None:
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


def _candidates(config: Config) -> list[Path]:
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


def _check_fit(folder: Path, about: Mapping[str, Any], config: Config, world: World) -> None:
    """Refuse a checkpoint of another number of ranks or of settings that make another run."""
    if about["ranks"] != world.ranks:
        raise CheckpointError(
            f"{folder} was written by {about['ranks']} rank(s), and this run has {world.ranks}: optimizer states are"
            f" split by rank. Resume with --num_accelerators {about['ranks']}; to go on with {world.ranks}, begin a new"
            " run from the actor's weights (--actor.model, with the first actor as --reference.model)."
        )
    then, now, fresh = dict(about["config"]), settings(config), settings(Config())
    for name in sorted({*then, *now}):
        old, new = then.get(name, fresh.get(name)), now.get(name, fresh.get(name))
        if old == new or name.startswith(FREE):
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


def settings(config: Config) -> dict[str, Any]:
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

    def __init__(self, config: Config, roles: Roles, prompts: tuple[PromptSet, PromptSet], world: World):
        """prompts: training and held-out; on resuming they must be what they were."""
        self._config, self._roles, self._world = config, roles, world
        self._output = Path(config.output)
        self._folder = self._output / "checkpoints"
        self._engines = {"actor": roles.actor} | ({} if roles.critic is None else {"critic": roles.critic})
        digest = hashlib.sha256()
        for tokens in (tokens for part in prompts for tokens in part.tokens):
            digest.update(array("q", [len(tokens), *tokens]))
        self._prompts = f"{'+'.join(str(len(p)) for p in prompts)}-{digest.hexdigest()[:16]}"

    def load(self, found: Found | None, run: Progress | None = None) -> Progress:
        """Where the run goes on, or `run` goes back to, with the roles' weights and optimizers as they were there."""
        run = run or Progress.begin(self._config, self._world.rank)
        if self._world.rank == 0:
            durable.remove_unfinished(self._folder)
        if found is None:
            return run
        if found.about["prompts"] != self._prompts:
            raise CheckpointError(
                f"{found.folder} was made with other prompts ({found.about['prompts']}, number and hash) than those of"
                f" data.path = {self._config.data.path} now ({self._prompts}). Give the data as it was, or"
                " --resume null to begin anew."
            )
        try:
            for name, engine in self._engines.items():
                engine.load(found.folder, name)
            state = torch.load(found.folder / "progress.pt", weights_only=False)
            own = torch.load(found.folder / f"rank-{self._world.rank:05d}.pt", weights_only=False)
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{found.folder} does not fit the models ({error}). If actor.model or critic.model changed since, give"
                " them as they were, or --resume null to begin anew."
            ) from error
        run.restore(state, own)
        if run.experience is not None:
            self._recall(run)
        if self._world.rank == 0:
            self._set_aside_newer(found.folder)
        set_random_state(run.random)
        return run

    def _recall(self, run: Progress) -> None:
        assert run.experience is not None
        packed = run.experience.packed
        plan = plan_step(packed.lengths, self._config, run.step, self._world.ranks)
        done = [minibatch for epoch in plan for minibatch in epoch][: max(len(run.updates), len(plan[0]))]
        trunk = recall_trunk(packed, done, self._roles, self._world)
        run.experience = dataclasses.replace(run.experience, trunk=trunk)

    def _set_aside_newer(self, folder: Path) -> None:
        """Checkpoints beyond the one resumed from, damaged or not wanted, must not be what `auto` takes next time."""
        for path in self._folder.glob("step-*"):
            if NAME.fullmatch(path.name) and path.name > folder.name:
                n = 1
                while (aside := path.with_name(f"aside-{path.name}.{n}")).exists():
                    n += 1
                path.rename(aside)
                log.warning("%s is beyond where this run goes on; it is now %s", path, aside.name)

    def save_if_due(self, run: Progress) -> None:
        """A checkpoint every `checkpoint.every` steps. A failure is logged, unless `checkpoint.on_error` says stop."""
        every = self._config.checkpoint.every
        if every and run.step % every == 0:
            error = self._save(run)
            if error is not None and self._config.checkpoint.on_error == "stop":
                raise CheckpointError(f"{error} checkpoint.on_error is stop, so the run ends here.")
            if error is not None:
                log.error("%s The run goes on; %s stays.", error, self._newest() or "no older checkpoint")

    @contextmanager
    def saved_when_stopped(self, run: Progress) -> Iterator[None]:
        """On `Stopped` the run is saved as it stands, and `Stopped` goes on. Raises CheckpointError if that fails."""
        try:
            yield
        except Stopped:
            log.info("told to stop at step %d; saving", run.step)
            error = self._save(run)
            if error is not None:
                newest = self._newest()
                raise CheckpointError(f"{error} What is left is {newest or 'nothing to resume from'}.") from None
            log.info("saved; --resume auto goes on from %s", self._folder / run.name)
            raise

    def _save(self, run: Progress) -> str | None:
        """Write a checkpoint; returns what went wrong, the same on every rank. Nothing older is deleted then."""
        folder = self._folder / run.name
        if self._agree(str(folder.exists()) if self._world.rank == 0 else None) == "True":
            return None  # written before, or resumed from
        error = self._agree(self._attempt(lambda: durable.begin(folder)))
        if error is None:
            writer = durable.Writer(durable.unfinished(folder))
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

    def _save_shared(self, run: Progress, writer: durable.Writer) -> None:
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
        durable.sync(self._output / METRICS)
        durable.finish(draft, folder, files)
        self._prune()

    def _about(self, run: Progress) -> dict[str, Any]:
        scored = self._config.eval.prompts and run.evaluated == run.step and run.experience is None
        return {
            "step": run.step,
            "ranks": self._world.ranks,
            "score": run.evaluations[-1].held_out if scored else None,
            "metrics_bytes": (self._output / METRICS).stat().st_size,
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
        scores = {name: held_out_score(self._folder / name) for name in names} if keep.keep_best else {}
        best = sorted((name for name, score in scores.items() if score is not None), key=lambda n: (scores[n], n))
        kept = {*names[-keep.keep_last :], *best[max(len(best) - keep.keep_best, 0) :]}
        for name in names:
            if name not in kept:
                try:
                    durable.remove(self._folder / name)
                except OSError as error:
                    log.warning("%s could not be deleted (%s)", self._folder / name, error.strerror)


def held_out_score(checkpoint: Path) -> float | None:
    """By which checkpoints are compared (`Evaluation.held_out`); None for one that was not evaluated."""
    try:
        about = json.loads((checkpoint / "about.json").read_text(encoding="utf-8"))
        return None if about["score"] is None else float(about["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def export(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the actor and its tokenizer so that `AutoModelForCausalLM.from_pretrained(folder)` loads them.

    A shared critic's value head is no part of a language model and stays behind.
    """
    model = policy.model
    model.set_attn_implementation("sdpa")  # ours is known in this process alone
    try:
        model.save_pretrained(folder)
    finally:
        model.set_attn_implementation(ATTENTION)
    tokenizer.save_pretrained(folder)
    log.info("the trained actor is in %s", folder)
