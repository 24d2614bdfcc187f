"""One ablation sweep by full passes and by replay, side by side: the ratio is what counts.

    python benchmarks/ablation.py                        # the emoji model
    python benchmarks/ablation.py --shape sd_v1 --rounds 1 --batch-size 1 --units 6

Both ways run the same units on the same batch, interleaved unit by unit, so that a slow minute of
the machine hits both alike. `--units N` takes N units evenly spaced in order of execution.
"""

from __future__ import annotations

import argparse
import platform
import time
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from bkprune import Inventory, Replay, bypassed
from bkprune.calibration import noise_conditions, noise_latents
from bkprune.models import load
from bkprune.single_file import families


def network(shape: str) -> Any:
    if shape == "emoji":
        return load("emoji").unet
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(families()[shape]["unet"]).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="emoji", help="emoji, or a family such as sd_v1")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--units", type=int, default=0, help="of all, evenly spaced; 0 takes all")
    options = parser.parse_args()

    unet = network(options.shape)
    inventory = Inventory.of(unet)
    names = list(inventory.names)
    if options.units:
        step = len(names) / options.units
        names = [names[int((i + 0.5) * step)] for i in range(options.units)]
    n = options.batch_size
    sample = noise_latents(unet.config, n, seed=0)
    embeddings, added = noise_conditions(unet.config, n, seed=0)
    timesteps = torch.linspace(0, 999, n).long()
    conditions: dict[str, Any] = {"added_cond_kwargs": added} if added else {}

    print(f"{options.shape}: {sum(p.numel() for p in unet.parameters()):,} params, batch {n}")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, float32, {len(names)} of {len(inventory)} blocks")
    ratios = []
    for turn in range(options.rounds):
        started = time.perf_counter()
        replay = Replay(unet, sample, timesteps, embeddings, **conditions)
        record_s = time.perf_counter() - started
        full_s, replay_s = 0.0, 0.0
        for name in names:
            plan = inventory.plan({name})
            started = time.perf_counter()
            with torch.no_grad(), bypassed(unet, plan):
                whole = unet(sample, timesteps, embeddings, return_dict=False, **conditions)[0]
            full_s += time.perf_counter() - started
            started = time.perf_counter()
            suffix = replay.ablate(plan)
            replay_s += time.perf_counter() - started
            if not torch.equal(whole, suffix):
                raise SystemExit(f"{name}: replay differs from the full pass")
        share = record_s * len(names) / len(inventory)  # the one recorded pass serves all units
        ratios.append(full_s / (replay_s + share))
        print(
            f"round {turn}: full {full_s:.2f} s, replay {replay_s:.2f} s + recorded pass "
            f"{record_s:.2f} s, ratio {ratios[-1]:.2f}, "
            f"recordings {replay.recorded_bytes / 1e6:.0f} MB"
        )
    print(f"ratio full / replay, median of {len(ratios)}: {sorted(ratios)[len(ratios) // 2]:.2f}")


if __name__ == "__main__":
    main()
