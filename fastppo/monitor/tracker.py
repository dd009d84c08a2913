"""The outputs of a run: progress on the terminal; metrics, responses and alarms as JSONL files (`run_dir`);
TensorBoard; Weights & Biases; the time of each phase; profiles.

Only rank 0 writes and prints; on the other ranks the same calls do nothing, so that the loop does not check the rank.
Profiles are the exception: every rank writes one, since the ranks wait for different things.
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
from fastppo.distributed import in_phase
from fastppo.monitor.output_guard import OutputGuard, Terminal, ensure_standard_streams, silence_stdout
from fastppo.monitor.run_dir import ALARMS, METRICS, RESPONSES, JsonlFile, continue_folder
from fastppo.monitor.wandb_run import WandbError, wandb_run

log = logging.getLogger("fastppo")

# The metrics of a step and of an evaluation that the terminal shows; the files contain every metric.
STEP_FORMATS = {"score": "score {:.3f}", "health/judge": "judge {:.3f}", "kl": "KL {:.3f}", "loss": "loss {:.3f}"}
STEP_FORMATS |= {"judge": "judge {:.3f}", "accuracy": "accuracy {:.3f}", "tokens_per_second": "{:,.0f} tokens/s"}
PHASE_FORMATS = {f"time/{phase}": f"{phase} {{:.1f}} s" for phase in ("sampling", "feedback", "learning")}
EVALUATION_FORMATS = {"score": "held-out score {:.3f}", "score_error": "+/- {:.3f}", "judge": "judge {:.3f}"}
EVALUATION_FORMATS |= {"kl": "KL {:.3f}"}
EVALUATION_FORMATS |= {"loss": "held-out loss {:.3f}", "perplexity": "perplexity {:.2f}", "accuracy": "accuracy {:.3f}"}
EVALUATION_FORMATS |= {"accuracy_low": "(95%: {:.3f}", "accuracy_high": "to {:.3f})"}
EVALUATION_FORMATS |= {"calibration_error": "calibration error {:.3f}"}

# Libraries with loggers of their own: they get our line format, and only rank 0 prints their warnings.
THIRD_PARTY = ("DeepSpeed", "transformers", "huggingface_hub", "datasets", "httpx", "httpx2")
KNOWN_NOISE = (
    "Token indices sequence length is longer than",  # fastppo.data.prompts checks the lengths itself
)

# Names, for log messages, of the outputs that are not files of the run's folder
TERMINAL, TENSORBOARD, WANDB = "stdout", "TensorBoard", "Weights & Biases"

WIDE = 140  # the bar also shows the seconds of the phases if the terminal has at least this many columns


class Tracker:
    """Records the steps of a run in the folder `output`, which exists (`fresh_folder`). A context manager.

    If an output fails, the error is logged and the run continues. Lines that cannot be written to a file are kept until
    there is space for them (`JsonlFile`).
    """

    def __init__(self, output: Path, config: TrackConfig, *, steps: int, rank: int, done: int = 0):
        """steps: of the whole run, for the progress bar and the remaining time; rank: of this process; done: steps
        that the run had done before it was resumed."""
        self._output, self._config, self._steps, self._rank, self._done = output, config, steps, rank, done
        self._files: dict[str, JsonlFile] = {}  # by file name; empty on the other ranks
        self.guard = OutputGuard()  # has the state of each output, by name
        self._services: dict[str, Any] = {}  # name -> SummaryWriter or wandb.Run
        self._bar: Progress | None = None
        self._first_logged: tuple[int, float] | None = None  # the first step that was logged, and its time in seconds

    def __enter__(self) -> Self:
        if self._rank != 0:
            return self
        names = [METRICS, ALARMS] + [RESPONSES] * bool(self._config.responses)
        self._files = {name: JsonlFile(self._output / name) for name in names}
        for name in names:
            self._add(name, ())
        if self._config.tensorboard:
            with self.guard(TENSORBOARD):
                self._services[TENSORBOARD] = self._summary_writer()
        if self._config.wandb is not None:
            # at the start of a run the user can correct what W&B refuses; a resumed run continues without it
            with self.guard(WANDB, reraise=() if self._done else (WandbError,)):
                self._services[WANDB] = wandb_run(self._output, self._config.wandb)
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
            if lost := file.drop_pending():
                log.error("%s: %d lines could not be written and are lost", self._output / name, lost)
        self._send(TENSORBOARD, lambda writer: writer.close())
        self._send(WANDB, lambda run: run.finish())

    def _add(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Append to one of the JSONL files, if this run writes it."""
        if name in self._files:
            with self.guard(str(self._output / name)):
                self._files[name].add(records)

    def _send(self, service: str, work: Callable[[Any], object]) -> None:
        """Call `work` with TensorBoard's writer or the W&B run, if it is used; after an error it is not used again."""
        if service in self._services:
            with self.guard(service):
                work(self._services[service])
            if self.guard.has_failed(service):
                del self._services[service]

    @contextmanager
    def _display(self) -> Iterator[None]:
        """Guard the terminal. If it fails, stdout is silenced and the progress bar is given up."""
        with self.guard(TERMINAL):
            yield
        if self.guard.has_failed(TERMINAL):
            silence_stdout()
            if self._bar is not None:
                self._bar, sys.stderr = None, self._stderr

    def _summary_writer(self) -> Any:
        """TensorBoard's SummaryWriter. TensorBoard then ignores earlier records of the steps after `done`."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import, and not every run needs it

        purge = {"purge_step": self._done + 1} if self._done else {}
        return SummaryWriter(str(self._output / "tensorboard"), **purge)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step, 1 to `steps`, as one line of strict JSON: `{"step": ..., name: value, ...}`.

        JSON has no NaN and no infinity; both are written as null.
        """
        parts = [_summary(STEP_FORMATS, metrics), self._time_left(step)]
        if self._bar is None or self._bar.console.width >= WIDE:
            parts.append(_summary(PHASE_FORMATS, metrics))
        text = "  ".join(part for part in parts if part)
        self._write(step, metrics)
        if not self._show(completed=step, description=text):
            self._print(step, text)

    def log_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record an evaluation after this step (0: before training) as a separate line, with names `eval/NAME`."""
        self._write(step, {f"eval/{name}": value for name, value in metrics.items()})
        self._print(step, _summary(EVALUATION_FORMATS, metrics))

    def log_alarms(self, alarms: Iterable[Mapping[str, Any]]) -> None:
        """Record alarms (`fastppo.monitor.health`) in `alarms.jsonl`, one per line, and in the log.

        TensorBoard gets them as text, and Weights & Biases as alerts, about which it notifies the user.
        """
        for alarm in alarms:
            self._add(ALARMS, [alarm])
            if self._rank == 0:
                log.warning("step %d: %s", alarm["step"], alarm["message"])
            name, step, text = f"alarms/{alarm['figure']}", alarm["step"], alarm["message"]
            self._send(TENSORBOARD, partial(_add_text, name, text, step))
            self._send(WANDB, partial(_alert, alarm["figure"], f"step {step}: {text}"))

    def roll_back(self, step: int, sizes: Mapping[str, int]) -> None:
        """Remove the records of all steps after `step`, from which the run continues.

        sizes: bytes of each JSONL file at that step. `alarms.jsonl` stays whole: the alarm that caused the rollback is
        in it.
        """
        self._done, self._first_logged = step, None
        if self._rank != 0:
            return
        for file in self._files.values():
            file.drop_pending()
        continue_folder(self._output, {name: size for name, size in sizes.items() if name != ALARMS})
        self._send(TENSORBOARD, lambda writer: writer.close())
        if TENSORBOARD in self._services:
            with self.guard(TENSORBOARD):
                self._services[TENSORBOARD] = self._summary_writer()
        self._show(completed=step)

    def wants_responses(self, step: int) -> bool:
        """Whether the training responses of this step are to be passed to `log_responses`."""
        return RESPONSES in self._files and (step == 1 or step % self._config.responses_every == 0)

    def log_responses(self, step: int, responses: Iterable[Mapping[str, Any]]) -> None:
        """Record responses (`fastppo.monitor.response_log`) in `responses.jsonl`, one per line, each with its step."""
        self._add(RESPONSES, ({"step": step} | dict(response) for response in responses))

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._add(METRICS, [{"step": step} | values])
        self._send(TENSORBOARD, partial(_add_scalars, values, step))
        self._send(WANDB, lambda run: run.log({"step": step} | values))

    def _show(self, **changes: Any) -> bool:
        """Redraw the progress bar; returns whether there is one."""
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
        """The remaining time as text, from the mean time per step since the first logged one, evaluations included."""
        now = time.perf_counter()
        self._first_logged = self._first_logged or (step, now)
        first_step, first_time = self._first_logged
        if not first_step < step < self._steps:
            return ""
        seconds = (now - first_time) / (step - first_step) * (self._steps - step)
        return f"{timedelta(seconds=round(seconds))} left"

    @contextmanager
    def profile(self, step: int) -> Iterator[None]:
        """Record the code inside this context as a Chrome trace, `output`/profile/step-N-rank-R.json, if the step is
        one of `track.profile_steps`."""
        if step not in self._config.profile_steps:
            yield
            return
        output = f"the profile of step {step}"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * _on_cuda()
        profiler = torch.profiler.profile(activities=activities)
        with self.guard(output):
            profiler.start()
        try:
            yield
        finally:
            with self.guard(output):
                profiler.stop()
        path = self._output / "profile" / f"step-{step}-rank-{self._rank}.json"
        with self.guard(output):
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
    if progress == "auto":  # rich's own test takes a CI log with FORCE_COLOR for a terminal
        return sys.stdout.isatty() and not Console().is_dumb_terminal
    return progress == "always"


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=None),
        TextColumn("{task.description}", markup=False),
        console=Terminal(force_terminal=True),
        expand=True,
        auto_refresh=False,  # it changes only when a step is logged
        redirect_stderr=sys.stderr.isatty(),  # log lines appear above the bar, unless stderr is a file
    )


def _summary(formats: Mapping[str, str], values: Mapping[str, float]) -> str:
    """The values that have a format, in the order of `formats`, as one line of text."""
    return "  ".join(text.format(values[name]) for name, text in formats.items() if name in values)


class Phases:
    """Seconds of each phase of a step: `with phases("sampling"): ...`. Phases are not nested."""

    def __init__(self, seconds: dict[str, float]):
        """seconds: the dict to add to; in a resumed run it has the seconds of an unfinished step."""
        self._seconds = seconds

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time inside to the phase `name`, tell the other ranks of it, and mark it in torch's profiles and, on
        CUDA, with NVTX."""
        nvtx_range = torch.cuda.nvtx.range(name) if _on_cuda() else nullcontext()
        start = time.perf_counter()
        with record_function(name), nvtx_range, in_phase(name):
            yield
            if _on_cuda():  # kernels run asynchronously: without this their time would count as the next phase's
                torch.cuda.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """`{"time/sampling": seconds, ...}` since the last call."""
        taken = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken


def _on_cuda() -> bool:
    """Whether this process computes on CUDA; it may not use a GPU that the machine has."""
    return bool(torch.cuda.is_initialized())


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stderr`, which a progress bar replaces while it is shown."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def setup_logging(rank: int) -> None:
    """Log to stderr: rank 0 from level INFO, the others from WARNING with their rank in the line.

    Call it after all modules are imported, since libraries set up their loggers on import. These get the same format,
    and transformers' progress bars are shown on rank 0's terminal only.
    """
    from transformers.utils import logging as transformers_logging  # slow to import, and only a run needs it

    ensure_standard_streams()
    handler = _Stderr()
    prefix = "" if rank == 0 else f"rank {rank}: "
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(lambda record: not record.getMessage().startswith(KNOWN_NOISE))
    log.handlers = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for name in THIRD_PARTY:
        library = logging.getLogger(name)
        library.handlers, library.propagate = [handler], False
        library.setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    if rank != 0 or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
