"""`python -m fastppo.best_of_n`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_page import Parsed, charts
from tiny import tokenizer

from fastppo.best_of_n import main
from fastppo.config import AnswersConfig
from fastppo.data import load_answers
from fastppo.report import Outcome, methods_page
from fastppo.report.frontier_pages import shown_n
from fastppo.rewards import estimate


def write(path: Path, prompts: int, samples: int, *, judged: bool = True, **others: Any) -> Path:
    """Responses whose judge is highest at a medium score."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for prompt in range(prompts):
            for sample in range(samples):
                score = float(rng.normal())
                row = {"prompt": f"Prompt {prompt}.", "prompt_index": prompt, "sample": sample, "score": score}
                row |= {"response": f" Response {sample}.", "tokens": [3], "logprobs": [-1.0], "ended": True}
                row |= {"judge": score - max(score, 0) ** 2} if judged else {}
                file.write(json.dumps(row | {"score/0": score, "answer": prompt * 10} | others) + "\n")
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("scored") / "scored.jsonl", 30, 12)


def run(capsys, *args: Any) -> str:
    main(list(map(str, args)))
    return capsys.readouterr().out


def refused(capsys, *args: Any) -> str:
    with pytest.raises(SystemExit) as left:
        main(list(map(str, args)))
    assert left.value.code == 2
    return capsys.readouterr().err


def test_the_table_has_powers_of_two_and_all_samples_and_says_where_the_judge_turns(capsys, file):
    out = run(capsys, file)
    assert "360 responses to 30 prompts, 12 each" in out
    assert [line.split()[0] for line in out.splitlines() if line.strip()[:1].isdigit()] == ["1", "2", "4", "8", "12"]
    assert "The judge turns down at n = 2 (" in out and "while the proxy still rises" in out
    assert "ln n - (n - 1)/n, an upper bound" in out


def test_asked_n_are_the_rows_of_the_table(capsys, file):
    out = run(capsys, file, "--n", 3, 1, 3)
    assert [line.split()[0] for line in out.splitlines() if line.strip()[:1].isdigit()] == ["1", "3"]


def test_json_has_every_n(capsys, file, tmp_path):
    run(capsys, file, "--json", tmp_path / "a.json", "--seed", 5, "--bootstrap", 300)
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["prompts"], record["responses"], record["samples"]) == (30, 360, [12, 12])
    assert (record["seed"], record["bootstrap"], record["turn"]["n"]) == (5, 300, 2)
    assert [row["n"] for row in record["n"]] == list(range(1, 13))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert record["n"][0]["score"] == pytest.approx(np.mean([row["score"] for row in rows]))
    best = [max((r for r in rows if r["prompt_index"] == p), key=lambda r: r["score"]) for p in range(30)]
    assert record["n"][-1]["score"] == pytest.approx(np.mean([row["score"] for row in best]))
    assert record["n"][-1]["judge"] == pytest.approx(np.mean([row["judge"] for row in best]))
    assert record["n"][-1]["kl_bound"] == pytest.approx(math.log(12) - 11 / 12)
    for row in record["n"]:
        assert row["score_interval"][0] < row["score"] < row["score_interval"][1]
    run(capsys, file, "--json", tmp_path / "b.json", "--seed", 5, "--bootstrap", 300)
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


def test_a_missing_judge_is_no_error(capsys, tmp_path):
    path = write(tmp_path / "a.jsonl", 3, 4, judged=False)
    out = run(capsys, path, "--json", tmp_path / "a.json", "--html", tmp_path / "a.html")
    assert "There is no judge in the file" in out and "judge " not in out.splitlines()[1]
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["turn"] is None and record["n"][0]["judge"] is None and record["n"][0]["judge_interval"] is None
    assert list(charts(Parsed((tmp_path / "a.html").read_text()))) == ["Proxy"]


def test_methods_are_dots_in_colours_of_their_own_beside_the_curve_of_best_of_n():
    draw = random.Random(0)
    groups = [[draw.gauss(0, 1) for _ in range(8)] for _ in range(20)]
    found = estimate(groups, groups, resamples=100, seed=0)
    outcomes = [Outcome(f"method {i % 4}", kl=0.5 * i - 0.1, score=i / 3, judge=i / 6) for i in range(12)]
    page = Parsed(methods_page(outcomes, found, "methods", "three seeds", ["A remark."]))
    drawn = charts(page)
    assert list(drawn) == ["Proxy", "Judge"]
    for chart in drawn.values():
        assert [len(line["x"]) for line in chart["lines"]] == [8, 3, 3, 3, 3]
        assert chart["lines"][1]["x"] == sorted(chart["lines"][1]["x"])
    assert all(said in page.text for said in ("A remark.", "three seeds", "best of n, to n = 8"))
    with pytest.raises(ValueError, match="5 methods have no colour each"):
        methods_page([*outcomes, Outcome("another", 1.0, 1.0, 1.0)], found, "methods", "", [])


def test_the_page_draws_proxy_and_judge_with_bands_and_needs_nothing_else(capsys, file, tmp_path):
    run(capsys, file, "--html", tmp_path / "a.html")
    html = (tmp_path / "a.html").read_text()
    page = Parsed(html)
    drawn = charts(page)
    assert list(drawn) == ["Proxy", "Judge"] and len(page.all("path", "band")) == 2
    for chart in drawn.values():
        [line] = chart["lines"]
        assert chart["counted"] == "n" and line["steps"] == list(range(1, 13))
        assert line["x"] == pytest.approx([math.sqrt(math.log(n) - (n - 1) / n) for n in range(1, 13)], rel=1e-3)
    assert "the judge is highest at n = 2" in page.text and "upper bound on the KL" in page.text
    assert not [a for tag in ("link", "script", "img") for a in page.all(tag) if "http" in str(a)]


def test_many_n_are_thinned_and_the_ends_stay():
    shown = shown_n(1024)
    assert shown[0] == 1 and shown[-1] == 1024 and len(shown) <= 100 and shown == sorted(set(shown))


@pytest.mark.parametrize("name", ["best.jsonl", "best.parquet"])
def test_the_best_of_each_prompt_are_demonstrations_that_sft_reads(capsys, file, tmp_path, name):
    out = run(capsys, file, "--keep", "best", "--output", tmp_path / name)
    assert "the best response to each of 30 prompts" in out and "lowest sample number" not in out
    if name.endswith("jsonl"):
        kept = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        best = [max((r for r in rows if r["prompt_index"] == p), key=lambda r: r["score"]) for p in range(30)]
        assert kept == [{name: row[name] for name in ("prompt", "response", "answer")} for row in best]
    examples, _ = load_answers(AnswersConfig(path=str(tmp_path / name)), tokenizer(), heldout=0, context=None)
    assert len(examples) == 30


def test_of_responses_that_tie_the_lowest_sample_number_is_kept_and_said(capsys, tmp_path):
    path = write(tmp_path / "a.jsonl", 2, 3, score=1.0)
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    out = run(capsys, path, "--keep", "best", "--output", tmp_path / "best.jsonl")
    assert "2 of them tie with others and have the lowest sample number" in out
    kept = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert [row["response"] for row in kept] == [" Response 0."] * 2


def test_n_goes_to_the_fewest_responses_and_that_is_said(capsys, tmp_path):
    path = write(tmp_path / "a.jsonl", 3, 5)
    path.write_text("\n".join(path.read_text().splitlines()[:-2]))
    assert "3 to 5 each: n goes to 3, all responses are used" in run(capsys, path)


def test_with_few_prompts_it_says_what_it_cannot_tell(capsys, tmp_path):
    assert "There are no intervals" in run(capsys, write(tmp_path / "a.jsonl", 1, 4))
    assert "is not tested with fewer than 20 prompts" in run(capsys, write(tmp_path / "a.jsonl", 3, 4))


def test_a_judge_that_does_not_fall_is_said_too(capsys, tmp_path):
    assert "No fall of the judge to n = 4" in run(capsys, write(tmp_path / "a.jsonl", 30, 4, judge=1))


def test_one_response_to_a_prompt_is_refused(capsys, tmp_path):
    said = refused(capsys, write(tmp_path / "a.jsonl", 4, 1))
    assert "line 1: prompt_index 0 has 1 response, and the best of n needs at least 2" in said


def test_an_n_that_no_prompt_has_is_refused(capsys, file):
    assert "--n 13: n goes from 1 to 12" in refused(capsys, file, "--n", 4, 13)
    assert "--n 0: n begins at 1" in refused(capsys, file, "--n", 0)


def test_data_that_cannot_be_used_is_one_line(capsys, tmp_path):
    said = refused(capsys, write(tmp_path / "a.jsonl", 2, 2, score=float("nan")))
    assert said.startswith("fastppo: ") and "line 1: score is nan" in said and said.count("\n") == 1
    (tmp_path / "a.jsonl").write_text("")
    assert "a.jsonl is empty" in refused(capsys, tmp_path / "a.jsonl")


def test_options_that_do_not_fit_are_refused(capsys, file, tmp_path):
    assert "belong together" in refused(capsys, file, "--keep", "best")
    assert "belong together" in refused(capsys, file, "--output", tmp_path / "a.jsonl")
    assert "at least 100 resamples" in refused(capsys, file, "--bootstrap", 0)
    assert "--seed -1" in refused(capsys, file, "--seed", -1)
    assert "must end in .jsonl or .parquet" in refused(capsys, file, "--keep", "best", "--output", tmp_path / "a.csv")
    for option in ("--json", "--html"):
        assert f"cannot be written (No such file or directory). Give another {option}" in refused(
            capsys, file, option, tmp_path / "none" / "a"
        )


def test_it_needs_no_torch(file):
    code = f"import sys; from fastppo.best_of_n import main; main([{str(file)!r}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
