"""What a machine has for a run."""

import logging

import pytest
import torch

from fastppo.planner.machine import CONTEXT, this_machine

TOTAL = 80 * 10**9


@pytest.mark.parametrize(("others", "counted"), [(0, 0), (CONTEXT // 2, 0), (CONTEXT + 6 * 10**9, 6 * 10**9)])
def test_what_other_processes_hold_of_a_gpu_is_not_there(monkeypatch, caplog, others, counted):
    ours = 3 * 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (TOTAL - others - ours, TOTAL))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: ours)
    with caplog.at_level(logging.WARNING, "fastppo"):
        assert this_machine(8, 1, cpu=False).gpu == TOTAL - counted
    said = [r.getMessage() for r in caplog.records]
    assert said == (["other processes hold 6.0 of the GPU's 80.0 GB (nvidia-smi lists them)"] if counted else [])
