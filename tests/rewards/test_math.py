"""Reference answers as a source of reward: what equals what, what hostile responses cost, and what errors say."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from fastppo.config import Config, DataConfig, HealthConfig, RewardConfig
from fastppo.data import load_prompts, pack
from fastppo.distributed import World
from fastppo.rewards import Responses, RewardError, check_imports, check_references
from fastppo.rewards.sources import shared_sources
from fastppo.rewards.verify import source as source_module
from fastppo.rewards.verify import workers
from fastppo.rewards.verify.source import MathSource
from fastppo.rewards.verify.worker import MEMORY
from fastppo.rewards.verify.workers import Pool, Task

ALONE = World(0, 1, torch.device("cpu"))
TWO_RANKS = [World(rank, 2, torch.device("cpu")) for rank in range(2)]


def responses(texts, references):
    count = len(texts)
    return Responses(
        [""] * count, list(texts), [True] * count, {"answer": list(references)}, pack([[1]] * count, [1] * count)
    )


def scores(texts, references, **settings):
    return MathSource(RewardConfig(math="answer", **settings))(responses(texts, references))


RIGHT = [
    ("#### 72", "48 + 24 = 72\n#### 72"),
    ("So she sold 72 clips.\n#### 72 clips", "#### 72"),
    ("#### $1,000.00", "#### 1,000"),
    ("The answer is 18 dollars per day.", "#### $18"),
    ("I get 5 apples", "#### 5"),
    ("It costs $1,234.", 1234),
    (r"\boxed{72.0}", 72),
    (r"\boxed{72}", 72.0),
    (r"\boxed{\frac{1}{2}}", 0.5),
    (r"\boxed{\dfrac12}", r"$\frac{1}{2}$"),
    (r"\boxed{0.5}", r"so $x = \boxed{\frac{1}{2}}$"),
    (r"\boxed{0.333333}", r"\frac{1}{3}"),
    (r"The answer is $\frac{3}{4}$ of a cup.", "3/4"),
    (r"\boxed{1 + x}", "x+1"),
    (r"\boxed{(x+1)^2}", "x^2 + 2x + 1"),
    (r"\boxed{\frac{\sqrt{3}}{3}}", r"\frac{1}{\sqrt{3}}"),
    (r"\boxed{\{2, 1\}}", r"\{1,2\}"),
    (r"\boxed{2 \text{ or } 1}", "1, 2"),
    (r"\boxed{(1, 2]}", r"\left(1,2\right]"),
    (r"\boxed{(3,\infty)\cup(-\infty,2)}", r"(-\infty, 2) \cup (3, \infty)"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\boxed{4i + 3}", "3+4i"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{y = 1 + 2x}", "y=2x+1"),
    (r"\boxed{50\%}", r"50\%"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{12\text{ cm}^2}", "12"),
    (r"\boxed{1\frac12}", "1.5"),
    (r"\boxed{2^{10}}", "1024"),
    (r"\boxed{10!}", "3628800"),
    (r"\boxed{1.5\times10^3}", "1500"),
    (r"\boxed{\text{evelyn}}", r"\text{Evelyn}"),
    (r"The correct answer is (B).", r"\textbf{(B)}"),
    (r"First \boxed{1}. No: \boxed{2}", "2"),
    (r"\boxed{0.00001}", 1e-5),
    (r"\boxed{10^{-5}}", 1e-5),
    (r"\boxed{1.7\cdot 10^{-19}}", 1.7e-19),
    (r"\boxed{10^{16}}", 1e16),
    (r"\boxed{6.02\times10^{23}}", 6.02e23),
    (r"\boxed{1.5e3}", "1500"),
    (r"\boxed{121}", 121.00000000000001),
    (r"\boxed{121}", 120.99999999999999),
    (r"\boxed{0.03333333}", r"\frac{1}{30}"),
    (r"\boxed{0.05}", r"5\%"),
    (r"\boxed{12.5}", r"12.5\%"),
    (r"\boxed{12.5\%}", "0.125"),
    ("#### 12.5%", "#### 12.5"),
    ("It is 12.5 per cent.", "12.5%"),
    ("\\boxed{90\u00b0}", r"90^\circ"),
    ("The answer is 5 \u20ac.", "5"),
]
WRONG = [
    ("#### 73", "#### 72"),
    ("#### 1,001", "#### 1,000"),
    ("", "5"),
    ("I do not know.", "5"),
    (r"The answer is 5. \boxed{}", "5"),
    (r"\boxed{-5}", "5"),
    (r"\boxed{5} \boxed{6}", "5"),
    ("The answer is 5 and 6.", "5"),
    (r"\boxed{\frac13}", "0.5"),
    (r"\boxed{0.33}", r"\frac{1}{3}"),
    (r"\boxed{x + 2}", "x+1"),
    (r"\boxed{(1, 2)}", "[1, 2]"),
    (r"\boxed{\{1,2,3\}}", r"\{1,2\}"),
    (r"\boxed{\text{Bob}}", r"\text{Evelyn}"),
    ("The answer is C.", r"\text{(B)}"),
    (r"\boxed{x = 5}", "y = 5"),
    (r"\boxed{\frac{1}{}}", "1"),
    (r"\boxed{2^{100}}", "2^{100}+1"),
    (r"\boxed{???}", "5"),
    ("The answer is (A) and (B).", r"\text{(A)}"),
    (r"\boxed{1.6\times 10^{-19}}", r"1.7\times 10^{-19}"),
    (r"\boxed{0.0000004}", "0.0000003"),
    (r"\boxed{0.0000104}", 1e-5),
    (r"\boxed{0.033333}", r"\frac{1}{30}"),
    (r"\boxed{120}", 120.99999999999999),
    (r"\boxed{2.9999999}", "3"),
    (r"\boxed{0.0000001}", "0"),
    (r"\boxed{6.03\times10^{23}}", 6.02e23),
    (r"\boxed{12.5\%}", "1250"),
]


def test_each_right_answer_gets_1_and_each_wrong_one_0():
    texts, references = zip(*RIGHT, *WRONG, strict=True)
    found = dict(zip(zip(texts, references, strict=True), scores(texts, references), strict=True))
    assert [pair for pair in RIGHT if found[pair] != 1] == []
    assert [pair for pair in WRONG if found[pair] != 0] == []
    assert "math_verify" not in sys.modules  # it is imported by the processes alone


def test_a_missing_reference_gets_0():
    assert scores(["None", "nan", ""], [None, float("nan"), ""]) == [0, 0, 0]


# What responses can do

HOSTILE = [
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{(10^9)!}",
    r"\boxed{\prod_{n=1}^{10^8} n}",
    "\\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
    "\\boxed{" + r"\frac{1}{" * 400 + "1" + "}" * 401,
]


def test_hostile_responses_get_0_within_the_limit_and_cost_the_others_nothing(caplog):
    texts = [text for hostile in HOSTILE for text in (hostile, r"\boxed{3/6}")]
    source = MathSource(RewardConfig(math="answer", time_limit=0.5))
    start = time.monotonic()
    assert source(responses(texts, ["0.5"] * len(texts))) == [0, 1] * len(HOSTILE)
    assert time.monotonic() - start < 120 and (source.over_limit, source.scored) == (5, 10)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1
    assert "rewards.math = answer: 5 of 10 responses could not be compared within 0.5 s" in said[0] and "9^9" in said[0]
    assert source(responses([HOSTILE[0]] * 4, ["1"] * 4)) == [0] * 4 and source.over_limit == 9
    assert len(caplog.records) == 1
    source(responses([HOSTILE[0]], ["1"]))
    assert "10 of 15 responses" in caplog.records[-1].getMessage() and len(caplog.records) == 2


def test_a_text_of_megabytes_is_an_answer_as_any_other():
    long = "and then 3 + 4 = 8, so " * 50_000
    assert scores([f"{long} the answer is 7.", long, r"\boxed{7}"], ["7"] * 3) == [1, 0, 1]


TASKS = [Task(text, True, reference) for text in ("x^2", "1/2", r"\{1,2\}", "2", r"(0,1]") for reference in (
    "x^2", "0.5", r"\{2,1\}", "2.0", "(0, 1]")]  # fmt: skip


@pytest.fixture
def pool():
    """Makes processes of a test's own."""
    made = []

    def make(size):
        made.append(Pool(os.getpid(), size))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_the_verdicts_do_not_depend_on_the_number_of_processes(pool):
    limit = [Task("9^{9^{9^9}}", True, "1")]
    found = {size: pool(size).run([*TASKS[:9], *limit, *TASKS[9:]], 0.5) for size in (1, 3)}
    assert found[1] == found[3] and found[1][9] is None
    assert found[1][:9] + found[1][10:] == [i // 5 == i % 5 for i in range(25)]


def started(pool):
    return [worker._process for worker in pool._workers if worker._process is not None]


def test_processes_are_started_only_for_something_to_compare(pool):
    few = pool(4)
    assert few.run([], 5.0) == [] and started(few) == []
    assert few.run(TASKS[:1], 5.0) == few.run(TASKS[:1], 5.0) == [True]
    assert len(started(few)) == 1
    [process] = started(few)
    few.close()
    assert process.poll() is not None and started(few) == []


def test_a_process_that_another_program_ends_is_replaced_and_its_task_done_again(pool):
    one = pool(1)
    assert one.run(TASKS[:1], 5.0) == [True]
    [process] = started(one)
    process.kill()
    assert one.run(TASKS[:2], 5.0) == [True, False] and started(one) != [process]


def test_signals_to_all_processes_of_a_job_are_for_the_run_to_answer(pool):
    one = pool(1)
    assert one.run(TASKS[:1], 5.0) == [True]
    [process] = started(one)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        process.send_signal(number)
    assert one.run(TASKS[1:3], 5.0) == [False, False] and started(one) == [process]


def test_a_process_has_a_limit_of_memory_and_is_the_first_to_end_where_there_is_none(pool):
    one = pool(1)
    one.run(TASKS[:1], 5.0)
    [process] = started(one)
    limits = Path(f"/proc/{process.pid}/limits").read_text().splitlines()
    [limit] = [line.split()[3] for line in limits if line.startswith("Max address space")]
    assert MEMORY < int(limit) < 2 * MEMORY
    assert Path(f"/proc/{process.pid}/oom_score_adj").read_text() == "1000\n"


ENDS = """
    import os, sys
    from fastppo.rewards.verify import workers
    pool = workers.Pool(os.getpid(), 2)
    pool.run([workers.Task("1", True, "2"), workers.Task("9^{9^{9^9}}", True, "1")], 0.5)
    print([w._process.pid for w in pool._workers if w._process is not None], flush=True)
    os.fork()
    HOW
    """


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sys.exit(0)", "os._exit(1)", "os.kill(os.getpid(), 9)"])
def test_no_process_outlives_the_run_however_it_ends(how):
    code = textwrap.dedent(ENDS).replace("HOW", how)
    run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    pids = json.loads(run.stdout)
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and state(pid) != "Z" for pid in pids):
        assert time.monotonic() < end, pids
        time.sleep(0.05)
    assert pids


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def test_a_process_that_cannot_start_is_an_error_with_its_reason(pool, monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no wheel for this machine')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match=r"could not be started: ImportError: no wheel for this machine"):
        pool(1).run(TASKS[:1], 5.0)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(RewardError, match=r"could not be started: .*no-python"):
        pool(1).run(TASKS[:1], 5.0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RewardError, match=r"could not be started: it ended with status 1"):
        pool(1).run(TASKS[:1], 5.0)
    monkeypatch.setattr(workers, "STARTING", 0.2)
    (tmp_path / "hangs").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "hangs").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "hangs"))
    with pytest.raises(RewardError, match=r"could not be started: it did not answer in 0 s"):
        pool(1).run(TASKS[:1], 5.0)


@pytest.mark.parametrize("kills", [1, 2])
def test_a_process_that_is_killed_while_it_starts_is_started_once_more(pool, monkeypatch, tmp_path, caplog, kills):
    killed = tmp_path / "killed"
    program = tmp_path / "python"
    program.write_text(
        f'#!/bin/sh\necho >>{killed}\n[ $(wc -l <{killed}) -gt {kills} ] || kill -9 $$\nexec {sys.executable} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    if kills == 1:
        assert pool(1).run(TASKS[:1], 5.0) == [True]
    else:
        with pytest.raises(RewardError, match=r"could not be started: it ended with status -9"):
            pool(1).run(TASKS[:1], 5.0)
    assert [record.getMessage() for record in caplog.records] == [
        "a process that verifies answers got signal 9 while it started: started again"
    ]


# What is wrong before a run

CONFIG = Config(rewards=(RewardConfig(math="answer"),))


def prompts(tmp_path, answers, name="data.jsonl", column="answer"):
    lines = [json.dumps({"prompt": f"prompt {i}", column: answer}) for i, answer in enumerate(answers)]
    (tmp_path / name).write_text("\n\n".join(lines))
    config = DataConfig(path=str(tmp_path / name), column="prompt", shuffle=False)
    return load_prompts(config, tiny.tokenizer(), prompts_heldout=0, context=None, reserve=1)[0]


GOOD = [72, 0.5, "#### 1,000", r"\boxed{\frac{1}{2}}", "x+1", "(1, 2]", r"\text{Evelyn}"]


def test_references_that_can_be_read_pass(tmp_path):
    check_references(CONFIG, ALONE, prompts(tmp_path, GOOD), prompts(tmp_path, GOOD[::-1], "other.jsonl"))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (["", 5], r"data.jsonl, line 15: ''"),
        ([None], r"data.jsonl, line 15: 'None'"),
        ([["5"]], r"data.jsonl, line 15: \"\['5'\]\""),
        (["48/2\n####"], r"data.jsonl, line 15: '48/2\\n####'"),
        ([r"so \boxed{\frac{1}{}}."], r"data.jsonl, line 15: .*boxed"),
        ([5, "???", "???", "!", "#### ?", r"\frac"], r"line 17: '\?\?\?'; .*, line 21: '!'; .* and 1 more"),
    ],
)
def test_references_that_cannot_be_read_are_named_with_their_rows(tmp_path, bad, words):
    with pytest.raises(RewardError, match=rf"^rewards.math = answer: .* cannot be read as mathematics: .*{words}"):
        check_references(CONFIG, ALONE, prompts(tmp_path, GOOD), prompts(tmp_path, [*GOOD, *bad]))
    judged = replace(CONFIG, rewards=(), health=HealthConfig(judge=CONFIG.rewards))
    with pytest.raises(
        RewardError, match=r"^health.judge.math = answer: .* Each must be a number, .*Correct these rows"
    ):
        check_references(judged, ALONE, prompts(tmp_path, [*GOOD, *bad]))


def test_ranks_read_each_a_part_and_raise_the_same_error(tmp_path, monkeypatch):
    data, read, said = prompts(tmp_path, [*GOOD, "???", "x", "!!"]), [], []
    real = source_module.verdicts
    monkeypatch.setattr(source_module, "verdicts", lambda tasks, limit: read.append(tasks) or real(tasks, limit))
    outcomes = []
    for gather in (lambda x, _: outcomes.append(x) or [[]], lambda x, _: outcomes):
        monkeypatch.setattr(source_module, "all_gather", gather)
        for world in TWO_RANKS:
            try:
                check_references(CONFIG, world, data)
            except RewardError as error:
                said.append(str(error))
    assert len(said) == 2 and said[0] == said[1] and "line 15: '???'" in said[0] and "line 19: '!!'" in said[0]
    parts = [{task.reference for task in tasks} for tasks in read[:2]]
    assert parts[0].isdisjoint(parts[1]) and {"x+1", "(1, 2]", "???", "x"} <= parts[0] | parts[1]


def test_a_reference_that_takes_too_long_is_one_that_cannot_be_read(monkeypatch, tmp_path):
    slow = Config(rewards=(RewardConfig(math="answer", time_limit=0.5),))
    deep = "(" * 3000 + "1" + ")" * 3000
    with pytest.raises(RewardError, match=r"data.jsonl, line 3"):
        check_references(slow, ALONE, prompts(tmp_path, ["1", deep]))


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    words = r"^rewards.math = answer names a column that the data does not have; it has: prompt, solution"
    with pytest.raises(RewardError, match=words):
        check_references(CONFIG, ALONE, prompts(tmp_path, GOOD, column="solution"))
    with pytest.raises(RewardError, match=words):
        MathSource(CONFIG.rewards[0])(replace(responses("a", "1"), columns={"prompt": [""], "solution": ["1"]}))


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    check_imports(CONFIG.rewards)
    monkeypatch.setattr(source_module, "find_spec", lambda name: None)
    with pytest.raises(
        RewardError, match=r"judge.math is answer, .* not installed. Run `pip install 'fastppo\[math\]'`"
    ):
        check_imports(CONFIG.rewards, "judge")


def test_a_judge_of_the_same_column_is_the_same_source():
    assert shared_sources(replace(CONFIG, health=HealthConfig(judge=CONFIG.rewards))) == ["math = answer"]
    other = HealthConfig(judge=(RewardConfig(math="solution"), RewardConfig(pattern="answer")))
    assert shared_sources(replace(CONFIG, health=other)) == []


def test_a_rank_uses_as_many_processes_as_it_has_threads_but_few(monkeypatch):
    for threads, size in ((1, 1), (3, 3), (64, 4)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        workers._pool.cache_clear()
        assert len(workers._pool(os.getpid())._workers) == size
    workers._pool.cache_clear()
