"""Which cheap score tells how good a mask will be once it is distilled?

    python masks.py              # which masks, build/masks.csv
    python recoverability.py     # trains and judges every one of them; resumes

Every mask of a budget is distilled with the same recipe, order of data, noise and steps, side by
side with others against one teacher pass (bkprune.racing), and judged on held-out captions. On the
way the error against the teacher is measured at each rung, on samples that are neither learned from
nor held out: what a race would see. The first hundred steps are taken once more, with pictures of
held-in captions drawn at each rung: what a race by pictures would see.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bkprune.calibration import calibrate
from bkprune.checkpoints import Checkpoints
from bkprune.clip import ClipScore
from bkprune.data import read_pairs
from bkprune.losses import LossSettings
from bkprune.measured import OutputDistance, PictureDistance
from bkprune.models import load
from bkprune.racing import Field
from bkprune.recipe import DistillSettings
from bkprune.sampling import SamplingSettings
from bkprune.study import write_atomic

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from held_out import PAIRS, SAMPLING, Judge, training_cache  # noqa: E402

BUILD, REPORT = HERE / "build", HERE.parents[1] / "reports" / "emoji-recoverability"
STEPS, RUNGS, BATCH, LR = 400, (10, 25, 50, 100, 200, 400), 8, 5e-4
DRAWN_AT, N_DRAWN = (25, 50, 100), 64  # pictures of held-in captions
SEEDS, TOGETHER, N_PICTURES, N_JUDGED = (0, 1, 2), 4, 328, 192
PICTURES = SamplingSettings(7, 3.0, 77, 32)
# how many of each budget are trained with every seed for their end, and whether less is better
BEST = {"clip_score": (4, False), "output_error": (2, True), "frechet_clip": (2, True)}
LEADING = ("race winner", "measured search", "knapsack", "greedy", "bk-sdm-base")


def settings(seed: int) -> DistillSettings:
    return DistillSettings(
        steps=STEPS,
        batch_size=BATCH,
        lr=LR,
        schedule="cosine",
        warmup=10,
        seed=seed,
        save_every=STEPS,
        losses=LossSettings(1.0, 30.0, 0.0),
    )


def noised(teacher: Any) -> OutputDistance:
    """The error against the teacher, on samples of the rungs' own."""
    inputs = calibrate(
        teacher,
        read_pairs(PAIRS).split("train"),
        n=N_JUDGED,
        n_bins=8,
        seed=4321,
        batch_size=32,
        sampling=SAMPLING,
    )
    return OutputDistance(teacher, inputs, BATCH)


class Drawn(PictureDistance):
    """Pictures of held-in captions: distance from the teacher's, and what CLIP scores lack to 1."""

    def __init__(self, teacher: Any) -> None:
        captions = read_pairs(PAIRS).split("train").captions
        prompts = captions[:: len(captions) // N_DRAWN][:N_DRAWN]
        clip = ClipScore.load(None)
        drawing = SamplingSettings(PICTURES.steps, PICTURES.guidance_scale, 999, 32)
        super().__init__(teacher, prompts, drawing, clip)
        self.text = clip.text_features(prompts).double()

    def __len__(self) -> int:
        return 2 * super().__len__()

    def apart(self, found: Any, expected: Any) -> Any:
        """The one for each picture, then the other, `[2 N]`."""
        return torch.cat([super(Drawn, self).apart(found, w) for w in (expected, self.text)])


def field(teacher: Any, masks: Mapping[str, str], seed: int, judge: Any, folder: Path) -> Field:
    removed = {name: frozenset(text.split()) for name, text in masks.items()}
    cache = training_cache(teacher, BUILD / "cache")
    return Field(teacher, removed, cache, judge, settings(seed), folder, TOGETHER)


def train(task: tuple[int, dict[str, str]]) -> list[dict[str, Any]]:
    """A group of masks side by side, to the end, and judged on the way by their output."""
    torch.set_num_threads(1)
    seed, masks = task
    teacher = load("emoji", dtype=torch.float32)
    made, rows = field(teacher, masks, seed, noised(teacher), BUILD / f"seed-{seed}"), []
    started = time.monotonic()
    for step in RUNGS:
        for name, errors in made.advance(list(masks), step).items():
            rows.append(
                {
                    "mask": name,
                    "seed": seed,
                    "step": step,
                    "error": float(errors.mean()),
                    "stderr": float(errors.std(ddof=1) / len(errors) ** 0.5),
                    "seconds": (time.monotonic() - started) / len(masks),
                }
            )
    return rows


def draw(task: tuple[int, dict[str, str]]) -> list[dict[str, Any]]:
    """The first steps of the same group, and judged on the way by its pictures."""
    torch.set_num_threads(1)
    seed, masks = task
    teacher = load("emoji", dtype=torch.float32)
    made, rows = field(teacher, masks, seed, Drawn(teacher), BUILD / f"drawn-{seed}"), []
    started = time.monotonic()
    for step in (0, *DRAWN_AT):
        found = made.advance(list(masks), step) if step else untrained(made)
        for name, values in found.items():
            near, caption = values.reshape(2, -1).mean(1)
            row = {"mask": name, "seed": seed, "step": step, "pictures": near, "clip": caption}
            rows.append({**row, "seconds": (time.monotonic() - started) / len(masks)})
    return rows


def untrained(made: Field) -> dict[str, Any]:
    """What the judge says of the students as they are pruned."""
    return {name: made.judge(made.student(name).eval()) for name in made.masks}


@functools.cache
def held_out_judge() -> Judge:
    """Made once a process."""
    return Judge(load("emoji", dtype=torch.float32), N_PICTURES, PICTURES)


def judge(task: tuple[int, str, str]) -> list[dict[str, Any]]:
    """One finished student on held-out captions."""
    torch.set_num_threads(1)
    seed, name, removed = task
    judged_by = held_out_judge()
    folder = BUILD / f"seed-{seed}"
    made = field(judged_by.teacher, {name: removed}, seed, None, folder)  # no rung, no judge
    student = made.student(name)
    state = Checkpoints(made.folder / name, made.stamp(name)).latest()
    assert state is not None
    assert state["step"] == STEPS
    student.load_state_dict(state["student"])
    found = judged_by(student)
    about = {"mask": name, "seed": seed, "step": STEPS}
    return [{**about, "metric": metric, "value": value} for metric, value in found.items()]


def groups(wanted: pd.DataFrame, seed: int, done: set[tuple[str, int]]) -> list[Any]:
    """Masks of one budget, side by side, that are not trained yet."""
    out = []
    for _, group in wanted.groupby("budget", sort=False):
        names = [m for m in group["mask"] if (m, seed) not in done]
        removed = group.set_index("mask")["removed"]
        for first in range(0, len(names), TOGETHER):
            part = names[first : first + TOGETHER]
            out.append((seed, {name: str(removed[name]) for name in part}))
    return out


def is_named(source: str) -> bool:
    """Whether a mask is the winner of a race, or what people do today."""
    is_other = any(word in source for word in ("second", " on "))
    return "race winner" in source or (any(n in source for n in LEADING) and not is_other)


def leading(masks: pd.DataFrame) -> pd.DataFrame:
    """What is trained with every seed: the named, and what ended best with the first seed."""
    final = pd.read_csv(BUILD / "final.csv").query("seed == 0")
    chosen = masks["source"].map(is_named)
    for metric, (n, falls) in BEST.items():
        values = final[final["metric"] == metric].set_index("mask")["value"]
        own = masks["mask"].map(values)
        chosen |= own.groupby(masks["budget"]).rank(ascending=falls) <= n
    return masks[chosen]


def work_off(work: Callable[[Any], list[dict[str, Any]]], todo: Sequence[Any], path: Path) -> None:
    """In two processes of one thread each; the rows of each task are kept as soon as they come."""
    rows: list[Any] = pd.read_csv(path).to_dict("records") if path.exists() else []
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for number, found in enumerate(pool.imap_unordered(work, todo), 1):
            rows += found
            text = pd.DataFrame(rows).to_csv(index=False, float_format="%.6g")
            write_atomic(path, text.encode())
            print(f"{path.name}: {number} of {len(todo)}", flush=True)


def known(path: Path) -> set[tuple[str, int]]:
    if not path.exists():
        return set()
    rows = pd.read_csv(path)
    return set(zip(rows["mask"], rows["seed"], strict=True))


def train_all(seeds: int) -> None:
    masks = pd.read_csv(BUILD / "masks.csv", dtype={"budget": str})
    training_cache(load("emoji", dtype=torch.float32), BUILD / "cache")
    for seed in range(seeds):
        wanted = leading(masks) if seed else masks
        work_off(train, groups(wanted, seed, known(BUILD / "rungs.csv")), BUILD / "rungs.csv")
        if seed == 0:
            work_off(draw, groups(masks, 0, known(BUILD / "drawn.csv")), BUILD / "drawn.csv")
        left = groups(wanted, seed, known(BUILD / "final.csv"))
        alone = [(seed, *mask) for _, group in left for mask in group.items()]
        work_off(judge, alone, BUILD / "final.csv")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    train_all(parser.parse_args().seeds)
