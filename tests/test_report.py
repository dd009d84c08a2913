"""fastppo.report: one file that shows a run as it is, whatever its models wrote and however far it has come."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import made_up_run
import pytest
from made_up_run import HOSTILE, write_run

from fastppo.folder import RunFolderError
from fastppo.report.__main__ import main, write_report
from fastppo.report.curves import Curve, duration, number, short_number, smooth, span, thin, ticks
from fastppo.report.frontier import turning_point
from fastppo.report.health import episodes
from fastppo.report.page import page
from fastppo.report.plot import Charts, Line
from fastppo.report.run import Run, read_runs
from fastppo.report.texts import text

VOID = {"meta", "link", "img", "br", "input"}


class Parsed(HTMLParser):
    """Elements as (tag, attributes), and the text outside of scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.data, self._inside = "", "", ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script" and self.elements[-1][1].get("type") == "application/json":
            self.data += data
        elif self._inside not in ("script", "style"):
            self.text += data

    def all(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        found = [attributes for name, attributes in self.elements if name == tag]
        return [a for a in found if not kind or kind in (a.get("class") or "").split()]

    @property
    def ids(self) -> list[str]:
        return [a["id"] or "" for _, a in self.elements if "id" in a]


def runs(*folders: Path) -> list[Run]:
    return read_runs(folders)


@pytest.fixture(scope="module")
def hacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "hacked")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "sound", 40, seed=1, planned=50, hacked=False)


@pytest.fixture(scope="module")
def shown(hacked: Path) -> Parsed:
    return Parsed(page(runs(hacked)))


# The page


def test_a_report_has_every_section_and_every_link_has_its_place(shown: Parsed) -> None:
    sections = [a["id"] for a in shown.all("section")]
    assert sections == ["learning", "frontier", "health", "time", "heldout", "training", "settings"]
    links = {(a["href"] or "") for a in shown.all("a")}
    assert links and {link.removeprefix("#") for link in links} <= set(shown.ids)
    assert len(shown.ids) == len(set(shown.ids))


def test_a_report_asks_for_nothing_outside_of_itself(hacked: Path) -> None:
    html = page(runs(hacked))
    for tag, attributes in Parsed(html).elements:
        for name in ("src", "srcset", "action", "data"):
            assert name not in attributes, tag
        assert (attributes.get("href") or "#").startswith(("#", "data:,")), tag
    code = "".join(re.findall(r"<(?:style|script)>(.*?)</", html, re.S))
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|import\(|https?:", code)


def test_what_models_write_stays_text(shown: Parsed) -> None:
    assert [a.get("type") for a in shown.all("script")] == ["application/json", None]
    assert not shown.all("img")
    assert "<img src=x onerror=\"throw Error('image')\">&amp; \ufffd\ufffd[2J \u202e \ufffd" in shown.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", shown.text)


def test_names_of_metrics_and_runs_stay_text_in_the_script_too(tmp_path: Path) -> None:
    folder = tmp_path / "<b>run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "</script><i>": 1.0, "health/<u>": 2}\n')
    parsed = Parsed(page(runs(folder)))
    assert not any(parsed.all(tag) for tag in ("u",))
    assert len(parsed.all("script")) == 2
    titles = [chart["title"] for chart in json.loads(parsed.data).values()]
    assert titles == ["</script><i>", "<u>"]


def test_the_charts_hold_the_runs_numbers(hacked: Path, shown: Parsed) -> None:
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


def test_every_chart_says_in_words_what_it_shows(shown: Parsed) -> None:
    plots = shown.all("div", "plot")
    assert len(plots) == len(json.loads(shown.data)) > 20
    for plot in plots:
        assert plot["role"] == "slider" and plot["tabindex"] == "0"
        assert re.search(r"\S.*, .*: .+ at .+, .+ at .+\.$", plot["aria-label"] or "", re.S)


def test_the_stages_times_are_shown_as_shares(shown: Parsed) -> None:
    shares = [int(share) for share in re.findall(r"(\d+)%", shown.text)]
    assert len(shares) == 4 and 98 <= sum(shares) <= 102
    assert all(stage in shown.text for stage in ("sampling", "feedback", "experience", "learning"))


def test_settings_are_all_there_and_those_that_are_no_default_are_marked(hacked: Path) -> None:
    html = page(runs(hacked))
    assert "<th>batch_size<td>512" in html
    assert "<th>steps<td><b>60</b>" in html


# Health


def test_alarms_that_follow_each_other_are_one(hacked: Path, shown: Parsed) -> None:
    first, second = episodes(runs(hacked)[0])
    assert (first.first, first.last, first.figure, first.level) == (48, 50, "distinct_2", "warn")
    assert (second.when, second.action, second.threshold) == ("step 60", "stop", 0.5)
    assert {"alarm-0-0", "alarm-0-1"} <= set(shown.ids)
    flags = [(a["href"], (a["class"] or "").split()[1]) for a in shown.all("a", "flag")]
    # the one that acted is on score and KL too
    assert flags == [("#alarm-0-1", "act")] * 2 + [("#alarm-0-0", "warn"), ("#alarm-0-1", "act")]
    assert len(shown.all("path", "level")) == 2


def test_the_judges_turning_point_is_found_where_it_is_and_not_in_a_sound_run(hacked: Path, sound: Path) -> None:
    [(place, sentence)] = turning_point(runs(hacked)[0])
    assert 1.5 < place < 2.8  # the made-up judge is highest in the middle, at sqrt(12 * 0.5^1.4) = 2.1
    assert "the judge was highest at" in sentence
    assert turning_point(runs(sound)[0]) == []


def test_a_run_without_judge_alarms_or_health_has_no_empty_charts(tmp_path: Path) -> None:
    parsed = Parsed(page(runs(write_run(tmp_path / "plain", 12, health=False))))
    assert "health" not in [a["id"] for a in parsed.all("section")]
    titles = [chart["title"] for chart in json.loads(parsed.data).values()]
    assert "Proxy" in titles and "Judge" not in titles


# Responses


def test_heldout_responses_stand_side_by_side_by_step(hacked: Path, shown: Parsed) -> None:
    html = page(runs(hacked))
    prompts = html.split('<article class="prompt">')[1:]
    assert len(prompts) == 3
    for prompt in prompts:
        steps = re.findall(r"<span>step (\d+)</span><b>([^<]+)</b>", prompt.split("</article>")[0])
        assert [int(step) for step, _ in steps] == [0, 10, 20, 30, 40, 50, 60]
        assert float(steps[0][1].replace("\u2212", "-")) < float(steps[-1][1])


def test_tokens_are_coloured_by_sign_and_size_of_their_advantage(tmp_path: Path) -> None:
    tokens = {"of": "training", "step": 1, "prompt": "p", "score": 0.5, "tokens": ["a", "b", "c", "d", ""]}
    (tmp_path / "metrics.jsonl").touch()
    line = json.dumps(tokens | {"advantages": [2.0, -2.0, 0.4, 0.0, -1.0]})
    (tmp_path / "responses.jsonl").write_text(line + "\n")
    spans = re.findall(r'<span class="t( \w+)?" title="advantage ([^"]+)">(\w)</span>', page(runs(tmp_path)))
    assert spans == [(" p4", "+2", "a"), (" m4", "\u22122", "b"), (" p1", "+0.4", "c"), ("", "0", "d")]


def test_a_text_loses_its_control_characters_alone() -> None:
    assert text("a\tb\nc \x1b\x85\ud800 長い \U0001f642 <&>\"'") == (
        "a\tb\nc \ufffd\ufffd\ufffd 長い \U0001f642 &lt;&amp;&gt;&quot;&#x27;"
    )


# Two runs


def test_two_runs_are_laid_over_each_other(hacked: Path, sound: Path) -> None:
    html = page(runs(hacked, sound))
    parsed = Parsed(html)
    charts = {chart["title"]: chart for chart in json.loads(parsed.data).values()}
    assert [len(line["x"]) for line in charts["Score"]["lines"]] == [60, 7, 40, 7]
    assert len(parsed.all("path", "run0")) > 20 and len(parsed.all("path", "run1")) > 20
    assert "hacked: 60 of 60 steps" in parsed.text and "sound: 40 of 50 steps" in parsed.text
    differences = html[html.index("Differences") : html.index("All settings")]
    assert re.findall(r"<tr><th>([\w.]+)<td>", differences) == ["output", "seed", "steps", "eval.every"]


def test_two_runs_of_one_name_are_called_by_their_paths(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "a" / "run", 3), write_run(tmp_path / "b" / "run", 3)
    assert [run.name for run in runs(one, other)] == [str(one), str(other)]


# A run that goes on, and one that is broken


def test_a_run_that_is_being_written_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 20, planned=50)
    for name in ("metrics", "responses", "alarms"):
        path = folder / f"{name}.jsonl"
        path.write_bytes(path.read_bytes() + '{"step": 21, "prompt": "長'.encode()[:-1])
    assert "20 of 50 steps" in Parsed(page(runs(folder))).text


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert "No step has been recorded yet." in Parsed(page(runs(tmp_path))).text


def test_numbers_that_were_not_finite_are_gaps(tmp_path: Path) -> None:
    values = [1, 2, None, 3, None, 4, 5]
    lines = "".join(json.dumps({"step": i + 1, "score": y, "kl": None}) + "\n" for i, y in enumerate(values))
    (tmp_path / "metrics.jsonl").write_text(lines)
    html = page(runs(tmp_path))
    [path] = re.findall(r'class="line run0" d="([^"]+)"', html)
    assert [part.count(",") for part in path.split("M")[1:]] == [2, 1, 2]
    assert "KL to the reference</b>" not in html


def test_a_long_run_makes_a_small_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "long", 200)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = (json.dumps(records[n % len(records)] | {"step": n}) for n in range(10_000))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_report([folder], tmp_path / "report.html")
    assert (folder / "metrics.jsonl").stat().st_size > 5e6
    assert (tmp_path / "report.html").stat().st_size < 2e6


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"step": 1}\n{"step": 2, "sco\n{"step": 3}\n', "metrics.jsonl, line 2: this is not JSON"),
        ('{"step": 1}\n{"score": 2}\n', "metrics.jsonl, line 2: this has no whole number as its step"),
    ],
)
def test_a_broken_line_is_named(content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert words in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"none is no folder\. Give the folder of a run"):
        runs(tmp_path / "none")
    with pytest.raises(RunFolderError, match=r"is not the folder of a run: it has no metrics\.jsonl"):
        runs(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(RunFolderError, match=r"config\.yaml cannot be read"):
        runs(tmp_path)


def test_a_file_that_cannot_be_written_is_named_and_leaves_no_draft(hacked: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"x\.html cannot be written .*Give another --output"):
        write_report([hacked], tmp_path / "none" / "x.html")
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunFolderError, match="taken cannot be written"):
        write_report([hacked], tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_command_writes_into_the_runs_folder_and_needs_no_torch(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 6)
    code = (
        "import sys; from fastppo.report.__main__ import main; main(sys.argv[1:]);"
        " raise SystemExit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r".*run/report\.html \(\d+ kB\)\n", done.stdout)
    assert Parsed((folder / "report.html").read_text(encoding="utf-8")).all("section")


# Numbers


def test_thinning_keeps_every_peak_and_every_gap() -> None:
    y: list[float | None] = [math.sin(i) for i in range(50_000)]
    y[12_345], y[40_000] = 99.0, -99.0
    y[20_000:21_000] = [None] * 1000
    found = thin(Curve(list(map(float, range(50_000))), y), 1000)
    assert len(found) <= 1000 and list(found.x) == sorted(found.x)
    assert (12_345.0, 99.0) in found.points and (40_000.0, -99.0) in found.points
    assert any(y is None and 20_000 <= x < 21_000 for x, y in zip(found.x, found.y, strict=True))


def test_smoothing_is_the_mean_of_the_neighbours_that_there_are() -> None:
    found = smooth(Curve(range(6), [0.0, 3.0, 6.0, None, None, None]), window=3)
    assert found.y == [1.5, 3.0, 4.5, 6.0, None, None]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.13, 0.31, [0.15, 0.2, 0.25, 0.3]), (-7, 9, [-5, 0, 5])],
)
def test_ticks_are_round_and_within_the_axis(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)
    assert ticks(0, 2, 5, whole=True) == [0, 1, 2]


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-1e-9, 1e-9], [1e6, 1e6 + 1], [3.0, math.pi * 1e5]])
def test_an_axis_holds_its_values_and_has_ticks(values: list[float]) -> None:
    low, high = span(values)
    assert low < min(values) and max(values) < high
    assert 2 <= len([t for t in ticks(low, high) if low <= t <= high]) <= 9


def test_numbers_and_times_are_written_as_people_write_them() -> None:
    written = [number(x) for x in (0, 0.5, -0.12345, 1234.5, 2e7, 1.5e-4, math.nan, None)]
    assert written == ["0", "0.5", "\u22120.1235", "1,234", "2e7", "1.5e\u22124", "—", "—"]
    assert [short_number(x) for x in (0, 950, 10_000, 2500)] == ["0", "950", "10k", "2.5k"]
    assert [duration(s) for s in (3.21, 235, 7384)] == ["3.21 s", "3 min 55 s", "2 h 3 min"]


def test_a_chart_of_one_point_or_none() -> None:
    charts = Charts()
    assert charts.draw("t", "n", [Line("a", Curve([1.0], [None]))]) == ""
    assert 'd="M500,500h0"' in charts.draw("t", "n", [Line("a", Curve([1.0], [2.0]))])


def test_the_made_up_run_is_as_hostile_as_it_says(hacked: Path) -> None:
    # the tests above would pass on harmless text
    assert HOSTILE.encode("utf-8", "replace")[:20] in (hacked / "responses.jsonl").read_bytes()
    assert made_up_run.alarms(60)[0]["message"].endswith(HOSTILE)
