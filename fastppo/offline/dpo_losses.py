"""DPO as pure functions: the losses of a pair, from how much likelier its answers are than under the reference."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def dpo_loss(margins: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) ln sigmoid(beta m) - e ln sigmoid(-beta m) of each pair (Rafailov et al., 2023, eq. 7).

    margins: m (P,) = ln(policy/reference)(chosen) - ln(policy/reference)(rejected), logprobs summed over an answer's
    tokens, in nats; label_smoothing: e, the share of pairs whose preference is taken to be wrong (Mitchell, 2023, "A
    note on DPO with noisy preferences", conservative DPO). With e > 0 the loss is least at beta m = ln((1 - e) / e), so
    that margins do not grow without bound. -> (P,) nats, in the dtype of margins.
    """
    right, wrong = F.logsigmoid(beta * margins), F.logsigmoid(-beta * margins)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(margins: Tensor, beta: float) -> Tensor:
    """(m - 1 / (2 beta))^2 of each pair (Azar et al., 2023, eq. 17, whose tau is beta).

    margins: m (P,) as in `dpo_loss`, but of mean logprobs, in nats a token, so that long answers do not have large
    margins because they are long. -> (P,), in the dtype of margins; 0 where m is 1 / (2 beta).
    """
    return (margins - 1 / (2 * beta)).square()


def nll_term(chosen: Tensor) -> Tensor:
    """The negative mean logprob of the chosen answers, which holds them up (Pang et al., 2024, eq. 1).

    chosen: (P,) mean logprobs, nats a token -> (P,) nats a token.
    """
    return -chosen


def loss_at_start(loss: Literal["dpo", "ipo"], beta: float) -> float:
    """The loss of a pair whose margin is 0, as every margin is while the policy is the reference: ln 2, whatever the
    label smoothing, or 1 / (2 beta)^2 of IPO."""
    return math.log(2) if loss == "dpo" else 1 / (2 * beta) ** 2
