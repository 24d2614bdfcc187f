"""Which cheap score tells how good a mask will be once it is distilled?

    python masks.py              # which masks, build/masks.csv
    python recoverability.py     # trains and judges every one of them; resumes

Every mask of a budget is distilled with the same recipe, order of data, noise and steps, side by
side with others against one teacher pass (bkprune.racing), and judged on held-out captions. On the
way the error against the teacher is measured at each rung, on samples that are neither learned from
nor held out: what a race would see.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bkprune.caching import Cache, CacheSettings, fill
from bkprune.calibration import calibrate
from bkprune.checkpoints import Checkpoints
from bkprune.data import read_pairs
from bkprune.losses import LossSettings
from bkprune.models import load
from bkprune.racing import Field
from bkprune.recipe import DistillSettings
from bkprune.sampling import SamplingSettings
from bkprune.sources import Source

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from held_out import PAIRS, SAMPLING, Judge  # noqa: E402

BUILD, REPORT = HERE / "build", HERE.parents[1] / "reports" / "emoji-recoverability"
STEPS, RUNGS, BATCH, LR = 400, (10, 25, 50, 100, 200, 400), 8, 5e-4
SEEDS, TOGETHER, N_PICTURES, N_JUDGED = (0, 1, 2), 4, 96, 192
PICTURES = SamplingSettings(7, 3.0, 77, 32)
LEADING = ("race winner", "measured search", "bk-sdm-base")


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


def training_cache(teacher: Any) -> Cache:
    folder = BUILD / "cache"
    source = Source(str(PAIRS), "train")
    size = int(teacher.unet.config.sample_size * teacher.vae_scale_factor)
    made = CacheSettings(size)
    fill(folder, teacher, source.examples(size), source.key, made, total=source.n)
    return Cache(folder)


def field(teacher: Any, masks: Mapping[str, str], seed: int) -> Field:
    judged = calibrate(
        teacher,
        read_pairs(PAIRS).split("train"),
        n=N_JUDGED,
        n_bins=8,
        seed=4321,
        batch_size=32,
        sampling=SAMPLING,
    )
    removed = {name: frozenset(text.split()) for name, text in masks.items()}
    cache = training_cache(teacher)
    return Field(teacher, removed, cache, judged, settings(seed), BUILD / f"seed-{seed}", TOGETHER)


def train(task: tuple[int, dict[str, str]]) -> list[dict[str, Any]]:
    """A group of masks side by side, to the end, and judged."""
    torch.set_num_threads(1)
    seed, masks = task
    teacher = load("emoji", dtype=torch.float32)
    made, rows = field(teacher, masks, seed), []
    started = time.monotonic()
    for step in RUNGS:
        errors = made.advance(list(masks), step)
        for name, values in errors.items():
            stderr = float(values.std(ddof=1) / len(values) ** 0.5)
            rows.append(
                {
                    "mask": name,
                    "seed": seed,
                    "step": step,
                    "error": float(values.mean()),
                    "stderr": stderr,
                    "seconds": (time.monotonic() - started) / len(masks),
                }
            )
    return rows


@functools.cache
def held_out_judge() -> Judge:
    """Made once a process."""
    return Judge(load("emoji", dtype=torch.float32), N_PICTURES, PICTURES)


def judge(task: tuple[int, str, str]) -> list[dict[str, Any]]:
    """One finished student on held-out captions."""
    torch.set_num_threads(1)
    seed, name, removed = task
    judged_by = held_out_judge()
    made = field(judged_by.teacher, {name: removed}, seed)
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


def is_leading(source: str) -> bool:
    return any(name in source for name in LEADING) and "second" not in source


def run(work: Any, todo: list[Any], path: Path) -> None:
    """In two processes of one thread each; the rows of each task are kept as soon as they come."""
    rows: list[Any] = pd.read_csv(path).to_dict("records") if path.exists() else []
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for number, found in enumerate(pool.imap_unordered(work, todo), 1):
            rows += found
            pd.DataFrame(rows).to_csv(path, index=False, float_format="%.6g")
            print(f"{path.name}: {number} of {len(todo)}", flush=True)


def known(path: Path) -> set[tuple[str, int]]:
    if not path.exists():
        return set()
    rows = pd.read_csv(path)
    return set(zip(rows["mask"], rows["seed"], strict=True))


def train_all(seeds: int) -> None:
    masks = pd.read_csv(BUILD / "masks.csv", dtype={"budget": str})
    training_cache(load("emoji", dtype=torch.float32))
    for seed in range(seeds):
        wanted = masks if seed == 0 else masks[masks["source"].map(is_leading)]
        run(train, groups(wanted, seed, known(BUILD / "rungs.csv")), BUILD / "rungs.csv")
        judged = known(BUILD / "final.csv")
        rows = zip(wanted["mask"], wanted["removed"], strict=True)
        todo = [(seed, name, str(removed)) for name, removed in rows if (name, seed) not in judged]
        run(judge, todo, BUILD / "final.csv")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    train_all(parser.parse_args().seeds)
