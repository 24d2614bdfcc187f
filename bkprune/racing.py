"""Students of one teacher, distilled side by side: each lesson is asked of the teacher once.

Knows how masks become students, that all of them learn from the same lessons, how each is kept in a
folder of its own so that it goes on rather than start again, and that a judge says what each loses
against the teacher. It does not know what the judge looks at, who is sent on, nor why.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from diffusers import DDPMScheduler
from numpy.typing import NDArray

from bkprune.blocks import Inventory, Mask
from bkprune.bypass import PrunedUNet
from bkprune.caching import Cache
from bkprune.distill import Distillation, StoppedError
from bkprune.lessons import Lesson, Lessons
from bkprune.losses import taps
from bkprune.measured import Distance
from bkprune.recipe import DistillSettings
from bkprune.study import digest, write_atomic

Array = NDArray[np.float64]
Progress = Callable[[int, int, str], None]


@dataclass
class Field:
    """The students of a race and what they are taught by.

    Attributes:
        pipeline: the teacher's.
        masks: of the students, by name.
        cache: what they learn from.
        judge: says what they lose against the teacher.
        settings: of the whole run; nobody need reach its last step.
        folder: a subfolder for each student.
        together: how many are held in memory at once.
    """

    pipeline: Any
    masks: Mapping[str, Mask]
    cache: Cache
    judge: Distance
    settings: DistillSettings
    folder: Path
    together: int = 8

    def __post_init__(self) -> None:
        self._inventory = Inventory.of(self.pipeline.unet)
        self._acc = Accelerator(mixed_precision=self.settings.precision)
        self._scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)

    def advance(
        self, names: Sequence[str], step: int, progress: Progress = lambda done, total, what: None
    ) -> dict[str, Array]:
        """Train the named students on to a step, each from its newest checkpoint.

        Returns:
            For each what the judge says of every sample, `[N]`; infinite where its losses have run
            away.
        """
        missing = [name for name in names if not self.is_done(name, step)]
        starts = range(0, len(missing), self.together)
        total = len(starts) * step
        for number, first in enumerate(starts):

            def told(now: int, before: int = number * step) -> None:
                progress(before + now, total, "distilling side by side")

            self._train(missing[first : first + self.together], step, told)
        return {name: self.loss(name, step) for name in names}

    def _train(self, names: Sequence[str], step: int, told: Callable[[int], None]) -> None:
        runs = {name: self._distillation(name) for name in names}
        tapped = dict.fromkeys(tap.name for run in runs.values() for tap in run.taps)
        teacher = self.pipeline.unet if self.settings.losses.needs_teacher else None
        lessons = Lessons(
            teacher, list(tapped), self.cache, self._scheduler, self.settings, self._acc
        )
        lost: set[str] = set()
        with ExitStack() as stack:
            stack.enter_context(lessons.opened())
            for name, run in runs.items():
                stack.enter_context(run.opened(self.folder / name, self.stamp(name)))
            while behind := {n: r for n, r in runs.items() if r.step < step and n not in lost}:
                at = min(run.step for run in behind.values())
                given = list(lessons.of(at))
                for name, run in behind.items():
                    if run.step == at and not self._has_learned(run, given, step):
                        lost.add(name)
                told(at + 1)
        for name, run in runs.items():
            run.use_average()
            run.student.eval()
            data = io.BytesIO()
            np.save(data, self._worst() if name in lost else self.judge(run.student))
            write_atomic(self._errors(name, step), data.getvalue())

    def _has_learned(self, run: Distillation, given: Sequence[Lesson], step: int) -> bool:
        """One step of one student; False if its losses have run away: the others go on."""
        try:
            run.learn(given)
        except StoppedError:
            return False
        if run.step == step or run.step % self.settings.save_every == 0:
            run.save()
        return True

    def _worst(self) -> Array:
        return np.full(len(self.judge), np.inf)

    def student(self, name: str) -> PrunedUNet:
        """A student with the teacher's weights, not yet trained."""
        plan = self._inventory.plan(self.masks[name])
        made: PrunedUNet = PrunedUNet.from_teacher(self.pipeline.unet, plan).float()
        return made

    def _distillation(self, name: str) -> Distillation:
        s = self.settings
        plan = self._inventory.plan(self.masks[name])
        return Distillation(
            self.student(name),
            None,
            taps(self._inventory, plan) if s.losses.feature else [],
            self.cache,
            self._scheduler,
            s,
            self._acc,
        )

    def rehearse(self, name: str) -> float:
        """Seconds of one student's step, the teacher's share left out; nothing is kept."""
        return self._distillation(name).rehearse(1)

    def is_done(self, name: str, step: int) -> bool:
        """Whether a student has been judged at a step."""
        return self._errors(name, step).exists()

    def loss(self, name: str, step: int) -> Array:
        """What `advance` has said of a student."""
        found: Array = np.load(self._errors(name, step), allow_pickle=False)
        return found

    def stamp(self, name: str) -> str:
        """Names a student's run in its checkpoints."""
        return digest([self.settings.stamped, sorted(self.masks[name])])

    def _errors(self, name: str, step: int) -> Path:
        return self.folder / name / f"errors-{step:08d}.npy"
