"""The finalists of a search, distilled for a short while side by side, and ranked by what is left.

Knows what they are judged by, where their cache and checkpoints lie, how long it will take, and
what is told of each. Who goes on is `halving.py`'s, how they are trained is `racing.py`'s; it does
not know how finalists were found.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bkprune.terminal import notice, progress_bar

if TYPE_CHECKING:
    from bkprune.blocks import Mask
    from bkprune.caching import Cache
    from bkprune.calibration import Calibration
    from bkprune.measured import Distance
    from bkprune.racing import Field
    from bkprune.recipe import DistillSettings

RACE, CACHE, SAVE_EVERY = "race", "cache", 100
JUDGES = ("pictures", "output")


@dataclass(frozen=True)
class RaceSettings:
    """How finalists are ranked; all of it enters the record's stamp.

    Attributes:
        finalists: how many start.
        steps: of the last two.
        kd: `NAME=VALUE`, options of `bkprune distill`.
        data: as in `bkprune distill`, a cache or what one is made of.
        together: how many are held in memory at once.
        judge: `pictures`, how far theirs are from the teacher's of the same seeds, or `output`, the
            error against the teacher on noised latents.
        pictures: how many decide, and as many again that only report.
        guidance_scale: of those pictures.
        sampling_steps: of those pictures.
    """

    finalists: int = 8
    steps: int = 200
    kd: tuple[str, ...] = ()
    data: str | None = None
    together: int = 8
    judge: str = "output"
    pictures: int = 64
    guidance_scale: float = 7.5
    sampling_steps: int = 10

    def __post_init__(self) -> None:
        least = {"finalists": 2, "steps": 1, "together": 1, "pictures": 2, "sampling_steps": 1}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                option = "--" + ("" if name == "finalists" else "kd-") + name.replace("_", "-")
                raise ValueError(f"{option} is {getattr(self, name)}: it must be at least {limit}")

    def recipe(self, seed: int) -> DistillSettings:
        """How each of them is trained."""
        from bkprune.recipe import from_words

        return from_words(self.kd, steps=self.steps, seed=seed, save_every=SAVE_EVERY)

    @property
    def judged_by(self) -> list[Any]:
        """What the judge's word depends on, beside its samples."""
        drawing = [self.guidance_scale, self.sampling_steps]
        return [self.judge, *(drawing if self.judge == "pictures" else [])]


def judge_of(
    pipeline: Any,
    asked: RaceSettings,
    judged: tuple[Calibration, int],
    prompts: Sequence[str] | None,
    clip: Path | None,
    batch_size: int,
    seed: int,
) -> tuple[Distance, int]:
    """What finalists lose, and how many of its first samples decide.

    Args:
        pipeline: the teacher's.
        asked: the race.
        judged: noised latents, for `output`, and how many of them decide.
        prompts: for `pictures`.
        clip: the network that looks at them; None for the built-in one.
        batch_size: latents or pictures at a time.
        seed: which prompts, and where their pictures start.

    Raises:
        ValueError: no prompts to draw for, or no CLIP model in the folder.
    """
    from bkprune.calibration import pick
    from bkprune.clip import ClipScore
    from bkprune.measured import OutputDistance, PictureDistance
    from bkprune.sampling import SamplingSettings

    if asked.judge == "output":
        return OutputDistance(pipeline, judged[0], batch_size), judged[1]
    if prompts is None:
        raise ValueError("--kd-judge pictures needs prompts, not noise: give --data, or use output")
    chosen = [prompts[i] for i in pick(len(prompts), 2 * asked.pictures, seed)]
    drawing = SamplingSettings(asked.sampling_steps, asked.guidance_scale, seed, batch_size)
    return PictureDistance(pipeline, chosen, drawing, ClipScore.load(clip)), asked.pictures


def run_race(
    pipeline: Any,
    masks: Sequence[Mask],
    judge: tuple[Distance, int],
    asked: RaceSettings,
    data: tuple[str, str | None],
    seed: int,
    folder: Path,
    storage: tuple[Any, str],
    *,
    quiet: bool,
) -> pd.DataFrame:
    """Rank masks by what they lose against the teacher after a short distillation.

    Args:
        pipeline: the teacher's.
        masks: of those that start; equals are decided by this order.
        judge: what they lose, and how many of its first samples decide; the rest only report.
        asked: the race.
        data: what is learned from, and its split.
        seed: of order, noise and timesteps.
        folder: of the study.
        storage: of Optuna, and the name of the search.
        quiet: no bar, no lines.

    Returns:
        A row for each mask, in the order given: `kd_steps` it has run, `distilled` and its
        standard error there, `behind` the winner at that step, paired, with its standard error,
        and `distilled_held_out`, on samples that decided nothing.
    """
    from bkprune import halving
    from bkprune.racing import Field
    from bkprune.study import digest

    settings = asked.recipe(seed)
    cache = _cache(pipeline, data, folder, quiet=quiet)
    index = {k: v for k, v in cache.index.items() if k not in ("bad", "examples", "stride")}
    key = digest(
        [[sorted(mask) for mask in masks], settings.stamped, index, asked.judged_by, judge[1]]
    )[:8]
    names = [f"{i:02d}" for i in range(len(masks))]
    field = Field(
        pipeline,
        dict(zip(names, masks, strict=True)),
        cache,
        judge[0],
        settings,
        folder / RACE / key,
        asked.together,
    )
    ladder = halving.rungs(len(masks), asked.steps)
    if not quiet:
        _say_how_long(field, names, ladder)
    n_chosen = judge[1]
    with progress_bar(quiet) as progress:

        def advance(live: Sequence[str], step: int) -> dict[str, float]:
            for out in set(names) - set(live):  # they do not go on: their checkpoints may go
                shutil.rmtree(field.folder / out / "checkpoints", ignore_errors=True)
            found = field.advance(live, step, lambda d, t, w: progress(d, t, f"{w} to step {step}"))
            return {name: float(errors[:n_chosen].mean()) for name, errors in found.items()}

        table = halving.race(names, ladder, advance, storage[0], f"{storage[1]}-race-{key}")
    return _told(table, field, names, n_chosen).assign(kd_judge=asked.judge)


def _cache(pipeline: Any, data: tuple[str, str | None], folder: Path, *, quiet: bool) -> Cache:
    from bkprune.caching import INDEX, Cache
    from bkprune.distill_job import fill_cache

    given = Path(data[0])
    if (given / INDEX).exists() or any(given.glob(f"*/{INDEX}")):
        cache = Cache(given)
        cache.check(pipeline)
        return cache
    fill_cache(pipeline, *data, folder / CACHE, {}, quiet=quiet)
    return Cache(folder / CACHE)


def _say_how_long(field: Field, names: Sequence[str], ladder: Sequence[Any]) -> None:
    from bkprune.halving import entrant_steps

    if any(field.is_done(name, ladder[-1].step) for name in names):
        return  # it is over
    started = time.monotonic()
    field.judge(field.pipeline.unet)  # remembers what the teacher says, and judges it
    judging = (time.monotonic() - started) / 2
    n_steps = entrant_steps(len(names), ladder)
    n_judged = len(names) + sum(rung.n_left for rung in ladder[:-1])
    seconds = n_steps * field.rehearse(names[0]) + n_judged * judging
    notice(
        f"short distillation of {len(names)} finalists, halved at steps "
        f"{', '.join(str(rung.step) for rung in ladder)}: {n_steps:,} steps in all, "
        f"{n_judged} times judged, about {seconds / 60:.1f} min"
    )


def _told(table: pd.DataFrame, field: Field, names: Sequence[str], n_chosen: int) -> pd.DataFrame:
    steps = dict(zip(table["entrant"], table["kd_steps"], strict=True))
    best = str(table["entrant"].iloc[0])
    rows = []
    for name in names:
        step = int(steps[name])
        errors, ahead = field.loss(name, step), field.loss(best, step)
        own, behind = errors[:n_chosen], (errors - ahead)[:n_chosen]
        rows.append(
            {
                "kd_steps": step,
                "distilled": own.mean(),
                "distilled_stderr": own.std(ddof=1) / np.sqrt(n_chosen),
                "behind": behind.mean(),
                "behind_stderr": behind.std(ddof=1) / np.sqrt(n_chosen),
                "distilled_held_out": errors[n_chosen:].mean(),
            }
        )
    return pd.DataFrame(rows)
