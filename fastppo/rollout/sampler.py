"""What every rollout engine is to the trainer, and the one sampler of a run, which training and evaluation ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from fastppo.config import ResponseSettings
from fastppo.data import Prompts, Rollout
from fastppo.distributed import Sleeper, Stopped
from fastppo.errors import RAISED, FastPPOError, has_own_message, line_of
from fastppo.models import SampledModel
from fastppo.rollout.answers import SamplerError, check_rollout


class Sampler(Protocol):
    """A rollout engine. All ranks call each method at the same place.

    One that has GPU memory of its own is a `fastppo.distributed.Sleeper` too: it sleeps outside the phases that sample.
    What it held may be lost then: `sync` follows on each `wake`.
    """

    def sync(self) -> None:
        """Bring the actor's present weights here. They stay valid, and the same, until the next `sync` or `sleep`.

        Called before the first `sample`, and before the next one after each change of the weights, once.
        """

    def sample(self, prompts: Prompts, *, temperature: float, seed: int) -> Rollout:
        """One response of 1 to `sampling.max_new_tokens` tokens to each of this rank's prompts, on the CPU.

        Only the engine in process is given responses that have begun, or a limit by which to extend them.
        A response depends on the weights, its prompt's tokens and stream, temperature and seed. Its logprobs are those
        of the distribution that each token was drawn from. There may be no prompts. Ranks wait for none but those that
        they sample together with: one that is told to stop leaves by `stop.check_alone`, such a group by
        `stop.check_among`.
        """


class ActorSampler:
    """The sampler of a run: an engine that is kept in step with the actor's weights and whose rollouts are checked.

    As a `Sleeper` it takes its engine with it.
    """

    def __init__(
        self,
        setting: str,
        engine: Sampler,
        roles: SampledModel,
        config: ResponseSettings,
        stop_ids: Sequence[int],
        folder: Path | None = None,
    ):
        """setting: as errors name the engine; folder: where its file lies if it is the user's."""
        self.stop_ids = tuple(stop_ids)  # tokens that end a response
        self._setting, self._engine, self._roles, self._folder = setting, engine, roles, folder
        self._sampling, self._seed = config.sampling, config.seed
        self._vocabulary: int = roles.policy.model.config.get_text_config().vocab_size
        self._version: int | None = None  # of the weights that the engine has; None: it has none

    def sync(self) -> None:
        """Let the engine have the actor's present weights; nothing to do if it has them. All ranks call it."""
        version = self._roles.version
        if self._version != version:
            with explained(self._setting, self._folder):
                self._engine.sync()
            self._version = version

    def sample(self, prompts: Prompts, *, temperature: float | None = None, seed: int | None = None) -> Rollout:
        """See `Sampler.sample`; what is left out is as the run trains: `sampling.temperature` and `seed`.

        `sync` comes first. To be called within `stop.together`. Raises SamplerError where the engine fails or returns
        something else than a response to each prompt.
        """
        assert self._version == self._roles.version, "sync() comes before sample(), or stale weights would answer"
        temperature = self._sampling.temperature if temperature is None else temperature
        with explained(self._setting, self._folder):
            rollout = self._engine.sample(prompts, temperature=temperature, seed=self._seed if seed is None else seed)
        check_rollout(
            rollout, prompts, self._setting, longest=self._sampling.max_new_tokens, vocabulary=self._vocabulary
        )
        return rollout

    def sleep(self) -> None:
        self._version = None
        if isinstance(self._engine, Sleeper):
            with explained(self._setting, self._folder):
                self._engine.sleep()

    def wake(self) -> None:
        if isinstance(self._engine, Sleeper):
            with explained(self._setting, self._folder):
                self._engine.wake()


@contextmanager
def explained(setting: str, folder: Path | None) -> Iterator[None]:
    """Within this context an engine runs; what the user's own raises becomes a SamplerError that says where.

    folder: where its file lies if it is the user's; what another engine raises is a fault of ours and goes on as it is.
    """
    try:
        yield
    except (FastPPOError, Stopped):
        raise
    except RAISED as error:
        if folder is None or has_own_message(error):
            raise
        raise SamplerError(f"{setting} raised {type(error).__name__}: {error} ({line_of(error, folder)})") from error
