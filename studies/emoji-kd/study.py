"""Does distillation pay? BK-SDM's three students of the emoji model, with and without the teacher.

    python study.py              # trains and evaluates; resumes; about an hour on two cores
    python study.py --report     # rebuilds the tables and pictures from what is trained
    python study.py --evaluate   # a thousand pictures of each model of the first seed

Each student is trained from the same pruned weights with the same order of data, noise and steps:
once with task, output and feature loss (`kd`), once with the task loss alone (`task`), three seeds
each. Everything is judged on held-out captions: the output error against the teacher, the CLIP
score of generated pictures by the small CLIP beside the model, and the Frechet distance of their
CLIP features from those of the real held-out pictures.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import DDPMScheduler

from bkprune import Inventory, preset
from bkprune.caching import Cache
from bkprune.comparing import identify
from bkprune.data import read_pairs
from bkprune.distill import Distillation
from bkprune.export import FolderSettings, Student, new_folder, student, write_folder
from bkprune.grids import grid_png
from bkprune.losses import LossSettings, taps
from bkprune.models import folder_of, load
from bkprune.presets import PRESETS
from bkprune.recipe import DistillSettings
from bkprune.sampling import decode, sample_latents

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from held_out import PAIRS, SAMPLING, Judge, training_cache  # noqa: E402

BUILD, REPORT = HERE / "build", HERE.parents[1] / "reports" / "emoji-kd"
STEPS, N_PICTURES, EVERY = 120, 256, 28
LOSSES = {
    "kd": LossSettings(1.0, 30.0, 0.0),
    "task": LossSettings(output=0.0, feature=0.0),
    "features": LossSettings(1.0, 10.0, 1.0, normalise_features=True),
}
COMPARED = ("kd", "task")  # with every seed; the others with the first


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


def jobs(seeds: int) -> Iterator[tuple[str, str, int]]:
    yield "teacher", "teacher", 0
    for name in PRESETS:
        yield name, "pruned", 0
    for seed in range(seeds):
        for name in PRESETS:
            for how in LOSSES if seed == 0 else COMPARED:
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
    cache, judge = training_cache(teacher, BUILD / "cache"), Judge(teacher, N_PICTURES)
    rows: list[Any] = pd.read_csv(path).to_dict("records") if path.exists() else []
    done = {(r["model"], r["how"], r["seed"]) for r in rows}
    for name, how, seed in jobs(options.seeds):
        if (name, how, seed) in done:
            continue
        unet = network(teacher, cache, name, how, seed, STEPS)
        measured = judge(unet)
        steps = 0 if how in ("teacher", "pruned") else STEPS
        rows.append({"model": name, "how": how, "seed": seed, "steps": steps, **measured})
        pd.DataFrame(rows).to_csv(path, index=False, float_format="%.6g")
        print(rows[-1], flush=True)


def report() -> None:
    REPORT.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(BUILD / "results.csv")
    n_runs = rows[rows["how"].isin(COMPARED)].groupby("seed").size()
    whole = n_runs.index[n_runs == len(PRESETS) * len(COMPARED)]  # seeds that are complete
    others = ~rows["how"].isin(COMPARED) & (rows["seed"] > 0)
    rows = rows[rows["seed"].isin(whole) & ~others].copy()
    rows["how"] = pd.Categorical(rows["how"], ["teacher", "pruned", "task", "kd", "features"])
    rows = rows.sort_values(["how", "model"], kind="stable")
    rows.to_csv(REPORT / "results.csv", index=False, float_format="%.6g")
    (REPORT / "grid.png").write_bytes(grid(load("emoji", dtype=torch.float32)))
    text = (HERE / "report.md").read_text(encoding="utf-8")
    for mark, found in (
        ("TABLE", table(rows)),
        ("EVALUATION", evaluation()),
        ("PAIRS", pairs(rows)),
    ):
        text = text.replace(mark, found)
    (REPORT / "README.md").write_text(text, encoding="utf-8")


def grid(teacher: Any) -> bytes:
    """Ten held-out prompts by every model of seed 0, each from the seed it had when judged."""
    prompts = read_pairs(PAIRS).split("heldout").captions
    cache, shown = Cache(BUILD / "cache"), range(0, N_PICTURES, EVERY)
    rows, own = {}, teacher.unet
    for label, name, how in [
        ("teacher", "", "teacher"),
        *((f"{n} {h}", n, h) for n in PRESETS for h in ("pruned", "task", "kd")),
    ]:
        teacher.unet = own
        teacher.unet = network(teacher, cache, name, how, 0, STEPS).eval()
        latents = [sample_latents(teacher, [prompts[i]], SAMPLING, first=i) for i in shown]
        rows[label] = decode(teacher.vae, torch.cat(latents))
    return grid_png(rows, [prompts[i] for i in shown])


def export_models() -> dict[str, Path]:
    """Pipelines of seed 0, before and after distillation, that any command takes."""
    out = {}
    for name in PRESETS:
        for how in ("pruned", "kd"):
            label = f"{name.removeprefix('bk-sdm-')} {'distilled' if how == 'kd' else how}"
            out[label] = BUILD / "models" / label.replace(" ", "-")
            if out[label].exists():
                continue
            teacher = load("emoji", dtype=torch.float32)
            unet = network(teacher, Cache(BUILD / "cache"), name, how, 0, STEPS).eval()
            with new_folder(out[label], force=True) as folder:
                source, kept = folder_of("emoji"), FolderSettings(torch.float32)
                write_folder(Path(folder), teacher, Student(unet, "plain"), source, kept)
    return out


def evaluate() -> None:
    """A thousand pictures of each, by the command; its tables and figures into the report."""
    models = [f"{label}={path}" for label, path in export_models().items()]
    out = BUILD / "evaluation"
    command = ["bkprune", "evaluate", *models, "--teacher", "teacher=emoji", "--out", str(out)]
    command += ["--protocol", "emoji", "--n", "1000", "--steps", str(SAMPLING.steps)]
    command += ["--together", "--batch-size", "16"]
    subprocess.run(command, check=True)
    for name in ("eval.csv", "differences.csv"):
        shutil.copy(out / name, REPORT / name)
    shutil.copy(out / "grid-text-to-image.png", REPORT / "evaluation.png")
    shutil.copy(out / "figures" / "quality-text-to-image.png", REPORT / "quality.png")


def evaluation() -> str:
    """The thousand pictures' metrics as a table."""
    rows = pd.read_csv(REPORT / "eval.csv")
    columns = {
        "frechet_clip": "Frechet distance, CLIP",
        "clip_score": "CLIP score",
        "psnr": "PSNR, dB",
        "ssim": "SSIM",
        "output_error": "output error",
    }
    lines = [
        f"| model | {' | '.join(columns.values())} |",
        "| --- " + "| ---: " * len(columns) + "|",
    ]
    for model, group in rows.groupby("model", sort=False):
        found = group.set_index("metric")
        cells = []
        for name in columns:
            known = name in found.index
            value = found.loc[name] if known else None
            cells.append(
                f"{value['value']:.4g} ± {value['stderr']:.2g}" if value is not None else ""
            )
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pairs(rows: pd.DataFrame) -> str:
    """In how many of all comparisons kd was ahead of task."""
    table = rows.pivot(
        index=["model", "seed"],
        columns="how",
        values=["output_error", "clip_score", "frechet_clip"],
    )
    wins = [
        table["output_error"]["kd"] < table["output_error"]["task"],
        table["clip_score"]["kd"] > table["clip_score"]["task"],
        table["frechet_clip"]["kd"] < table["frechet_clip"]["task"],
    ]
    compared = [w[table["clip_score"]["kd"].notna()] for w in wins]
    n = sum(len(w) for w in compared)
    return f"{sum(int(w.sum()) for w in compared)} of {n} comparisons"


def table(rows: pd.DataFrame) -> str:
    """Means over seeds and their spread; where there is one run, its own standard error."""
    lines = ["| model | trained | output error | CLIP score | Frechet distance, CLIP |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for (how, name), group in rows.groupby(["how", "model"], sort=False, observed=True):
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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--evaluate", action="store_true")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    if options.evaluate:
        return evaluate()
    if not options.report:
        train(options)
    return report()


if __name__ == "__main__":
    main()
