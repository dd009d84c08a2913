"""The phases of PPO and of ReST: sampling, feedback, experience and learning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

from fastppo.config import Config, OnlineConfig, RestConfig
from fastppo.planner.batch import rows_of
from fastppo.planner.constants.values import Constants, Seconds
from fastppo.planner.memory import Role
from fastppo.planner.plan import Plan
from fastppo.planner.time.collectives import Group, Sent
from fastppo.planner.time.moves import moves
from fastppo.planner.time.passes import Passes, Sampling, head_asks, head_learns, value_work
from fastppo.planner.time.phases import Lengths, Phase, Rank, Step, Tally, groups_of, microbatches
from fastppo.planner.time.work import Work
from fastppo.rollout import bucket


class OnlineTimes:
    """The seconds of a step of a plan."""

    def __init__(self, plan: Plan, constants: Constants, lengths: Lengths) -> None:
        self.plan, self.constants, self.lengths = plan, constants, lengths
        self.config, self.machine = cast(OnlineConfig, plan.config), plan.machine
        self.ranks = {role.name: Rank(role, plan.config, plan.machine, constants) for role in plan.roles}
        self.scorers = [
            Rank(role, plan.config, plan.machine, constants)
            for role in plan.roles
            if role.name.startswith(("reward", "judge"))
        ]
        self.groups = groups_of(plan.config, plan.machine)
        # The prompts and responses of a step; of ReST a Grow.
        self.drawn = self.config.drawn_together
        self.batches = self.config.drawn_in_a_step / self.drawn

    def step(self) -> Step:
        phases = [self.sampling(), self.feedback(), self.experience(), self.learning()]
        moved = moves(self.plan, self.constants)
        phases = [
            Phase(p.name, p.seconds + Seconds({"copies": moved.get(p.name, 0.0)} if moved.get(p.name) else {}), p.work)
            for p in phases
        ]
        beside = 0.0
        if self.config.sampled_ahead:  # from one phase `feedback` to the next
            others = sum(phase.seconds.total for phase in phases if phase.name != "feedback")
            beside = min(self.lengths.reward_seconds, others)
        written = self.batches * self.drawn * self.lengths.response
        return Step(tuple(phases), written, "response tokens", beside)

    # sampling

    def sampling(self) -> Phase:
        actor, config = self.ranks["actor"], self.config
        graphs = self.machine.gpu is not None and config.sampling.cuda_graphs and config.rollout.engine == "inprocess"
        tally = Tally(self.constants)
        if config.zero.stage == 3 and self.machine.ranks > 1:  # the actor's weights, whole on each rank
            size = actor.role.size
            sent = Sent(max(size.layers, 1), size.parameters * size.bytes)
            tally.spend(Seconds({"collectives": self.batches * actor.zero.group.seconds(sent, self.constants)}))
        if config.rollout.engine == "vllm" and self.plan.vllm is not None:
            vllm = self.plan.vllm
            self._drawn_by_vllm(tally, actor.role, vllm.ranks, max(int(vllm.cache // vllm.response), 1))
        else:
            mine = -(-self.drawn // self.machine.ranks)
            for responses, times in _rounds(mine, rows_of(config, mine)):
                found = self._sampled(actor.role, responses)
                tally.add(found.prefill, self.batches * times)
                steps = self.lengths.response - 1
                tally.add(found.step, self.batches * times * steps, in_graph=graphs)
        return tally.phase("sampling")

    def _sampled(self, role: Role, responses: int) -> Sampling:
        passes, lengths = Passes(role.size), self.lengths  # no sequence is shared here
        return passes.sampler(self.config, bucket(responses), responses, lengths.prompt, lengths.response)

    def _drawn_by_vllm(self, tally: Tally, role: Role, together: int, most: int) -> None:
        """Ranks that draw together divide weights, heads and cache, and sum the states of each layer twice."""
        mine = -(-self.drawn * together // self.machine.ranks)
        group = Group(together, max(1, together // self.machine.gpus))
        for responses, times in _rounds(mine, min(mine, most)):
            found, steps = self._sampled(role, responses), self.lengths.response - 1
            prompts = -(-responses // self.config.sampling.samples_per_prompt) * self.lengths.prompt
            for work, tokens, often in ((found.prefill, prompts, 1), (found.step, responses, steps)):
                own = Tally(self.constants)
                own.add(1 / together * work, in_graph=work is found.step)
                between = own.seconds.parts["launches"] * (together - 1)  # each rank launches all kernels
                sums = Sent(2 * role.size.layers, 2 * role.size.layers * tokens * role.size.width * role.size.bytes)
                exchange = group.seconds(sums, self.constants, times=2)
                own.spend(Seconds({"launches": between, "collectives": exchange}))
                tally.include(own, self.batches * times * often)

    # feedback and experience

    def feedback(self) -> Phase:
        tally, mine = Tally(self.constants), -(-self.drawn // self.groups)
        for scorer in self.scorers:
            for sequences, times in microbatches(mine, self.lengths.whole, self.config.microbatch_tokens):
                own = Tally(self.constants)
                scorer.asks(own, sequences, self.lengths.whole, value_work(scorer.role.size, sequences, gradient=False))
                tally.include(own, self.batches * times)
        if self.lengths.reward_seconds:
            tally.spend(Seconds({"waiting": self.lengths.reward_seconds}))
        return tally.phase("feedback")

    def experience(self) -> Phase:
        tally = Tally(self.constants)
        for sequences, times in self._measured():
            own = Tally(self.constants)
            self._asks(own, sequences)
            tally.include(own, self.batches * times)
        return tally.phase("experience")

    def _measured(self) -> Iterator[tuple[int, float]]:
        """A rank's microbatches in experience."""
        budget, length = self.config.microbatch_tokens, self.lengths.whole
        if not self.config.learns_as_measured:
            yield from microbatches(-(-self.drawn // self.groups), length, budget)
            return
        updates = self.drawn // self.config.learned_together
        for sequences, times in microbatches(self.config.learned_together // self.groups, length, budget):
            yield sequences, updates * times

    def _asks(self, tally: Tally, sequences: int) -> None:
        """Logprobs of actor and reference and values, of one microbatch."""
        length, tokens = self.lengths.whole, self._head_tokens(sequences)
        actor, exact = self.ranks["actor"], self.config.exact_kl
        reference, critic = self.ranks.get("reference", actor), self.ranks.get("critic")
        head = Work() if exact else head_asks(reference.role.size, tokens)
        reference.asks(tally, sequences, length, head)
        head = head_asks(actor.role.size, tokens, reference=exact)
        if self._shared_critic:
            head += value_work(actor.role.size, tokens, gradient=False)
        actor.asks(tally, sequences, length, head, depth=self._above_prefix(actor.role))
        if critic is not None:
            critic.asks(tally, sequences, length, value_work(critic.role.size, tokens, gradient=False))

    def _head_tokens(self, sequences: int) -> int:
        """Response tokens that a rank's heads read."""
        return -(-sequences * self.lengths.response // self.ranks["actor"].sequence)

    @property
    def _shared_critic(self) -> bool:
        critic = self.config.value_function
        return critic is not None and critic.kind == "shared"

    def _keeps(self, role: Role) -> bool:
        """Whether the outputs of the role's frozen lower layers are kept from experience on."""
        return bool(role.size.prefix) and self.config.zero.stage < 3 and self.config.learns_as_measured

    def _above_prefix(self, role: Role) -> int | None:
        """The layers that the actor computes beyond those whose outputs the reference, which starts as it does, has
        left; None: all."""
        shared = self.config.zero.stage < 3 and self.config.reference.model is None
        return role.size.layers - role.size.prefix if shared and role.size.prefix else None

    # learning

    def learning(self) -> Phase:
        raise NotImplementedError

    def _mixes(self, tally: Tally, texts: int, length: int, *, times: float) -> None:
        """Texts that the actor learns from beside its responses, as long as they may be."""
        actor = self.ranks["actor"]
        for sequences, often in microbatches(-(-texts // self.groups), length, self.config.microbatch_tokens):
            own, tokens = Tally(self.constants), -(-sequences * length // actor.sequence)
            actor.learns(own, sequences, length, head_learns(actor.role.size, tokens, None), kept=False)
            tally.include(own, times * often)


class PPOTimes(OnlineTimes):
    """The seconds of a step of PPO."""

    def learning(self) -> Phase:
        tally, config = Tally(self.constants), cast(Config, self.config)
        ppo, length = config.ppo, self.lengths.whole
        updates = ppo.epochs * ppo.minibatches
        learning = [self.ranks[name] for name in ("actor", "critic") if name in self.ranks]
        for sequences, times in microbatches(config.learned_together // self.groups, length, config.microbatch_tokens):
            own, tokens = Tally(self.constants), self._head_tokens(sequences)
            for rank in learning:
                size = rank.role.size
                head = head_learns(size, tokens, ppo) if rank.role.name == "actor" else Work()
                if rank.role.name == "critic" or self._shared_critic:
                    head += value_work(size, tokens, gradient=True)
                rank.learns(own, sequences, length, head, kept=self._keeps(rank.role))
            if ppo.loss_reads_reference:
                self.ranks.get("reference", learning[0]).asks(own, sequences, length, Work())
            tally.include(own, updates * times)
            again = ppo.minibatches * times * sum(self._computed_again(sequences, e) for e in range(1, ppo.epochs))
            for rank in learning:
                if self._keeps(rank.role) and again:
                    tally.add(rank.role.size.prefix * rank.passes.layer(sequences, length), again)
        if config.mixed_in is not None:
            self._mixes(tally, *config.mixed_in, times=updates)
        for rank in learning:
            tally.spend(rank.zero.update(self.constants), updates)
        return tally.phase("learning")

    def _computed_again(self, sequences: int, epoch: int) -> float:
        """The chance that a microbatch of a later epoch has a sequence whose frozen lower layers another rank computed
        in each epoch before: then it computes them for all of the microbatch."""
        known = 1 - (1 - 1 / self.groups) ** epoch
        return 1 - float(known**sequences)


class RestTimes(OnlineTimes):
    """The seconds of a step of ReST: a Grow and its Improves."""

    def learning(self) -> Phase:
        """Each Improve learns from what is above its threshold: a quantile says how much that is; a score does not, and
        then it is all."""
        tally, config = Tally(self.constants), cast(RestConfig, self.config)
        improve, actor, length = config.improve, self.ranks["actor"], self.lengths.whole
        grown = config.drawn_in_a_step
        for level in improve.levels:
            kept = config.grow.prompts if level is None else grown
            if improve.keep == "quantile" and level is not None:
                kept = math.ceil(grown * (1 - level))
            if improve.max_per_prompt is not None:
                kept = min(kept, config.grow.prompts * improve.max_per_prompt)
            updates = improve.epochs * max(kept // max(config.learned_together, 1), 1)
            mine = config.learned_together // self.groups
            for sequences, times in microbatches(mine, length, config.microbatch_tokens):
                own, tokens = Tally(self.constants), self._head_tokens(sequences)
                actor.learns(own, sequences, length, head_learns(actor.role.size, tokens, None), kept=False)
                tally.include(own, updates * times)
            if config.mixed_in is not None:
                self._mixes(tally, *config.mixed_in, times=updates)
            tally.spend(actor.zero.update(self.constants), updates)
        return tally.phase("learning")


def _rounds(responses: int, rows: int) -> Iterator[tuple[int, int]]:
    """(responses that begin together, how many such rounds): responses of equal length end together."""
    if full := responses // rows:
        yield rows, full
    if rest := responses % rows:
        yield rest, 1
