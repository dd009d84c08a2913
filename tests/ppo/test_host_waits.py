"""Where the host would wait for a GPU in a microbatch: on the meta device, which has no values to wait for.

What reads a value raises there, and a copy of host memory that is not told to go on meanwhile is counted.
"""

import contextlib
import copy
from types import SimpleNamespace

import made_up_batches
import pytest
import tiny
import torch
from ppo_step import config_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastppo.data import Minibatch, pack
from fastppo.distributed import World
from fastppo.models import Critic, Policy, PrefixStates, RewardModel, ValueHead, fuse_head
from fastppo.models.frozen_prefix import prefix_depth
from fastppo.models.loading.trained import set_trainable
from fastppo.models.roles import copy_backbone
from fastppo.online.token_rows import _measure
from fastppo.ppo import update
from fastppo.ppo.losses import load_loss
from fastppo.ppo.terms import Totals, jobs_of

META = torch.device("meta")
DATA_DEPENDENT = ("nonzero", "masked_select", "unique", "bincount", "_local_scalar_dense", "is_nonzero", "equal")


class Waits(TorchDispatchMode):
    """The calls for which the host would wait until a GPU has done what it was given before."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        name = func._schema.name.removeprefix("aten::")
        on_device = any(x.device == META for x in tensors)
        if on_device and (name.startswith(DATA_DEPENDENT) or _of_unknown_size(name, args, kwargs)):
            self.calls.append(name)
        result = func(*args, **kwargs)
        places = {x.device for x in (*tensors, *tree_leaves(result)) if isinstance(x, torch.Tensor)}
        if name in ("_to_copy", "copy_", "lift_fresh_copy") and len(places) > 1:
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
            if waits and not (name == "copy_" and tensors[1].ndim == 0):  # a number is an argument of a kernel
                self.calls.append(f"{name} of {tuple(tensors[-1].shape)}")
        return result


def _of_unknown_size(name, args, kwargs):
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # torch does not answer for meta


class PlainEngine:
    """An engine without an optimizer."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *args):
        return self.module(*args)

    def backward(self, loss, *, last):
        loss.backward()


def policy(family="llama", train="all"):
    model = tiny.causal(family)
    made = Policy(fuse_head(model), ValueHead(tiny.WIDTH, model.dtype, torch.device("cpu")))
    set_trainable(made, train)
    made.prefix_depth = prefix_depth(made.model)
    return made.to(META)


def context_of(actor, critic=None, *arguments):
    config = config_of("none", *arguments)
    reference = PlainEngine(copy.deepcopy(actor).requires_grad_(False))
    engines = {"actor": PlainEngine(actor), "critic": critic and PlainEngine(critic), "reference": reference}
    roles = SimpleNamespace(**engines, policy=actor)
    world = World(rank=0, ranks=1, device=META)
    return SimpleNamespace(config=config, world=world, roles=roles, loss=load_loss(config.ppo), kl_coef=0.1)


def learned(experience, context):
    """Two microbatches of an update."""
    jobs = jobs_of(context, 1e-3, 1e-3, True)
    minibatch = Minibatch(torch.arange(len(experience.packed)).chunk(2))
    totals = Totals.of(experience, minibatch, context.config)
    update._accumulate(jobs, experience, None, minibatch, totals, PrefixStates(), context)


SETTINGS = {
    "any loss": ("--ppo.loss", "fastppo.ppo.losses:clip"),
    "KL in the loss": ("--ppo.kl_in", "loss", "--ppo.kl_kind", "k3"),
    "exact KL in the loss": ("--ppo.kl_in", "loss", "--ppo.kl_kind", "exact"),
    "gspo": ("--ppo.loss", "gspo"),
    "cispo": ("--ppo.loss", "cispo"),
    "a mean over responses": ("--ppo.aggregate", "sequence"),
    "good responses": ("--ppo.nll_coef", "0.1"),
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_learning_microbatch_waits_for_nothing(family):
    context = context_of(policy(family))
    with Waits() as waits:
        learned(made_up_batches.healthy(1), context)
    assert waits.calls == []


def test_nor_does_it_above_a_frozen_prefix():
    context = context_of(policy(train=1))
    with Waits() as waits:
        learned(made_up_batches.healthy(1), context)
    assert waits.calls == []


@pytest.mark.parametrize("settings", SETTINGS)
def test_nor_does_it_with_other_losses(settings):
    context = context_of(policy(), None, *SETTINGS[settings])
    with Waits() as waits:
        learned(made_up_batches.healthy(1), context)
    assert waits.calls == []


def test_nor_does_it_with_a_critic_of_its_own():
    actor = policy()
    critic = Critic(copy_backbone(actor.model), ValueHead(tiny.WIDTH, actor.model.dtype, META))
    with Waits() as waits:
        learned(made_up_batches.healthy(1), context_of(actor, critic))
    assert waits.calls == []


@pytest.mark.parametrize("arguments", [(), ("--ppo.kl_in", "loss", "--ppo.kl_kind", "exact")], ids=["k1", "exact"])
def test_a_microbatch_of_experience_waits_for_nothing_before_the_last(arguments):
    context, packed = context_of(policy(), None, *arguments), made_up_batches.healthy(1).packed
    sequences = torch.arange(10)
    with Waits() as waits, torch.no_grad():
        rows = _measure(packed.select(sequences).to(META), sequences, context.roles, PrefixStates(), context.config)
    assert waits.calls == [] and all(x.device == META for x in rows.values())


@pytest.mark.parametrize("padding", [None, 0])
def test_a_microbatch_of_a_reward_model_waits_for_nothing_before_the_last(padding):
    model = tiny.classifier()
    model.config.pad_token_id = padding
    role, packed = RewardModel(model).to(META), pack([(1, 2, 3), (4, 5, 0, 0)], [1, 1])
    with Waits() as waits, torch.no_grad():
        role(packed.to(META))
    assert waits.calls == []


def test_what_waits_is_seen():
    x = torch.zeros(3, device=META)
    for waiting in (lambda: torch.ones(3).to(META), lambda: x.nonzero(), lambda: x[x > 0], lambda: x.max().item()):
        with Waits() as waits:
            with contextlib.suppress(Exception):  # the meta device has no values
                waiting()
            assert len(waits.calls) == 1
