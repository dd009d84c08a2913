"""Python functions as sources of reward: how they are imported, what they are given, and what is said of a failure."""

import asyncio
import sys
import textwrap
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from fastppo.config import RewardConfig
from fastppo.data.packed import pack
from fastppo.rewards import Responses, RewardError, check_imports
from fastppo.rewards.functions.function import function_source, score_concurrently
from fastppo.user_code import SETTINGS

RESPONSES = Responses(
    prompts=["one", "two"],
    texts=["b", "a"],
    ended=[True, False],
    columns={"prompt": ["one", "two"], "answer": [["x"], ["y"]]},
    packed=pack([[1]] * 2, [1] * 2),
)


@pytest.fixture(autouse=True)
def _imports_as_they_were(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files, and goes to their folder."""
    monkeypatch.chdir(tmp_path)

    def _write(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))

    return _write


def ask(name="own_reward.py:reward"):
    return function_source(name)(RESPONSES)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:reward", "could not be imported"),
        ("nowhere.py:reward", "no file nowhere.py"),
        ("textwrap:nothing", "has no function nothing; it has: .*indent"),
        ("textwrap", "module:function"),
    ],
)
def test_a_function_that_is_not_there_is_an_error_before_anything_loads(name, words):
    with pytest.raises(RewardError, match=words):
        check_imports([RewardConfig(function=name)])


def test_a_function_is_found_in_the_folder_of_the_run(write):
    write(my_rewards_here="def reward(**_): return [1, 2]")
    assert ask("my_rewards_here:reward") == [1, 2]


@pytest.mark.parametrize(
    ("parameters", "expression"),
    [
        ("prompts, responses", "[1, 2] if prompts == ['one', 'two'] else None"),
        ("responses, answer", "[1, 2] if answer == [['x'], ['y']] else None"),
        ("prompt, *, other=3", "[1, 2] if (prompt, other) == (['one', 'two'], 3) else None"),
        ("responses, **columns", "[1, 2] if list(columns) == ['prompts', 'prompt', 'answer'] else None"),
    ],
)
def test_a_function_gets_what_it_names_or_everything(write, parameters, expression):
    write(own_reward=f"def reward({parameters}):\n    return {expression}")
    assert ask() == [1, 2]


def test_a_parameter_that_is_no_column_is_an_error_with_the_columns(write):
    write(own_reward="def reward(responses, label): return [1, 2]")
    with pytest.raises(RewardError, match=r"has the parameter label, .* these are: prompts, responses, prompt, answer"):
        ask()


def test_what_a_function_changes_no_other_source_sees(write):
    write(
        own_reward="""
        def reward(responses, answer):
            responses.sort()
            answer[0].append("z")
            return [1, 2]
        """
    )
    ask()
    assert RESPONSES.texts == ["b", "a"] and RESPONSES.columns["answer"] == [["x"], ["y"]]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return (1 / 0 for r in responses)", r"raised ZeroDivisionError: division by zero \(own_reward.py:3\)"),
        ("raise SystemExit('no key')", r"raised SystemExit: no key \(own_reward.py:3\)"),
        ("return [int(r) for r in responses]", r"raised ValueError: .* \(own_reward.py:3\)"),
        ("return [json.loads(r) for r in responses]", r"raised JSONDecodeError: .* \(own_reward.py:3\)"),
        ("return helper.fails()", r"raised KeyError: 'deep' \(helper.py:2\)"),
    ],
)
def test_a_failure_is_named_by_the_innermost_line_of_the_users_own(write, body, words):
    write(
        own_reward=f"import helper, json\ndef reward(responses):\n    {body}",
        helper="def fails():\n    return {}['deep']",
    )
    with pytest.raises(RewardError, match=words):
        ask()


@pytest.mark.parametrize("body", ["raise SystemExit(3)", "import no_such_module", "def ("])
def test_a_file_that_cannot_be_imported_leaves_no_module(write, body):
    write(own_reward=body)
    with pytest.raises(RewardError, match=r"own_reward.py could not be imported \((SystemExit|ModuleNotFound|Syntax)"):
        ask()
    assert "own_reward" not in sys.modules


def test_a_file_is_imported_once_however_many_name_it(write):
    write(
        own_reward="import counted\ncounted.times += 1\ndef reward(**_): return [counted.times] * 2",
        counted="times = 0",
    )
    check_imports([RewardConfig(function="own_reward.py:reward")] * 2)
    assert ask() == ask("./own_reward.py:reward") == [1, 1]


def test_a_file_is_a_module_of_its_own_also_where_another_has_its_name(write, tmp_path):
    """Dataclasses and pickle look modules up by name."""
    text = """
        from __future__ import annotations
        import dataclasses, pickle

        @dataclasses.dataclass
        class Score:
            value: float

        def reward(responses):
            return [pickle.loads(pickle.dumps(Score(2.0))).value for _ in responses]
        """
    write(own_reward=text, json=text)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/own_reward.py").write_text("def reward(**_): return [5, 6]")
    assert ask("own_reward.py:reward") == ask("json.py:reward") == [2, 2]
    assert ask("other/own_reward.py:reward") == ask("other/own_reward.py:reward") == [5, 6]
    assert hasattr(sys.modules["json"], "loads") and {"json_2", "own_reward_2"} <= set(sys.modules)


# Functions of TRL's signature, and coroutine functions


@pytest.mark.parametrize("parameters", ["prompts, completions", "completions, **columns", "completions, answer"])
def test_completions_are_the_responses_as_functions_for_trl_call_them(write, parameters):
    write(own_reward=f"def reward({parameters}):\n    return [1, 2] if completions == ['b', 'a'] else None")
    assert ask() == [1, 2]


def test_a_column_called_completions_stays_the_datas(write):
    write(own_reward="def reward(completions): return completions")
    responses = replace(RESPONSES, columns={"completions": [3, 4]})
    assert function_source("own_reward.py:reward")(responses) == [3, 4]


def test_a_function_that_takes_completions_for_messages_is_told_that_they_are_texts(write):
    write(own_reward="def reward(completions, **_): return [len(c[0]['content']) for c in completions]")
    with pytest.raises(RewardError, match=r"raised TypeError: .*own_reward.py:1.* completions are texts here"):
        ask()


ASYNC = {
    "a coroutine function": "async def reward(responses):\n    await asyncio.sleep(0)\n    return [1, 2]",
    "an object": """
        class Reward:
            async def __call__(self, responses):
                return [1, 2]
        reward = Reward()
        """,
    "a generator": "async def reward(responses):\n    for i in (1, 2):\n        yield i",
    "a plain function around one": """
        async def inner(responses):
            return [1, 2]
        def reward(responses):
            return inner(responses)
        """,
    "one that keeps something of its loop": """
        lock = None
        async def reward(responses):
            global lock
            lock = lock or asyncio.Event()
            asyncio.get_running_loop().call_later(0.01, lock.set)
            await lock.wait()
            lock.clear()
            return [1, 2]
        """,
}


@pytest.mark.parametrize("text", ASYNC.values(), ids=ASYNC)
def test_an_async_function_is_awaited_whatever_runs_here(write, text):
    write(own_reward="import asyncio\n" + textwrap.dedent(text))
    source = function_source("own_reward.py:reward")
    assert source(RESPONSES) == source(RESPONSES) == [1, 2]

    async def in_a_notebook():
        return source(RESPONSES)

    assert asyncio.run(in_a_notebook()) == [1, 2]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('x')", r"raised KeyError: 'x' \(own_reward.py:4\)"),
        ("raise SystemExit(3)", r"raised SystemExit: 3 \(own_reward.py:4\)"),
        ("raise asyncio.CancelledError", r"raised CancelledError:"),
        ("return [1]", "returned 1 numbers for 2 responses"),
    ],
)
def test_an_async_function_that_fails_is_named_like_another_and_the_next_call_works(write, body, words):
    write(own_reward=f"import asyncio\nasync def reward(responses):\n    await asyncio.sleep(0)\n    {body}")
    write(fine="async def reward(responses): return [1, 2]")
    for _ in range(2):
        with pytest.raises(RewardError, match=words):
            ask()
    assert ask("fine.py:reward") == [1, 2]


def test_async_functions_of_one_call_are_awaited_together_and_a_failure_waits_for_no_other(write):
    write(
        own_reward="""
        import asyncio
        here = []
        async def meet(responses):
            here.append(1)
            while len(here) < 2:  # for ever, if one is awaited after the other
                await asyncio.sleep(0.01)
            return [1, 2]
        async def also(responses):
            return await meet(responses)
        async def never(responses):
            await asyncio.sleep(1e6)
        async def fails(responses):
            raise LookupError("the cause")
        """
    )
    meet, also, never, fails = (function_source(f"own_reward.py:{n}") for n in ("meet", "also", "never", "fails"))
    assert score_concurrently([meet, also], RESPONSES) == {meet: [1, 2], also: [1, 2]}
    with pytest.raises(RewardError, match="fails raised LookupError: the cause"):
        score_concurrently([never, fails], RESPONSES)


# What a function changes in the whole process

CHANGES = {
    "gradients": "torch.set_grad_enabled(False)",
    "gradients, by a context that is never left": "keep.append(torch.no_grad()); keep[0].__enter__()",
    "inference mode, by a context that is never left": "keep.append(torch.inference_mode()); keep[0].__enter__()",
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "default device": "torch.set_default_device('meta')",
    "threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "autocast": "torch.set_autocast_enabled('cpu', True)",
    "precision": "torch.set_float32_matmul_precision('medium')",
    "determinism": "torch.use_deterministic_algorithms(True)",
    "anomalies": "torch.autograd.set_detect_anomaly(True)",
    "folder": "os.chdir('/')",
}


def state():
    return {name: setting.read() for name, setting in SETTINGS.items()} | {
        "inference": torch.is_inference_mode_enabled()
    }


@pytest.mark.parametrize("where", ["in the module", "in the function", "in one that fails", "in a coroutine"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_function_switches_is_switched_for_the_function_alone(write, change, where):
    start, before = "import os, torch\nkeep = []\n", state()
    text = {
        "in the module": f"{change}\ndef reward(responses):\n    return [1, 2]",
        "in the function": f"def reward(responses):\n    {change}\n    return [1, 2]",
        "in one that fails": f"def reward(responses):\n    {change}\n    raise LookupError",
        "in a coroutine": f"async def reward(responses):\n    {change}\n    return [1, 2]",
    }[where]
    write(own_reward=start + text)
    source = function_source("own_reward.py:reward")
    assert state() == before
    with suppress(RewardError):
        source(RESPONSES)
    assert state() == before
    weight = torch.ones(2, requires_grad=True)
    (weight * 2).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_what_a_module_has_set_for_itself_is_set_whenever_it_is_called(write):
    write(
        own_reward="""
        import os, torch
        torch.set_default_dtype(torch.float64)
        os.chdir("/")
        def reward(responses):
            assert torch.get_default_dtype() == torch.float64 and os.getcwd() == "/"
            return [1, 2]
        """
    )
    assert ask() == ask() == [1, 2]
    assert torch.get_default_dtype() == torch.float32
