"""Retraining a pruned U-Net against its teacher, step by step.

Knows the optimiser, what a bad step is, when to save and how a run goes on after any interruption
with the same bits. accelerate owns devices, precision, accumulation and processes. It does not know
where lessons come from, nor what the student is saved as.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from diffusers.training_utils import EMAModel
from torch import nn

from bkprune import gathering, recipe
from bkprune.caching import Cache
from bkprune.checkpoints import Checkpoints, Log
from bkprune.lessons import Lesson, Lessons, channels_last
from bkprune.losses import Tap, distillation_losses, sample_weights, watched
from bkprune.recipe import DistillSettings

_HISTORY, _LEAST, _SPIKE, _MOST_BAD = 50, 10, 20.0, 10
Progress = Callable[[int, int, str], None]


class StoppedError(ValueError):
    """Training cannot go on; the last good checkpoint is kept."""


@dataclass
class _Going:
    """What a run holds while it is going."""

    student: Any
    kept: Checkpoints
    log: Log | None
    history: list[float]
    n_bad: int = 0


@dataclass
class Distillation:
    """One student and its teacher, ready to be stepped.

    Attributes:
        student: trained in place; its weights are float32.
        teacher: never trained, in whatever dtype it has; None where only the task counts.
        taps: what is compared inside.
        cache: latents and text embeddings.
        scheduler: of the noise; its `prediction_type` says what is predicted.
        settings: how.
        accelerator: one made by `accelerate`; a plain one by default.
    """

    student: nn.Module
    teacher: nn.Module | None
    taps: list[Tap]
    cache: Cache
    scheduler: Any
    settings: DistillSettings
    accelerator: Accelerator | None = None

    def __post_init__(self) -> None:
        s = self.settings
        self.acc = self.accelerator or Accelerator(mixed_precision=s.precision)
        self.is_sharded = self.acc.distributed_type == DistributedType.FSDP
        if self.is_sharded and not self.acc.is_fsdp2:
            raise ValueError("FSDP 1 is not supported: set fsdp_version: 2 in accelerate's config")
        if self.is_sharded and s.optimiser == "adamw8bit":
            raise ValueError("--optimiser adamw8bit cannot be shared out by FSDP; use adamw")
        self.lessons = Lessons(
            self.teacher,
            [tap.name for tap in self.taps],
            self.cache,
            self.scheduler,
            s,
            self.acc,
        )
        self.student.requires_grad_(True).train()
        if s.checkpointing:
            unet: Any = self.student
            unet.enable_gradient_checkpointing()
        if s.channels_last and not self.is_sharded:  # FSDP takes contiguous weights alone
            channels_last(self.student)
        self.optimiser = recipe.optimiser(list(self.student.parameters()), s)
        self.schedule = recipe.schedule(self.optimiser, s)
        self.ema: EMAModel | None = None
        self.step = 0
        self._going: _Going | None = None

    @property
    def effective_batch(self) -> int:
        """Samples of one step over all processes."""
        return self.settings.batch_size * self.settings.accumulate * int(self.acc.num_processes)

    # --- running ---------------------------------------------------------------------------------

    def run(
        self,
        folder: Path,
        stamp: str,
        progress: Progress = lambda done, total, what: None,
        preview: Callable[[int], None] = lambda step: None,
        wants_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train to the last step, from the newest checkpoint if there is one.

        Args:
            folder: of the run: log, checkpoints.
            stamp: names the run; checkpoints of another are refused.
            progress: told steps done.
            preview: called every `preview_every` steps, and before the first.
            wants_stop: asked after each step; True saves and ends.

        Returns:
            Whether the last step was reached.

        Raises:
            StoppedError: the loss is not finite, or jumps, many times in a row.
        """
        s = self.settings
        with self.opened(folder, stamp), self.lessons.opened():
            if self.step == 0 and s.preview_every:
                preview(0)
            while self.step < s.steps:
                shown = self.learn(self.lessons.of(self.step))
                progress(self.step, s.steps, shown)
                is_last, stops = self.step == s.steps, self._any(wants_stop())
                if is_last or stops or self.step % s.save_every == 0:
                    self.save()
                if s.preview_every and (is_last or self.step % s.preview_every == 0):
                    preview(self.step)
                if stops and not is_last:
                    return False
        return True

    def _any(self, wish: bool) -> bool:
        """Whether any process wishes it: all stop after the same step, or none does."""
        if self.acc.num_processes == 1:
            return wish
        wishes = self.acc.reduce(torch.tensor(float(wish), device=self.acc.device), "sum")
        return bool(wishes > 0)

    @contextmanager
    def opened(self, folder: Path, stamp: str) -> Iterator[Distillation]:
        """Ready to learn, from the newest checkpoint of the folder if there is one."""
        kept = Checkpoints(folder, stamp)
        state = kept.latest()
        self.student.to(self.acc.device)
        with ExitStack() as stack:
            student = stack.enter_context(self.watching())
            if state is not None:
                self._load(state)
            log = Log(folder, self.step) if self.acc.is_main_process else None
            if log is not None:
                stack.callback(log.close)
            history = list(state["history"]) if state is not None else []
            self._going = _Going(student, kept, log, history)
            stack.callback(setattr, self, "_going", None)
            yield self

    def learn(self, lessons: Iterable[Lesson]) -> str:
        """One step, written into the log; says for people what its losses were.

        Raises:
            StoppedError: the loss is not finite, or jumps, many times in a row.
        """
        going = self._going
        assert going is not None, "learn inside `with opened`"
        started = time.perf_counter()
        terms, is_good = self.update(going.student, lessons, going.history)
        going.n_bad = 0 if is_good else going.n_bad + 1
        if going.n_bad > _MOST_BAD:
            raise StoppedError(
                f"step {self.step + 1}: the loss was not finite, or {_SPIKE:g} times its "
                f"median, {going.n_bad} times in a row; lower --lr. The last good checkpoint is "
                f"kept in {going.kept.folder}"
            )
        self.step += 1
        if is_good:
            going.history.append(terms["loss"])
        if going.log is not None:
            row = {"step": self.step, **terms, "lr": self.schedule.get_last_lr()[0]}
            if not is_good:
                row["skipped"] = True
            elapsed = time.perf_counter() - started
            row["images_per_s"] = round(self.effective_batch / elapsed, 3)
            going.log.add(row)
            self.acc.log(row, step=self.step)  # to trackers, if there are any
        with warnings.catch_warnings():  # torch says so where the very first step was skipped
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.schedule.step()
        return _shown(terms, is_good)

    def save(self) -> None:
        """Log and checkpoint to the disk, by the main process; all bring it what they hold."""
        going = self._going
        assert going is not None, "save inside `with opened`"
        state = {**self._state(), "history": going.history[-_HISTORY:]}
        if going.log is not None:
            going.log.sync()
            going.kept.save(self.step, state)

    def rehearse(self, n: int) -> float:
        """Seconds of a step, the best of `n` after one to warm up; the weights are spoiled."""
        self.student.to(self.acc.device)
        times = []
        with self.watching() as student, self.lessons.opened():
            for _ in range(n + 1):
                started = time.perf_counter()
                self.update(student, self.lessons.of(self.step), [])
                times.append(time.perf_counter() - started)
                self.step += 1
        return min(times[1:])

    @contextmanager
    def watching(self) -> Iterator[Any]:
        """The student with its taps, as accelerate wants it."""
        with watched(self.student, [tap.student for tap in self.taps]) as own:
            student: Any = torch.compile(own) if self.settings.compile else own
            student, self.optimiser = self.acc.prepare(student, self.optimiser)
            if self.settings.ema is not None and self.ema is None:
                self.ema = EMAModel(list(self.student.parameters()), decay=self.settings.ema)
            yield student

    def update(
        self, student: Any, lessons: Iterable[Lesson], history: list[float]
    ) -> tuple[dict[str, float], bool]:
        """Forward, backward and update; a step whose loss is no good changes no weight."""
        s = self.settings
        self.optimiser.zero_grad(set_to_none=True)
        names: list[str] = []
        sums = torch.zeros(())
        for micro, lesson in enumerate(lessons):
            is_last = micro == s.accumulate - 1
            with nullcontext() if is_last else self.acc.no_sync(student):
                total, terms = self._losses(student, lesson)
                self.acc.backward(total / s.accumulate)
            names = ["loss", *terms]
            values = torch.stack([total.detach(), *(v.detach() for v in terms.values())])
            sums = sums.to(values) + values / s.accumulate
        found = dict(zip(names, self.acc.reduce(sums, "mean").tolist(), strict=True))
        norm = float(self.acc.clip_grad_norm_(self.student.parameters(), s.clip_norm))
        is_good = math.isfinite(found["loss"])
        recent = sorted(history[-_HISTORY:])
        if is_good and len(recent) >= _LEAST:
            is_good = found["loss"] <= _SPIKE * recent[len(recent) // 2]
        if self.acc.scaler is None:
            is_good = is_good and math.isfinite(norm)
        if is_good:  # with a gradient scaler an infinite norm is its own affair: it skips
            self.optimiser.step()
            is_good = not self.acc.optimizer_step_was_skipped
        if is_good and self.ema is not None:
            self.ema.step(self.student.parameters())
        return {**found, "grad_norm": norm}, is_good

    def _losses(self, student: Any, lesson: Lesson) -> tuple[Any, dict[str, Any]]:
        with self.acc.autocast():
            own = student(**lesson.inputs)
        names = [tap.name for tap in self.taps]
        theirs = None
        if lesson.output is not None:
            theirs = (lesson.output, [lesson.features[name] for name in names])
        gamma = self.settings.losses.snr_gamma
        weights = sample_weights(self.scheduler, lesson.timesteps, gamma)
        return distillation_losses(own, theirs, lesson.target, names, self.settings.losses, weights)

    # --- state -----------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "student": gathering.weights(self.student),
            "optimiser": gathering.moments(self.student, self.optimiser),
            "schedule": _plain(self.schedule.state_dict()),
            "ema": gathering.tensors(self.ema.shadow_params) if self.ema is not None else None,
            "ema_step": self.ema.optimization_step if self.ema is not None else 0,
            "scaler": self.acc.scaler.state_dict() if self.acc.scaler is not None else None,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        gathering.set_moments(self.student, self.optimiser, state["optimiser"])
        gathering.set_weights(self.student, state["student"])
        self.schedule.load_state_dict({**self.schedule.state_dict(), **state["schedule"]})
        if self.ema is not None:
            gathering.set_tensors(self.ema.shadow_params, state["ema"])
            self.ema.optimization_step = state["ema_step"]
        if self.acc.scaler is not None:
            self.acc.scaler.load_state_dict(state["scaler"])
        self.step = int(state["step"])

    def weights(self) -> dict[str, Any]:
        """The student's, whole, by name; asked by every process, given to the main one."""
        return gathering.weights(self.student)

    def use_average(self) -> None:
        """Put the moving average, if there is one, into the student for good."""
        if self.ema is not None:
            self.ema.copy_to(self.student.parameters())


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule's counters, without its functions."""
    return {
        k: v for k, v in state.items() if isinstance(v, int | float | list) and k != "lr_lambdas"
    }


def _shown(terms: Mapping[str, float], is_good: bool) -> str:
    parts = [
        f"{k.removeprefix('loss_')} {v:.3g}" for k, v in terms.items() if k.startswith("loss_")
    ]
    return " ".join(parts) if is_good else "skipped: loss not finite or far off"
