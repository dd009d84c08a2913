"""What a run tells: progress on the terminal, metrics, responses and alarms as files of lines (`folder`), TensorBoard,
Weights & Biases, the time of each stage, profiles.

Rank 0 alone writes and prints; on the other ranks the same calls do nothing, so the loop needs no question of rank.
Only a profile is written by every rank, since ranks differ in what they wait for.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch.profiler import ProfilerActivity, record_function

from fastppo.config import TrackConfig
from fastppo.monitor.run_dir import ALARMS, METRICS, RESPONSES, Lines, continue_folder
from fastppo.monitor.tell import Telling, Terminal, silence_stdout, steady_streams
from fastppo.monitor.wandb_run import WandbError, wandb_run

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
    "Token indices sequence length is longer than",  # fastppo.data.prompts checks lengths, and drops or refuses
)

# The outputs that are no files of the run's folder, for the log
TERMINAL, TENSORBOARD, WANDB = "stdout", "TensorBoard", "Weights & Biases"

WIDE = 140  # columns of a terminal from which the bar has room for the seconds of the stages


class Tracker:
    """Records the steps of a run in the folder `output`, which exists (`fresh_folder`). A context manager.

    An output that fails is an error in the log and ends nothing. Lines of files wait until there is room for them.
    """

    def __init__(self, output: Path, config: TrackConfig, *, steps: int, rank: int, done: int = 0):
        """steps: of the whole run, for the bar and the time left; rank: of this process; done: steps before this."""
        self._output, self._config, self._steps, self._rank, self._done = output, config, steps, rank, done
        self._files: dict[str, Lines] = {}  # by their names; none on other ranks
        self.only_tells = Telling()  # guards each output by its name
        self._outlets: dict[str, Any] = {}  # a SummaryWriter, a wandb.Run
        self._bar: Progress | None = None
        self._first: tuple[int, float] | None = None  # the first step logged, and when

    def __enter__(self) -> Self:
        if self._rank != 0:
            return self
        names = [METRICS, ALARMS] + [RESPONSES] * bool(self._config.responses)
        self._files = {name: Lines(self._output / name) for name in names}
        for name in names:
            self._add(name, ())
        if self._config.tensorboard:
            with self.only_tells(TENSORBOARD):
                self._outlets[TENSORBOARD] = self._events()
        if self._config.wandb is not None:
            # refused where a run begins, it is for the user to put right; a run that goes on, goes on
            with self.only_tells(WANDB, but=() if self._done else (WandbError,)):
                self._outlets[WANDB] = wandb_run(self._output, self._config.wandb)
        if _wants_bar(self._config.progress):
            self._stderr = sys.stderr
            with self._display():
                self._bar = _progress_bar()
                self._bar.start()
                self._bar.add_task("", total=self._steps, completed=self._done)
        return self

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            with self._display():
                self._bar.stop()
        for name, file in self._files.items():
            self._add(name, ())
            if lost := file.drop():
                log.error("%s: %d lines could not be written and are lost", self._output / name, lost)
        self._send(TENSORBOARD, lambda writer: writer.close())
        self._send(WANDB, lambda run: run.finish())

    def _add(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Append to one of the files of lines, if it is kept."""
        if name in self._files:
            with self.only_tells(str(self._output / name)):
                self._files[name].add(records)

    def _send(self, outlet: str, work: Callable[[Any], object]) -> None:
        """Give something to TensorBoard or Weights & Biases, if they are used; one that fails gets nothing more."""
        if outlet in self._outlets:
            with self.only_tells(outlet):
                work(self._outlets[outlet])
            if self.only_tells.has_failed(outlet):
                del self._outlets[outlet]

    @contextmanager
    def _display(self) -> Iterator[None]:
        """For what is shown. A bar that cannot be drawn gives way to plain lines."""
        with self.only_tells(TERMINAL):
            yield
        if self.only_tells.has_failed(TERMINAL):
            silence_stdout()
            if self._bar is not None:
                self._bar, sys.stderr = None, self._stderr

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
        if not self._show(completed=step, description=text):
            self._print(step, text)

    def log_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record an evaluation after this step, 0 before training: a line of its own, each name behind `eval/`."""
        self._write(step, {f"eval/{name}": value for name, value in metrics.items()})
        self._print(step, _summary(OF_EVALUATION, metrics))

    def log_alarms(self, alarms: Iterable[Mapping[str, Any]]) -> None:
        """Record alarms (`fastppo.monitor.health`) in `alarms.jsonl`, one a line, and in the log.

        TensorBoard has them as text, and Weights & Biases as alerts, of which it tells the user.
        """
        for alarm in alarms:
            self._add(ALARMS, [alarm])
            if self._rank == 0:
                log.warning("step %d: %s", alarm["step"], alarm["message"])
            name, step, text = f"alarms/{alarm['figure']}", alarm["step"], alarm["message"]
            self._send(TENSORBOARD, partial(_add_text, name, text, step))
            self._send(WANDB, partial(_alert, alarm["figure"], f"step {step}: {text}"))

    def go_back(self, step: int, then: Mapping[str, int]) -> None:
        """The run goes on from this step, where its files of lines had these sizes: what came after is taken back.

        Alarms stay: the one for which the run goes back is among them.
        """
        self._done, self._first = step, None
        if self._rank != 0:
            return
        for file in self._files.values():
            file.drop()
        continue_folder(self._output, {name: size for name, size in then.items() if name != ALARMS})
        self._send(TENSORBOARD, lambda writer: writer.close())
        if TENSORBOARD in self._outlets:
            with self.only_tells(TENSORBOARD):
                self._outlets[TENSORBOARD] = self._events()
        self._show(completed=step)

    def wants_responses(self, step: int) -> bool:
        """Whether the training responses of this step are to be given to `log_responses`."""
        return RESPONSES in self._files and (step == 1 or step % self._config.responses_every == 0)

    def log_responses(self, step: int, responses: Iterable[Mapping[str, Any]]) -> None:
        """Keep responses (`fastppo.monitor.response_log`) in `responses.jsonl`, one a line, each with its step."""
        self._add(RESPONSES, ({"step": step} | dict(response) for response in responses))

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._add(METRICS, [{"step": step} | values])
        self._send(TENSORBOARD, partial(_add_scalars, values, step))
        self._send(WANDB, lambda run: run.log({"step": step} | values))

    def _show(self, **changes: Any) -> bool:
        """Draw the bar anew; returns whether there is one."""
        if self._bar is None:
            return False
        with self._display():
            self._bar.update(self._bar.task_ids[0], refresh=True, **changes)
        return self._bar is not None

    def _print(self, step: int, text: str) -> None:
        line = f"step {step}/{self._steps}  {text}"
        with self._display():
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
        output = f"the profile of step {step}"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * _on_cuda()
        profiler = torch.profiler.profile(activities=activities)
        with self.only_tells(output):
            profiler.start()
        try:
            yield
        finally:
            with self.only_tells(output):
                profiler.stop()
        path = self._output / "profile" / f"step-{step}-rank-{self._rank}.json"
        with self.only_tells(output):
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            log.info("profile of step %d: %s; chrome://tracing and ui.perfetto.dev show it", step, path)


def _add_scalars(values: Mapping[str, float], step: int, writer: Any) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, step)
    writer.flush()


def _add_text(name: str, text: str, step: int, writer: Any) -> None:
    writer.add_text(name, text, step)
    writer.flush()


def _alert(title: str, text: str, run: Any) -> None:
    run.alert(title=title, text=text, level="WARN")


def _wants_bar(progress: str) -> bool:
    if progress == "auto":  # not rich's own guess, which takes FORCE_COLOR in a CI log for a terminal
        return sys.stdout.isatty() and not Console().is_dumb_terminal
    return progress == "always"


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=None),
        TextColumn("{task.description}", markup=False),
        console=Terminal(force_terminal=True),
        expand=True,
        auto_refresh=False,  # it changes when a step is logged
        redirect_stderr=sys.stderr.isatty(),  # log lines appear above the bar, unless they go to a file
    )


def _summary(formats: Mapping[str, str], values: Mapping[str, float]) -> str:
    return "  ".join(text.format(values[name]) for name, text in formats.items() if name in values)


class Phases:
    """Seconds of each stage of a step: `with phases("sampling"): ...`. Stages follow each other, not one in another."""

    def __init__(self, seconds: dict[str, float]):
        """seconds: where they are kept, with those of a step that another process began."""
        self._seconds = seconds

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time inside to the stage `name`, and name it in profiles: torch's, and NVTX on CUDA."""
        marked = torch.cuda.nvtx.range(name) if _on_cuda() else nullcontext()
        start = time.perf_counter()
        with record_function(name), marked:
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

    steady_streams()
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
