"""Constants of nodes with 8 GPUs, from the datasheets of their makers, with the part of each that is assumed to be
reached. Nothing here was measured by fastppo."""

from __future__ import annotations

import difflib
from typing import NamedTuple

from fastppo.planner.constants.values import Constant, Constants, ConstantsError


class Node(NamedTuple):
    """A node as its maker describes it."""

    name: str
    gpus: int
    gpu_memory: int  # bytes of a GPU
    host_memory: int
    bf16: float  # dense FLOP/s of a GPU
    memory: float  # bytes/s of a GPU
    nvlink: float  # bytes/s of a GPU, each way
    pcie: float  # bytes/s of a GPU, each way
    network: float  # bytes/s of a GPU's adapter, each way
    host: float  # bytes/s of the memory of both sockets
    fp32: float  # FLOP/s, without TF32
    sheet: str


TB = 10**12
NODES = {
    "a100": Node(
        *("DGX A100 80GB", 8, 80 * 10**9, 2 * TB, 312e12, 2.039e12, 300e9, 32e9, 25e9, 409.6e9, 19.5e12),
        "datasheets of A100 80GB SXM and DGX A100: NVLink 600 GB/s both ways, PCIe 4.0, 200 Gb/s a GPU, 2 EPYC 7742",
    ),
    "h100": Node(
        *("DGX H100", 8, 80 * 10**9, 2 * TB, 989e12, 3.35e12, 450e9, 64e9, 50e9, 614.4e9, 67e12),
        "datasheets of H100 SXM and DGX H100: NVLink 900 GB/s both ways, PCIe 5.0, 400 Gb/s a GPU, 2 Xeon 8480C",
    ),
    "h200": Node(
        *("DGX H200", 8, 141 * 10**9, 2 * TB, 989e12, 4.8e12, 450e9, 64e9, 50e9, 614.4e9, 67e12),
        "datasheets of H200 SXM and DGX H200: NVLink 900 GB/s both ways, PCIe 5.0, 400 Gb/s a GPU, 2 Xeon 8480C",
    ),
    "b200": Node(
        *("DGX B200", 8, 180 * 10**9, 2 * TB, 2250e12, 8.0e12, 900e9, 64e9, 50e9, 716.8e9, 80e12),
        "datasheet of DGX B200: NVLink 1.8 TB/s a GPU both ways, PCIe 5.0, 400 Gb/s a GPU, 2 Xeon 8570",
    ),
}

# The part of a datasheet's number that is reached. Those of products and memory are what fastppo's ops reached on one
# H100 (bench/kernel_seconds.py has the same); the others are assumed.
REACHED = {"bf16": 0.73, "fp32": 0.73, "memory": 0.88, "attention": 0.45, "links": 0.8, "pcie": 0.85, "host": 0.6}


def node_named(name: str) -> Node:
    """Raises ConstantsError for one that is not known."""
    if name not in NODES:
        near = difflib.get_close_matches(name.lower(), NODES, n=1, cutoff=0.3)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise ConstantsError(
            f"--node {name} is no node that is known here; known are {', '.join(NODES)}.{meant} For another machine,"
            " write its constants to a file for --constants, or measure them with --measure."
        )
    return NODES[name]


def constants_of(name: str) -> Constants:
    node = node_named(name)
    sheet, assumed = node.sheet, "assumed"
    reached = REACHED
    values = {
        "products_bf16": Constant(node.bf16, sheet, reached["bf16"]),
        "products_fp32": Constant(node.fp32, sheet, reached["fp32"]),
        "attention": Constant(node.bf16, sheet, reached["attention"]),
        "memory": Constant(node.memory, sheet, reached["memory"]),
        "decode": Constant(node.memory, sheet, reached["memory"]),
        "adam": Constant(node.memory, sheet, reached["memory"]),
        "launch": Constant(6e-6, f"{assumed}: a kernel from Python"),
        "gap": Constant(1.5e-6, assumed),
        "graph_gap": Constant(1e-6, assumed),
        "host_adam": Constant(node.host, sheet, reached["host"]),
        "pcie": Constant(node.pcie, sheet, reached["pcie"]),
        "nvme": Constant(25e9, f"{assumed}: eight PCIe 4.0 drives", 0.8),
        "link": Constant(node.nvlink, sheet, reached["links"]),
        "link_latency": Constant(20e-6, f"{assumed}: NCCL's call and its hops"),
        "network": Constant(node.network, sheet, reached["links"]),
        "network_latency": Constant(10e-6, f"{assumed}: each doubling of the nodes"),
        "zero3_module": Constant(50e-6, f"{assumed}: DeepSpeed's hooks of a module"),
        "hidden": Constant(0.8, f"{assumed}: DeepSpeed gathers ahead on a stream of its own"),
    }
    return Constants(node.name, False, values, origin=f"--node {name}")
