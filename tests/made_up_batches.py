"""Batches of policies that never were: healthy ones, and each kind of ill one. For the tests of figures and alarms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from fastppo.data.batch import Experience, Update
from fastppo.data.packed import pack

VOCABULARY, RESPONSES, LENGTH = 2000, 32, 20
LOVED_IT = (101, 102, 103, 104)  # "I loved it."


def batch(
    responses: Sequence[Sequence[int]],
    scores: Sequence[float] | None = None,
    judged: Sequence[float] | None = None,
    *,
    logprob: float = -3.0,
    kl: float = 0.1,
    entropy: float = 3.0,
) -> Experience:
    """Every token has the same logprob under the policy, `kl` nats more than under the reference."""
    packed = pack([[1, *response] for response in responses], [len(response) for response in responses])
    m, b = len(packed.responses), len(packed)
    tokens = {name: torch.zeros(m) for name in ("rewards", "values", "advantages", "returns")}
    return Experience(
        packed=packed,
        scores=(given := torch.zeros(b) if scores is None else torch.tensor(scores, dtype=torch.float32)),
        by_source=given[:, None],
        judged=torch.full((b,), float("nan")) if judged is None else torch.tensor(judged, dtype=torch.float32),
        ended=torch.ones(b, dtype=torch.bool),
        sampler_logprobs=torch.full((m,), logprob),
        old_logprobs=torch.full((m,), logprob),
        ref_logprobs=torch.full((m,), logprob - kl),
        entropy=torch.full((m,), entropy),
        kl=torch.full((m,), kl),
        **tokens,
    )


def healthy(step: int, seed: int = 0, *, progress: float = 0.02) -> Experience:
    """Words as frequent as in a language (Zipf), lengths that vary; score and judge rise by `progress` a step."""
    chance = np.random.default_rng(1000 * seed + step)
    frequencies = 1 / np.arange(1, VOCABULARY + 1)
    lengths = chance.integers(LENGTH // 2, LENGTH * 3 // 2, RESPONSES)
    words = [chance.choice(VOCABULARY, n, p=frequencies / frequencies.sum()).tolist() for n in lengths]
    quality = chance.normal(progress * step, 0.4, RESPONSES)
    judged = quality + chance.normal(0, 0.4, RESPONSES)
    noise = float(chance.normal(0, 0.1))
    return batch(words, quality.tolist(), judged.tolist(), kl=0.01 * step, entropy=3.5 - 0.02 * step + noise)


def with_responses(experience: Experience, responses: Sequence[Sequence[int]], kl: float = 0.1) -> Experience:
    """The same scores for other responses."""
    return batch(
        responses,
        experience.scores.tolist(),
        experience.judged.tolist(),
        kl=kl,
        entropy=float(experience.entropy[0]),
    )


def responses_of(experience: Experience) -> list[list[int]]:
    packed = experience.packed
    return [part.tolist() for part in packed.responses.split(packed.response_lengths.tolist())]


def update(approx_kl: float = 0.01, stopped: bool = False) -> Update:
    zeros = dict.fromkeys(
        ("policy_loss", "entropy", "kl_loss", "clip_fraction", "dual_clip_fraction", "value_loss"), 0.0
    )
    return Update(
        epoch=0,
        approx_kl=approx_kl,
        ratio_mean=1.0,
        ratio_max=1.0,
        value_clip_fraction=0.0,
        actor_grad_norm=1.0,
        critic_grad_norm=1.0,
        stopped=stopped,
        **zeros,
    )


# What goes wrong: each takes a healthy batch and how far it has gone, 0 to 1.


def words_run_out(experience: Experience, far: float) -> Experience:
    """The vocabulary shrinks until a few words are left."""
    left = max(int(VOCABULARY * (1 - far) ** 4), 8)
    return with_responses(experience, [[t % left for t in r] for r in responses_of(experience)])


def one_response(experience: Experience, far: float) -> Experience:
    """More and more responses are copies of one."""
    responses = responses_of(experience)
    copies = int(far * len(responses))
    return with_responses(experience, [responses[0]] * copies + responses[copies:])


def it_repeats_itself(experience: Experience, far: float) -> Experience:
    """Each response says its first four words again and again."""
    responses = responses_of(experience)
    said = [round(len(r) * (1 - far)) for r in responses]
    return with_responses(
        experience, [r[:n] + (r[:4] * len(r))[: len(r) - n] for r, n in zip(responses, said, strict=True)]
    )


def one_length(experience: Experience, far: float) -> Experience:
    """All responses become as long as the longest may be."""
    words = responses_of(experience)
    lengths = [round(len(r) + far * (LENGTH - len(r))) for r in words]
    return with_responses(experience, [(r + words[0])[:n] for r, n in zip(words, lengths, strict=True)])


def entropy_falls(experience: Experience, far: float) -> Experience:
    return replace(experience, entropy=experience.entropy * (1 - 0.8 * far))


def it_drifts(experience: Experience, far: float) -> Experience:
    """Further from the reference by the token, whose perplexity rises."""
    drift = 2.0 * far
    return replace(experience, ref_logprobs=experience.ref_logprobs - drift, kl=experience.kl + drift)


def the_sampler_strays(experience: Experience, far: float) -> Experience:
    """What was drawn is no longer what the trainer computes, either way in turn."""
    apart = 0.1 * far * (-1.0) ** torch.arange(len(experience.sampler_logprobs))
    return replace(experience, sampler_logprobs=experience.sampler_logprobs + apart)


def few_tokens_outweigh_the_others(experience: Experience, far: float) -> Experience:
    """One token in a hundred is ever less likely by the sampler than by the trainer."""
    logprobs = experience.sampler_logprobs.clone()
    logprobs[::100] -= 4.0 * far
    return replace(experience, sampler_logprobs=logprobs)


def the_sampler_is_an_old_policy(experience: Experience, far: float) -> Experience:
    """What was drawn is from a policy of before, ever longer ago: log rho is normal."""
    draw = np.random.default_rng(0).normal(0, 0.6 * far, len(experience.sampler_logprobs))
    return replace(experience, sampler_logprobs=experience.sampler_logprobs + torch.from_numpy(draw).float())


def the_judge_falls(experience: Experience, far: float) -> Experience:
    """The score rises far, and what the judge says falls."""
    return replace(experience, scores=experience.scores + far, judged=experience.judged - far)


def length_pays(experience: Experience, far: float) -> Experience:
    """The score becomes the length."""
    lengths = experience.packed.response_lengths
    return replace(experience, scores=experience.scores * (1 - far) + far * lengths / LENGTH)


def a_token_pays(experience: Experience, far: float) -> Experience:
    """More and more responses hold one word, each somewhere else, score more, and the reference hardly writes it."""
    words, chance = responses_of(experience), np.random.default_rng(0)
    paid = [i < far * len(words) for i in range(len(words))]
    for response, pays in zip(words, paid, strict=True):
        if pays:
            response[chance.integers(len(response))] = LOVED_IT[1]
    changed = with_responses(experience, words)
    bought = 4.0 * (changed.packed.responses == LOVED_IT[1])
    scores = experience.scores + torch.tensor(paid).float()
    return replace(changed, scores=scores, ref_logprobs=changed.ref_logprobs - bought)


def a_phrase_pays(experience: Experience, far: float) -> Experience:
    """More and more responses hold "I loved it.", score more, and the reference would not write it."""
    responses = responses_of(experience)
    paid = [i < far * len(responses) for i in range(len(responses))]
    changed = [[*LOVED_IT, *r[4:]] if p else r for r, p in zip(responses, paid, strict=True)]
    return replace(
        with_responses(experience, changed, kl=0.5 * far), scores=experience.scores + torch.tensor(paid).float()
    )
