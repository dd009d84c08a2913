"""Writing, loading and deleting the checkpoints of a run, from which it resumes bit for bit.

A checkpoint is a folder `output`/checkpoints/step-N (after N steps) or step-N-update-U (after U updates of the next
step, if a run was stopped during it; in ReST also step-N-grow-B, after B batches of its Grow). DeepSpeed writes
weights, master weights and optimizer states of each trained role and rank into `actor` and `critic`; `progress.pt` and
`rank-R.pt` contain the rest of the state, and `about.json` the settings, data and versions that it belongs to.
`atomic_dir` makes the folder complete or absent.

With `checkpoint.keep_best` the best evaluated checkpoint also has its critic as a model in `critic_model`, and the link
`output`/critic-best leads there. Being part of its checkpoint it is complete, deleted and set aside with it; the state
of a run does not depend on it, so that it is not in the manifest.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastppo.checkpoint import atomic_dir
from fastppo.checkpoint.resume import NAME, Checkpoint, CheckpointError, held_out_score, settings, versions
from fastppo.checkpoint.run_state import Run, saved_random_state, set_random_state
from fastppo.config import TrainingConfig
from fastppo.distributed import LayoutError, Saved, Stopped, World, all_gather, clock, in_phase
from fastppo.environments import ConversationError
from fastppo.monitor import JSONL_FILES, file_sizes
from fastppo.rewards import RewardError

log = logging.getLogger("fastppo")

R = TypeVar("R", bound=Run)

# After which a run is saved, since what it has done is whole.
CAUSES: Mapping[type[Exception], str] = {
    Stopped: "stopped by a signal",
    RewardError: "a source of reward failed",
    ConversationError: "the environment failed",
}
BEST_CRITIC = "critic_model"  # in the best evaluated checkpoint
LINK = "critic-best"  # in `output`, to it


class Checkpoints:
    """Saves and loads the checkpoints of a run. All ranks call each method at the same place."""

    def __init__(
        self,
        config: TrainingConfig,
        engines: Mapping[str, Saved],
        data: Iterable[Sequence[Sequence[int]]],
        world: World,
        *,
        holding: Callable[[str], AbstractContextManager[object]] = nullcontext,
        export_best: Callable[[Path, Run], object] | None = None,
    ):
        """engines: what is trained, by name. data: the tokens that the run depends on; they must be the same on
        resuming. holding: `Residency.holding`, entered with `checkpoint` while engines are saved or loaded.
        export_best: writes the critic as `BEST_CRITIC` into the folder of a checkpoint that is not complete yet, and
        logs its errors; all ranks call it. None: there is no critic.
        """
        self._config, self._engines, self._world, self._holding = config, engines, world, holding
        self._export_best = export_best
        self._output = Path(config.output)
        self.folder = self._output / "checkpoints"
        self._data_id = data_id(data)
        self._paths = " and ".join(f"{setting} = {path}" for setting, path in config.data_paths.items())

    def load(self, checkpoint: Checkpoint | None, run: R) -> R:
        """Restore `run`, the weights and the optimizers from a checkpoint, and return `run`; None: leave it unchanged.

        Newer checkpoints are renamed (`_set_aside_newer`). Raises CheckpointError.
        """
        if self._world.rank == 0:
            atomic_dir.remove_unfinished(self.folder)
        if checkpoint is None:
            return run
        if checkpoint.about["prompts"] != self._data_id:
            raise CheckpointError(
                f"{checkpoint.folder} was made with other data ({checkpoint.about['prompts']}, number and hash) than"
                f" {self._paths} has now ({self._data_id}). Restore the data, or give --resume null to start a new run."
            )
        with self._holding("checkpoint"):
            try:
                for name, engine in self._engines.items():
                    engine.load(checkpoint.folder, name)
                state = torch.load(checkpoint.folder / "progress.pt", weights_only=False)
                ranks, seed = checkpoint.about["ranks"], self._config.seed
                rank_state = saved_random_state(checkpoint.folder, ranks, seed, self._world)
            except LayoutError as error:
                raise CheckpointError(f"{checkpoint.folder} cannot be continued like this: {error}") from error
            except (OSError, RuntimeError, KeyError, ValueError) as error:
                raise CheckpointError(
                    f"{checkpoint.folder} does not fit the models ({error}). If a model has changed since, restore it,"
                    " or give --resume null to start a new run."
                ) from error
        run.restore(state, rank_state)
        if self._world.rank == 0:
            self._set_aside_newer(checkpoint.folder)
            self._link_best()
        set_random_state(run.random)
        return run

    def _set_aside_newer(self, folder: Path) -> None:
        """Rename the checkpoints that are newer than `folder`, so that `--resume auto` does not choose them next time.

        Of the renamed ones, the newest `keep_last + keep_best` are kept, so that many rollbacks do not fill the disk.
        """
        for path in self.folder.glob("step-*"):
            if NAME.fullmatch(path.name) and path.name > folder.name:
                n = 1
                while (aside := path.with_name(f"aside-{path.name}.{n}")).exists():
                    n += 1
                path.rename(aside)
                log.warning("%s is newer than the checkpoint of this run; it is renamed to %s", path, aside.name)
        keep = self._config.checkpoint.keep_last + self._config.checkpoint.keep_best
        asides = sorted(self.folder.glob("aside-*"), key=lambda path: path.stat().st_mtime)  # oldest first
        for path in asides[: max(len(asides) - keep, 0)]:
            _remove(path)

    def save_if_due(self, run: Run) -> None:
        """Save a checkpoint every `checkpoint.every` steps, as `save_or_tell` does."""
        every = self._config.checkpoint.every
        if every and run.step % every == 0:
            self.save_or_tell(run)

    def save_or_tell(self, run: Run) -> None:
        """Save a checkpoint. A failure is logged; with `checkpoint.on_error` = stop it raises CheckpointError."""
        error = self.save(run)
        if error is not None and self._config.checkpoint.on_error == "stop":
            raise CheckpointError(f"{error} checkpoint.on_error is stop, so the run ends here.")
        if error is not None:
            newest = self.newest()
            log.error("%s The run continues. The newest checkpoint: %s.", error, newest or "there is none")

    @contextmanager
    def saved_when_stopped(self, run: Run) -> Iterator[None]:
        """Save a checkpoint if a stop signal, or the error of a reward source or an environment, ends the code inside,
        and raise it again.

        Raises CheckpointError if saving fails. After such an error in the first step nothing is saved, as there is
        nothing to lose.
        """
        try:
            yield
        except tuple(CAUSES) as exception:
            if not isinstance(exception, Stopped) and run.name == f"step-{0:08d}":
                raise
            cause = next(cause for kind, cause in CAUSES.items() if isinstance(exception, kind))
            log.info("%s at step %d; saving a checkpoint", cause, run.step)
            error = self.save(run)
            if error is not None:
                newest = self.newest()
                raise CheckpointError(f"{error} The newest checkpoint: {newest or 'there is none'}.") from None
            log.info("saved; --resume auto continues from %s", self.folder / run.name)
            raise

    def save(self, run: Run) -> str | None:
        """Write a checkpoint, then delete old ones; returns the error, the same on every rank, or None.

        After an error no older checkpoint is deleted.
        """
        folder = self.folder / run.name
        if self._first_message(str(folder.exists()) if self._world.rank == 0 else None) == "True":
            return None  # already written, or the run has resumed from it
        with in_phase("saving a checkpoint"):
            return self._write(run, folder)

    def _write(self, run: Run, folder: Path) -> str | None:
        error = self._first_message(self._attempt(lambda: self._create_draft(folder)))
        if error is None:
            writer = atomic_dir.Writer(atomic_dir.unfinished(folder))
            with self._holding("checkpoint"):
                for name, engine in self._engines.items():
                    engine.save(writer.folder, name, writer.save)
            writer.save(run.random, writer.folder / f"rank-{self._world.rank:05d}.pt")
            shared_error = self._attempt(lambda: self._save_shared(run, writer))
            written = all_gather((shared_error or writer.error, writer.files), self._world)
            error = next((rank_error for rank_error, _ in written if rank_error is not None), None)
            if error is None:
                if self._export_best is not None and self._is_best(run):
                    self._export_best(writer.folder, run)
                files = [file for _, rank_files in written for file in rank_files]
                error = self._first_message(self._attempt(lambda: self._finish(writer.folder, folder, files, run.good)))
        if error is None:
            return None
        self._attempt(lambda: atomic_dir.remove_unfinished(self.folder))
        return f"The checkpoint {folder} could not be written ({error})."

    def _create_draft(self, folder: Path) -> None:
        """Create the temporary folder with those of the engines: if an engine failed to create its folder, it would
        raise while the other ranks wait in a collective."""
        draft = atomic_dir.begin(folder)
        for name in self._engines:
            (draft / name).mkdir()

    def _save_shared(self, run: Run, writer: atomic_dir.Writer) -> None:
        """Write the files that exist once for all ranks."""
        writer.save(run.state(), writer.folder / "progress.pt")
        writer.save_text(json.dumps(self._about(run), indent=1), writer.folder / "about.json")

    def _first_message(self, message: str | None) -> str | None:
        """The message of the lowest rank that has one, on every rank; None if no rank has one. A collective."""
        return next((text for text in all_gather(message, self._world) if text is not None), None)

    def _attempt(self, work: Callable[[], object]) -> str | None:
        """Call `work` on rank 0 only; returns the text of an OSError there, otherwise None."""
        if self._world.rank == 0:
            try:
                work()
            except OSError as error:
                return f"{error.strerror or error}"
        return None

    def _finish(self, draft: Path, folder: Path, files: list[atomic_dir.File], good: int | None) -> None:
        """Rename the complete checkpoint to its final name, after syncing the JSONL files, and delete old ones."""
        for name in JSONL_FILES:
            if (self._output / name).exists():
                atomic_dir.sync(self._output / name)
        atomic_dir.finish(draft, folder, files)
        self._link_best()
        self._prune(good)

    def _about(self, run: Run) -> dict[str, Any]:
        return {
            "step": run.step,
            "ranks": self._world.ranks,
            "score": run.score,
            "bytes": file_sizes(self._output),
            "prompts": self._data_id,
            "clock": clock.reading(),
            "versions": versions(),
            "config": settings(self._config),
        }

    def newest(self) -> Path | None:
        """The newest checkpoint; None if there is none."""
        return max((p for p in self.folder.glob("step-*") if NAME.fullmatch(p.name)), default=None)

    def _is_best(self, run: Run) -> bool:
        """Whether `keep_best` is set, and no checkpoint that is there has a higher score than this one.

        The same on every rank. A collective.
        """
        if run.score is None or self._config.checkpoint.keep_best == 0:
            return False
        higher = self._world.rank == 0 and (best := self._best()) is not None and best[0] > run.score
        return self._first_message(str(higher) if self._world.rank == 0 else None) == "False"

    def _best(self) -> tuple[float, Path] | None:
        """Score and folder of the checkpoint with the highest score, of equal ones the newest; None without scores."""
        paths = [path for path in self.folder.glob("step-*") if NAME.fullmatch(path.name)]
        return max(((score, path) for path in paths if (score := held_out_score(path)) is not None), default=None)

    def _link_best(self) -> None:
        """Let the link lead to the critic of the best checkpoint that there is; without one there is no link.

        Rank 0 only. An error is logged.
        """
        if self._export_best is None:
            return
        link, best = self._output / LINK, self._best() if self._config.checkpoint.keep_best else None
        try:
            if best is not None and (best[1] / BEST_CRITIC).is_dir():
                draft = atomic_dir.unfinished(link)
                draft.unlink(missing_ok=True)
                draft.symlink_to(Path(self.folder.name, best[1].name, BEST_CRITIC))
                draft.replace(link)
            elif link.is_symlink():
                link.unlink()
        except OSError as error:
            log.error("%s could not be made to lead to the best critic (%s)", link, error.strerror or error)

    def _prune(self, good: int | None) -> None:
        """Delete all checkpoints but the newest, the best, and the one that an alarm would roll back to: the newest
        after at most `good` steps. If one cannot be deleted, a warning is logged.
        """
        keep = self._config.checkpoint
        names = sorted(p.name for p in self.folder.glob("step-*") if NAME.fullmatch(p.name))
        scores = {name: held_out_score(self.folder / name) for name in names} if keep.keep_best else {}
        best = sorted((name for name, score in scores.items() if score is not None), key=lambda n: (scores[n], n))
        retained = {*names[-keep.keep_last :], *best[max(len(best) - keep.keep_best, 0) :]}
        if good is not None:  # not one within a step: it may have learned from the batch that raised the alarm
            retained.update([name for name in names if name <= f"step-{good:08d}" and name.count("-") == 1][-1:])
        for name in names:
            if name not in retained:
                _remove(self.folder / name)


def data_id(data: Iterable[Sequence[Sequence[int]]]) -> str:
    """Number and hash of the sequences of tokens in each part of the data."""
    digest, counts = hashlib.sha256(), []
    for part in data:
        counts.append(str(len(part)))
        for tokens in part:
            digest.update(array("q", [len(tokens), *tokens]))
    return f"{'+'.join(counts)}-{digest.hexdigest()[:16]}"


def _remove(path: Path) -> None:
    try:
        atomic_dir.remove(path)
    except OSError as error:
        log.warning("%s could not be deleted (%s)", path, error.strerror)
