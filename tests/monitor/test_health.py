"""Alarms: each illness is seen before it is over, a healthy run raises none, and settings say what is held to what."""

import dataclasses
import json
import math
from functools import cache
from itertools import pairwise

import made_up_batches as made_up
import numpy as np
import pytest
import tiny
import torch

from fastppo.config import AlarmConfig, Config, HealthConfig, PPOConfig, PPORolloutConfig, RewardConfig
from fastppo.config.health import FIGURES
from fastppo.monitor.health import Health, _last_good_step, judge_turn, watch
from fastppo.monitor.health_metrics import sampler_kl
from fastppo.monitor.trend_tests import slope, trend

TOKENIZER = tiny.tokenizer()
JUDGED = HealthConfig(judge=(RewardConfig(function="mine:judge"),))
STEPS, ILL_FROM, ILL_FOR = 40, 15, 12


def config(*alarms: AlarmConfig, **changes) -> Config:
    health = dataclasses.replace(JUDGED, alarms=alarms, **changes)
    return Config(health=health, ppo=PPOConfig(kl_kind="exact"))


@cache
def run(illness=None, settings=None, *, seed=0, steps=STEPS, approx_kl=0.01):
    """The alarms of a run that falls ill at step 15 and gets worse for twelve steps, and what was seen of it."""
    kept, settings = Health(), settings or config()
    for step in range(1, steps + 1):
        experience = made_up.healthy(step, seed)
        far = min(max(step - ILL_FROM, 0) / ILL_FOR, 1.0)
        if illness is not None and far > 0:
            experience = illness(experience, far)
        watch(experience, [made_up.update(approx_kl)], kept, settings, TOKENIZER)
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_raises_no_alarm(seed):
    kept = run(seed=seed)
    assert kept.alarms == []
    assert set(kept.history) >= set(FIGURES) and all(len(x) == STEPS for x in kept.history.values())


ILLNESSES = {
    made_up.words_run_out: ["distinct_1", "distinct_2", "distinct_3", "self_bleu"],
    made_up.one_response: ["duplicates", "self_bleu", "distinct_2"],
    made_up.it_repeats_itself: ["repetition"],
    made_up.one_length: ["length_spread"],
    made_up.entropy_falls: ["entropy"],
    made_up.it_drifts: ["kl_token", "kl_exact", "perplexity"],
    made_up.the_sampler_strays: ["sampler_error"],
    made_up.few_tokens_outweigh_the_others: ["effective_samples"],
    made_up.the_sampler_is_an_old_policy: ["sampler_kl"],
    made_up.the_judge_falls: ["judge", "judge_gap", "judge_turn"],
    made_up.length_pays: ["length_correlation"],
    made_up.a_phrase_pays: ["rewarded_phrase"],
    made_up.a_token_pays: ["rewarded_phrase"],
}
SEEN_APART = {"kl_sequence", "kl_exact_sequence", "approx_kl"}  # below


@pytest.mark.parametrize(("illness", "figures"), ILLNESSES.items(), ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("seed", range(2))
def test_each_illness_is_seen_in_the_figures_meant_for_it(illness, figures, seed):
    alarms = run(illness, seed=seed).alarms
    assert {alarm.figure for alarm in alarms} >= set(figures)
    assert all(alarm.step > ILL_FROM and alarm.good <= alarm.step - 2 for alarm in alarms)
    assert all(f"{alarm.figure} is" in alarm.message for alarm in alarms)


def far_off(experience, far):
    return made_up.it_drifts(experience, 4 * far)


def test_drift_of_whole_responses_and_of_an_update_are_seen_too():
    whole = ("kl_sequence", "kl_exact_sequence")
    assert {a.figure for a in run(far_off).alarms} >= set(whole)
    sooner = run(made_up.it_drifts, config(*(AlarmConfig(name, 30.0) for name in whole)))
    assert {a.figure for a in sooner.alarms} >= set(whole)
    assert {a.figure for a in run(approx_kl=1.2).alarms} == {"approx_kl"}


def never_by_the_reference(experience, far):
    ref_logprobs = experience.ref_logprobs.clone()
    ref_logprobs[0] = -math.inf
    return dataclasses.replace(experience, ref_logprobs=ref_logprobs)


def test_a_figure_that_is_infinite_is_beyond_its_level():
    alarms = run(never_by_the_reference).alarms
    assert {"kl_token", "perplexity"} <= {a.figure for a in alarms}
    assert {a.value for a in alarms if a.figure == "perplexity"} == {math.inf}


def test_shorter_responses_that_pay_are_seen_as_longer_ones_are():
    def shortness_pays(experience, far):
        return dataclasses.replace(experience, scores=-made_up.length_pays(experience, far).scores)

    alarm = next(a for a in run(shortness_pays).alarms if a.figure == "length_correlation")
    assert alarm.value < -0.7


def test_the_judge_turns_only_while_the_score_rises():
    def both_fall(experience, far):
        return dataclasses.replace(experience, scores=experience.scores - far, judged=experience.judged - far)

    assert not {"judge_turn", "judge_gap"} & {a.figure for a in run(both_fall).alarms}


def test_a_judge_that_wanders_has_not_turned():
    """Means near those before look like trends to a test that takes them as independent."""
    turns = 0
    for seed in range(20):
        chance, kept, mean = np.random.default_rng(seed), Health(), 0.0
        for step in range(50):
            mean = 0.8 * mean + 0.6 * chance.normal(0, 1 / math.sqrt(32))
            kept.add({"score": 0.01 * step, "judge": mean, "judge_std": 1.0})
            turns += judge_turn(kept, responses=32, window=3) > 2.6
    assert turns <= 3  # of 1,000 steps; 60 if the size of the fall did not count


def test_a_judge_that_says_the_same_of_all_at_first_has_a_gap_once_it_does_not():
    def silent(experience, far):
        return dataclasses.replace(experience, judged=torch.zeros_like(experience.judged))

    kept, settings = Health(), config()
    for step in range(1, 8):
        experience = made_up.healthy(step)
        watch(experience if step > 5 else silent(experience, 1), [made_up.update()], kept, settings, TOKENIZER)
    gaps = kept.history["judge_gap"]
    assert all(map(math.isnan, gaps[:5])) and all(map(math.isfinite, gaps[5:]))


def test_a_figure_that_is_newer_than_the_run_is_counted_in_the_runs_steps():
    """Of an older run's checkpoint; the step that its alarm names is one of the run, and nothing is made of the gap."""
    kept, settings = Health(), config()
    for step in range(1, 20):
        if step == 11:
            del kept.history["effective_samples"]
        experience = made_up.healthy(step)
        if step > 15:
            experience = made_up.few_tokens_outweigh_the_others(experience, 1.0)
        watch(experience, [made_up.update()], kept, settings, TOKENIZER)
    assert all(len(values) == 19 for values in kept.history.values())
    alarms = {alarm.figure: (alarm.step, alarm.good) for alarm in kept.alarms}
    assert alarms == {"sampler_kl": (17, 15), "effective_samples": (17, 15)}


@pytest.mark.parametrize(
    "earlier",
    [{"ppo": PPOConfig(kl_kind="exact", steps_ahead=1)}, {"rollout": PPORolloutConfig(partial_tokens=3)}],
    ids=["ahead", "partial"],
)
def test_where_earlier_policies_sample_their_distance_has_a_level_and_the_error_of_one_has_none(earlier):
    def figures(*alarms):
        settings = dataclasses.replace(config(*alarms), **earlier)
        return {alarm.figure for alarm in run.__wrapped__(made_up.the_sampler_is_an_old_policy, settings).alarms}

    found = figures()
    assert "sampler_kl" in found and "sampler_error" not in found
    assert "sampler_error" in figures(AlarmConfig("sampler_error", 0.2))


def test_the_kl_of_the_sampler_is_that_of_its_tokens_by_hand():
    drawn, trained = torch.tensor([0.5, 0.25, 0.125]).log(), torch.tensor([0.25, 0.5, 0.125]).log()
    batch = dataclasses.replace(made_up.batch([[1, 2, 3]]), sampler_logprobs=drawn, old_logprobs=trained)
    # rho is 1/2, 2 and 1, and k3 rho - 1 - log rho
    assert sampler_kl(batch) == pytest.approx(((0.5 - 1 + math.log(2)) + (2 - 1 - math.log(2)) + 0) / 3)
    assert sampler_kl(made_up.healthy(1)) == 0


def test_updates_that_were_not_applied_do_not_hide_how_far_the_others_went():
    kept = Health()
    skipped = dataclasses.replace(made_up.update(math.nan), skipped=1)
    checkup = watch(made_up.healthy(1), [made_up.update(0.3), skipped], kept, config(), TOKENIZER)
    assert checkup.metrics["health/approx_kl"] == pytest.approx(0.3)
    none = watch(made_up.healthy(2), [skipped], kept, config(), TOKENIZER)
    assert math.isnan(none.metrics["health/approx_kl"]) and none.alarms == []


def test_the_approximate_kl_of_a_step_is_the_mean_of_its_updates():
    kept = Health()
    checkup = watch(made_up.healthy(1), [made_up.update(0.0), made_up.update(0.3)], kept, config(), TOKENIZER)
    assert checkup.metrics["health/approx_kl"] == pytest.approx(0.15)


def test_each_figure_has_an_illness_that_it_must_see():
    assert {figure for figures in ILLNESSES.values() for figure in figures} | SEEN_APART == set(FIGURES)


def test_a_collapse_is_seen_before_distinct_2_is_half_of_what_it_was():
    kept = run(made_up.one_response, config(AlarmConfig("distinct_2", 0.8, "stop")))
    alarm = next(a for a in kept.alarms if a.level == "act")
    distinct = kept.history["distinct_2"]
    assert alarm.action == "stop" and distinct[alarm.step - 1] > distinct[0] / 2
    assert alarm.threshold == pytest.approx(0.8 * np.mean(distinct[:3])) and ILL_FROM <= alarm.good < alarm.step


def test_the_alarm_of_a_hack_names_the_phrase_and_where_the_judge_turned():
    alarms = {a.figure: a for a in run(made_up.a_phrase_pays).alarms}
    assert "Phrases: " in alarms["rewarded_phrase"].message and "of the responses" in alarms["rewarded_phrase"].message
    turn = next(a for a in run(made_up.the_judge_falls).alarms if a.figure == "judge_turn")
    assert "the judge was highest at step 1" in turn.message and "sqrt(KL)" in turn.message


def odd_batches(kept, settings, odd):
    """A healthy run in which the batches of these steps have collapsed."""
    for step in range(1, 31):
        experience = made_up.healthy(step)
        if step in odd:
            experience = made_up.one_response(experience, 1.0)
        watch(experience, [made_up.update()], kept, settings, TOKENIZER)
    return kept.alarms


def test_one_odd_batch_raises_no_alarm_and_two_in_a_row_do():
    assert odd_batches(Health(), config(), {12, 20}) == []
    assert {a.step for a in odd_batches(Health(), config(), {20, 21})} == {21}
    assert {a.step for a in odd_batches(Health(), config(window=1), {20})} == {20}


def test_an_alarm_that_stays_on_is_raised_again_after_ten_steps_only():
    steps = [a.step for a in run(made_up.entropy_falls, steps=60).alarms if a.figure == "entropy"]
    assert len(steps) > 2 and {b - a for a, b in pairwise(steps)} == {10}


def test_a_level_of_the_settings_takes_the_place_of_the_standing_warning_or_takes_it_away():
    strict = run(settings=config(AlarmConfig("kl_token", 0.2))).alarms
    assert {a.figure for a in strict} == {"kl_token"} and strict[0].threshold == 0.2 and strict[0].level == "warn"
    assert "entropy" not in {a.figure for a in run(made_up.entropy_falls, config(AlarmConfig("entropy"))).alarms}
    both = run(made_up.entropy_falls, config(AlarmConfig("entropy", 0.4, "raise_kl"))).alarms
    assert {(a.level, a.action) for a in both if a.figure == "entropy"} == {("warn", None), ("act", "raise_kl")}


def test_two_levels_of_one_figure_both_speak():
    two = config(AlarmConfig("entropy", 0.9), AlarmConfig("entropy", 0.4))
    alarms = [a for a in run(made_up.entropy_falls, two).alarms if a.figure == "entropy"]
    first, second = (
        min(a.step for a in alarms if a.threshold == x) for x in sorted({a.threshold for a in alarms})[::-1]
    )
    assert first < second


def test_what_would_go_back_is_known_before_there_is_an_alarm():
    """So that its checkpoint is kept; for actions that go back alone."""
    stop = config(AlarmConfig("distinct_2", 0.8, "stop"))
    assert run(settings=stop).good == STEPS and run().good is None
    kept = run(made_up.one_response, stop)
    alarm = next(a for a in kept.alarms if a.action == "stop")
    assert kept.good == alarm.good and f"Step {alarm.good} was the last to end a full window" in alarm.message
    odd = Health()
    odd_batches(odd, stop, {20, 22})
    assert odd.good == 30
    odd_batches(odd := Health(), stop, {28, 30})
    assert odd.good == 27  # 29 is within the level, its window is not


@pytest.mark.parametrize(("bad_from", "good"), [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4)])
def test_a_run_that_went_bad_within_its_first_window_was_good_until_then(bad_from, good):
    """Where fewer steps than a window have been, those were good if all of them were."""
    kept = Health(history={"kl_token": [0.1 if step < bad_from else 2.0 for step in range(1, 7)]})
    assert _last_good_step(AlarmConfig("kl_token", 1.0, "stop"), kept, window=3) == good


def test_levels_have_the_unit_of_their_figure():
    kept = run(made_up.the_judge_falls)
    start, spread = kept.start("judge", 3), kept.spread("judge", 3)
    judge = next(a for a in kept.alarms if a.figure == "judge")
    assert judge.threshold == pytest.approx(start - 0.75 * spread) and judge.value < judge.threshold
    kept = run(made_up.it_repeats_itself)
    alarm = next(a for a in kept.alarms if a.figure == "repetition")
    assert alarm.threshold == pytest.approx(kept.start("repetition", 3) + 0.2)


def test_without_a_judge_there_are_no_figures_of_it():
    kept = Health()
    checkup = watch(made_up.healthy(1), [made_up.update()], kept, Config(), TOKENIZER)
    assert not any("judge" in name for name in checkup.metrics) and "health/kl_exact" not in checkup.metrics
    assert checkup.metrics["health/distinct_2"] == kept.history["distinct_2"][0]


def test_a_batch_whose_learning_was_ended_is_an_alarm_each_time():
    kept, settings = Health(), config(AlarmConfig("approx_kl", 0.05, "stop_epoch"))
    for step in (1, 2):
        updates = [made_up.update(0.01), made_up.update(0.08, stopped=True)]
        watch(made_up.healthy(step), updates, kept, settings, TOKENIZER)
    assert [(a.step, a.action, a.value, a.threshold) for a in kept.alarms] == [
        (step, "stop_epoch", 0.08, 0.05) for step in (1, 2)
    ]


def test_what_was_seen_survives_a_checkpoint_and_goes_on_as_if_nothing_had_been():
    straight, settings = run(made_up.the_judge_falls), config()
    kept = run(made_up.the_judge_falls, steps=22)
    kept = Health.from_state(json.loads(json.dumps(kept.state())))
    for step in range(23, STEPS + 1):
        experience = made_up.the_judge_falls(made_up.healthy(step), min((step - ILL_FROM) / ILL_FOR, 1.0))
        watch(experience, [made_up.update()], kept, settings, TOKENIZER)
    assert kept == straight


def test_trend_and_slope_are_those_of_the_books():
    # S = 43 of 45 pairs, var S = 125
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 9.0]
    assert trend(values) == pytest.approx(42 / math.sqrt(125)) and trend(values[::-1]) == -trend(values)
    assert trend([2.0] * 10) == 0 and trend([1.0, 1.0, 2.0]) == pytest.approx(1 / math.sqrt((66 - 18) / 18))
    assert slope([0.0, 1.0, 2.0, 300.0, 4.0]) == pytest.approx(1.0) and slope(values) == pytest.approx(1.0)


def test_trends_of_noise_are_rarely_what_the_turn_of_the_judge_asks_for():
    chance = np.random.default_rng(1)
    found = [trend(chance.normal(size=10).tolist()) for _ in range(4000)]
    assert np.std(found) == pytest.approx(1, abs=0.1) and np.mean(np.array(found) < -2.6) < 0.01
