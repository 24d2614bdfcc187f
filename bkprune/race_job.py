"""The finalists of a search, distilled for a short while side by side, and ranked by what is left.

Knows where their cache and checkpoints lie, how long it will take, and what is told of each. Who
goes on is `halving.py`'s, how they are trained is `racing.py`'s; it does not know how finalists
were found.
"""

from __future__ import annotations

import shutil
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
    from bkprune.racing import Field
    from bkprune.recipe import DistillSettings

RACE, CACHE, SAVE_EVERY = "race", "cache", 100


@dataclass(frozen=True)
class RaceSettings:
    """How finalists are ranked; all of it enters the record's stamp.

    Attributes:
        finalists: how many start.
        steps: of the last two.
        kd: `NAME=VALUE`, options of `bkprune distill`.
        data: as in `bkprune distill`, a cache or what one is made of.
        together: how many are held in memory at once.
    """

    finalists: int = 8
    steps: int = 200
    kd: tuple[str, ...] = ()
    data: str | None = None
    together: int = 8

    def __post_init__(self) -> None:
        for name, least in (("finalists", 2), ("steps", 1), ("together", 1)):
            if getattr(self, name) < least:
                option = {"steps": "--kd-steps", "together": "--kd-together"}.get(name, f"--{name}")
                raise ValueError(f"{option} is {getattr(self, name)}: it must be at least {least}")

    def recipe(self, seed: int) -> DistillSettings:
        """How each of them is trained."""
        from bkprune.recipe import from_words

        return from_words(self.kd, steps=self.steps, seed=seed, save_every=SAVE_EVERY)


def run_race(
    pipeline: Any,
    masks: Sequence[Mask],
    judged: tuple[Calibration, int],
    asked: RaceSettings,
    data: tuple[str, str | None],
    seed: int,
    folder: Path,
    storage: tuple[Any, str],
    *,
    quiet: bool,
) -> pd.DataFrame:
    """Rank masks by their error against the teacher after a short distillation.

    Args:
        pipeline: the teacher's.
        masks: of those that start; equals are decided by this order.
        judged: noised latents, and how many of the first of them decide; the rest only report.
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
    key = digest([[sorted(mask) for mask in masks], settings.stamped, index, judged[1]])[:8]
    names = [f"{i:02d}" for i in range(len(masks))]
    field = Field(
        pipeline,
        dict(zip(names, masks, strict=True)),
        cache,
        judged[0],
        settings,
        folder / RACE / key,
        asked.together,
    )
    ladder = halving.rungs(len(masks), asked.steps)
    if not quiet:
        _say_how_long(field, names, ladder)
    n_chosen = judged[1]
    with progress_bar(quiet) as progress:

        def advance(live: Sequence[str], step: int) -> dict[str, float]:
            for out in set(names) - set(live):  # they do not go on: their checkpoints may go
                shutil.rmtree(field.folder / out / "checkpoints", ignore_errors=True)
            found = field.advance(live, step, lambda d, t, w: progress(d, t, f"{w} to step {step}"))
            return {name: float(errors[:n_chosen].mean()) for name, errors in found.items()}

        table = halving.race(names, ladder, advance, storage[0], f"{storage[1]}-race-{key}")
    return _told(table, field, names, n_chosen)


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

    left = [rung for rung in ladder if not field.is_done(names[0], rung.step)]
    if not left:
        return
    n = entrant_steps(len(names), ladder)
    seconds = n * field.rehearse(names[0])
    notice(
        f"short distillation of {len(names)} finalists, halved at steps "
        f"{', '.join(str(rung.step) for rung in ladder)}: {n:,} steps in all, about "
        f"{seconds / 60:.1f} min"
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
