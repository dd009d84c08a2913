"""The report in a headless Chromium: as a phone and a desktop show it, light and dark, with a pointer and with keys."""

from __future__ import annotations

import pytest
from browser import browser, chromium
from made_up_run import write_run

from fastppo.report.__main__ import write_report

pytestmark = pytest.mark.skipif(chromium() is None, reason="there is no Chromium here (Debian's package chromium)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    one, other = write_run(folder / "hacked"), write_run(folder / "sound", 40, seed=1, hacked=False)
    name = "qwen2_5_7b_instruct_helpful_ppo_lr1e6_kl002_seed"
    write_report([write_run(folder / f"{name}{seed}", seed=seed) for seed in (1, 2)], folder / "long.html")
    write_report([one], folder / "one.html")
    write_report([one, other], folder / "two.html")
    return folder


@pytest.fixture(scope="module")
def tab(folder):
    with browser(folder / "profile") as page:
        yield page


@pytest.mark.parametrize("report", ["one", "two"])
@pytest.mark.parametrize("width", [360, 800, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_opens_without_a_word_in_the_console_and_fits(report, width, dark, folder, tab):
    tab.open(folder / f"{report}.html", width=width, dark=dark)
    assert tab.errors() == []
    assert [url.partition(":")[0] for url in tab.requests()] == ["file"]
    assert tab.js("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    paper = tab.js("getComputedStyle(document.documentElement).backgroundColor")
    assert paper == ("rgb(20, 22, 26)" if dark else "rgb(250, 249, 246)")


@pytest.mark.parametrize("width", [360, 800])
def test_names_of_any_length_fit(width, folder, tab):
    tab.open(folder / "long.html", width=width)
    tab.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert tab.js("document.documentElement.scrollWidth") == width


def test_a_phone_shows_every_cell_of_an_alarm(folder, tab):
    tab.open(folder / "one.html", width=360)
    assert tab.js("document.querySelector('.scroll').scrollWidth <= document.querySelector('.scroll').clientWidth")
    cells = "[...document.querySelectorAll('.alarms td')]"
    assert tab.js(f"{cells}.every((cell) => cell.getBoundingClientRect().right <= innerWidth)")
    before = "getComputedStyle(document.querySelectorAll('.alarms td')[4], '::before').content"
    assert "threshold" in tab.js(before)


@pytest.mark.parametrize("width", [800, 1280])
def test_tiles_and_large_charts_fill_their_rows(width, folder, tab):
    tab.open(folder / "one.html", width=width)
    for row in (".tiles", ".grid.large"):
        rights = tab.js(LAST_OF_ROWS % row)
        assert rights and max(rights) - min(rights) < 1


# How far each row of boxes reaches to the right.
LAST_OF_ROWS = """(() => {
  const rows = {};
  for (const box of document.querySelector('%s').children) {
    const {top, right} = box.getBoundingClientRect();
    rows[top] = Math.max(rows[top] ?? 0, right);
  }
  return Object.values(rows);
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_its_texts_have_contrast(dark, folder, tab):
    """Each text against what is behind it, tokens on the colours of their advantage among them: 4.5 (WCAG 2, AA)."""
    tab.open(folder / "two.html", width=1280, dark=dark)
    assert tab.js(LEAST_CONTRAST) >= 4.5


# Colours are painted on a canvas to see what they are, each layer over the one below.
LEAST_CONTRAST = """(() => {
  const pen = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const paint = (colours) => {
    for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map((c) => c / 255)
      .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let least = 99;
  const seen = new Set();
  for (const element of document.querySelectorAll("body *")) {
    const words = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!words || !element.checkVisibility() || element.matches("script, style")) continue;
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.unshift(getComputedStyle(e).backgroundColor);
    const key = layers.join() + getComputedStyle(element).color;
    if (seen.has(key)) continue;
    seen.add(key);
    const behind = paint(layers), front = paint([...layers, getComputedStyle(element).color]);
    least = Math.min(least, (Math.max(front, behind) + 0.05) / (Math.min(front, behind) + 0.05));
  }
  return least;
})()"""

KEY = "document.querySelector('#chart0 .key').innerText"


def test_the_pointer_shows_the_values_under_it(folder, tab):
    tab.open(folder / "one.html", width=1280)
    still = tab.js(KEY)
    assert "last" in still
    tab.move("#chart0 .plot", 0.5)
    assert "step 30" in tab.js(KEY)
    assert tab.js("document.querySelector('#chart0 .cursor').hidden") is False
    tab.move("h1", 0.5)
    assert tab.js(KEY) == still
    assert tab.errors() == []


def test_arrow_keys_walk_along_a_chart_and_say_its_values(folder, tab):
    tab.open(folder / "two.html", width=360)
    tab.js("document.querySelector('#chart0 .plot').focus()")
    for name in ("Home", "ArrowRight", "ArrowRight"):
        tab.key(name)
    said = tab.js("document.querySelector('#chart0 .plot').getAttribute('aria-valuetext')")
    assert said.startswith("step 2: hacked, training ")
    assert "sound, training" in said
    assert tab.errors() == []


def test_the_theme_can_be_chosen_and_is_remembered(folder, tab):
    tab.open(folder / "one.html", width=1280, dark=True)
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    tab.js("document.getElementById('theme').click()")
    assert tab.js("document.getElementById('theme').textContent") == "theme: light"
    assert tab.js(paper) == "rgb(250, 249, 246)"
    tab.open(folder / "one.html", width=1280, dark=True)
    assert tab.js(paper) == "rgb(250, 249, 246)"
    tab.js("localStorage.clear()")


def test_a_tap_on_a_token_says_its_advantage(folder, tab):
    tab.open(folder / "one.html", width=360)
    tab.js("document.querySelector('.words .p1').click()")
    assert "advantage +" in tab.js("document.querySelector('.token').textContent")
