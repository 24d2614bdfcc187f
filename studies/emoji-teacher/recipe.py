"""What every stage of the recipe shares: the build folder, the images, the training loop's bones.

It knows where each stage leaves its files, how a training survives a kill, and how the learning
rate falls. It does not know any model: each stage builds its own.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

BUILD = Path(os.environ.get("EMOJI_TEACHER_BUILD", Path(__file__).parent / "build"))
DATASET = BUILD / "emoji.zip"
SEED = 1234
SIZE = 64
STYLES = {"noto": "noto emoji", "fluent": "fluent emoji"}


@dataclass(frozen=True)
class Pairs:
    """Images [N, 3, 64, 64] in [-1, 1] with their captions."""

    images: Tensor
    captions: list[str]
    styles: list[str]


def options(doc: str | None, *, steps: int, batch_size: int, lr: float) -> argparse.Namespace:
    """The command line of a training stage; the defaults are what made the shipped weights."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--lr", type=float, default=lr)
    return parser.parse_args()


def read_pairs(split: str) -> Pairs:
    """Read one split, `train` or `heldout`, of the dataset stage's archive."""
    with zipfile.ZipFile(DATASET) as archive:
        rows = [json.loads(line) for line in archive.read("metadata.jsonl").splitlines()]
        rows = [row for row in rows if row["split"] == split]
        arrays = [
            np.asarray(Image.open(io.BytesIO(archive.read(row["file_name"]))).convert("RGB"))
            for row in rows
        ]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return Pairs(
        images=images.float() / 127.5 - 1,
        captions=[row["text"] for row in rows],
        styles=[row["style"] for row in rows],
    )


def warmup_cosine(step: int, n_steps: int, n_warmup: int = 100) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine down to zero."""
    if step < n_warmup:
        return (step + 1) / n_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))


def generator(step: int, stream: int = 0) -> torch.Generator:
    """Randomness of one step, so that a resumed run draws what an uninterrupted one would."""
    return torch.Generator().manual_seed(SEED + 1_000_003 * stream + step)


def batch_indices(step: int, batch_size: int, n_images: int) -> Tensor:
    """Indices of one batch: epochs are permutations laid end to end, cut into batches."""
    first = step * batch_size
    epoch, offset = divmod(first, n_images)
    order = torch.randperm(n_images, generator=generator(epoch, stream=1))
    if offset + batch_size > n_images:
        following = torch.randperm(n_images, generator=generator(epoch + 1, stream=1))
        order = torch.cat([order, following])
    return order[offset : offset + batch_size]


def save_atomic(state: dict[str, Any], path: Path) -> None:
    """Write beside the target, flush to the disk, rename: a kill leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def resume(path: Path, modules: dict[str, Any]) -> int:
    """Load every named state from a checkpoint, if there is one; return the next step."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state[name])
    print(f"resumed {path} at step {state['step']}", flush=True)
    return int(state["step"])


def loop(
    path: Path,
    modules: dict[str, Any],
    n_steps: int,
    step: Callable[[int], dict[str, float]],
    *,
    check: Callable[[int], dict[str, float]] | None = None,
    log_every: int = 50,
    save_every: int = 250,
) -> None:
    """Run `step` until `n_steps`, logging to `path`.jsonl and checkpointing into `path`."""
    log = path.with_suffix(".jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)

    def save(next_step: int) -> None:
        state = {name: module.state_dict() for name, module in modules.items()}
        save_atomic({**state, "step": next_step}, path)

    sums: dict[str, float] = {}
    n, started = 0, time.perf_counter()
    for index in _remaining(resume(path, modules), n_steps):
        for name, value in step(index).items():
            sums[name] = sums.get(name, 0.0) + value
        n += 1
        done = index + 1
        if done % log_every == 0 or done == n_steps:
            row: dict[str, float] = {"step": done} | {k: v / n for k, v in sums.items()}
            row["s_per_step"] = (time.perf_counter() - started) / n
            if check is not None and (done % save_every == 0 or done == n_steps):
                row |= check(done)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(" ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
            sums, n, started = {}, 0, time.perf_counter()
        if done % save_every == 0 or done == n_steps:
            save(done)


def _remaining(first: int, n_steps: int) -> Iterator[int]:
    if first >= n_steps:
        print(f"already at step {first} of {n_steps}: nothing to do", flush=True)
    yield from range(first, n_steps)
