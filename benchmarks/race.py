"""Distilling k students against one teacher pass, against k runs that each ask the teacher.

    python benchmarks/race.py --students 4 --rounds 20

Both ways take the same step of the same students on the same batch; rounds alternate, so that both
see the same machine.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler

from bkprune import Inventory, PrunedUNet, preset
from bkprune.caching import Cache, CacheSettings, fill
from bkprune.data import read_pairs
from bkprune.distill import Distillation
from bkprune.lessons import Lessons
from bkprune.losses import LossSettings
from bkprune.models import BUILT_IN, load
from bkprune.recipe import DistillSettings

N_PAIRS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--students", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    settings = DistillSettings(
        batch_size=options.batch_size, losses=LossSettings(1.0, 30.0, 0.0), steps=10_000
    )
    pipeline = load("emoji", dtype=torch.float32)
    inventory = Inventory.of(pipeline.unet)
    plan = inventory.plan(preset("bk-sdm-base", inventory))
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        pairs = read_pairs(BUILT_IN["emoji"] / "pairs.zip").split("train").subset(range(N_PAIRS))
        examples = ((pairs.image(i, 64), c) for i, c in enumerate(pairs.captions))
        fill(Path(name), pipeline, examples, "benchmark", CacheSettings(64))
        cache, acc = Cache(Path(name)), Accelerator()
        lessons = stack.enter_context(
            Lessons(pipeline.unet, [], cache, scheduler, settings, acc).opened()
        )
        runs = [
            Distillation(
                PrunedUNet.from_teacher(pipeline.unet, plan), None, [], cache, scheduler, settings
            )
            for _ in range(options.students)
        ]
        nets = [stack.enter_context(run.watching()) for run in runs]

        def together(step: int) -> None:
            given = list(lessons.of(step))
            for run, net in zip(runs, nets, strict=True):
                run.update(net, given, [])

        def apart(step: int) -> None:
            for run, net in zip(runs, nets, strict=True):
                run.update(net, lessons.of(step), [])

        ways = {"apart": apart, "together": together}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for i in range(options.rounds + 1):
            for way in list(ways) if i % 2 else list(ways)[::-1]:
                start = time.perf_counter()
                ways[way](i)
                if i:
                    times[way].append(time.perf_counter() - start)
    print(
        f"emoji, bk-sdm-base, {options.students} students, batch {options.batch_size}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}, "
        f"{options.rounds} alternating rounds"
    )
    for way, seconds in times.items():
        middle = sorted(seconds)[len(seconds) // 2]
        print(f"{way:9} {middle / options.students:.3f} s a student's step")
    ratios = sorted(a / b for a, b in zip(times["apart"], times["together"], strict=True))
    n = len(ratios)
    low, middle, high = ratios[n // 10], ratios[n // 2], ratios[-n // 10]
    print(f"together is {middle:.2f}x as fast ({low:.2f} .. {high:.2f})")


if __name__ == "__main__":
    main()
