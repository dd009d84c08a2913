"""Two audits of the Triton kernels without a GPU: `python bench/audit.py [bytes|code [80] [90] [100]]`.

bytes: counts every load and store in Triton's interpreter, and compares the sum with the least possible traffic.
code: compiles each kernel for sm_80, sm_90 and sm_100, or for those named, with arguments specialised as its launcher
passes them, and reads the machine code: registers, spills, shared memory, occupancy, instructions and loads of the
main loops.

Rows have GPT-2's vocabulary of 50,257 tokens, padded to start at multiples of 16 bytes. Attention is over a row of
8,192 positions with the heads of widely used models. The last line of each audit is JSON. Time, bandwidth and cache
hits cannot be measured without a GPU.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from audit_calls import (
    WINDOW,
    Call,
    attention_calls,
    glu_calls,
    gradient_calls,
    layer_calls,
    rotary_calls,
    row_calls,
    token_calls,
)
from interpreted import replace_the_language_once_a_launch
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90, 100)
LAYER_WIDTHS = (576, 8192)  # of SmolLM2-135M and a 70B Llama
# Kernels that several calls launch in the same form, and the call that shows them.
ONCE = {"finish_kernel": "policy_loss", "add_sums_kernel": "rms_norm backward"}
WARPS, BLOCKS, REGISTERS = 64, 32, 65_536  # limits of a multiprocessor, the same on all three
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}

Program = list[tuple[int, str]]  # address and instruction


# Bytes


class Traffic:
    """A context that counts the elements that interpreted kernels load and store, without masked ones."""

    def __enter__(self) -> Traffic:
        self.bytes = 0
        self.builder = interpreter.InterpreterBuilder
        self.load, self.store = self.builder.create_masked_load, self.builder.create_masked_store

        def load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self.bytes += size(pointers, mask)
            return self.load(builder, pointers, mask, *rest)

        def store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.bytes += size(pointers, mask)
            return self.store(builder, pointers, value, mask, *rest)

        def size(pointers: Any, mask: Any) -> int:
            shown = int(mask.data.sum()) * pointers.data.size // mask.data.size
            return shown * max(1, pointers.get_element_ty().primitive_bitwidth // 8)

        # Loads and stores without a mask call the same two functions.
        self.builder.create_masked_load, self.builder.create_masked_store = load, store
        return self

    def __exit__(self, *_: object) -> None:
        self.builder.create_masked_load, self.builder.create_masked_store = self.load, self.store


def bytes_moved() -> list[dict[str, Any]]:
    """One entry per call: bytes moved, least possible, and their ratio. Needs TRITON_INTERPRET=1."""
    made = []
    replace_the_language_once_a_launch()
    for dtype in (torch.bfloat16, torch.float32):
        calls = row_calls(dtype) + gradient_calls(dtype) + (token_calls() if dtype == torch.float32 else [])
        of_layers = layer_calls(dtype) + glu_calls(dtype) + rotary_calls(dtype)
        for call in calls + attention_calls(dtype) + of_layers:
            with Traffic() as traffic:
                call.launch()
            ratio = round(traffic.bytes / call.least, 4)
            entry = {"op": call.name, "dtype": str(dtype).removeprefix("torch.")}
            made.append(entry | {"bytes": traffic.bytes, "least": call.least, "ratio": ratio})
    return made


# Machine code


class NoGPU:
    """A replacement for Triton's driver that only names the architecture to compile for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton caches kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(call: Call, architecture: int) -> list[tuple[str, Any]]:
    """The kernels that a call launches, compiled with the launcher's arguments but not run."""
    kernels = []
    run = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append((kernel.__name__, run(kernel, *arguments, grid=grid, warmup=True, **options)))

    triton.runtime.driver.set_active(NoGPU(architecture))
    JITFunction.run = compile_only
    try:
        call.launch()
    finally:
        JITFunction.run = run
    return kernels


def tool(name: str) -> Path:
    """The path of a machine-code tool that Triton's package contains."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not path.exists():
        raise SystemExit(f"no {name} at {path}: the machine code cannot be read")
    return path


def instructions(cubin: bytes) -> bytes:
    """The instructions of a cubin with one kernel: its section .text, found by its 64-bit ELF headers."""
    headers, (size, count, names) = struct.unpack_from("<Q", cubin, 0x28)[0], struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    (code,) = [s for s in sections if cubin.startswith(b".text.", sections[names][4] + s[0])]
    return cubin[code[4] : code[4] + code[5]]


def disassembled(cubins: list[bytes], architecture: int) -> list[Program]:
    """The program of each cubin. nvdisasm starts slowly, so it runs once, and addresses continue across cubins."""
    codes = [instructions(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        dump = [str(tool("nvdisasm")), "--binary", f"SM{architecture}", file.name]
        sass = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([^;]+);", sass)
    whole = [(int(address, 16), text) for address, text in lines]
    starts = [bisect_left(whole, (end,)) for end in itertools.accumulate(map(len, codes), initial=0)]
    return [whole[first:last] for first, last in itertools.pairwise(starts)]


def loops(program: Program) -> list[list[str]]:
    """The instructions of each innermost loop: from the target of a backward branch to the branch."""
    spans = []
    for address, text in program:
        target = re.search(r"^BRA\b.*\b0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    inner = [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[text for address, text in program if first <= address <= last] for first, last in inner]


def occupancy(architecture: int, registers: int, shared: int, warps: int) -> float:
    """Resident warps of a multiprocessor over the most that it can have."""
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = (
        REGISTERS // 4 // warp_registers * 4 // warps
    )  # each quarter of the warps has a quarter of the registers
    by_shared = SHARED[architecture] // (shared + 1024)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS) * warps / WARPS


def accesses(program: Iterable[str]) -> list[str]:
    """Loads and stores of global memory."""
    return [text.split()[0] for text in program if re.match(r"(LDG|LDGSTS|STG)\.", text)]


def inspect(kernel: Any, program: Program, architecture: int) -> dict[str, Any]:
    """What the machine code of a kernel shows."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        dump = [str(tool("cuobjdump")), "--dump-resource-usage", file.name]
        usage = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    registers, shared, warps = int(re.search(r"REG:(\d+)", usage)[1]), kernel.metadata.shared, kernel.metadata.num_warps
    bodies = [body for body in loops(program) if any(re.match(r"(LDG|STG)", text) for text in body)]
    memory = [accesses(body) for body in bodies]
    return {
        "registers": registers,
        "spills": sum(text.startswith(("STL", "LDL")) for _, text in program),
        "shared": shared,
        "warps": warps,
        "occupancy": occupancy(architecture, registers, shared, warps),
        "accesses": sorted(set(accesses(text for _, text in program))),
        "loops": [{"instructions": len(b), "memory": m} for b, m in zip(bodies, memory, strict=True)],
    }


def machine_code(architectures: Sequence[int]) -> list[dict[str, Any]]:
    """One entry per kernel, dtype and architecture. Needs a process without TRITON_INTERPRET."""
    made = []
    for architecture in architectures:
        groups = [("bfloat16", row_calls(torch.bfloat16)), ("float32", row_calls(torch.float32))]
        groups += [("bfloat16, softcap", row_calls(torch.bfloat16, 30.0)[:6]), ("float32", token_calls())]
        groups += [("bfloat16", gradient_calls(torch.bfloat16)[:1]), ("float32", gradient_calls(torch.float32)[:1])]
        groups += [("bfloat16", attention_calls(torch.bfloat16)), ("float32", attention_calls(torch.float32))]
        groups += [("bfloat16, softcap", attention_calls(torch.bfloat16, 50.0, WINDOW))]
        groups += [("float32, softcap", attention_calls(torch.float32, 50.0, WINDOW))]
        for width in LAYER_WIDTHS:
            of_width = f", {width} columns"
            groups += [(f"bfloat16{of_width}", layer_calls(torch.bfloat16, width))]
            groups += [(f"float32{of_width}", layer_calls(torch.float32, width))]
        groups += [("bfloat16", glu_calls(torch.bfloat16)), ("float32", glu_calls(torch.float32, ("silu",)))]
        groups += [("bfloat16", rotary_calls(torch.bfloat16)), ("float32", rotary_calls(torch.float32))]
        entries, kernels = [], []
        for dtype, calls in groups:
            for call in calls:
                for name, kernel in compiled(call, architecture):
                    if name not in ONCE or call.name == ONCE[name]:  # the same for all three architectures
                        entries.append({"op": call.name, "kernel": name, "dtype": dtype, "sm": architecture})
                        kernels.append(kernel)
        programs = disassembled([kernel.asm["cubin"] for kernel in kernels], architecture)
        for entry, kernel, program in zip(entries, kernels, programs, strict=True):
            made.append(entry | inspect(kernel, program, architecture))
    return made


def print_code(entry: dict[str, Any]) -> None:
    memory = "; ".join(
        f"{loop['instructions']}: " + " ".join(f"{loop['memory'].count(m)} {m}" for m in dict.fromkeys(loop["memory"]))
        for loop in entry["loops"]
    )
    name = {"finish_kernel": "finish", "combine_kernel": "combine", "choose_kernel": "choose"}
    name = name.get(entry["kernel"], entry["op"])
    print(
        f"sm_{entry['sm']:<4} {name:24} {entry['dtype']:18} {entry['registers']:>9} {entry['spills']:>6} "
        f"{entry['shared']:>6} {entry['warps']:>5} {entry['occupancy']:>9.0%}  {memory}"
    )


def main() -> None:
    if sys.argv[1:] == ["bytes"]:
        print(f"{'op':24} {'dtype':9} {'bytes':>11} {'least':>11} {'ratio':>7}")
        made = bytes_moved()
        for e in made:
            print(f"{e['op']:24} {e['dtype']:9} {e['bytes']:>11,} {e['least']:>11,} {e['ratio']:>7.4f}")
        print(json.dumps(made))
    elif sys.argv[1:2] == ["code"]:
        print(
            f"{'':7} {'op':24} {'dtype':18} registers spills shared warps occupancy  instructions of each loop: memory"
        )
        made = machine_code([int(name) for name in sys.argv[2:]] or ARCHITECTURES)
        for entry in made:
            print_code(entry)
        print(json.dumps(made))
    else:  # triton chooses its interpreter when it is imported, so use two processes
        for audit in ("bytes", "code"):
            environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
            environment |= {"TRITON_INTERPRET": "1"} if audit == "bytes" else {}
            if code := subprocess.run([sys.executable, __file__, audit], env=environment).returncode:
                raise SystemExit(code)


if __name__ == "__main__":
    main()
