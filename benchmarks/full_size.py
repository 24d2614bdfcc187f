"""The U-Nets of the shipped studies at full size, with random weights: does it fit and agree?

    python benchmarks/full_size.py sd_v1 --step
    python benchmarks/full_size.py sd_v2_base --step
    python benchmarks/full_size.py sdxl --mask mid_block,up_blocks.0.attentions.2

For each mask one pass with the blocks bypassed, one of the student made from it, and one of that
student written and read again, all on the same input, batch 1, at the size of the family's config.
`--step` distils the first mask for two steps of one sample, with gradient checkpointing, and gives
the second. Random weights say nothing about quality.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

from bkprune import Inventory, bypassed
from bkprune.caching import FORMAT, INDEX, Cache
from bkprune.counting import unet_call
from bkprune.distill import Distillation
from bkprune.export import student
from bkprune.losses import taps
from bkprune.masks import read_mask
from bkprune.recipe import DistillSettings
from bkprune.single_file import families

PRESETS = ["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"]


def timed(unet: Any) -> tuple[torch.Tensor, float]:
    """Output on the family's own input, and seconds."""
    call = unet_call(unet.config, device="cpu")
    started = time.perf_counter()
    with torch.no_grad():
        output = unet(*call.args, **call.kwargs)[0]
    return output, time.perf_counter() - started


def apart(found: torch.Tensor, expected: torch.Tensor) -> str:
    """How two outputs differ, in words."""
    if torch.equal(found, expected):
        return "same bits"
    return f"{float((found - expected).abs().max() / expected.abs().max()):.1e} apart"


def agrees(teacher: Any, inventory: Inventory, name: str) -> str:
    """One mask, three ways."""
    plan = inventory.plan(read_mask(name, inventory))
    with bypassed(teacher, plan):
        expected, ablated_s = timed(teacher)
    made = student(teacher, inventory, plan)
    own, own_s = timed(made.unet)
    with tempfile.TemporaryDirectory() as folder:
        made.unet.save_pretrained(folder)
        again = type(made.unet).from_pretrained(folder)
        read, _ = timed(again)
    return (
        f"{name}: {made.form}, {made.n_params:,} params, bypassed {ablated_s:.1f} s, student "
        f"{own_s:.1f} s, {apart(own, expected)}; written and read: {apart(read, own)}"
    )


def random_cache(folder: Path, unet: Any, n: int = 8) -> Cache:
    """Noise for latents and text."""
    call = unet_call(unet.config, batch_size=n, device="cpu")
    sample = call.args[0]
    tensors = {
        "mean": sample,
        "std": 0.1 * torch.ones_like(sample),
        "mean_flipped": sample.flip(-1).contiguous(),
        "std_flipped": 0.1 * torch.ones_like(sample),
        "caption": torch.arange(n),
        "embedding": call.args[2].contiguous(),
    }
    save_file(tensors, folder / "shard-000000.safetensors")
    shards = [["shard-000000.safetensors", n]]
    index = {"format": FORMAT, "n": n, "shards": shards, "complete": True, "examples": []}
    (folder / INDEX).write_text(json.dumps(index))
    return Cache(folder)


def distilled(teacher: Any, inventory: Inventory, name: str, family: str) -> str:
    """Two steps of BK-SDM's losses at full size."""
    plan = inventory.plan(read_mask(name, inventory))
    made = student(teacher, inventory, plan)
    own = copy.deepcopy(made.unet)
    scheduler = DDPMScheduler.from_config(families()[family]["scheduler"])
    settings = DistillSettings(batch_size=1, steps=2, checkpointing=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Distillation(
            own,
            teacher,
            taps(inventory, plan, made.modules),
            random_cache(Path(folder), teacher),
            scheduler,
            settings,
            Accelerator(cpu=True),
        )
        with run.watching() as ready, run.lessons.opened():
            for _ in range(2):
                started = time.perf_counter()
                terms, is_good = run.update(ready, run.lessons.of(run.step), [])
                run.step += 1
    losses = ", ".join(f"{k} {terms[k]:.3g}" for k in ("loss_task", "loss_output", "loss_feature"))
    assert is_good
    return f"{name}: a step takes {time.perf_counter() - started:.1f} s; {losses}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=sorted(families()))
    parser.add_argument("--mask", action="append", help="the published students by default")
    parser.add_argument("--step", action="store_true", help="distil as well")
    options = parser.parse_args()
    torch.manual_seed(0)
    teacher = UNet2DConditionModel.from_config(families()[options.family]["unet"]).eval()
    inventory = Inventory.of(teacher)
    n = sum(p.numel() for p in teacher.parameters())
    _, seconds = timed(teacher)
    print(f"{options.family}, {n:,} params, torch {torch.__version__}, {platform.machine()}")
    print(f"{torch.get_num_threads()} threads, float32; teacher {seconds:.1f} s a pass")
    names = options.mask or PRESETS
    for name in names:
        print(agrees(teacher, inventory, name), flush=True)
    if options.step:
        print(distilled(teacher, inventory, names[0], options.family))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"highest resident memory {peak:.1f} GB")


if __name__ == "__main__":
    main()
