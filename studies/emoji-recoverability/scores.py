"""Cheap scores of every mask, before any distillation, and what each costs to compute.

    python scores.py     # build/scores.csv; resumes; about eight seconds a mask

For one sample let `eps` be the teacher's output, `eps_m` the masked one's, `y` the noise:

    additive:C     summed importance of the removed blocks by criterion C, from `bkprune analyze`
    measured       E ||eps_m - eps||^2, and by timestep bin (measured:0 has the least noise)
    task           E ||eps_m - y||^2
    latent         shift of final latents of sampling runs (LD-Pruner)
    refit          measured, after conv_out is fitted to eps by least squares: a closed form
    few steps      measured, after six AdamW steps on one frozen batch
    params         share of the teacher's parameters that is gone; blocks and pairs likewise
    slope          squared norm of the gradient of log measured: how fast it begins to fall, negated
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from bkprune.blocks import Inventory, Mask
from bkprune.bypass import PrunedUNet, Replay
from bkprune.calibration import Calibration, calibrate
from bkprune.data import read_pairs
from bkprune.measured import PictureLoss
from bkprune.models import BUILT_IN, load
from bkprune.sampling import SamplingSettings

HERE = Path(__file__).parent
BUILD = HERE / "build"
N, BATCH, N_BINS, N_PROMPTS, FEW, LR, RIDGE = 96, 16, 8, 12, 6, 5e-4, 1e-4


def additive(mask: Mask, table: pd.DataFrame) -> dict[str, float]:
    inside = table[table["unit"].isin(mask)]
    sums = inside.groupby("criterion")["score"].sum()
    return {f"additive:{name}": float(sums[name]) for name in sums.index}


def ablated(pipeline: Any, drawn: Calibration, mask: Mask) -> dict[str, float]:
    """Error against the teacher by timestep bin, and the task loss."""
    plan = Inventory.of(pipeline.unet).plan(mask)
    errors, tasks = [], []
    for _, batch in drawn.batches(BATCH):
        replay = Replay(pipeline.unet, **batch.inputs(pipeline.scheduler, torch.float32))
        out = replay.ablate(plan)
        errors.append((out - replay.output).square().flatten(1).mean(1))
        tasks.append((out - batch.target(pipeline.scheduler)).square().flatten(1).mean(1))
    values = torch.cat(errors)
    by_bin = {f"measured:{b}": float(values[drawn.bins == b].mean()) for b in range(N_BINS)}
    return {"measured": float(values.mean()), **by_bin, "task": float(torch.cat(tasks).mean())}


def before_last(unet: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What enters `conv_out`, as patches `[pixels, 9 C + 1]`, and the output."""
    seen: list[Tensor] = []
    hook = unet.conv_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        out = unet(**inputs).sample
    hook.remove()
    patches = F.unfold(seen[0], 3, padding=1).transpose(1, 2)
    patches = F.pad(patches, (0, 1), value=1.0).flatten(0, 1)
    return patches.double(), out


def refit(pipeline: Any, student: Any, drawn: Calibration) -> float:
    """Error on the second half after `conv_out` is fitted on the first by ridge regression."""
    half, scheduler = len(drawn) // 2, pipeline.scheduler
    width = 9 * student.conv_out.in_channels + 1
    gram = torch.zeros(width, width, dtype=torch.double)
    cross = torch.zeros(width, student.conv_out.out_channels, dtype=torch.double)
    errors = []
    for part, is_fit in ((drawn[:half], True), (drawn[half:], False)):
        if not is_fit:
            ridge = RIDGE * gram.trace() / width * torch.eye(width, dtype=torch.double)
            weights = torch.linalg.solve(gram + ridge, cross)
        for _, batch in part.batches(BATCH):
            inputs = batch.inputs(scheduler, torch.float32)
            with torch.no_grad():
                wanted = pipeline.unet(**inputs).sample
            patches, _ = before_last(student, inputs)
            target = wanted.flatten(2).transpose(1, 2).flatten(0, 1).double()
            if is_fit:
                gram += patches.T @ patches
                cross += patches.T @ target
            else:
                errors.append((patches @ weights - target).square().mean())
    return float(torch.stack(errors).mean())


def learned(pipeline: Any, student: Any, drawn: Calibration) -> tuple[float, float]:
    """Error on fresh samples after a few steps on one batch, and the slope of the log before."""
    batch, fresh = drawn[:BATCH], drawn[BATCH : 4 * BATCH]
    scheduler = pipeline.scheduler
    inputs = batch.inputs(scheduler, torch.float32)
    with torch.no_grad():
        wanted = pipeline.unet(**inputs).sample
    optimiser = torch.optim.AdamW(student.parameters(), lr=LR)
    slope = 0.0
    for step in range(FEW):
        optimiser.zero_grad()
        loss = (student(**inputs).sample - wanted).square().mean()
        loss.log().backward()
        norm = float(torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0))
        slope = norm**2 if step == 0 else slope
        optimiser.step()
    errors = []
    with torch.no_grad():
        for _, part in fresh.batches(BATCH):
            given = part.inputs(scheduler, torch.float32)
            errors.append((student(**given).sample - pipeline.unet(**given).sample).square().mean())
    return float(torch.stack(errors).mean()), -slope


def main() -> None:
    torch.set_num_threads(1)
    masks = pd.read_csv(BUILD / "masks.csv", dtype={"budget": str})
    path = BUILD / "scores.csv"
    rows: list[Any] = pd.read_csv(path).to_dict("records") if path.exists() else []
    done = {row["mask"] for row in rows}
    table = pd.read_csv(BUILD / "importance" / "importance.csv")
    table = table[table["timestep_bin"].astype(str) == "all"]
    pipeline = load("emoji", dtype=torch.float32)
    inventory = Inventory.of(pipeline.unet)
    pairs = read_pairs(BUILT_IN["emoji"] / "pairs.zip").split("train")
    sampling = SamplingSettings(10, 3.0, 7, BATCH)
    drawn = calibrate(
        pipeline, pairs, n=N, n_bins=N_BINS, seed=777, batch_size=BATCH, sampling=sampling
    )
    pictures = PictureLoss(pipeline, pairs.captions[:: len(pairs) // N_PROMPTS], sampling, None)
    for _, row in masks.iterrows():
        if row["mask"] in done:
            continue
        mask = frozenset(str(row["removed"]).split())
        found: dict[str, Any] = {"mask": row["mask"], **additive(mask, table)}
        clock = [time.perf_counter()]

        def took(name: str, row: dict[str, Any] = found, clock: list[float] = clock) -> None:
            clock.append(time.perf_counter())
            row[f"seconds:{name}"] = clock[-1] - clock[-2]

        found |= ablated(pipeline, drawn, mask)
        took("measured")
        found["latent"] = pictures(mask)["latent"][0]
        took("latent")
        plan = inventory.plan(mask)
        found["refit"] = refit(pipeline, PrunedUNet.from_teacher(pipeline.unet, plan), drawn)
        took("refit")
        student = PrunedUNet.from_teacher(pipeline.unet, plan)
        found["few steps"], found["slope"] = learned(pipeline, student, drawn)
        took("few steps")
        pairs_of = inventory.units("pair").values()
        found["params"] = 1 - float(row["params"])
        found["blocks"] = len(mask)
        found["pairs"] = sum(blocks <= mask for blocks in pairs_of)
        found["pairs broken"] = sum(
            bool(blocks & mask) and not blocks <= mask for blocks in pairs_of
        )
        rows.append(found)
        pd.DataFrame(rows).to_csv(path, index=False, float_format="%.6g")
        print(row["mask"], f"{found['measured']:.4g} {found['refit']:.4g}", flush=True)


if __name__ == "__main__":
    main()
