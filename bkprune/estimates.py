"""Roughly how long stages will take, before they have ever run.

Knows how many passes of the U-Net each stage makes, and times a few passes of the model where it
can be loaded. It does not know how far a stage already is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bkprune.halving import entrant_steps, rungs
from bkprune.stages import RACE, Stage
from bkprune.studyfile import StudyFile

_ROWS = 16  # of the timed batch
_SUFFIX, _PRUNED, _BACKWARD = 0.56, 0.7, 2.0  # of a teacher's pass


def seconds_of(asked: StudyFile, stages: Sequence[Stage]) -> dict[str, float | None]:
    """Seconds for each stage, or None where the model cannot be loaded here."""
    if not stages:
        return {}
    timed = _seconds_per_row(asked.model)
    if timed is None:
        return {stage.name: 2.0 if stage.command == "report" else None for stage in stages}
    per_row, n_blocks = timed
    return {stage.name: _seconds(stage, per_row, n_blocks) for stage in stages}


def _seconds(stage: Stage, per_row: float, n_blocks: int) -> float:
    words = stage.words

    def number(option: str, default: float) -> float:
        return float(words[words.index(option) + 1]) if option in words else default

    if stage.command == "analyze":
        return number("--samples", 256) * (1 + _SUFFIX * n_blocks) * per_row
    if stage.command == "profile":
        limit = number("--max-seconds", 60)
        return 2 * limit + (limit if number("--validate", 0) else 0)
    if stage.command == "search":
        searched = number("--trials", 200) * number("--samples", 96)
        judged = 10 * 2 * number("--judged", 256)
        return (searched + judged) * _PRUNED * per_row + _race(words, number) * per_row
    if stage.command == "distill":
        rows = number("--steps", 1000) * number("--batch-size", 16) * number("--accumulate", 1)
        return rows * (1 + _PRUNED * (1 + _BACKWARD)) * per_row
    if stage.command == "evaluate":
        models = 1 + sum("=" in word for word in words[: words.index("--teacher")])
        drawn = models * number("--n", 328) * number("--steps", 25) * 2 * _PRUNED
        return drawn * per_row + number("--max-seconds", 60)
    return 5.0


def _race(words: Sequence[str], number: Callable[[str, float], float]) -> float:
    """Rows of a teacher's pass that a race of finalists is worth."""
    if not set(words) >= RACE:
        return 0.0
    ladder = rungs(int(number("--finalists", 8)), int(number("--kd-steps", 200)))
    rows = [w for w in words if w.startswith("batch-size=")] or ["batch-size=16"]
    n = int(number("--finalists", 8))
    steps = entrant_steps(n, ladder) * _PRUNED * (1 + _BACKWARD)
    taught = (steps + ladder[-1].step) * float(rows[0].partition("=")[2])
    if "--kd-judge" in words and words[words.index("--kd-judge") + 1] == "output":
        return taught
    judged = n + sum(rung.n_left for rung in ladder[:-1])
    return taught + judged * 2 * number("--kd-pictures", 64) * _drawing(words, number)


def _drawing(words: Sequence[str], number: Callable[[str, float], float]) -> float:
    """Rows of a pass that a picture takes."""
    return number("--kd-sampling-steps", 10) * 2 * _PRUNED


def _seconds_per_row(model: str) -> tuple[float, int] | None:
    """Time of one latent through the U-Net in a batch, and how many blocks there are."""
    import torch

    from bkprune.blocks import Inventory
    from bkprune.calibration import noise_conditions, noise_latents
    from bkprune.models import BUILT_IN, load

    if model not in BUILT_IN and not Path(model).exists():
        return None  # nothing is downloaded to make a guess
    try:
        unet = load(model).unet
    except ValueError:
        return None
    conditions, added = noise_conditions(unet.config, _ROWS, 0)
    inputs = {
        "sample": noise_latents(unet.config, _ROWS, 0),
        "timestep": torch.full((_ROWS,), 500),
        "encoder_hidden_states": conditions,
        **({"added_cond_kwargs": added} if added else {}),
    }
    times = []
    with torch.inference_mode():
        for _ in range(3):
            start = time.perf_counter()
            unet(**inputs)
            times.append(time.perf_counter() - start)
    return min(times) / _ROWS, len(Inventory.of(unet))
