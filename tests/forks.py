"""Runs of `fastppo.train` and its siblings, on one or two ranks, as forks of a process that has imported everything.

As a script it is that process: it reads one JSON command a line from stdin and answers each with one line.
`Forks` is the test's side of it. Ranks stand under a parent of their own, as under DeepSpeed's `launch`; once that is
gone they belong to the script (a subreaper), which can wait for them.
"""

from __future__ import annotations

import ast
import ctypes
import gc
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path
from typing import Any, NamedTuple

SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


class Run(NamedTuple):
    launcher: int  # process ids
    ranks: list[int]
    logs: list[Path]  # of each rank

    def text(self) -> str:
        return "\n".join(f"--- rank {i}\n{log.read_text()}" for i, log in enumerate(self.logs))


class Forks:
    """Starts runs, and waits for them. A context manager."""

    def __init__(self, logs: Path):
        self._logs, self._count = logs, 0

    def __enter__(self) -> Forks:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *raised: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def start(self, argv: list[str], ranks: int = 1, before: str = "", module: str = "fastppo.train") -> Run:
        """before: Python that each rank executes first, with RANK in its environment; module: whose `main` runs."""
        self._count += 1
        logs = [self._logs / f"run-{self._count}-rank-{rank}.log" for rank in range(ranks)]
        answer = self._ask(argv=argv, before=before, module=module, logs=[str(log) for log in logs])
        return Run(answer["launcher"], answer["ranks"], logs)

    def wait(self, run: Run, seconds: float = 120.0) -> list[int]:
        """Exit statuses of the ranks, negative for a signal; ranks that last longer are killed and fail the test."""
        codes = self._ask(wait=[*run.ranks, run.launcher], seconds=seconds)["codes"]
        assert None not in codes, f"still running after {seconds} s\n{run.text()}"
        return codes[:-1]

    def run(self, argv: list[str], ranks: int = 1, before: str = "", module: str = "fastppo.train") -> list[int]:
        run = self.start(argv, ranks, before, module)
        codes = self.wait(run)
        assert codes == [0] * ranks, run.text()
        return codes

    def _ask(self, **command: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def _only_replacing(code: str) -> types.CodeType:
    """The code, which fails where it gives `a.b` a value and there is no such thing: a patch of what has moved."""
    tree, body = ast.parse(code), []
    for node in tree.body:
        patched = [x for x in getattr(node, "targets", ()) if isinstance(x, ast.Attribute)]
        body += [ast.parse(ast.unparse(x)).body[0] for x in patched] + [node]  # read first, then replaced
    tree.body = body
    return compile(tree, "before", "exec")


def _rank(command: dict[str, Any], log: str, environment: dict[str, str]) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests are a shell's background job
    try:
        main = importlib.import_module(command["module"]).main
        exec(_only_replacing(command["before"]), {})
        main(command["argv"])
    except SystemExit as error:
        os._exit(error.code if isinstance(error.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)
    sys.stdout.flush()
    os._exit(0)


def _launch(command: dict[str, Any]) -> dict[str, Any]:
    """A fork that forks the ranks and waits for them, as a launcher does, though it does not end the others."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    told, tell = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        ranks, size = [], len(command["logs"])
        for rank, log in enumerate(command["logs"]):
            pid = os.fork()
            if pid == 0:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_SIZE": size, "MASTER_PORT": port}
                environment = {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
                _rank(command, log, environment)
            ranks.append(pid)
        os.write(tell, json.dumps(ranks).encode())
        os.close(tell)
        while True:  # the ranks' statuses are for the script, which gets them once this process is gone
            if all(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None for pid in ranks):
                os._exit(0)
            time.sleep(0.05)
    os.close(tell)
    ranks = json.loads(os.read(told, 4096))
    os.close(told)
    return {"launcher": launcher, "ranks": ranks}


def _wait(pids: list[int], seconds: float) -> dict[str, Any]:
    codes: dict[int, int | None] = dict.fromkeys(pids)
    end, kill = time.monotonic() + seconds, False
    while None in codes.values():
        if time.monotonic() > end and not kill:
            kill = True
            for pid in [p for p, code in codes.items() if code is None]:
                os.kill(pid, 9)
            break
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid in codes:
            codes[pid] = os.waitstatus_to_exitcode(status)
        elif pid == 0:
            time.sleep(0.02)
    return {"codes": [codes[pid] for pid in pids]}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    from deepspeed.comm.torch import build_shm_op
    from transformers import conversion_mapping

    from fastppo.config import command_line

    # the seconds that forks save; DeepSpeed imports torch's compiler where it makes an engine
    for name in (
        "fastppo.generate",
        "fastppo.train",
        "fastppo.train_dpo",
        "fastppo.train_reward",
        "fastppo.train_sft",
        "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "peft",
        "torch.utils.cpp_extension",
        "transformers.models.llama.modeling_llama",
    ):
        importlib.import_module(name)
    # what each run would otherwise make for itself, and keep
    for command in command_line.COMMANDS.values():
        command_line._parser(command, command.call)
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    build_shm_op()
    if importlib.util.find_spec("vllm") is not None:
        importlib.import_module("fastppo.rollout.vllm.check").import_vllm()
        for name in ("vllm.entrypoints.llm", "vllm.model_executor.models.llama", "vllm.v1.worker.cpu_worker"):
            importlib.import_module(name)
    gc.freeze()  # a fork's collector passes over what is there; else it would write to, and so copy, every page of it
    ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0)
    for line in sys.stdin:
        command = json.loads(line)
        answer = _wait(command["wait"], command["seconds"]) if "wait" in command else _launch(command)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
