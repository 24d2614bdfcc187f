"""Drawing pictures, ours against a plain loop over the pipeline; and 30,000 prompts in flat memory.

    python benchmarks/evaluate.py --n 60                 # throughput, identical pictures
    python benchmarks/evaluate.py --flat 30000           # peak memory at 3,000 and at all prompts

The plain loop is what people write: `pipe(prompt, generator=...)` for each prompt, in one process
with the library's default threads. Ours draws the same prompts and seeds one by one in a process a
core, through files, and with `--together` in batches. They take turns, `--rounds` times.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from bkprune.generation import Generation, fill
from bkprune.models import load
from bkprune.pictures import PictureFolder
from bkprune.protocols import PROTOCOLS, read
from bkprune.sampling import SamplingSettings

STEPS, GUIDANCE, SEED = 25, 3.0, 1234


def plain(prompts: list[str], n: int) -> list[Any]:
    """The loop that people write."""
    pipeline = load("emoji")
    return [
        np.asarray(
            pipeline(
                prompts[i % len(prompts)],
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=torch.Generator().manual_seed(SEED + i),
            ).images[0]
        )
        for i in range(n)
    ]


def ours(prompts: list[str], n: int, *, together: bool) -> list[Any]:
    """Through the room that `bkprune evaluate` uses, loading and files included."""
    settings = SamplingSettings(STEPS, GUIDANCE, SEED, 8, is_exact=not together)
    generation = Generation("emoji", "emoji", tuple(prompts), settings)
    with tempfile.TemporaryDirectory() as inside:
        folder = PictureFolder(Path(inside) / "pictures", {})
        fill([(generation, folder)], n, len(os.sched_getaffinity(0)))
        return [folder.load(i) for i in range(n)]


def throughput(n: int, rounds: int) -> dict[str, Any]:
    prompts = read(None, PROTOCOLS["emoji"]).texts
    ways: dict[str, Callable[[], list[Any]]] = {
        "plain loop": lambda: plain(prompts, n),
        "one by one": lambda: ours(prompts, n, together=False),
        "together": lambda: ours(prompts, n, together=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    pictures = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            pictures[name] = way()
            seconds[name].append(time.perf_counter() - start)
            print(name, round(seconds[name][-1], 1), "s", flush=True)
    out: dict[str, Any] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as our processes have
    pictures["plain loop, one thread"] = plain(prompts, n)
    torch.set_num_threads(threads)
    for name, drawn in pictures.items():
        against = pictures["plain loop"]
        pairs = zip(drawn, against, strict=True)
        differ = [np.abs(a.astype(int) - b.astype(int)) for a, b in pairs]
        same = [np.array_equal(a, b) for a, b in zip(drawn, pictures["one by one"], strict=True)]
        out[name] = {
            "identical_to_one_by_one": sum(same),
            "values_that_differ_from_plain": float(np.mean([(d > 0).mean() for d in differ])),
            "largest_difference": int(max(d.max() for d in differ)),
        }
        if name in seconds:
            ratios = [a / b for a, b in zip(seconds["plain loop"], seconds[name], strict=True)]
            out[name] |= {
                "pictures_per_s": round(n / float(np.median(seconds[name])), 3),
                "times_plain": round(float(np.median(ratios)), 3),
                "times_plain_by_round": [round(r, 3) for r in ratios],
            }
    return out


def tiny_model(folder: Path) -> None:
    """Random weights, 16x16 pixels: so that the number of pictures is all that weighs."""
    base = load("emoji")
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=base.unet.config.cross_attention_dim,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3}
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 3,
        **blocks,
    )
    StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        scheduler=base.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def flat(n: int) -> None:
    """The command in a process of its own, at a tenth and at all of the prompts."""
    with tempfile.TemporaryDirectory() as inside:
        tiny_model(Path(inside) / "tiny")
        prompts = Path(inside) / "prompts.txt"
        prompts.write_text("".join(f"picture number {i}, noto emoji\n" for i in range(n)))
        clip = Path(__file__).parents[1] / "bkprune" / "assets" / "emoji" / "clip"
        for share in (n // 10, n):
            command = [sys.executable, __file__, "--child", "evaluate", f"{inside}/tiny"]
            command += ["--protocol", "own", "--prompts", str(prompts), "--n", str(share)]
            command += ["--steps", "1", "--guidance-scale", "1", "--together", "--quiet"]
            command += ["--metrics", "clip_score,frechet_clip", "--clip", str(clip)]
            command += ["--reference", "emoji", "--workers", "1", "--batch-size", "64"]
            command += ["--out", f"{inside}/out-{share}"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            print(share, "pictures:", done.stderr.strip().splitlines()[-1], flush=True)


def child(words: list[str]) -> None:
    from bkprune.cli import app

    start = time.perf_counter()
    app(words, standalone_mode=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    told = {"peak_mb": round(peak), "seconds": round(time.perf_counter() - start)}
    print(json.dumps(told), file=sys.stderr)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flat", type=int)
    options = parser.parse_args()
    if options.flat:
        flat(options.flat)
    else:
        print(json.dumps(throughput(options.n, options.rounds), indent=1))


if __name__ == "__main__":
    main()
