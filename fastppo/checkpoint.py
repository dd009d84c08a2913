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
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastppo import durable
from fastppo.attention import ATTENTION
from fastppo.config import ActorLoraConfig, Config
from fastppo.data import PromptSet
from fastppo.engine import World, all_gather
from fastppo.estimate import recall_trunk
from fastppo.feedback import RewardError
from fastppo.folder import LINES, sizes
from fastppo.lora import merged_state, save_adapters
from fastppo.microbatch import plan_step
from fastppo.models import Policy
from fastppo.progress import Progress, set_random_state
from fastppo.resume import NAME, CheckpointError, Found, held_out_score, settings, versions
from fastppo.roles import Roles
from fastppo.stop import Stopped

log = logging.getLogger("fastppo")


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
        self._roles.residency.enter("checkpoint")
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
        plan = plan_step(packed.lengths, self._config, run.step, self._world.ranks, self._roles.attention)
        done = [minibatch for epoch in plan for minibatch in epoch][: max(len(run.updates), len(plan[0]))]
        self._roles.residency.enter("experience")
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

    def _save(self, run: Progress) -> str | None:
        """Write a checkpoint; returns what went wrong, the same on every rank. Nothing older is deleted then."""
        folder = self._folder / run.name
        if self._agree(str(folder.exists()) if self._world.rank == 0 else None) == "True":
            return None  # written before, or resumed from
        error = self._agree(self._attempt(lambda: durable.begin(folder)))
        if error is None:
            writer = durable.Writer(durable.unfinished(folder))
            self._roles.residency.enter("checkpoint")
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
        for name in LINES:
            if (self._output / name).exists():
                durable.sync(self._output / name)
        durable.finish(draft, folder, files)
        self._prune()

    def _about(self, run: Progress) -> dict[str, Any]:
        scored = self._config.eval.prompts and run.evaluated == run.step and run.experience is None
        return {
            "step": run.step,
            "ranks": self._world.ranks,
            "score": run.evaluations[-1].held_out if scored else None,
            "bytes": sizes(self._output),
            "prompts": self._prompts,
            "versions": versions(),
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


def export(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, lora: ActorLoraConfig) -> None:
    """Write the actor and its tokenizer so that `AutoModelForCausalLM.from_pretrained(folder)` loads them.

    Adapters are merged, or written alone: then peft, and where it is installed transformers too, loads them onto the
    model that the actor began as. A shared critic's value head is no part of a language model and stays behind.
    """
    model = policy.model
    if lora.rank and lora.export == "adapters":
        save_adapters(model, folder)
    else:
        model.set_attn_implementation("sdpa")  # ours is known in this process alone
        try:
            model.save_pretrained(folder, state_dict=merged_state(model) if lora.rank else None)
        finally:
            model.set_attn_implementation(ATTENTION)
    tokenizer.save_pretrained(folder)
    log.info("the trained actor is in %s", folder)
