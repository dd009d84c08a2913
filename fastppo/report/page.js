"use strict";
// Values at the pointer, arrow keys, and the choice of the theme. The page is complete without scripts.

const charts = JSON.parse(document.getElementById("data").textContent);
const format = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });

function written(value) {
  const size = Math.abs(value);
  const text = value !== 0 && (size < 1e-3 || size >= 1e7) ? value.toExponential(3) : format.format(value);
  return text.replace("-", "\u2212");
}

// A point of a line nearest to x.
function nearest(line, x) {
  let best = 0;
  line.x.forEach((other, i) => { if (Math.abs(other - x) < Math.abs(line.x[best] - x)) best = i; });
  return best;
}

function follow(figure) {
  const chart = charts[figure.id];
  const [left, right] = chart.range;
  const plot = figure.querySelector(".plot");
  const cursor = plot.querySelector(".cursor");
  const at = figure.querySelector(".key .at");
  const values = [...figure.querySelectorAll(".key b")];
  const still = values.map((value) => value.textContent);
  const swatches = [...figure.querySelectorAll(".key .swatch")];
  const dots = chart.lines.map((line, i) => {
    const dot = document.createElement("i");
    dot.className = [...swatches[i].classList].find((name) => name.startsWith("run"));
    return cursor.appendChild(dot);
  });
  const stops = [...new Set(chart.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  let here = stops.length - 1;

  function show(x) {
    here = nearest({ x: stops }, x);
    x = stops[here];
    const percent = (value) => ((value - left) / (right - left || 1)) * 100;
    cursor.hidden = false;
    cursor.style.left = `${percent(x)}%`;
    const texts = chart.lines.map((line, i) => {
      const point = nearest(line, x);
      const other = line.steps ? ` (${chart.counted} ${line.steps[point]})` : line.x[point] !== x ? ` (${chart.x} ${written(line.x[point])})` : "";
      values[i].textContent = written(line.y[point]) + other;
      dots[i].style.bottom = `${line.up[point]}%`;
      dots[i].hidden = line.x[point] !== x;
      return values[i].parentElement.textContent.trim();
    });
    at.textContent = chart.x === "step" ? `step ${written(x)}` : `at ${written(x)}`;
    plot.setAttribute("aria-valuenow", x);
    plot.setAttribute("aria-valuetext", `${at.textContent}: ${texts.join(", ")}`);
  }

  function rest() {
    cursor.hidden = true;
    at.textContent = "last";
    values.forEach((value, i) => { value.textContent = still[i]; });
  }

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    show(left + ((event.clientX - box.left) / box.width) * (right - left));
  });
  plot.addEventListener("pointerleave", rest);
  plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) show(stops[here]); });
  plot.addEventListener("blur", rest);
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    show(stops[Math.max(0, Math.min(stops.length - 1, here + move))]);
  });
}

document.querySelectorAll("figure.chart").forEach(follow);

// A touch screen has no hovering pointer: a tap on a token shows its advantage.
const token = document.querySelector(".token");
document.addEventListener("click", (event) => {
  if (token && event.target.matches(".words .t")) token.textContent = `\u201c${event.target.textContent}\u201d ${event.target.title}`;
});

const themes = ["auto", "light", "dark"];
const button = document.getElementById("theme");

function choose(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  button.textContent = `theme: ${theme}`;
}

function remembered() {
  try { return localStorage.getItem("fastppo-theme"); } catch { return null; } // pages opened from a file may have no storage
}

choose(themes.includes(remembered()) ? remembered() : "auto");
button.hidden = false;
button.addEventListener("click", () => {
  const theme = themes[(themes.indexOf(button.textContent.slice(7)) + 1) % themes.length];
  choose(theme);
  try { localStorage.setItem("fastppo-theme", theme); } catch { /* the choice is not remembered */ }
});
