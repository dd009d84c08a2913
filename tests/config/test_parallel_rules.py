"""What `parallel.sequence` may be, and how it divides ranks into groups."""

import pytest

from fastppo.config import ParallelConfig
from fastppo.config.commands.offline import ModelConfig, PairsConfig, RewardTrainingConfig
from fastppo.config.commands.ppo import Config
from fastppo.config.validation.learning import check_batch, check_parallel
from fastppo.config.validation.offline import validate_reward
from fastppo.errors import ConfigError


def test_groups_are_ranks_over_parallel_sequence():
    assert check_parallel(Config(), 6) == 6
    assert check_parallel(Config(parallel=ParallelConfig(2)), 6) == 3


@pytest.mark.parametrize(
    ("sequence", "ranks", "words"),
    [
        (2, 1, r"parallel.sequence is 2 and there is 1 rank: .* Set parallel.sequence to 1, or start 2 ranks"),
        (4, 6, r"parallel.sequence is 4 and there are 6 ranks: .* Set parallel.sequence to 2, or start 8 ranks"),
    ],
)
def test_ranks_that_make_no_whole_groups_are_refused_with_the_way_out(sequence, ranks, words):
    with pytest.raises(ConfigError, match=words):
        check_parallel(Config(parallel=ParallelConfig(sequence)), ranks)


def test_a_batch_is_divided_among_groups():
    config = Config(parallel=ParallelConfig(4))
    check_batch(config, 2)
    with pytest.raises(ConfigError, match=r"divided equally among 3 groups of 4 ranks \(parallel.sequence\)"):
        check_batch(config, 3)
    reward = RewardTrainingConfig(
        batch_size=5, model=ModelConfig("m"), data=PairsConfig("d"), parallel=ParallelConfig(2)
    )
    with pytest.raises(ConfigError, match=r"batch_size is 5 and there are 2 groups of 2 ranks"):
        validate_reward(reward, 4)
