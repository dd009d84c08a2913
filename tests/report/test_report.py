"""fastppo.report: one file that shows a run as it is, whatever its models wrote and however far it has come."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import made_up_run
import pytest
from made_up_run import HOSTILE, write_run
from report_page import Parsed, runs

from fastppo.monitor.run_dir import RunFolderError
from fastppo.report.__main__ import write_report
from fastppo.report.page import page
from fastppo.report.texts import text


@pytest.fixture(scope="module")
def hacked(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "hacked")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "sound", 40, seed=1, planned=50, hacked=False)


@pytest.fixture(scope="module")
def shown(hacked):
    return Parsed(page(runs(hacked)))


# The page


def test_a_report_has_every_section_and_every_link_has_its_place(shown):
    sections = [a["id"] for a in shown.all("section")]
    assert sections == ["learning", "frontier", "health", "time", "heldout", "training", "settings"]
    links = {(a["href"] or "") for a in shown.all("a")}
    assert links and {link.removeprefix("#") for link in links} <= set(shown.ids)
    assert len(shown.ids) == len(set(shown.ids))


def test_a_report_asks_for_nothing_outside_of_itself(hacked):
    html = page(runs(hacked))
    for tag, attributes in Parsed(html).elements:
        for name in ("src", "srcset", "action", "data"):
            assert name not in attributes, tag
        assert (attributes.get("href") or "#").startswith(("#", "data:,")), tag
    code = "".join(re.findall(r"<(?:style|script)>(.*?)</", html, re.S))
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|import\(|https?:", code)


def test_what_models_write_stays_text(shown):
    assert [a.get("type") for a in shown.all("script")] == ["application/json", None]
    assert not shown.all("img")
    assert "<img src=x onerror=\"throw Error('image')\">&amp; \ufffd\ufffd[2J \u202e \ufffd" in shown.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", shown.text)


def test_names_of_metrics_and_runs_stay_text_in_the_script_too(tmp_path):
    folder = tmp_path / "<b>run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "</script><i>": 1.0, "health/<u>": 2}\n')
    parsed = Parsed(page(runs(folder)))
    assert not any(parsed.all(tag) for tag in ("u",))
    assert len(parsed.all("script")) == 2
    titles = [chart["title"] for chart in json.loads(parsed.data).values()]
    assert titles == ["</script><i>", "<u>"]


def test_the_charts_hold_the_runs_numbers(hacked, shown):
    charts = {(chart["title"], chart["x"][0]): chart for chart in json.loads(shown.data).values()}
    records = [json.loads(line) for line in (hacked / "metrics.jsonl").read_text().splitlines()]
    training, heldout = charts["Score", "s"]["lines"]
    assert training["x"] == list(range(1, 61)) and heldout["x"] == list(range(0, 61, 10))
    assert training["y"] == pytest.approx([r["score"] for r in records if "score" in r], rel=1e-3)
    assert heldout["y"] == pytest.approx([r["eval/score"] for r in records if "eval/score" in r], rel=1e-3)
    proxy, judge = charts["Proxy", "√"]["lines"][0], charts["Judge", "√"]["lines"][0]
    steps = [r for r in records if "health/judge" in r]
    assert judge["x"] == proxy["x"] == pytest.approx([math.sqrt(max(r["kl"], 0)) for r in steps], rel=1e-3)
    assert judge["y"] == pytest.approx([r["health/judge"] for r in steps], rel=1e-3)
    assert judge["steps"] == [r["step"] for r in steps]


def test_every_chart_says_in_words_what_it_shows(shown):
    plots = shown.all("div", "plot")
    assert len(plots) == len(json.loads(shown.data)) > 20
    for plot in plots:
        assert plot["role"] == "slider" and plot["tabindex"] == "0"
        assert re.search(r"\S.*, .*: .+ at .+, .+ at .+\.$", plot["aria-label"] or "", re.S)


def test_the_phases_times_are_shown_as_shares(shown):
    shares = [int(share) for share in re.findall(r"(\d+)%", shown.text)]
    assert len(shares) == 4 and 98 <= sum(shares) <= 102
    assert all(phase in shown.text for phase in ("sampling", "feedback", "experience", "learning"))


def test_settings_are_all_there_and_those_that_are_no_default_are_marked(hacked):
    html = page(runs(hacked))
    assert "<th>batch_size<td>512" in html
    assert "<th>steps<td><b>60</b>" in html


# Responses


def test_heldout_responses_stand_side_by_side_by_step(hacked, shown):
    html = page(runs(hacked))
    prompts = html.split('<article class="prompt">')[1:]
    assert len(prompts) == 3
    for prompt in prompts:
        steps = re.findall(r"<span>step (\d+)</span><b>([^<]+)</b>", prompt.split("</article>")[0])
        assert [int(step) for step, _ in steps] == [0, 10, 20, 30, 40, 50, 60]
        assert float(steps[0][1].replace("\u2212", "-")) < float(steps[-1][1])


def test_tokens_are_coloured_by_sign_and_size_of_their_advantage(tmp_path):
    tokens = {"of": "training", "step": 1, "prompt": "p", "score": 0.5, "tokens": ["a", "b", "c", "d", ""]}
    (tmp_path / "metrics.jsonl").touch()
    line = json.dumps(tokens | {"advantages": [2.0, -2.0, 0.4, 0.0, -1.0]})
    (tmp_path / "responses.jsonl").write_text(line + "\n")
    spans = re.findall(r'<span class="t( \w+)?" title="advantage ([^"]+)">(\w)</span>', page(runs(tmp_path)))
    assert spans == [(" p4", "+2", "a"), (" m4", "\u22122", "b"), (" p1", "+0.4", "c"), ("", "0", "d")]


def test_a_text_loses_its_control_characters_alone():
    assert text("a\tb\nc \x1b\x85\ud800 長い \U0001f642 <&>\"'") == (
        "a\tb\nc \ufffd\ufffd\ufffd 長い \U0001f642 &lt;&amp;&gt;&quot;&#x27;"
    )


# Two runs


def test_two_runs_are_laid_over_each_other(hacked, sound):
    html = page(runs(hacked, sound))
    parsed = Parsed(html)
    charts = {chart["title"]: chart for chart in json.loads(parsed.data).values()}
    assert [len(line["x"]) for line in charts["Score"]["lines"]] == [60, 7, 40, 7]
    assert len(parsed.all("path", "run0")) > 20 and len(parsed.all("path", "run1")) > 20
    assert "hacked: 60 of 60 steps" in parsed.text and "sound: 40 of 50 steps" in parsed.text
    differences = html[html.index("Differences") : html.index("All settings")]
    assert re.findall(r"<tr><th>([\w.]+)<td>", differences) == ["output", "seed", "steps", "eval.every"]


def test_two_runs_of_one_name_are_called_by_their_paths(tmp_path):
    one, other = write_run(tmp_path / "a" / "run", 3), write_run(tmp_path / "b" / "run", 3)
    assert [run.name for run in runs(one, other)] == [str(one), str(other)]


# The command


def test_a_file_that_cannot_be_written_is_named_and_leaves_no_draft(hacked, tmp_path):
    with pytest.raises(RunFolderError, match=r"x\.html cannot be written .*Give another --output"):
        write_report([hacked], tmp_path / "none" / "x.html")
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunFolderError, match="taken cannot be written"):
        write_report([hacked], tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_command_writes_into_the_runs_folder_and_needs_no_torch(tmp_path):
    folder = write_run(tmp_path / "run", 6)
    code = (
        "import sys; from fastppo.report.__main__ import main; main(sys.argv[1:]);"
        " raise SystemExit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r".*run/report\.html \(\d+ kB\)\n", done.stdout)
    assert Parsed((folder / "report.html").read_text(encoding="utf-8")).all("section")


def test_the_made_up_run_is_as_hostile_as_it_says(hacked):
    # the tests above would pass on harmless text
    assert HOSTILE.encode("utf-8", "replace")[:20] in (hacked / "responses.jsonl").read_bytes()
    assert made_up_run.alarms(60)[0]["message"].endswith(HOSTILE)
