"""What a run tells: progress on the terminal, metrics, responses and alarms as files of lines (`folder`), TensorBoard,
Weights & Biases, the time of each stage, profiles, samples.

Rank 0 alone writes and prints; on the other ranks the same calls do nothing, so the loop needs no question of rank.
Only a profile is written by every rank, since ranks differ in what they wait for.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from torch.profiler import ProfilerActivity, record_function

from fastppo.config import TrackConfig
from fastppo.folder import ALARMS, METRICS, RESPONSES, as_line, continue_folder
from fastppo.wandb_run import wandb_run

log = logging.getLogger("fastppo")

# What the display shows of a step and of an evaluation; the files hold every metric.
OF_STEP = {"score": "score {:.3f}", "health/judge": "judge {:.3f}", "kl": "KL {:.3f}", "loss": "loss {:.3f}"}
OF_STEP |= {"accuracy": "accuracy {:.3f}", "tokens_per_second": "{:,.0f} tokens/s"}
OF_STAGES = {f"time/{stage}": f"{stage} {{:.1f}} s" for stage in ("sampling", "feedback", "learning")}
OF_EVALUATION = {"score": "held-out score {:.3f}", "score_error": "+/- {:.3f}", "judge": "judge {:.3f}"}
OF_EVALUATION |= {"kl": "KL {:.3f}"}
OF_EVALUATION |= {"loss": "held-out loss {:.3f}", "perplexity": "perplexity {:.2f}", "accuracy": "accuracy {:.3f}"}
OF_EVALUATION |= {"accuracy_low": "(95%: {:.3f}", "accuracy_high": "to {:.3f})"}
OF_EVALUATION |= {"calibration_error": "calibration error {:.3f}"}

# Libraries that log on their own: they get our line format, and warnings are said by rank 0 alone.
THIRD_PARTY = ("DeepSpeed", "transformers", "huggingface_hub", "datasets", "httpx", "httpx2")
KNOWN_NOISE = (
    "Token indices sequence length is longer than",  # fastppo.data checks lengths, and drops or refuses
)

WIDE = 140  # columns of a terminal from which the bar has room for the seconds of the stages
SHOWN_CELLS = 300  # columns of the terminal for one text in the table of samples; samples.jsonl holds all of it


class Tracker:
    """Records the steps of a run in the folder `output`, which exists (`fresh_folder`). A context manager."""

    def __init__(self, output: Path, config: TrackConfig, *, steps: int, rank: int, done: int = 0):
        """steps: of the whole run, for the bar and the time left; rank: of this process; done: steps before this."""
        self._output, self._config, self._steps, self._rank, self._done = output, config, steps, rank, done
        self._stack = ExitStack()
        self._metrics: TextIO | None = None
        self._responses: TextIO | None = None
        self._alarms: TextIO | None = None
        self._writer: Any = None  # a SummaryWriter
        self._wandb: Any = None  # a wandb.Run
        self._bar: Progress | None = None
        self._first: tuple[int, float] | None = None  # the first step logged, and when

    def __enter__(self) -> Self:
        if self._rank != 0:
            return self
        # a lone surrogate is written as \ud800, which is how JSON has it
        lines = partial(open, mode="a", encoding="utf-8", errors="backslashreplace")
        self._metrics = self._stack.enter_context(lines(self._output / METRICS))
        self._alarms = self._stack.enter_context(lines(self._output / ALARMS))
        if self._config.responses:
            self._responses = self._stack.enter_context(lines(self._output / RESPONSES))
        if self._config.tensorboard:
            self._writer = self._events()
            self._stack.callback(lambda: self._writer.close())
        if self._config.wandb is not None:
            self._wandb = wandb_run(self._output, self._config.wandb)
            self._stack.callback(self._wandb.finish)
        if _wants_bar(self._config.progress):
            self._bar = self._stack.enter_context(_progress_bar())
            self._bar.add_task("", total=self._steps, completed=self._done)
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def _events(self) -> Any:
        """A SummaryWriter. TensorBoard then leaves out what was written of steps after those done."""
        from torch.utils.tensorboard import SummaryWriter  # a second of imports that not every run wants

        purge = {"purge_step": self._done + 1} if self._done else {}
        return SummaryWriter(str(self._output / "tensorboard"), **purge)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step, 1 to `steps`, as one line of strict JSON: `{"step": ..., name: value, ...}`.

        JSON has no NaN and no infinity; both are written as null.
        """
        parts = [_summary(OF_STEP, metrics), self._time_left(step)]
        if self._bar is None or self._bar.console.width >= WIDE:
            parts.append(_summary(OF_STAGES, metrics))
        text = "  ".join(part for part in parts if part)
        self._write(step, metrics)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, description=text, refresh=True)
        else:
            self._print(step, text)

    def log_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record an evaluation after this step, 0 before training: a line of its own, each name behind `eval/`."""
        self._write(step, {f"eval/{name}": value for name, value in metrics.items()})
        self._print(step, _summary(OF_EVALUATION, metrics))

    def log_alarms(self, alarms: Iterable[Mapping[str, Any]]) -> None:
        """Record alarms (`fastppo.health`) in `alarms.jsonl`, one a line, and in the log.

        TensorBoard has them as text, and Weights & Biases as alerts, of which it tells the user.
        """
        if self._alarms is None:
            return
        for alarm in alarms:
            self._alarms.write(as_line(alarm))
            log.warning("step %d: %s", alarm["step"], alarm["message"])
            if self._writer is not None:
                self._writer.add_text(f"alarms/{alarm['figure']}", alarm["message"], alarm["step"])
            if self._wandb is not None:
                self._wandb.alert(title=alarm["figure"], text=f"step {alarm['step']}: {alarm['message']}", level="WARN")
        self._alarms.flush()

    def go_back(self, step: int, then: Mapping[str, int]) -> None:
        """The run goes on from this step, where its files of lines had these sizes: what came after is taken back.

        Alarms stay: the one for which the run goes back is among them.
        """
        self._done, self._first = step, None
        if self._rank != 0:
            return
        # the open files append, wherever their ends are
        continue_folder(self._output, {name: size for name, size in then.items() if name != ALARMS})
        if self._writer is not None:
            self._writer.close()
            self._writer = self._events()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, refresh=True)

    def wants_responses(self, step: int) -> bool:
        """Whether the training responses of this step are to be given to `log_responses`."""
        return self._responses is not None and (step == 1 or step % self._config.responses_every == 0)

    def log_responses(self, step: int, responses: Iterable[Mapping[str, Any]]) -> None:
        """Keep responses (`fastppo.responses`) in `responses.jsonl`, one a line, each with its step."""
        if self._responses is not None:
            self._responses.writelines(as_line({"step": step} | dict(response)) for response in responses)
            self._responses.flush()

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._metrics is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        self._metrics.write(as_line({"step": step} | values))
        self._metrics.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step} | values)

    def _print(self, step: int, text: str) -> None:
        line = f"step {step}/{self._steps}  {text}"
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        elif self._rank == 0:
            print(line, flush=True)

    def _time_left(self, step: int) -> str:
        """From the mean time of the steps since the first one logged; evaluations between them count."""
        now = time.perf_counter()
        self._first = self._first or (step, now)
        first_step, first_time = self._first
        if not first_step < step < self._steps:
            return ""
        seconds = (now - first_time) / (step - first_step) * (self._steps - step)
        return f"{timedelta(seconds=round(seconds))} left"

    @contextmanager
    def profile(self, step: int) -> Iterator[None]:
        """Record what runs inside as a Chrome trace, `output`/profile/step-N-rank-R.json, if this step was chosen."""
        if step not in self._config.profile_steps:
            yield
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * _on_cuda()
        with torch.profiler.profile(activities=activities) as profiler:
            yield
        path = self._output / "profile" / f"step-{step}-rank-{self._rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        log.info("profile of step %d: %s; chrome://tracing and ui.perfetto.dev show it", step, path)


def _wants_bar(progress: str) -> bool:
    if progress == "auto":  # not rich's own guess, which takes FORCE_COLOR in a CI log for a terminal
        return sys.stdout.isatty() and not Console().is_dumb_terminal
    return progress == "always"


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=None),
        TextColumn("{task.description}", markup=False),
        console=Console(force_terminal=True),
        expand=True,
        auto_refresh=False,  # it changes when a step is logged
        redirect_stderr=sys.stderr.isatty(),  # log lines appear above the bar, unless they go to a file
    )


def _summary(formats: Mapping[str, str], values: Mapping[str, float]) -> str:
    return "  ".join(text.format(values[name]) for name, text in formats.items() if name in values)


class Stages:
    """Seconds of each stage of a step: `with stages("sampling"): ...`. Stages follow each other, not one in another."""

    def __init__(self, seconds: dict[str, float], enter: Callable[[str], None] = lambda stage: None):
        """seconds: where they are kept, with those of a step that another process began; enter: called with the name
        of each stage as it begins, and timed with it."""
        self._seconds, self._enter = seconds, enter

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time inside to the stage `name`, and name it in profiles: torch's, and NVTX on CUDA."""
        marked = torch.cuda.nvtx.range(name) if _on_cuda() else nullcontext()
        start = time.perf_counter()
        with record_function(name), marked:
            self._enter(name)
            yield
            if _on_cuda():  # kernels run behind: without this the next stage would pay for them
                torch.cuda.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """`{"time/sampling": seconds, ...}` since the last call."""
        taken = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken


def _on_cuda() -> bool:
    """Whether this process computes on CUDA; a GPU that is there may be unused."""
    return bool(torch.cuda.is_initialized())


class Sample(NamedTuple):
    """A held-out prompt, and the responses and scores of the actor before and after training."""

    prompt: str
    before: str
    score_before: float
    after: str
    score_after: float


def show_samples(rows: Iterable[Sample]) -> None:
    """Print `samples_table` on stdout."""
    Console().print(samples_table(rows))


def samples_table(rows: Iterable[Sample]) -> Table:
    """Prompt, and response and score before and after, for a terminal. Long texts are cut."""
    table = Table(expand=True, show_lines=True)
    for text, score in (("prompt", None), ("before", "score"), ("after", "score")):
        table.add_column(text, ratio=1, overflow="fold")
        if score:
            table.add_column(score, justify="right", no_wrap=True)
    for row in rows:
        before, after = f"{row.score_before:.2f}", f"{row.score_after:.2f}"
        table.add_row(_printable(row.prompt), _printable(row.before), before, _printable(row.after), after)
    return table


def _printable(text: str) -> Text:
    """Models write anything. Markup stays text (`Text` reads none), and escape codes lose their force."""
    shown = Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split())))
    shown.truncate(SHOWN_CELLS, overflow="ellipsis")
    return shown


def write_samples(path: Path, rows: Sequence[Sample]) -> None:
    """One JSON object a row, with the field names of `Sample`."""
    lines = "".join(as_line(row._asdict()) for row in rows)
    path.write_text(lines, encoding="utf-8", errors="backslashreplace")  # a lone surrogate: \ud800, as JSON writes it


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at that time: a progress bar stands in for it while it is shown."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def setup_logging(rank: int) -> None:
    """Log to stderr, rank 0 from INFO and the others from WARNING with their rank in the line.

    Call it once all modules are imported, since libraries set up loggers of their own on import. Theirs get the same
    format here, and transformers' progress bars are shown on rank 0's terminal only.
    """
    from transformers.utils import logging as transformers_logging  # heavy, and only a run needs it

    handler = _Stderr()
    who = "" if rank == 0 else f"rank {rank}: "
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {who}%(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(lambda record: not record.getMessage().startswith(KNOWN_NOISE))
    log.handlers = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for name in THIRD_PARTY:
        library = logging.getLogger(name)
        library.handlers, library.propagate = [handler], False
        library.setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    if rank != 0 or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
