"""Does distillation pay? BK-SDM's three students of the emoji model, with and without the teacher.

    python study.py              # trains and evaluates; resumes; about an hour on two cores
    python study.py --report     # rebuilds the tables and pictures from results.csv

Each student is trained from the same pruned weights with the same order of data, noise and steps:
once with task, output and feature loss (`kd`), once with the task loss alone (`task`), three seeds
each. Everything is judged on held-out captions: the output error against the teacher, the CLIP
score of generated pictures by the small CLIP beside the model, and the Frechet distance of their
CLIP features from those of the real held-out pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from bkprune import Inventory, preset
from bkprune.caching import Cache, CacheSettings, fill
from bkprune.calibration import calibrate
from bkprune.comparing import identify
from bkprune.data import read_pairs
from bkprune.distill import Distillation
from bkprune.export import student
from bkprune.grids import grid_png
from bkprune.losses import LossSettings, taps
from bkprune.metrics import ClipScore, frechet_distance
from bkprune.models import BUILT_IN, load
from bkprune.presets import PRESETS
from bkprune.recipe import DistillSettings
from bkprune.sampling import SamplingSettings, decode, sample_latents
from bkprune.sources import Source

HERE = Path(__file__).parent
BUILD, REPORT = HERE / "build", HERE.parents[1] / "reports" / "emoji-kd"
PAIRS = BUILT_IN["emoji"] / "pairs.zip"
N_ERRORS, N_PICTURES, N_SHOWN, SAMPLING = 320, 256, 10, SamplingSettings(10, 3.0, 77, 32)
LOSSES = {
    "kd": LossSettings(1.0, 10.0, 1.0, normalise_features=True),
    "task": LossSettings(output=0.0, feature=0.0),
}


def settings(seed: int, steps: int, losses: LossSettings) -> DistillSettings:
    return DistillSettings(
        steps=steps,
        batch_size=32,
        lr=1e-3,
        schedule="cosine",
        warmup=10,
        seed=seed,
        save_every=50,
        losses=losses,
    )


def training_cache(teacher: Any) -> Cache:
    folder = BUILD / "cache"
    source = Source(str(PAIRS), "train")
    size = int(teacher.unet.config.sample_size * teacher.vae_scale_factor)
    made = CacheSettings(size)
    fill(folder, teacher, source.examples(size), source.key, made, total=source.n)
    return Cache(folder)


class Judge:
    """Held-out captions, pictures and noise, the same for every model."""

    def __init__(self, teacher: Any) -> None:
        held = read_pairs(PAIRS).split("heldout")
        self.teacher = teacher
        self.inputs = calibrate(
            teacher, held, n=N_ERRORS, n_bins=8, seed=5, batch_size=32, sampling=SAMPLING
        )
        self.prompts = held.captions[:N_PICTURES]
        self.clip = ClipScore.load(None)
        self.real = self.clip.image_features(held.images(64) / 2 + 0.5)
        with torch.no_grad():
            self.expected = self._outputs(teacher.unet)

    def _outputs(self, unet: Any) -> list[Tensor]:
        scheduler = self.teacher.scheduler
        batches = self.inputs.batches(32)
        return [unet(**b.inputs(scheduler, torch.float32)).sample for _, b in batches]

    @torch.no_grad()
    def __call__(self, unet: Any) -> tuple[dict[str, float], Tensor]:
        unet.eval()
        pairs = zip(self._outputs(unet), self.expected, strict=True)
        errors = torch.cat([(a - b).square().flatten(1).mean(1) for a, b in pairs])
        own, self.teacher.unet = self.teacher.unet, unet
        try:
            latents = sample_latents(self.teacher, self.prompts, SAMPLING)
        finally:
            self.teacher.unet = own
        pictures = decode(self.teacher.vae, latents, 32)
        score = self.clip(pictures, self.prompts)
        features = self.clip.image_features(pictures)
        return {
            "output_error": float(errors.mean()),
            "output_error_stderr": float(errors.std() / len(errors) ** 0.5),
            "clip_score": float(score.mean()),
            "clip_score_stderr": float(score.std() / len(score) ** 0.5),
            "frechet_clip": frechet_distance(features, self.real),
            "n_pictures": len(pictures),
        }, pictures[:N_SHOWN]


def jobs(seeds: int) -> Iterator[tuple[str, str, int]]:
    yield "teacher", "teacher", 0
    for name in PRESETS:
        yield name, "pruned", 0
    for seed in range(seeds):
        for name in PRESETS:
            for how in LOSSES:
                yield name, how, seed


def network(teacher: Any, cache: Cache, name: str, how: str, seed: int, steps: int) -> Any:
    if how == "teacher":
        return teacher.unet
    inventory = Inventory.of(teacher.unet)
    made = student(teacher.unet, inventory, inventory.plan(preset(name, inventory)))
    unet: Any = made.unet
    unet.load_state_dict({k: v.clone() for k, v in unet.state_dict().items()}, assign=True)
    if how == "pruned":
        return unet
    losses = LOSSES[how]
    found = identify(teacher.unet, unet)
    assert found.twin is not None
    run = Distillation(
        unet,
        teacher.unet if losses.needs_teacher else None,
        taps(inventory, found.plan, found.twin.modules) if losses.feature else [],
        cache,
        DDPMScheduler.from_config(teacher.scheduler.config),
        settings(seed, steps, losses),
    )
    folder = BUILD / f"{name}-{how}-{seed}"
    run.run(folder, f"{name} {how} {seed} {steps}")
    return unet


def train(options: argparse.Namespace) -> None:
    teacher = load("emoji", dtype=torch.float32)
    path = BUILD / "results.csv"
    cache, judge = training_cache(teacher), Judge(teacher)
    rows: list[Any] = pd.read_csv(path).to_dict("records") if path.exists() else []
    done = {(r["model"], r["how"], r["seed"]) for r in rows}
    for name, how, seed in jobs(options.seeds):
        if (name, how, seed) in done:
            continue
        unet = network(teacher, cache, name, how, seed, options.steps)
        measured, pictures = judge(unet)
        steps = 0 if how in ("teacher", "pruned") else options.steps
        rows.append({"model": name, "how": how, "seed": seed, "steps": steps, **measured})
        pd.DataFrame(rows).to_csv(path, index=False, float_format="%.6g")
        torch.save(pictures, BUILD / f"pictures-{name}-{how}-{seed}.pt")
        print(rows[-1], flush=True)


def report() -> None:
    REPORT.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(BUILD / "results.csv")
    n_runs = rows[rows["how"].isin(list(LOSSES))].groupby("seed").size()
    whole = n_runs.index[n_runs == len(PRESETS) * len(LOSSES)]  # seeds that are complete
    rows = rows[rows["seed"].isin(whole)]
    rows.to_csv(REPORT / "results.csv", index=False, float_format="%.6g")
    prompts = read_pairs(PAIRS).split("heldout").captions[:N_SHOWN]
    shown = {}
    for name, how, label in [
        ("teacher", "teacher", "teacher"),
        *((n, h, f"{n} {h}") for n in PRESETS for h in ("pruned", "task", "kd")),
    ]:
        found = BUILD / f"pictures-{name}-{how}-0.pt"
        if found.exists():
            shown[label] = torch.load(found, weights_only=True)
    (REPORT / "grid.png").write_bytes(grid_png(shown, prompts))
    text = (HERE / "report.md").read_text(encoding="utf-8")
    (REPORT / "README.md").write_text(text.replace("TABLE", table(rows)), encoding="utf-8")


def table(rows: pd.DataFrame) -> str:
    """Means over seeds and their spread; where there is one run, its own standard error."""
    lines = ["| model | trained | output error | CLIP score | Frechet distance, CLIP |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for (name, how), group in rows.groupby(["model", "how"], sort=False):
        cells = []
        for column, digits in (("output_error", 4), ("clip_score", 2), ("frechet_clip", 4)):
            mean, n = group[column].mean(), len(group)
            spread = group[column].std() / np.sqrt(n) if n > 1 else np.nan
            if n == 1 and f"{column}_stderr" in group:
                spread = float(group[f"{column}_stderr"].iloc[0])
            error = "" if np.isnan(spread) else f" ± {spread:.{digits}f}"
            cells.append(f"{mean:.{digits}f}{error}")
        lines.append(f"| {name} | {how} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    if not options.report:
        train(options)
    report()


if __name__ == "__main__":
    main()
