"""The policy that is sampled from at ZeRO stage 3: whole, as it is now, and never waiting for another rank."""

import json

import pytest
import tiny
import torch
import whole_runs
from ppo_step import config_of
from safetensors.torch import load_file

from fastppo.checkpoint.export import write_model
from fastppo.config import LoraConfig
from fastppo.data.packed import pack
from fastppo.distributed.engine import Engine
from fastppo.distributed.world import start_world
from fastppo.models import sampling_weights
from fastppo.models.lora import add_adapters
from fastppo.models.roles import Policy, ValueHead, fuse_head, width_of
from fastppo.models.sampling_weights import SamplingWeights

SPLIT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def world():
    return start_world(1)


@pytest.fixture
def zero(tmp_path):
    """Settings of stage 3 with every weight split, the smallest too."""
    (tmp_path / "split.json").write_text(json.dumps(SPLIT_ALL))
    return config_of("none", "--zero.stage", "3", "--zero.deepspeed", str(tmp_path / "split.json"))


def engine_of(policy, config):
    return Engine(policy, [list(policy.parameters())], config.optim, config.zero)


def test_below_stage_3_it_is_the_actor_itself():
    policy = Policy(fuse_head(tiny.causal()))
    assert SamplingWeights(policy, 2).gather() is policy


@pytest.mark.parametrize("bucket", [1, 2**28])
def test_it_has_the_weights_of_now_in_tensors_that_stay(world, zero, monkeypatch, bucket):
    monkeypatch.setattr(sampling_weights, "BUCKET", bucket)
    actor = Policy(fuse_head(tiny.causal(tie_word_embeddings=True)))
    before = {name: p.detach().clone() for name, p in actor.named_parameters()}
    whole = SamplingWeights(actor, 3)
    engine = engine_of(actor, zero)
    assert all(p.numel() == 0 for p in actor.parameters())
    found = whole.gather()
    assert all(torch.equal(p, before[name]) for name, p in found.named_parameters())
    assert all(p.numel() == 0 for p in actor.parameters())
    places = [p.data_ptr() for p in found.parameters()]

    batch = pack([(1, 2, 3, 4, 5), (6, 7, 8)], [2, 1])
    engine.backward(engine(batch, lambda policy, hidden: policy.head(hidden).square().mean()), last=True)
    engine.step([1e-2])
    again = whole.gather()
    assert again is found and [p.data_ptr() for p in again.parameters()] == places
    assert not torch.equal(again.head.weight, before["model.model.embed_tokens.weight"])
    with sampling_weights.gathered(actor.parameters()):
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), actor.parameters(), strict=True))


def test_tied_weights_stay_tied_and_no_hook_of_deepspeed_is_in_it(world, zero):
    actor = Policy(fuse_head(tiny.causal(tie_word_embeddings=True)))
    whole = SamplingWeights(actor, 3)
    engine_of(actor, zero)
    found = whole.gather()
    assert found.head.weight is found.model.get_input_embeddings().weight
    assert found.head.weight is not actor.head.weight
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in found.modules())
    assert not any(hasattr(p, "ds_id") for p in found.parameters())


# Ranks with 1 and 15 prompts. Each collective is noted with its beginning and end on a clock that both ranks share,
# and the second rank takes its time for every token.

UNEVEN = """
import functools, json, os, time
import torch.distributed as dist
from deepspeed.comm.torch import TorchBackend
from fastppo import train
from fastppo.distributed import stop
from fastppo.models import sampling_weights
from fastppo.data.batch import Prompts
from fastppo.rollout import InProcess

rank, events = int(os.environ["RANK"]), []

def noted(function, name):
    @functools.wraps(function)
    def call(*args, **kwargs):
        start = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            events.append((name, start, time.monotonic()))
    return call

COLLECTIVES = ("all_reduce", "reduce", "all_gather", "gather", "scatter", "reduce_scatter", "all_to_all", "broadcast",
               "barrier", "send", "recv", "inference")
for owner in (dist, dist.ProcessGroup, TorchBackend):
    for name in dir(owner):
        plain = name.strip("_").replace("allreduce", "all_reduce").replace("allgather", "all_gather")
        member = getattr(owner, name)
        if plain.startswith(COLLECTIVES) and callable(member) and not isinstance(member, type):
            setattr(owner, name, noted(member, f"{owner.__name__}.{name}"))
InProcess.sample = noted(InProcess.sample, "sample")
sampling_weights._copy_weights = noted(sampling_weights._copy_weights, "gather")
train.score = noted(train.score, "score")

Prompts.of_rank = lambda self, rank, ranks: self.select([range(1), range(1, len(self))][rank])
check_alone = stop.check_alone
def slowly():
    time.sleep(0.05 * rank)
    check_alone()
stop.check_alone = slowly

main = train.train
def recorded(*args):
    done = main(*args)
    with open(f"{folder}/events-{rank}.json", "w") as file:
        json.dump(events, file)
    return done
train.train = recorded
"""


@pytest.fixture(scope="module")
def events(tmp_path_factory, forks):
    """Of each rank, in the order in which they ended: (name, start, end), seconds."""
    folder = whole_runs.prepare(tmp_path_factory.mktemp("uneven"))
    (folder / "split.json").write_text(json.dumps(SPLIT_ALL))
    argv = whole_runs.settings(
        folder,
        folder / "out",
        steps=1,
        zero__stage=3,
        zero__deepspeed=folder / "split.json",
        ppo__batch_size=16,
        eval__prompts=0,
        eval__every=0,
        checkpoint__every=0,
    )
    forks.run(argv, 2, UNEVEN.replace("{folder}", str(folder)))
    return [json.loads((folder / f"events-{rank}.json").read_text()) for rank in range(2)]


def of(events, name):
    return [(start, end) for called, start, end in events if called == name]


def test_no_collective_is_in_sampling_but_the_gather_before_it(events):
    for rank in events:
        gathers, samples = of(rank, "gather"), of(rank, "sample")
        assert len(samples) == 1 and len(gathers) == 2  # the second one is for the export
        (start, end), (begin, finish) = gathers[0], samples[0]
        assert end <= begin
        inside = [e for e in rank if start <= e[1] and e[2] <= end and e[0] != "gather"]
        assert inside, "the gather's collectives are noted"
        assert [e for e in rank if begin <= e[1] < finish and e[0] != "sample"] == []


def test_the_longest_wait_in_sampling_is_that_for_the_end_of_the_phase(events):
    """The rank with one prompt waits for the other after its last token, once."""
    quick, slow = events
    start, _ = of(quick, "gather")[0]
    _, end = of(quick, "sample")[0]
    _, others_end = of(slow, "sample")[0]
    phase = [e for e in quick if start <= e[1] < of(quick, "score")[0][0] and e[0] not in ("sample", "gather")]
    longest = max(phase, key=lambda e: e[2] - e[1])
    assert longest[1] >= end and longest[2] >= others_end > end
    waited = [e for e in phase if e[1] < others_end <= e[2]]
    assert waited and all(e[1] >= end for e in waited)


# The same weights as a stream, for an engine that has a module of its own

FORMS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "gemma2": {},
    "gpt2": {},
    "opt": {},
    "mixtral": {},  # a checkpoint has its experts one by one
    "qwen3_moe": {},
}


def checkpoint(folder, policy, lora_rank=0):
    """What the export writes."""
    tokenizer = tiny.tokenizer()
    write_model(policy, tokenizer, folder, LoraConfig(rank=lora_rank))
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("form", FORMS)
def test_the_stream_is_what_a_checkpoint_has(tmp_path, form):
    model = tiny.causal("llama" if form == "tied" else form, **FORMS[form])
    policy = Policy(fuse_head(model), ValueHead(width_of(model), torch.float32, torch.device("cpu")))
    sent = dict(SamplingWeights(policy, 2).stream())
    written = checkpoint(tmp_path / "model", policy)
    assert sent.keys() == written.keys()
    assert all(sent[name].equal(written[name]) for name in sent)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_stream_has_merged_adapters(tmp_path, family):
    policy = Policy(fuse_head(tiny.causal(family)))
    add_adapters(policy.model, "actor", LoraConfig(rank=4), seed=1, source="none")
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_" in name:
                p.add_(0.1)
    sent = dict(SamplingWeights(policy, 0).stream())
    written = checkpoint(tmp_path / "model", policy, lora_rank=4)
    assert sent.keys() == written.keys() and not any("lora" in name or "base_layer" in name for name in sent)
    assert all(sent[name].equal(written[name]) for name in sent)
    plain = dict(SamplingWeights(Policy(fuse_head(tiny.causal(family))), 0).stream())
    assert sum(not sent[name].equal(plain[name]) for name in sent) >= tiny.LAYERS


@pytest.mark.parametrize(("bucket", "gathers"), [(1, 3 + tiny.LAYERS), (2**28, 1)])
def test_at_stage_3_the_stream_gathers_some_layers_at_a_time(world, zero, monkeypatch, bucket, gathers):
    """Each alone where a bucket holds none: the embeddings, three layers, the norm, the head."""
    whole = dict(SamplingWeights(Policy(fuse_head(tiny.causal())), 2).stream())
    policy = Policy(fuse_head(tiny.causal()))
    weights = SamplingWeights(policy, 3)
    engine_of(policy, zero)
    at_once, together = [], sampling_weights.gathered

    def counted(parameters):
        parameters = list(parameters)
        at_once.append(len(parameters))
        return together(parameters)

    monkeypatch.setattr(sampling_weights, "BUCKET", bucket)
    monkeypatch.setattr(sampling_weights, "gathered", counted)
    sent = {name: weight.clone() for name, weight in weights.stream()}
    assert sent.keys() == whole.keys() and all(sent[name].equal(whole[name]) for name in sent)
    assert len(at_once) == gathers and sum(at_once) == len(whole)
    assert not any(p.numel() for p in policy.parameters())  # and nothing stays gathered
