"""What ranks send each other, and what a GPU and its host: bytes of one rank, and seconds from them.

A collective over N ranks of S bytes in all sends (N - 1) / N S from each rank if it gathers or scatters, and twice as
much if it reduces and returns the sum (ring algorithms; Thakur et al., 2005). Its latency is that of a node, and grows
with the logarithm of the number of nodes (trees). Rings enter and leave each node once, over the adapters of all its
ranks, so that between nodes the slower counts of a rank's link and of the adapters of a node.

P parameters of which T train, weights of b bytes, N ranks (Rajbhandari et al., 2020, section 7), as DeepSpeed 0.19 does
it with the settings that fastppo gives it:

| zero.stage        | each microbatch                             | each update                                    |
|-------------------|---------------------------------------------|------------------------------------------------|
| 0 (fp32)          |                                             | sum 4 T                                        |
| 1                 |                                             | sum 4 T, gather b T                            |
| 2                 | sum b T (a part of which is kept)           | gather b T                                     |
| 3                 | gather b P forward, b P backward,           |                                                |
|                   | scatter b T                                 |                                                |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastppo.config import AnyConfig
from fastppo.planner.constants.values import Constants, Seconds
from fastppo.planner.machine import Machine
from fastppo.planner.memory import REDUCE_BUCKET, Role

# Bytes of AdamW for each parameter: gradient and, read and written, master weight and two moments, in fp32.
ADAM_BYTES = 4 + 3 * 8
# Bytes of adding a gradient in b bytes to its sum in fp32, less those b.
ADD_BYTES = 8
# DeepSpeed's defaults: weights that are used again within so many elements stay gathered, and so many at most.
REUSED = LIVE = 1_000_000_000


@dataclass(frozen=True)
class Sent:
    """Collectives of one kind: how many, and the bytes that all ranks together gather, scatter or sum."""

    count: float = 0
    bytes: float = 0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.count + other.count, self.bytes + other.bytes)

    def __rmul__(self, factor: float) -> Sent:
        return Sent(factor * self.count, factor * self.bytes)


@dataclass(frozen=True)
class Group:
    """Ranks that take part in collectives: all of a run, or those that share sequences."""

    ranks: int
    nodes: int  # that they are spread over

    @staticmethod
    def of(machine: Machine) -> Group:
        return Group(machine.ranks, machine.nodes)

    def sent(self, whole: float) -> float:
        """Bytes that a rank sends when `whole` bytes are gathered or scattered."""
        return whole * (self.ranks - 1) / self.ranks

    def seconds(self, sent: Sent, constants: Constants, *, times: float = 1) -> float:
        """times: 2 for sums that all ranks get."""
        if self.ranks == 1 or not sent.count:
            return 0.0
        latency, rate = 0.0, math.inf
        if self.ranks > self.nodes:  # several on a node
            latency, rate = constants["link_latency"], constants["link"]
        if self.nodes > 1:
            latency += math.log2(self.nodes) * constants["network_latency"]
            rate = min(rate, self.ranks / self.nodes * constants["network"])
        return sent.count * latency + times * self.sent(sent.bytes) / rate


@dataclass(frozen=True)
class Zero:
    """What a role costs under ZeRO in a pass, and in an update."""

    role: Role
    config: AnyConfig
    machine: Machine

    @property
    def group(self) -> Group:
        return Group.of(self.machine)

    @property
    def stage(self) -> int:
        return self.config.zero.stage

    @property
    def gathers(self) -> Sent:
        """Of a pass forward at stage 3."""
        size = self.role.size
        if self.stage < 3 or self.group.ranks == 1:
            return Sent()
        return Sent(size.modules, size.partitioned * size.bytes)

    @property
    def stays_gathered(self) -> bool:
        """Whether what a pass forward has gathered is still whole when the backward pass comes."""
        return self.role.size.parameters <= min(REUSED, LIVE)

    @property
    def sums(self) -> Sent:
        """Gradients that are brought together after each microbatch, at stages 2 and 3, or else once an update."""
        size = self.role.size
        width = 4 if self.stage < 2 else size.bytes
        if self.group.ranks == 1:
            return Sent()
        return Sent(math.ceil(size.trained / REDUCE_BUCKET), size.trained * width)

    @property
    def updated(self) -> Sent:
        """New weights that each rank gets from the one that has computed them."""
        size = self.role.size
        if self.stage in (0, 3) or self.group.ranks == 1:
            return Sent()
        return Sent(math.ceil(size.trained / REDUCE_BUCKET), size.trained * size.bytes)

    def forward(self, constants: Constants) -> Seconds:
        """Beside the kernels of a pass without gradient."""
        sent = self.gathers
        return Seconds(
            {
                "collectives": self.group.seconds(sent, constants),
                "copies": self._copied(sent.bytes / self.group.ranks, constants, self._parameters_on),
                "launches": self._hooks(constants),
            }
        )

    def learn(self, constants: Constants) -> Seconds:
        """Beside the kernels of a microbatch, forward and backward."""
        size, gathered = self.role.size, self.gathers
        passes = 1 if self.stays_gathered else 2
        collectives = passes * self.group.seconds(gathered, constants)
        added = size.trained * (size.bytes + ADD_BYTES) / (1 if self.stage < 2 else self.group.ranks)
        if self.stage == 2:
            collectives += self.group.seconds(self.sums, constants, times=2)
        elif self.stage == 3:
            collectives += self.group.seconds(self.sums, constants)
        copied = passes * gathered.bytes / self.group.ranks
        down = 4 * size.trained / self.group.ranks if self.stage > 1 and self.config.zero.optimizer_on != "none" else 0
        return Seconds(
            {
                "memory": added / constants["memory"] if size.trained else 0.0,
                "collectives": collectives,
                "copies": self._copied(copied, constants, self._parameters_on)
                + self._copied(down, constants, self.config.zero.optimizer_on),
                "launches": 2 * self._hooks(constants),
            }
        )

    def update(self, constants: Constants) -> Seconds:
        """The norm, AdamW on a rank's part, and the exchange of gradients and weights where it is once an update."""
        size, place = self.role.size, self.config.zero.optimizer_on
        part = size.trained / (1 if self.stage == 0 else self.group.ranks)
        collectives = self.group.seconds(self.sums, constants, times=2) if self.stage < 2 else 0.0
        collectives += self.group.seconds(self.updated, constants)
        found = {"collectives": collectives}
        touched = part * (ADAM_BYTES + 4 + (size.bytes if size.bytes < 4 else 0))  # the norm reads the gradient, too
        if place == "none" or self.machine.gpu is None:
            found["optimizer"] = touched / constants["adam"]
        else:
            found["optimizer"] = touched * self.machine.gpus / constants["host_adam"]
            down = 4 * part if self.stage < 2 else 0
            found["copies"] = self._copied(down + size.bytes * part, constants, "cpu")
        if place == "nvme":
            moved = 2 * 12 * part * self.machine.gpus / constants["nvme"]
            found["copies"] = found.get("copies", 0.0) + moved
        return Seconds(found) if size.trained else Seconds()

    @property
    def _parameters_on(self) -> str:
        return self.config.zero.parameters_on if self.role.trains else self.config.zero.frozen_on

    def _copied(self, amount: float, constants: Constants, place: str) -> float:
        """Seconds of a rank's bytes between its GPU and the host, and the NVMe of its node."""
        if place == "none" or self.machine.gpu is None or not amount:
            return 0.0
        found = amount / constants["pcie"]
        return found if place == "cpu" else max(found, amount * self.machine.gpus / constants["nvme"])

    def _hooks(self, constants: Constants) -> float:
        return self.role.size.modules * constants["zero3_module"] if self.stage == 3 else 0.0


def exchanged(role: Role, tokens: int, group: Group) -> Sent:
    """What a layer's attention exchanges forward among ranks that share sequences (DeepSpeed-Ulysses; Jacobs et al.,
    2023): queries, keys, values and outputs of all their `tokens`, each rank (P - 1) / P of its own share. Heads of
    keys and values that are fewer than ranks are repeated."""
    size = role.size
    if group.ranks == 1:
        return Sent()
    heads = 2 * size.heads + 2 * max(size.key_value_heads, group.ranks)
    return Sent(4 * size.layers, size.layers * heads * size.head_width * size.bytes * tokens / group.ranks)
