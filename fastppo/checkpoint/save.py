"""What a run leaves behind: checkpoints to resume from bit for bit, and the actor as a Hugging Face directory.

A checkpoint is a folder `output`/checkpoints/step-N (N steps done) or step-N-update-U (and U updates of the next one,
where a run was told to stop). DeepSpeed writes weights, master weights and optimizer of each trained role and rank into
`actor` and `critic`; `progress.pt` and `rank-R.pt` hold the rest, `about.json` what it belongs to. `durable` makes it
whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.checkpoint import atomic_dir
from fastppo.checkpoint.resume import NAME, CheckpointError, Found, held_out_score, settings, versions
from fastppo.checkpoint.run_state import Run, set_random_state
from fastppo.config import AnyConfig, LoraConfig
from fastppo.distributed import Saved, Stopped, World, all_gather, clock
from fastppo.models import ATTENTION, Backbone, merged_state, save_adapters
from fastppo.monitor import LINES, sizes
from fastppo.rewards import RewardError

log = logging.getLogger("fastppo")

R = TypeVar("R", bound=Run)


class Checkpoints:
    """Saves and loads the checkpoints of a run. All ranks call each method at the same place."""

    def __init__(
        self,
        config: AnyConfig,
        engines: Mapping[str, Saved],
        data: Iterable[Sequence[Sequence[int]]],
        world: World,
        *,
        enter: Callable[[str], None] = lambda stage: None,
    ):
        """engines: what trains, by name; data: tokens that the run depends on; on resuming they must be what they were.

        enter: called with `checkpoint` before engines are saved or loaded (`Residency.enter`).
        """
        self._config, self._engines, self._world, self._enter = config, engines, world, enter
        self._output = Path(config.output)
        self.folder = self._output / "checkpoints"  # where they are
        digest, counts = hashlib.sha256(), []
        for part in data:
            counts.append(str(len(part)))
            for tokens in part:
                digest.update(array("q", [len(tokens), *tokens]))
        self._prompts = f"{'+'.join(counts)}-{digest.hexdigest()[:16]}"
        self._paths = " and ".join(f"{setting} = {path}" for setting, path in config.data_paths.items())

    def load(self, found: Found | None, run: R) -> R:
        """The run as it begins, goes on or goes back to, with the engines' weights and optimizers as they were."""
        if self._world.rank == 0:
            atomic_dir.remove_unfinished(self.folder)
        if found is None:
            return run
        if found.about["prompts"] != self._prompts:
            raise CheckpointError(
                f"{found.folder} was made with other data ({found.about['prompts']}, number and hash) than that of"
                f" {self._paths} now ({self._prompts}). Give the data as it was, or"
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
        """Checkpoints beyond the one gone back to, damaged or not wanted, must not be what `auto` takes next time.

        Of all that were ever set aside as many stay as of the others: a run that goes back often fills no disk.
        """
        for path in self.folder.glob("step-*"):
            if NAME.fullmatch(path.name) and path.name > folder.name:
                n = 1
                while (aside := path.with_name(f"aside-{path.name}.{n}")).exists():
                    n += 1
                path.rename(aside)
                log.warning("%s is beyond where this run goes on; it is now %s", path, aside.name)
        keep = self._config.checkpoint.keep_last + self._config.checkpoint.keep_best
        asides = sorted(self.folder.glob("aside-*"), key=lambda path: path.stat().st_mtime)  # when each was written
        for path in asides[: max(len(asides) - keep, 0)]:
            _remove(path)

    def save_if_due(self, run: Run) -> None:
        """A checkpoint every `checkpoint.every` steps. A failure is logged, unless `checkpoint.on_error` says stop."""
        every = self._config.checkpoint.every
        if every and run.step % every == 0:
            error = self.save(run)
            if error is not None and self._config.checkpoint.on_error == "stop":
                raise CheckpointError(f"{error} checkpoint.on_error is stop, so the run ends here.")
            if error is not None:
                log.error("%s The run goes on; %s stays.", error, self.newest() or "no older checkpoint")

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
            error = self.save(run)
            if error is not None:
                newest = self.newest()
                raise CheckpointError(f"{error} What is left is {newest or 'nothing to resume from'}.") from None
            log.info("saved; --resume auto goes on from %s", self.folder / run.name)
            raise

    def save(self, run: Run) -> str | None:
        """Write a checkpoint; returns what went wrong, the same on every rank. Nothing older is deleted then."""
        folder = self.folder / run.name
        if self._agree(str(folder.exists()) if self._world.rank == 0 else None) == "True":
            return None  # written before, or resumed from
        error = self._agree(self._attempt(lambda: self._begin(folder)))
        if error is None:
            writer = atomic_dir.Writer(atomic_dir.unfinished(folder))
            self._enter("checkpoint")
            for name, engine in self._engines.items():
                engine.save(writer.folder, name, writer.save)
            writer.save(run.random, writer.folder / f"rank-{self._world.rank:05d}.pt")
            failed = self._attempt(lambda: self._save_shared(run, writer))
            parts = all_gather((failed or writer.error, writer.files), self._world)
            error = next((e for e, _ in parts if e is not None), None)
            if error is None:
                files = [file for _, part in parts for file in part]
                error = self._agree(self._attempt(lambda: self._finish(writer.folder, folder, files, run.good)))
        if error is None:
            return None
        self._attempt(lambda: atomic_dir.remove_unfinished(self.folder))
        return f"The checkpoint {folder} could not be written ({error})."

    def _begin(self, folder: Path) -> None:
        """The folders of all engines too: an engine that cannot make its own would raise amid a collective."""
        draft = atomic_dir.begin(folder)
        for name in self._engines:
            (draft / name).mkdir()

    def _save_shared(self, run: Run, writer: atomic_dir.Writer) -> None:
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

    def _finish(self, draft: Path, folder: Path, files: list[atomic_dir.File], good: int | None) -> None:
        for name in LINES:
            if (self._output / name).exists():
                atomic_dir.sync(self._output / name)
        atomic_dir.finish(draft, folder, files)
        self._prune(good)

    def _about(self, run: Run) -> dict[str, Any]:
        return {
            "step": run.step,
            "ranks": self._world.ranks,
            "score": run.score,
            "bytes": sizes(self._output),
            "prompts": self._prompts,
            "clock": clock.reading(),
            "versions": versions(),
            "config": settings(self._config),
        }

    def newest(self) -> Path | None:
        return max((p for p in self.folder.glob("step-*") if NAME.fullmatch(p.name)), default=None)

    def _prune(self, good: int | None) -> None:
        """Keep the newest, the best, and the one that an alarm would go back to, `good` steps or fewer.

        A checkpoint that cannot be deleted is none the worse for it.
        """
        keep = self._config.checkpoint
        names = sorted(p.name for p in self.folder.glob("step-*") if NAME.fullmatch(p.name))
        scores = {name: held_out_score(self.folder / name) for name in names} if keep.keep_best else {}
        best = sorted((name for name, score in scores.items() if score is not None), key=lambda n: (scores[n], n))
        kept = {*names[-keep.keep_last :], *best[max(len(best) - keep.keep_best, 0) :]}
        if good is not None:  # none within a step, which may have learned from the batch that went bad
            kept.update([name for name in names if name <= f"step-{good:08d}" and "update" not in name][-1:])
        for name in names:
            if name not in kept:
                _remove(self.folder / name)


def _remove(path: Path) -> None:
    try:
        atomic_dir.remove(path)
    except OSError as error:
        log.warning("%s could not be deleted (%s)", path, error.strerror)


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
    model, draft = role.model, atomic_dir.begin(folder)
    if lora.rank and lora.exports_adapters:
        save_adapters(model, draft)
    else:
        model.set_attn_implementation("sdpa")  # ours is known in this process alone
        try:
            model.save_pretrained(draft, state_dict=merged_state(model, state) if lora.rank else state)
        finally:
            model.set_attn_implementation(ATTENTION)
    tokenizer.save_pretrained(draft)
    atomic_dir.replace(draft, folder)
    log.info("the trained model is in %s", folder)
