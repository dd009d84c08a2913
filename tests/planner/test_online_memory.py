"""The plan of a PPO run and what is really held: the same table decides, and nothing stays that it does not count."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
import whole_runs
from architectures import ACTORS, directory
from ppo_step import config_of, context_of, responses, roles_of
from transformers import AutoModelForCausalLM

from fastppo import train
from fastppo.config import (
    Config,
    DataConfig,
    EvalConfig,
    OptimConfig,
    PPOConfig,
    PPORolloutConfig,
    SamplingConfig,
    ZeroConfig,
)
from fastppo.config.command_line import REST, parse
from fastppo.data.batch import Moments
from fastppo.data.microbatches import plan_step
from fastppo.distributed.residency import Residency
from fastppo.distributed.world import World, start_world
from fastppo.models.assembly import Roles
from fastppo.models.frozen_prefix import PrefixStates
from fastppo.models.loading.weights import Source, outline
from fastppo.models.roles import Policy, fuse_head
from fastppo.online import evaluation
from fastppo.planner import memory
from fastppo.planner.footprint import Footprint, Pass
from fastppo.planner.machine import Machine
from fastppo.planner.memory import Bytes, Role, by_phase, placed
from fastppo.planner.methods.online import PHASES, _live, averaged, least, parts, shares, smaller_passes
from fastppo.planner.plan import PROCESS_GPU, make_plan, measured_roles
from fastppo.ppo.experience import compute_experience
from fastppo.ppo.update import run_updates
from fastppo.rewards import load_sources
from fastppo.rollout import ActorSampler, InProcess, bucket

pytestmark = pytest.mark.slow

KINDS = ("sampling_weights", "reference", "rewards", "optimizers", "gradients")

CASES = [
    {"stage": 0, "critic": "shared"},
    {"stage": 0, "critic": "none"},
    {"stage": 1, "average": 0.9},
    {"stage": 1, "lora": 2, "offload": "offload_optimizer"},
    {"stage": 1, "dtype": "bf16"},
    {"stage": 1, "dtype": "bf16", "critic": "shared", "lora": 2, "average": 0.9},
    {"stage": 1, "dtype": "bf16", "offload": "offload_optimizer"},
    {"stage": 2, "offload": "offload_optimizer"},  # sums on the host
    {"stage": 2, "dtype": "bf16", "critic": "shared", "lora": 2, "average": 0.9},
    {"stage": 2, "dtype": "bf16", "offload": "offload_optimizer"},
    {"stage": 3, "dtype": "bf16", "average": 0.9, "exact": True},
    {"stage": 3, "critic": "shared"},
    {"stage": 1, "dtype": "bf16", "critic": "none", "lora": 2},
    {"stage": 3, "dtype": "bf16", "critic": "none"},
    {"stage": 3, "dtype": "bf16", "lora": 2, "exact": True},
    {"stage": 3, "dtype": "bf16", "offload": "offload_parameters"},
    {"stage": 3, "critic": "shared", "lora": 2, "average": 0.9, "offload": "offload"},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An actor and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    return tiny.saved(folder / "actor", tiny.causal()), tiny.saved(folder / "reward", tiny.classifier())


@pytest.fixture(scope="module")
def world():
    return start_world(1)


def settings(models: tuple[str, str], case: dict[str, Any], deepspeed: str) -> Config:
    actor, reward = models
    argv = ["--zero.stage", str(case["stage"]), "--critic.kind", case.get("critic", "separate")]
    argv += ["--ppo.estimator", "reinforce++"] if case.get("critic") == "none" else []
    argv += ["--rewards", json.dumps([{"model": reward}]), "--optim.dtype", case.get("dtype", "fp32")]
    if "lora" in case:
        argv += ["--actor.lora.rank", str(case["lora"])]
        argv += [] if case.get("critic") in ("shared", "none") else ["--critic.lora.rank", str(case["lora"])]
    if "average" in case:
        argv += ["--actor.average", str(case["average"])]
    if "offload" in case:
        argv += [f"--zero.{case['offload']}", "cpu"]
    if case.get("exact"):
        argv += ["--ppo.kl_in", "loss", "--ppo.kl_kind", "exact"]
    argv += ["--zero.deepspeed", deepspeed] if case["stage"] else []
    return config_of(actor, "--ppo.microbatch_tokens", "60", *argv)  # several, whose gradients are added up


def after_a_step(config: Config, world: World) -> Roles:
    """The roles of a run that has learned once, so that all is there that a step brings about."""
    roles = roles_of(config, world)
    load_sources(config, roles.tokenizer, world, roles.residency)
    roles.residency.enter("sampling")
    scored = responses(roles)
    plan = plan_step(scored.rollout.packed.lengths, config, 0, 1, roles.attention)
    roles.residency.enter("experience")
    context, prefix_cache = context_of(config, roles, world), PrefixStates()
    experience = compute_experience(scored, Moments().add(scored.scores), plan[0], prefix_cache, context)
    roles.residency.enter("learning")
    list(run_updates(experience, plan, prefix_cache, context))
    return roles


@pytest.fixture
def small(tmp_path, monkeypatch):
    """DeepSpeed's settings with a small reduce bucket, of which the plan is told."""
    (tmp_path / "small.json").write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 2_000}}))
    monkeypatch.setattr(memory, "REDUCE_BUCKET", 2_000)
    return str(tmp_path / "small.json")


def on_device(residency: Residency) -> dict[str, int]:
    """Bytes by kind, each storage once."""
    found: dict[str, int] = {}
    for part in residency._parts:
        storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in part.states()}
        found[part.name[0]] = found.get(part.name[0], 0) + sum(storages.values())
    return found


# What else than the phases that use it a part is on the GPU in: nothing; all of them; some as they are moved.
SOME = frozenset({("optimizers", "actor"), ("rewards", "reward 1"), ("gradients", "critic")})
PLACEMENTS = [
    {},
    {"moved": frozenset()},
    {"moved": SOME, "beside": {"sampling": {("rewards", "reward 1")}, "experience": {("optimizers", "actor")}}},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_each_stage_residency_keeps_what_the_plan_counts(models, world, small, monkeypatch, case):
    given = PLACEMENTS[CASES.index(case) % len(PLACEMENTS)]
    whole_runs.move_on_the_cpu_too(monkeypatch, **given)
    config = settings(models, case, small)
    roles, members, zero = after_a_step(config, world), measured_roles(config, cpu=False), config.zero
    homes, placement = dict.fromkeys(("reference", "rewards"), zero.frozen_on), replace(least(config), **given)
    homes["optimizers"] = zero.optimizer_on
    then = dict(zip(PHASES, (*PHASES[1:], PHASES[0]), strict=True))
    for phase in ("sampling", "feedback", "experience", "learning"):
        roles.residency.enter(phase, then[phase])
        held, counted = on_device(roles.residency), dict.fromkeys(KINDS, 0)
        sums_on_host = zero.stage == 3 and zero.optimizer_on != "none"
        if sums_on_host and placement.holds(phase, ("gradients", "actor")):
            held["gradients"] -= 4 * sum(member.size.trained for member in members if member.trains)
        for name, amount in parts(members, config, 1).items():
            counted[name[0]] += placed(name, amount, phase, placement, cpu=False).gpu.total
        for kind, planned in counted.items():
            if homes.get(kind, "none") == "none":
                assert planned == pytest.approx(held.get(kind, 0), rel=0.02), (phase, kind)
            else:  # it is in the host's memory at all times, which is the same memory here
                assert planned == 0, (phase, kind)
    if roles.average is not None:
        actor, own = members[0], sum(p.nbytes for p in roles.average._average.values())
        planned = {phase: averaged(actor, phase, config, 1).host.total for phase in PHASES}
        copy = own * actor.size.bytes // 4  # of weights on their way from a GPU; another of what the average stands for
        assert planned["learning"] == pytest.approx(own + copy, rel=0.02)
        assert planned["sampling"] == planned["experience"] == pytest.approx(own + 2 * copy, rel=0.02)


@pytest.mark.parametrize("case", [CASES[i] for i in (1, 3, 5, 6, 8, 11, 13)], ids=str)
def test_nothing_stays_after_a_step_that_the_plan_does_not_count(models, world, small, monkeypatch, case):
    """Every tensor that is alive between two steps, on the CPU, where nothing moves."""
    monkeypatch.setattr(Footprint, "passes", nothing_passes)
    config = settings(models, case, small)
    before = alive()
    roles = after_a_step(config, world)
    now = {at: size for at, size in alive().items() if at not in before}
    planned = [
        share.places for share in shares(measured_roles(config, cpu=True), config, 1) if share.phase == "learning"
    ]
    lasting = sum(
        place.states + place.buffers for found in planned for place in (found.gpu, found.host, found.nvme)
    ) - gone(config)
    assert sum(now.values()) == pytest.approx(lasting, rel=0.03)
    assert roles.actor is not None


class OwnWeights:
    """An engine with a copy of the weights, which it loses when it sleeps."""

    def __init__(self, roles: Roles):
        self.roles, self.held = roles, list[torch.Tensor]()

    def wake(self) -> None:
        own = [p for name, p in self.roles.policy.model.named_parameters() if ".lora_" not in name]
        self.held = [torch.empty(getattr(p, "ds_shape", p.shape), dtype=p.dtype) for p in own]

    def sync(self) -> None:
        assert self.held

    def sleep(self) -> None:
        self.held = []

    def sample(self, *args: Any, **options: Any) -> Any: ...


@pytest.mark.parametrize("engine", ["inprocess", "vllm"])
@pytest.mark.parametrize("room", ["a GPU for all", "a GPU for little"])
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 4, 5, 8, 10, 14)], ids=str)
def test_every_copy_of_weights_is_counted_in_every_phase_in_which_it_stays(
    models, world, small, monkeypatch, case, room, engine
):
    """The weights of all roles and those to sample from, in two steps, as the plan of such a machine places them."""
    monkeypatch.setattr(Footprint, "passes", nothing_passes)
    config = replace(settings(models, case, small), rollout=PPORolloutConfig(engine=engine))
    members, machine = measured_roles(config, cpu=False), Machine(1, 1, 10**10, 10**12)
    if room == "a GPU for little":  # none at all, so that all leaves
        machine = replace(machine, gpu=PROCESS_GPU + 1)
    planned = make_plan(config, machine, members)
    assert planned.placement.moved == (set() if room == "a GPU for all" else set(planned.parts))
    whole_runs.move_on_the_cpu_too(monkeypatch, moved=planned.placement.moved, beside=planned.placement.beside)
    roles = roles_of(config, world)
    load_sources(config, roles.tokenizer, world, roles.residency)
    own = OwnWeights(roles)
    found: Any = InProcess(roles.sampling_weights, config.sampling, [0]) if engine == "inprocess" else own
    sampler = ActorSampler(f"rollout.engine = {engine}", found, roles, config, [0])
    roles.residency.add_sleeper("sampler", sampler)
    trained = [*roles.actor.module.parameters()]
    trained += [] if roles.critic is None else [*roles.critic.module.parameters()]
    each: dict[str, int] = {}
    for share in planned.shares:
        role = next((m for m in members if m.name == share.role), None)  # none: vLLM, the average
        live = 0 if role is None else _live(role, share.phase, config).gpu.weights
        each[share.phase] = each.get(share.phase, 0) + share.places.gpu.weights - live
    roles.residency.enter("sampling")
    sampler.sync()  # before it there is no copy to sample from
    for phase in PHASES * 2:
        roles.residency.enter(phase)
        if phase == "sampling":
            sampler.sync()
        kinds_held = on_device(roles.residency)
        held = sum(kinds_held.get(kind, 0) for kind in ("sampling_weights", "reference", "rewards"))
        held += sum({id(x): x.nbytes for x in (getattr(p, "ds_tensor", p) for p in trained)}.values())
        assert held + sum(x.nbytes for x in own.held) == pytest.approx(each[phase], rel=0.02), phase


def nothing_passes(self: Footprint, sequences: int, length: int, **options: object) -> Pass:
    """Activations take time to be counted, and are not asked for."""
    return Pass(0, 0)


def gone(config: Config) -> int:
    """What the plan has in learning alone: gradients that are in no buffer of their own, the sums of stage 2 that wait
    for the host, and at stage 3 the module that is whole and its gradients."""
    total = 0
    for member in measured_roles(config, cpu=True):
        states, size = memory.model_states(member, config, 1).gpu, member.size
        live = size.largest * size.bytes
        if config.zero.stage < 3:
            summed = memory.summed_on_arrival(member, config)
            total += 0 if summed or not member.trains else states.gradients
            total += memory.reducing(member, config, 1).gpu.gradients if member.trains else 0
        elif member.trains:
            total += 2 * live
        elif member.name == "reference" and config.ppo.loss_reads_reference:
            total += live
    return total


def alive() -> dict[int, int]:
    """Bytes of every storage that a tensor has."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            found[thing.untyped_storage()._cdata] = thing.untyped_storage().nbytes()
    return found


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory):
    """The actor on a GPU, and on the CPU."""
    folder = directory(tmp_path_factory.mktemp("7b"), *ACTORS["7b"])
    model = fuse_head(outline(AutoModelForCausalLM, Source("actor.model", folder), torch.bfloat16))
    sizes = {cpu: Footprint(Policy(model), torch.bfloat16, cpu=cpu) for cpu in (False, True)}
    return {cpu: [Role("actor", size, trains=True, weights=size.parameters)] for cpu, size in sizes.items()}


def by_name(members: list[Role], config: Config, ranks: int = 8) -> dict[str, Bytes]:
    """What each phase has on the GPU."""
    return {stage: places.gpu for stage, places in by_phase(shares(members, config, ranks))}


UNRECORDED = SamplingConfig(cuda_graphs=False)  # recorded decode steps keep memory of their own
STAGE_3 = Config(zero=ZeroConfig(stage=3), optim=OptimConfig(activation_checkpointing=True))


def test_the_copy_to_sample_from_is_counted_where_it_stays(seven_billion, monkeypatch):
    monkeypatch.setattr(Footprint, "passes", nothing_passes)
    for cpu, members in seven_billion.items():
        size, found = members[0].size, by_name(members, STAGE_3)
        whole, split = size.parameters * size.bytes, size.parameters * size.bytes // 8
        live = size.largest * size.bytes
        held = {stage: amount.weights - split for stage, amount in found.items()}
        copy = whole if cpu else 0  # on the CPU nothing moves
        assert held == {
            "sampling": whole,
            "feedback": copy,
            "experience": copy + live,
            "learning": copy + live,
        }


def test_the_buffers_that_deepspeed_keeps_are_counted_of_each_role_where_they_do_not_leave(seven_billion, monkeypatch):
    monkeypatch.setattr(Footprint, "passes", nothing_passes)
    actor = seven_billion[False][0]
    both = [actor, replace(actor, name="critic")]
    offloaded = Config(zero=ZeroConfig(stage=2, offload_optimizer="cpu"), sampling=UNRECORDED)
    sizes = (
        (replace(STAGE_3, sampling=UNRECORDED), memory.REDUCE_BUCKET),
        (Config(zero=ZeroConfig(stage=2), sampling=UNRECORDED), 0),
        (offloaded, actor.size.largest_trained),
    )
    for config, each in sizes:
        found = by_name(both, config)
        assert [found[phase].buffers for phase in PHASES] == [0, 0, 0, 2 * 2 * each]
    kept = seven_billion[True][0]  # on the CPU, where nothing leaves
    both = [kept, replace(kept, name="critic")]
    each = kept.size.largest_trained
    assert [found.buffers for found in by_name(both, offloaded).values()] == 4 * [2 * 2 * each]


def test_what_recorded_decode_steps_hold_is_counted_of_the_actor_in_every_phase(seven_billion, monkeypatch):
    """On a GPU: logits and activations of the largest step, and what each row has written. The cache leaves."""
    monkeypatch.setattr(Footprint, "passes", lambda self, n, length, **how: Pass(0, 5 * n * length))
    for cpu, members in seven_billion.items():
        size, both = members[0].size, [members[0], replace(members[0], name="critic")]
        sampling = SamplingConfig(max_new_tokens=128, rows=96, top_k=9)
        recorded, plain = (
            by_name(both, Config(sampling=replace(sampling, cuda_graphs=on), ppo=PPOConfig(batch_size=96)), ranks=1)
            for on in (True, False)
        )
        logits = 96 * size.vocabulary * 2  # top_k copies nothing
        held = 0 if cpu else logits + 5 * 128 + 96 * 129 * 12
        assert [recorded[phase].buffers - plain[phase].buffers for phase in PHASES] == [held] * 4
        assert all(recorded[phase].cache == plain[phase].cache for phase in PHASES)
        assert [bool(recorded[phase].cache) for phase in PHASES] == [True, False, False, False]


def test_gradients_are_counted_for_each_role_while_it_learns_and_on_the_cpu_wherever_they_are_kept(
    seven_billion, monkeypatch
):
    monkeypatch.setattr(Footprint, "passes", nothing_passes)
    for cpu, (actor,) in seven_billion.items():
        both, trained = [actor, replace(actor, name="critic")], actor.size.trained
        for zero, each, kept in (
            (ZeroConfig(stage=1), 4 * trained, True),
            (ZeroConfig(stage=1, offload_optimizer="cpu"), 4 * trained, False),
            (ZeroConfig(stage=2), 2 * trained // 8 + 4 * trained // 8, False),
            (ZeroConfig(stage=2, offload_optimizer="cpu"), 4 * (trained // 8), False),
        ):
            found = [amount.gradients for amount in by_name(both, Config(zero=zero)).values()]
            resting = 2 * each if cpu and kept else 0
            assert found == [resting, resting, resting, 2 * each]


def test_an_evaluation_that_is_larger_than_a_step_is_what_counts(seven_billion):
    size = seven_billion[False][0].size
    members = [
        *seven_billion[False],
        Role("reference", size, trains=False, weights=size.parameters),
        Role("reward 1", size, trains=False, weights=size.parameters),
    ]
    config = replace(
        STAGE_3,
        ppo=PPOConfig(batch_size=16, minibatches=1, microbatch_tokens=8192),
        data=DataConfig(max_prompt_tokens=256),
        sampling=SamplingConfig(max_new_tokens=256, rows=64, cuda_graphs=False),
        eval=EvalConfig(prompts=0),
    )
    step, large = by_name(members, config), by_name(members, replace(config, eval=EvalConfig(prompts=256)))
    assert large["sampling"].cache == 8 * step["sampling"].cache  # 32 rows of a rank and not 4
    for phase in ("feedback", "experience"):  # 16 sequences in a microbatch and not 2
        assert large[phase].activations > 4 * step[phase].activations
    assert large["learning"] == step["learning"]


def test_all_responses_of_a_rank_are_scored_together(seven_billion):
    """However many minibatches they are learned from in."""
    size = seven_billion[False][0].size
    reward = Role("reward 1", size, trains=False, weights=size.parameters)
    found = [
        by_name(
            [*seven_billion[False], reward], replace(STAGE_3, ppo=PPOConfig(batch_size=128, minibatches=minibatches))
        )
        for minibatches in (1, 16)
    ]
    assert found[0]["feedback"].activations == found[1]["feedback"].activations > 0
    assert found[0]["learning"].activations > found[1]["learning"].activations


def test_what_prefixs_handed_up_is_counted_of_each_role(tmp_path):
    model = fuse_head(
        outline(AutoModelForCausalLM, Source("actor.model", tiny.saved(tmp_path, tiny.causal())), torch.float32)
    )
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    size = Footprint(Policy(model), torch.float32, cpu=False)
    assert size.prefix == 1
    both = [Role(name, size, trains=True, weights=size.parameters) for name in ("actor", "critic")]
    found = by_name(both, Config(zero=ZeroConfig(stage=0), sampling=UNRECORDED), ranks=1)
    batch = memory.Batch.of(Config(), 1)
    assert found["experience"].buffers == found["learning"].buffers == 2 * batch.tokens * size.width * 4
    assert found["sampling"].buffers == found["feedback"].buffers == 0


@pytest.fixture
def kept_states(monkeypatch):
    """Of how many sequences prefix states are kept anywhere."""
    made, there = PrefixStates.__init__, weakref.WeakSet[PrefixStates]()

    def init(self: PrefixStates, **options: Any) -> None:
        made(self, **options)
        there.add(self)

    monkeypatch.setattr(PrefixStates, "__init__", init)
    return lambda: sum(len(kept) for states in there for kept in states._states.values())


def test_prefix_states_are_gone_once_a_batch_is_learned_from(tmp_path, world, monkeypatch, kept_states):
    folder, found = whole_runs.prepare(tmp_path), []
    log_step, sample = train.log_step, InProcess.sample

    def logging(setup: Any, done: Any, tracker: Any) -> None:
        found.append(("logged", kept_states()))
        log_step(setup, done, tracker)

    def sampling(*args: Any, **options: Any) -> Any:
        found.append(("sampled", kept_states()))
        return sample(*args, **options)

    run_updates = train.run_updates

    def learning(*args: Any, **options: Any) -> Any:
        for update in run_updates(*args, **options):
            found.append(("learned", kept_states()))
            yield update

    for name, function in (("log_step", logging), ("run_updates", learning)):
        monkeypatch.setattr(train, name, function)
    monkeypatch.setattr(InProcess, "sample", sampling)
    argv = whole_runs.settings(
        folder, tmp_path / "out", steps=2, actor__train=1, eval__prompts=0, eval__every=0, checkpoint__every=0
    )
    train.train(parse(argv), world)
    assert [count > 0 for what, count in found if what == "learned"] == [True] * 8
    assert [(what, count) for what, count in found if what != "learned" and count] == []


def test_an_evaluation_keeps_the_prefix_states_of_one_microbatch(tmp_path, world, monkeypatch, kept_states):
    folder, found = whole_runs.prepare(tmp_path), []
    own = evaluation.token_stats

    def counting(*args: Any, **options: Any) -> Any:
        found.append(kept_states())
        return own(*args, **options)

    monkeypatch.setattr(evaluation, "token_stats", counting)
    argv = whole_runs.settings(folder, tmp_path / "out", steps=1, eval__prompts=12, actor__train=1, eval__every=0)
    train.train(parse(argv), world)
    assert 0 < max(found) < 12


def test_a_run_samples_with_the_rows_that_the_plan_has_chosen(tmp_path, world, monkeypatch):
    folder, found = whole_runs.prepare(tmp_path), []
    sample = InProcess.sample

    def sampling(self: InProcess, *args: Any, **options: Any) -> Any:
        found.append(self._sampling.rows)
        return sample(self, *args, **options)

    monkeypatch.setattr(InProcess, "sample", sampling)
    argv = whole_runs.settings(folder, tmp_path / "out", steps=1, sampling__rows="auto", eval__prompts=0, eval__every=0)
    config = parse(argv)
    train.train(config, world)
    assert found == [bucket(config.ppo.batch_size)]


def test_without_a_critic_the_plan_falls_by_what_the_critic_was(tmp_path):
    model = tiny.saved(tmp_path, tiny.causal())
    machine = Machine(1, 2, 10**10, 10**12)
    for stage in ("1", "3"):
        with_one = config_of(model, "--zero.stage", stage, "--optim.dtype", "bf16")
        without = config_of(model, "--zero.stage", stage, "--optim.dtype", "bf16", "--ppo.estimator", "reinforce++")
        plans = [make_plan(config, machine, measured_roles(config, cpu=False)) for config in (with_one, without)]
        gone = {share.role for share in plans[0].shares} - {share.role for share in plans[1].shares}
        assert {name.partition(",")[0] for name in gone} == {"critic"}  # and at stage 3 its export by the first rank
        for phase in PHASES:
            critic = sum(s.places.gpu.total for s in plans[0].shares if (s.role, s.phase) == ("critic", phase))
            totals = [sum(s.places.gpu.total for s in plan.shares if s.phase == phase) for plan in plans]
            assert totals[0] - totals[1] == critic > 0


def test_rest_counts_its_batches_of_a_grow_and_no_critic(seven_billion):
    """It measures a whole batch of a Grow at once, and learns from other microbatches."""
    config, actor = parse(REST_RUN, REST), seven_billion[False][:1]
    batch = memory.Batch.of(config, 8)
    assert (batch.rows, batch.sequences) == (64, 4)  # 512 responses of 1,024 tokens on 8 ranks; 32 in an update
    assert batch.asked("experience", config, 8).sequences == batch.asked("feedback", config, 8).sequences == 8
    found = {(s.role, s.phase): s.places.gpu for s in shares(actor, config, 8)}
    assert set(found) == {("actor", phase) for phase in PHASES}
    mixed = replace(config, mixture=replace(config.mixture, share=0.5, path="d", max_tokens=4096))
    wider = {(s.role, s.phase): s.places.gpu for s in shares(actor, mixed, 8)}
    assert wider["actor", "learning"].activations > found["actor", "learning"].activations
    assert next(smaller_passes(config)) == {"improve.microbatch_tokens": 4096}


REST_RUN = (
    *("--actor.model", "m", "--data.path", "d", "--rewards", '[{"pattern": "a"}]'),
    *("--data.max_prompt_tokens", "512", "--sampling.max_new_tokens", "512", "--improve.batch_size", "32"),
)
