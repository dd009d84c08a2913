"""Python functions as sources of reward: how they are imported, what they are given, and what is said of a failure."""

import sys
import textwrap

import pytest

from fastppo.batch import pack
from fastppo.config import RewardConfig
from fastppo.feedback import Responses, RewardError, load_functions
from fastppo.feedback.function import function_source

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
        load_functions([RewardConfig(function=name)])


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
    with pytest.raises(RewardError, match=r"takes label, .* there are: prompts, responses, prompt, answer"):
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
    load_functions([RewardConfig(function="own_reward.py:reward")] * 2)
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
