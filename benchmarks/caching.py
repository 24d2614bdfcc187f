"""Does `bkprune cache` stream with flat memory? Generated webdataset shards, memory as it goes.

    python benchmarks/caching.py --pairs 100000 --out build/caching

Pictures are 16x16 tiles of one colour with a caption of two words; the emoji model's networks
encode them. What counts is the resident memory over time, not the speed.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import time
from pathlib import Path

import psutil
import torch
from PIL import Image

from bkprune.caching import Cache, CacheSettings, fill
from bkprune.models import load
from bkprune.sources import Source

WORDS = [f"word{i}" for i in range(16)]
PER_SHARD = 10_000


def shards(folder: Path, n: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    n_shards = -(-n // PER_SHARD)
    for s in range(n_shards):
        path = folder / f"shard-{s:03d}.tar"
        if path.exists():
            continue
        with tarfile.open(path.with_suffix(".new"), "w") as archive:
            for i in range(s * PER_SHARD, min((s + 1) * PER_SHARD, n)):
                buffer = io.BytesIO()
                colour = (i % 256, i // 256 % 256, i * 7 % 256)
                Image.new("RGB", (16, 16), colour).save(buffer, format="png", compress_level=1)
                text = f"{WORDS[i % 16]} {WORDS[i // 16 % 16]}".encode()
                for suffix, data in (("png", buffer.getvalue()), ("txt", text)):
                    info = tarfile.TarInfo(f"{i:07d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        path.with_suffix(".new").rename(path)
    return str(folder / f"shard-{{000..{n_shards - 1:03d}}}.tar")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only-shards", action="store_true")
    options = parser.parse_args()
    text = shards(options.out / "shards", options.pairs)
    if options.only_shards:
        return
    pipeline = load("emoji", dtype=torch.float32)
    source, process, started = Source(text), psutil.Process(), time.monotonic()
    seen: list[tuple[int, float]] = []

    def progress(done: int, total: int, what: str) -> None:
        seen.append((done, process.memory_info().rss / 1e6))
        if len(seen) % 10 == 1:
            elapsed = time.monotonic() - started
            print(f"{done:7,} pairs  {elapsed:5.0f} s  {seen[-1][1]:6.0f} MB", flush=True)

    settings = CacheSettings(16, flip=False, batch_size=256)
    fill(options.out / "cache", pipeline, source.examples(16), source.key, settings, progress)
    first = [mb for n, mb in seen if n <= options.pairs // 5]
    last = [mb for n, mb in seen if n > options.pairs * 4 // 5]
    print(f"{len(Cache(options.out / 'cache')):,} pairs; highest in the first fifth ", end="")
    print(f"{max(first):.0f} MB, in the last fifth {max(last):.0f} MB")


if __name__ == "__main__":
    main()
