"""What is learned at each step: noised latents, their target, and what the teacher says of them.

Knows the order of samples, and that every random number of a step depends on the seed and on the
sample's position in the run alone: neither the number of processes nor the batch they share it in
changes what is learned. It does not know students; one lesson serves any number of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bkprune.caching import Batch, Cache
from bkprune.calibration import sample_generator
from bkprune.losses import watched
from bkprune.recipe import DistillSettings


@dataclass(frozen=True)
class Lesson:
    """One micro-batch.

    Attributes:
        inputs: keyword arguments of the U-Net.
        target: what the scheduler wants predicted, `[B, C, H, W]`.
        output: the teacher's, or None where only the task counts.
        features: the teacher's, by the names of its tapped modules.
    """

    inputs: dict[str, Any]
    target: Tensor
    output: Tensor | None
    features: dict[str, Tensor]

    @property
    def timesteps(self) -> Tensor:
        """`[B]`."""
        timesteps: Tensor = self.inputs["timestep"]
        return timesteps


class Lessons:
    """The lessons of a run, by step; give them inside `with lessons.opened():`.

    Args:
        teacher: never trained, in whatever dtype it has; None where only the task counts.
        names: of the teacher's modules that are tapped.
        cache: latents and text embeddings.
        scheduler: of the noise; its `prediction_type` says what is predicted.
        settings: seed, batch size and how many micro-batches make a step.
        accelerator: says the device, and which share of a step is this process's.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        names: Sequence[str],
        cache: Cache,
        scheduler: Any,
        settings: DistillSettings,
        accelerator: Accelerator,
    ) -> None:
        if len(cache) < 1:
            raise ValueError("the cache is empty")
        self.teacher, self.names = teacher, tuple(names)
        self.cache, self.scheduler, self.settings = cache, scheduler, settings
        self.acc = accelerator
        self._asked: Any = None
        self._orders: dict[int, list[int]] = {}

    @contextmanager
    def opened(self) -> Iterator[Lessons]:
        """With the teacher on its device and its taps hung."""
        with ExitStack() as stack:
            if self.teacher is not None:
                self.teacher.requires_grad_(False).eval().to(self.acc.device)
                if self.settings.channels_last:
                    channels_last(self.teacher)
                self._asked = stack.enter_context(watched(self.teacher, self.names))
                if self.settings.compile:
                    self._asked = torch.compile(self._asked)
                stack.callback(setattr, self, "_asked", None)
            yield self

    def of(self, step: int) -> Iterator[Lesson]:
        """The micro-batches of one step, one after the other."""
        for micro in range(self.settings.accumulate):
            inputs, target = self.inputs(step, micro)
            yield self._asked_of(inputs, target)

    def _asked_of(self, inputs: dict[str, Any], target: Tensor) -> Lesson:
        if self.teacher is None:
            return Lesson(inputs, target, None, {})
        dtype = next(self.teacher.parameters()).dtype
        cast = {k: v if k == "timestep" else _cast(v, dtype) for k, v in inputs.items()}
        with torch.inference_mode():
            output, features = self._asked(**cast)
        return Lesson(inputs, target, output, dict(zip(self.names, features, strict=True)))

    def positions(self, step: int, micro: int) -> list[int]:
        """Where in the run the samples of one micro-batch of this process stand."""
        s, n = self.settings, int(self.acc.num_processes)
        first = ((step * s.accumulate + micro) * n + int(self.acc.process_index)) * s.batch_size
        return list(range(first, first + s.batch_size))

    def sample(self, position: int) -> int:
        """Which sample of the cache stands at a position of the run."""
        epoch, place = divmod(position, len(self.cache))
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = self.cache.order(epoch, self.settings.seed)
        return self._orders[epoch][place]

    def inputs(self, step: int, micro: int = 0) -> tuple[dict[str, Any], Tensor]:
        """Keyword arguments of the U-Net and the target of one micro-batch."""
        positions = self.positions(step, micro)
        generators = [sample_generator(self.settings.seed, p) for p in positions]
        batch = self.cache.batch([self.sample(p) for p in positions], generators)
        n_train = int(self.scheduler.config.num_train_timesteps)
        timesteps = torch.stack([torch.randint(n_train, (), generator=g) for g in generators])
        noise = torch.stack([torch.randn(batch.latents.shape[1:], generator=g) for g in generators])
        return self._on_device(batch, noise, timesteps)

    def _on_device(
        self, batch: Batch, noise: Tensor, timesteps: Tensor
    ) -> tuple[dict[str, Any], Tensor]:
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
        return inputs, target


def channels_last(network: Any) -> None:
    """The memory layout that convolutions like best."""
    network.to(memory_format=torch.channels_last)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Mapping):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return value.to(dtype)
