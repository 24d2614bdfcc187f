"""A step of distillation, ours against a plain transcription of BK-SDM's script.

    python benchmarks/distill.py --rounds 30 --compiled

The plain step does what the published script does: VAE and text encoder in every step, the teacher
in the precision of training, outputs kept by hooks, contiguous layout. Ours reads the cache, runs
the teacher in inference mode, and both networks in channels-last layout. Both train the
same student (bk-sdm-base) with the same three losses; steps alternate, so that both see the same
machine. Peak memory is taken in a process of its own for each.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler

from bkprune import Inventory, preset
from bkprune.caching import Cache, CacheSettings, fill
from bkprune.comparing import identify
from bkprune.data import read_pairs
from bkprune.distill import Distillation
from bkprune.export import student
from bkprune.losses import taps
from bkprune.models import BUILT_IN, load
from bkprune.recipe import DistillSettings

Step = Callable[[], None]
_kept = ExitStack()  # taps stay until the process ends
N_PAIRS = 256


class Plain:
    """The semantics of BK-SDM's step, nothing cached."""

    def __init__(self, pipeline: Any, unet: Any, batch_size: int, device: str) -> None:
        self.pipeline, self.unet, self.batch_size, self.device = pipeline, unet, batch_size, device
        self.teacher = copy.deepcopy(pipeline.unet).requires_grad_(False)
        pairs = read_pairs(BUILT_IN["emoji"] / "pairs.zip").split("train")
        self.images = pairs.subset(range(N_PAIRS)).images(64)
        self.captions = pairs.captions[:N_PAIRS]
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.optimiser = torch.optim.AdamW(unet.parameters(), lr=5e-5, weight_decay=1e-2)
        self.seen: dict[str, dict[str, Any]] = {"teacher": {}, "student": {}}
        inventory = Inventory.of(pipeline.unet)
        found = identify(pipeline.unet, unet)
        modules = found.twin.modules if found.twin else None
        self.taps = taps(inventory, found.plan, modules)
        for tap in self.taps:
            self._hook(self.teacher, tap.name, "teacher")
            self._hook(unet, tap.student, "student")
        self.at = 0

    def _hook(self, network: Any, name: str, which: str) -> None:
        def keep(module: Any, args: Any, out: Any) -> None:
            self.seen[which][name] = out[0] if isinstance(out, tuple) else out

        network.get_submodule(name).register_forward_hook(keep)

    def __call__(self) -> None:
        rows = [(self.at + i) % N_PAIRS for i in range(self.batch_size)]
        self.at += self.batch_size
        with torch.no_grad():
            vae = self.pipeline.vae
            images = self.images[rows].to(self.device)
            latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
            text = self.pipeline.tokenizer(
                [self.captions[i] for i in rows],
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            )
            encoded = self.pipeline.text_encoder(text.input_ids.to(self.device))[0]
        noise = torch.randn_like(latents)
        at = torch.randint(1000, (len(latents),), device=self.device)
        noisy = self.scheduler.add_noise(latents, noise, at)
        with torch.no_grad():
            eps_teacher = self.teacher(noisy, at, encoded).sample
        eps = self.unet(noisy, at, encoded).sample
        loss = F.mse_loss(eps, noise) + F.mse_loss(eps, eps_teacher)
        for tap in self.taps:
            own, theirs = self.seen["student"][tap.student], self.seen["teacher"][tap.name]
            loss = loss + F.mse_loss(own, theirs)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimiser.step()
        loss.item()


def ours(
    pipeline: Any, unet: Any, batch_size: int, device: str, folder: Path, *, compiled: bool
) -> Step:
    pairs = read_pairs(BUILT_IN["emoji"] / "pairs.zip").split("train").subset(range(N_PAIRS))
    examples = ((pairs.image(i, 64), c) for i, c in enumerate(pairs.captions))
    fill(folder, pipeline, examples, "benchmark", CacheSettings(64))
    found = identify(pipeline.unet, unet)
    modules = found.twin.modules if found.twin else None
    run = Distillation(
        unet,
        pipeline.unet,
        taps(Inventory.of(pipeline.unet), found.plan, modules),
        Cache(folder),
        DDPMScheduler.from_config(pipeline.scheduler.config),
        DistillSettings(batch_size=batch_size, compile=compiled),
        Accelerator(cpu=device == "cpu"),
    )
    student_net = _kept.enter_context(run.watching())
    lessons = _kept.enter_context(run.lessons.opened())

    def step() -> None:
        run.update(student_net, lessons.of(run.step), [])
        run.step += 1

    return step


def own_student(pipeline: Any) -> Any:
    inventory = Inventory.of(pipeline.unet)
    plan = inventory.plan(preset("bk-sdm-base", inventory))
    return copy.deepcopy(student(pipeline.unet, inventory, plan).unet).train()


def prepared(which: str, options: argparse.Namespace, folder: Path) -> Step:
    pipeline = load("emoji", dtype=torch.float32)
    unet = own_student(pipeline)
    if which == "plain":
        return Plain(pipeline, unet, options.batch_size, options.device)
    compiled = which == "compiled"
    return ours(pipeline, unet, options.batch_size, options.device, folder, compiled=compiled)


def peak_mb(which: str, options: argparse.Namespace) -> float:
    words = [sys.executable, __file__, "--only", which, "--batch-size", str(options.batch_size)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mb"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=["plain", "ours", "compiled"])
    parser.add_argument("--compiled", action="store_true", help="with torch.compile as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.only:
            step = prepared(options.only, options, Path(name) / "cache")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for _ in range(3):
                step()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(json.dumps({"peak_mb": peak * 1024 / 1e6, "before_mb": before * 1024 / 1e6}))
            return
        ways = ("plain", "ours", *(("compiled",) if options.compiled else ()))
        steps = {w: prepared(w, options, Path(name) / w) for w in ways}
        times: dict[str, list[float]] = {which: [] for which in steps}
        for i in range(options.rounds + 2):
            for which in list(steps) if i % 2 else list(steps)[::-1]:
                start = time.perf_counter()
                steps[which]()
                if i >= 2:
                    times[which].append(time.perf_counter() - start)
    print(f"emoji, batch {options.batch_size}, {options.device}, {torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, {platform.machine()}, {options.rounds} alternating rounds")
    for which, seconds in times.items():
        middle = sorted(seconds)[len(seconds) // 2]
        print(
            f"{which:8} {middle:.3f} s a step, {options.batch_size / middle:.1f} images/s, "
            f"peak {peak_mb(which, options):,.0f} MB"
        )
    for which in list(times)[1:]:
        ratios = sorted(a / b for a, b in zip(times["plain"], times[which], strict=True))
        n = len(ratios)
        low, middle, high = ratios[n // 10], ratios[n // 2], ratios[-n // 10]
        print(f"{which} is {middle:.2f}x as fast ({low:.2f} .. {high:.2f})")


if __name__ == "__main__":
    main()
