"""Retraining a pruned U-Net against its teacher, step by step.

Knows the order of samples, the optimiser, what a bad step is, when to save and how a run goes on
after any interruption with the same bits. accelerate owns devices, precision, accumulation and
processes. It does not know where the cache came from, nor what the student is saved as.

Every random number of a step depends on the seed and on the sample's position in the run alone, so
that neither the number of processes nor the batch they share it in changes what is trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from bkprune import recipe
from bkprune.caching import Batch, Cache
from bkprune.calibration import sample_generator
from bkprune.checkpoints import Checkpoints, Log
from bkprune.losses import Tap, distillation_losses, sample_weights, watched
from bkprune.recipe import DistillSettings

_HISTORY, _LEAST, _SPIKE, _MOST_BAD = 50, 10, 20.0, 10
Progress = Callable[[int, int, str], None]


class StoppedError(ValueError):
    """Training cannot go on; the last good checkpoint is kept."""


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
        if len(self.cache) < 1:
            raise ValueError("the cache is empty")
        self.student.requires_grad_(True).train()
        if s.checkpointing:
            unet: Any = self.student
            unet.enable_gradient_checkpointing()
        if s.channels_last:
            _channels_last(self.student)
        parameters = list(self.student.parameters())
        self.optimiser = recipe.optimiser(parameters, s)
        self.schedule = recipe.schedule(self.optimiser, s)
        self.ema = EMAModel(parameters, decay=s.ema) if s.ema is not None else None
        self.step = 0
        self._orders: dict[int, list[int]] = {}

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
        kept = Checkpoints(folder, stamp)
        state = kept.latest()
        self._prepare()
        if state is not None:
            self._load(state)
        log = Log(folder, self.step) if self.acc.is_main_process else None
        history = [row["loss"] for row in (log.rows if log else []) if not row.get("skipped")]
        n_bad = 0
        with ExitStack() as stack:
            if log is not None:
                stack.callback(log.close)
            student, teacher = stack.enter_context(self._watching())
            if self.step == 0 and s.preview_every:
                preview(0)
            while self.step < s.steps:
                started = time.perf_counter()
                terms, is_good = self._one_step(student, teacher, history)
                n_bad = 0 if is_good else n_bad + 1
                if n_bad > _MOST_BAD:
                    raise StoppedError(
                        f"step {self.step + 1}: the loss was not finite, or {_SPIKE:g} times its "
                        f"median, {n_bad} times in a row; lower --lr. The last good checkpoint is "
                        f"kept in {kept.folder}"
                    )
                self.step += 1
                if is_good:
                    history.append(terms["loss"])
                if log is not None:
                    row = {"step": self.step, **terms, "lr": self.schedule.get_last_lr()[0]}
                    if not is_good:
                        row["skipped"] = True
                    elapsed = time.perf_counter() - started
                    row["images_per_s"] = round(self.effective_batch / elapsed, 3)
                    log.add(row)
                    self.acc.log(row, step=self.step)  # to trackers, if there are any
                self.schedule.step()
                progress(self.step, s.steps, _shown(terms, is_good))
                is_last, stops = self.step == s.steps, wants_stop()
                if log is not None and (is_last or stops or self.step % s.save_every == 0):
                    log.sync()
                    kept.save(self.step, self._state())
                if s.preview_every and (is_last or self.step % s.preview_every == 0):
                    preview(self.step)
                if stops and not is_last:
                    return False
        return True

    def rehearse(self, n: int) -> float:
        """Seconds of a step, the best of `n` after one to warm up; the weights are spoiled."""
        self._prepare()
        times = []
        with self._watching() as (student, teacher):
            for _ in range(n + 1):
                started = time.perf_counter()
                self._one_step(student, teacher, [])
                times.append(time.perf_counter() - started)
                self.step += 1
        return min(times[1:])

    def _prepare(self) -> None:
        """Move the networks where they run."""
        device = self.acc.device
        self.student.to(device)
        if self.teacher is not None:
            self.teacher.requires_grad_(False).eval().to(device)
            if self.settings.channels_last:
                _channels_last(self.teacher)
        if self.ema is not None:
            self.ema.to(device)

    @contextmanager
    def _watching(self) -> Iterator[tuple[Any, Any]]:
        """Both networks with their taps, as accelerate wants them."""
        with ExitStack() as stack:
            own = stack.enter_context(watched(self.student, [tap.student for tap in self.taps]))
            student: Any = torch.compile(own) if self.settings.compile else own
            student, self.optimiser = self.acc.prepare(student, self.optimiser)
            teacher: Any = None
            if self.teacher is not None:
                names = [tap.name for tap in self.taps]
                teacher = stack.enter_context(watched(self.teacher, names))
                teacher = torch.compile(teacher) if self.settings.compile else teacher
            yield student, teacher

    def _one_step(
        self, student: Any, teacher: Any, history: list[float]
    ) -> tuple[dict[str, float], bool]:
        """Forward, backward and update; a step whose loss is no good changes no weight."""
        s = self.settings
        self.optimiser.zero_grad(set_to_none=True)
        names: list[str] = []
        sums = torch.zeros(())
        for micro in range(s.accumulate):
            is_last = micro == s.accumulate - 1
            with nullcontext() if is_last else self.acc.no_sync(student):
                total, terms = self._losses(student, teacher, micro)
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

    def _losses(self, student: Any, teacher: Any, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, target, timesteps = self.inputs(micro)
        with self.acc.autocast():
            own = student(**inputs)
        theirs = None
        if teacher is not None and self.teacher is not None:
            dtype = next(self.teacher.parameters()).dtype
            cast = {k: _cast(v, dtype) for k, v in inputs.items() if k != "timestep"}
            with torch.inference_mode():
                theirs = teacher(**cast, timestep=timesteps)
        weights = sample_weights(self.scheduler, timesteps, self.settings.losses.snr_gamma)
        names = [tap.name for tap in self.taps]
        return distillation_losses(own, theirs, target, names, self.settings.losses, weights)

    # --- what a step is made of ----------------------------------------------------------------

    def positions(self, micro: int) -> list[int]:
        """Where in the run the samples of one micro-batch of this process stand."""
        s, n = self.settings, int(self.acc.num_processes)
        first = ((self.step * s.accumulate + micro) * n + int(self.acc.process_index)) * (
            s.batch_size
        )
        return list(range(first, first + s.batch_size))

    def inputs(self, micro: int) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Keyword arguments of the U-Net, the target, and the timesteps of one micro-batch."""
        positions = self.positions(micro)
        generators = [sample_generator(self.settings.seed, p) for p in positions]
        batch = self.cache.batch([self._sample(p) for p in positions], generators)
        n_train = int(self.scheduler.config.num_train_timesteps)
        timesteps = torch.stack([torch.randint(n_train, (), generator=g) for g in generators])
        noise = torch.stack([torch.randn(batch.latents.shape[1:], generator=g) for g in generators])
        return self._on_device(batch, noise, timesteps)

    def _on_device(
        self, batch: Batch, noise: Tensor, timesteps: Tensor
    ) -> tuple[dict[str, Any], Tensor, Tensor]:
        device = self.acc.device
        latents, noise = batch.latents.to(device), noise.to(device)
        timesteps = timesteps.to(device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        kind = self.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {kind!r} is not supported: epsilon or v_prediction")
        target = noise
        if kind == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        inputs: dict[str, Any] = {
            "sample": noisy,
            "timestep": timesteps,
            "encoder_hidden_states": batch.embeddings.to(device),
        }
        if batch.added:
            inputs["added_cond_kwargs"] = {k: v.to(device) for k, v in batch.added.items()}
        return inputs, target, timesteps

    def _sample(self, position: int) -> int:
        epoch, place = divmod(position, len(self.cache))
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = self.cache.order(epoch, self.settings.seed)
        return self._orders[epoch][place]

    # --- state -----------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": _plain(self.schedule.state_dict()),
            "ema": self.ema.shadow_params if self.ema is not None else None,
            "ema_step": self.ema.optimization_step if self.ema is not None else 0,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict({**self.schedule.state_dict(), **state["schedule"]})
        if self.ema is not None:
            self.ema.shadow_params = [t.to(self.acc.device) for t in state["ema"]]
            self.ema.optimization_step = state["ema_step"]
        self.step = int(state["step"])

    def use_average(self) -> None:
        """Put the moving average, if there is one, into the student for good."""
        if self.ema is not None:
            self.ema.copy_to(self.student.parameters())


def _channels_last(network: Any) -> None:
    network.to(memory_format=torch.channels_last)


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule's counters, without its functions."""
    return {
        k: v for k, v in state.items() if isinstance(v, int | float | list) and k != "lr_lambdas"
    }


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Mapping):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return value.to(dtype)


def _shown(terms: Mapping[str, float], is_good: bool) -> str:
    parts = [
        f"{k.removeprefix('loss_')} {v:.3g}" for k, v in terms.items() if k.startswith("loss_")
    ]
    return " ".join(parts) if is_good else "skipped: loss not finite or far off"
