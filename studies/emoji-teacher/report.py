"""Stage 6: is the teacher good enough? Grids and figures, measured on the shipped folder.

Everything goes through the package as a user would: the built-in model is loaded, sampled and
judged. Writes `reports/emoji-teacher/`: figures.json, README.md, grids, loss curves.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from recipe import BUILD, generator
from torch import Tensor

import bkprune
from bkprune import Inventory, Replay, preset
from bkprune.calibration import calibrate, encode_images
from bkprune.clip import ClipScore
from bkprune.data import Pairs, read_pairs
from bkprune.models import BUILT_IN, load
from bkprune.sampling import SamplingSettings, decode, sample_latents

OUT = Path(__file__).parents[2] / "reports" / "emoji-teacher"

README = """\
# The emoji teacher, as measured

The model that ships as `emoji`, through the package as a user meets it: loaded from the fp16 files,
{sampling}, guidance scale {guidance_scale}. Command: `python studies/emoji-teacher/report.py`;
machine: {machine}; versions: {versions}. The U-Net was trained for {unet_training_steps:,} steps
of 48 images.

Generated from captions it was trained on (the prompts are in `prompts.txt`), and the real images:

![generated](generated.png) ![real](real.png)

Generated from (caption, style) pairs that were held out, and the real images:

![generated, held out](generated-heldout.png) ![real, held out](real-heldout.png)

| figure | value |
| --- | --- |
{rows}

PSNR is the mean over images, from the posterior mean. "Top-1 of 100" is the share of pictures whose
own caption scores highest beside 99 others under the small CLIP that ships with the model (chance:
1 %); held-in captions were seen by that judge too. Output error and denoising loss are means over
256 training samples, timesteps stratified and weighted uniformly; they use no guidance.

The recipe aims at a PSNR of at least 26 dB and at a top-1 of at least 0.5 for pictures generated
from held-in captions. `docs/decisions.md` says how the training went and what limits it.

![training](training.png)
"""


def grid(pictures: Tensor, columns: int = 8) -> Image.Image:
    """Pictures `[N, 3, H, W]` in [0, 1] in rows of `columns`, two pixels apart."""
    n, _, height, width = pictures.shape
    rows = -(-n // columns)
    sheet = torch.ones(3, rows * (height + 2), columns * (width + 2))
    for i, picture in enumerate(pictures):
        y, x = (i // columns) * (height + 2), (i % columns) * (width + 2)
        sheet[:, y : y + height, x : x + width] = picture
    return Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def pick(pairs: Pairs, n: int) -> Pairs:
    order = torch.randperm(len(pairs), generator=generator(0, stream=11)).tolist()
    return pairs.subset(order[:n])


def top1_of_100(judge: ClipScore, pictures: Tensor, captions: list[str], pool: list[str]) -> float:
    """Share of pictures whose own caption beats 99 others drawn from the pool."""
    image, own = judge.image_features(pictures), judge.text_features(captions)
    others, hits = judge.text_features(pool), 0
    for i, caption in enumerate(captions):
        rivals = [j for j, text in enumerate(pool) if text != caption]
        drawn = torch.randperm(len(rivals), generator=generator(i, stream=12))[:99]
        chosen = [rivals[k] for k in drawn.tolist()]
        hits += bool(image[i] @ own[i] > (others[chosen] @ image[i]).max())
    return hits / len(captions)


def psnr_db(vae: Any, pictures: Tensor) -> float:
    """Mean over images of the autoencoder's PSNR, decoded from the posterior mean."""
    decoded = decode(vae, encode_images(vae, pictures * 2 - 1, 64), 64)
    error = (decoded - pictures).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(1 / error)).mean())


def ablations(pipeline: Any, pairs: Pairs) -> dict[str, float]:
    """Output error relative to the output's power, and the denoising loss of the whole net."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    inventory = Inventory.of(unet)
    masks: dict[str, Any] = {name: {name} for name in inventory.names}
    inner = inventory.levels[-1].blocks
    masks["mid_block"] = {"mid_block"}
    masks["innermost level with mid_block"] = inner
    masks["two innermost levels"] = inner | inventory.levels[-2].blocks
    for name in ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"):
        masks[name] = preset(name, inventory)
    calibration = calibrate(
        pipeline, pairs, n=256, n_bins=8, seed=7, batch_size=32, sampling=SamplingSettings()
    )
    sums = dict.fromkeys(masks, 0.0)
    losses = dict.fromkeys(masks, 0.0)
    power = loss = 0.0
    for _, batch in calibration.batches(32):
        target = batch.target(scheduler)
        replay = Replay(unet, **batch.inputs(scheduler, unet.dtype))
        power += float(replay.output.square().sum())
        loss += float((replay.output - target).square().sum())
        for name, mask in masks.items():
            out = replay.ablate(inventory.plan(mask))
            sums[name] += float((out - replay.output).square().sum())
            losses[name] += float((out - target).square().sum())
    few = [name for name in inventory.names if sums[name] / power < 1e-3]
    found = {"denoising loss": loss / calibration.noise.numel()}
    found["blocks under 1e-3 of the output power"] = len(few)
    for name in list(masks)[len(inventory.names) :]:
        found[f"output error without {name}, per output power"] = sums[name] / power
        found[f"denoising loss without {name}, as a multiple"] = losses[name] / loss
    return found


def loss_curves() -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for panel, (stage, columns) in zip(
        axes,
        (
            ("autoencoder", ["heldout_psnr_db"]),
            ("clip", ["train_top1_of_100", "heldout_top1_of_100"]),
            ("unet", ["ema_train_loss", "ema_heldout_loss"]),
        ),
        strict=True,
    ):
        log = pd.read_json(BUILD / f"{stage}.jsonl", lines=True)
        for column in columns:
            rows = log.dropna(subset=[column])
            panel.plot(rows["step"], rows[column], marker=".", label=column)
        panel.set_title(stage)
        panel.set_xlabel("step")
        panel.legend(frameon=False, fontsize=8)
        if stage == "unet":
            panel.set_yscale("log")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--n-judged", type=int, default=256)
    options = parser.parse_args()

    OUT.mkdir(parents=True, exist_ok=True)
    pipeline = load("emoji")
    pairs = read_pairs(BUILT_IN["emoji"] / "pairs.zip")
    train, heldout = pairs.split("train"), pairs.split("heldout")
    judge = ClipScore.load(None)
    sampling = SamplingSettings(guidance_scale=options.guidance_scale, batch_size=32)

    judged = pick(train, options.n_judged)
    pictures = decode(pipeline.vae, sample_latents(pipeline, judged.captions, sampling))
    real = judged.images(64) / 2 + 0.5
    grid(pictures[:64]).save(OUT / "generated.png")
    grid(real[:64]).save(OUT / "real.png")
    (OUT / "prompts.txt").write_text("\n".join(judged.captions[:64]) + "\n", encoding="utf-8")
    unseen = pick(heldout, 64)
    new = decode(pipeline.vae, sample_latents(pipeline, unseen.captions, sampling))
    grid(new).save(OUT / "generated-heldout.png")
    grid(unseen.images(64) / 2 + 0.5).save(OUT / "real-heldout.png")
    loss_curves().savefig(OUT / "training.png", dpi=120)

    images = heldout.images(64) / 2 + 0.5
    step = int(torch.load(BUILD / "unet.pt", map_location="cpu", weights_only=True)["step"])
    figures: dict[str, Any] = {
        "autoencoder PSNR, held out (dB)": psnr_db(pipeline.vae, images),
        "top-1 of 100, generated from held-in captions": top1_of_100(
            judge, pictures, judged.captions, train.captions
        ),
        "top-1 of 100, real held-in": top1_of_100(judge, real, judged.captions, train.captions),
        "top-1 of 100, generated from held-out captions": top1_of_100(
            judge, new, unseen.captions, heldout.captions
        ),
        "top-1 of 100, real held-out": top1_of_100(
            judge, images, heldout.captions, heldout.captions
        ),
        "CLIP score, generated from held-in captions": float(
            judge(pictures, judged.captions).mean()
        ),
        "CLIP score, real held-in": float(judge(real, judged.captions).mean()),
        **ablations(pipeline, train),
    }
    record: dict[str, Any] = {
        "figures": figures,
        "settings": {
            "sampling": "DDIM, 25 steps",
            "guidance_scale": options.guidance_scale,
            "n_judged": options.n_judged,
            "unet_training_steps": step,
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, CPU",
        "versions": {"bkprune": bkprune.__version__, "torch": torch.__version__},
    }
    (OUT / "figures.json").write_text(json.dumps(record, indent=1) + "\n")
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in figures.items())
    text = README.format(
        rows=rows,
        machine=record["machine"],
        versions=", ".join(f"{k} {v}" for k, v in record["versions"].items()),
        **record["settings"],
    )
    (OUT / "README.md").write_text(text, encoding="utf-8")
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:.4g}")


if __name__ == "__main__":
    main()
