"""Latents and text embeddings, encoded once: training then needs neither VAE nor text encoder.

Knows the cache folder (shards of safetensors beside `cache.json`, which says by which networks they
were made), how it is filled from pairs, streams of pairs or prompts alone, how it is gone on with
after an interruption, and how samples are read back. It does not know what they are used for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bkprune.calibration import encode_prompts
from bkprune.models import fingerprint, need
from bkprune.sampling import SamplingSettings, sample_latents
from bkprune.single_file import first_line, read_json
from bkprune.study import digest, write_atomic

INDEX, FORMAT = "cache.json", 1
N_NAMED = 20  # unreadable pairs, and captions, that are remembered by name
Example = tuple[Tensor | None, str]  # picture [3, H, W] in [-1, 1] or none, and its caption


@dataclass(frozen=True)
class CacheSettings:
    """How pairs are encoded; all of it but the batch size is part of the cache's identity."""

    size: int
    flip: bool = True
    shard_size: int = 1024
    batch_size: int = 16
    seed: int = 1234
    max_bad: float = 0.02
    steps: int = 25
    guidance_scale: float = 7.5

    def __post_init__(self) -> None:
        if self.size < 8 or self.shard_size < 1 or self.batch_size < 1:
            raise ValueError("size must be at least 8, shard_size and batch_size at least 1")


@dataclass
class Progressed:
    """What has become of a source so far: pairs encoded, and pairs that could not be read."""

    n: int = 0
    n_read: int = 0
    n_bad: int = 0
    bad: list[str] = field(default_factory=list)


def identity(pipeline: Any, settings: CacheSettings) -> dict[str, Any]:
    """What a cache's content depends on: the networks and how pictures are cut."""
    networks = {
        name: fingerprint(getattr(pipeline, name))
        for name in ("vae", "text_encoder", "text_encoder_2")
        if getattr(pipeline, name, None) is not None
    }
    return {"format": FORMAT, "size": settings.size, "flip": settings.flip, **networks}


def fill(
    folder: Path,
    pipeline: Any,
    examples: Iterable[Example | str],
    source: str,
    settings: CacheSettings,
    progress: Any = lambda done, total, what: None,
    total: int | None = None,
) -> Progressed:
    """Encode everything that a source yields, shard by shard; what is there already is skipped.

    Args:
        folder: the cache.
        pipeline: whose VAE and text encoder encode; its U-Net draws where there are no pictures.
        examples: pairs; a string in place of one says what could not be read.
        source: a name of the source that changes when it does.
        settings: how.
        progress: told pairs done.
        total: how many there are, if that is known.

    Raises:
        ValueError: the folder was filled otherwise, too many pairs are unreadable, or none is left.
    """
    need(pipeline, "text_encoder", "encoding captions")
    need(pipeline, "vae", "encoding pictures")
    made = {**identity(pipeline, settings), "source": digest([source, settings.shard_size])}
    index = _opened(folder, made)
    done = Progressed(index["n"], index["n_read"], index["n_bad"], list(index["bad"]))
    stream = islice(iter(examples), done.n_read, None)
    while not index["complete"]:
        chunk = list(islice(stream, settings.shard_size))
        good = [e for e in chunk if not isinstance(e, str)]
        done.bad = [*done.bad, *(e for e in chunk if isinstance(e, str))][-N_NAMED:]
        done.n_bad += len(chunk) - len(good)
        done.n_read += len(chunk)
        _check_bad(source, done, settings)
        if good:
            name = f"shard-{len(index['shards']):06d}.safetensors"
            tensors = _encode(pipeline, good, settings, done.n)
            write_atomic(folder / name, save({k: v.contiguous() for k, v in tensors.items()}))
            index["shards"].append([name, len(good)])
            _keep_examples(index, [caption for _, caption in good], done.n)
            done.n += len(good)
        index |= {"n": done.n, "n_read": done.n_read, "n_bad": done.n_bad, "bad": done.bad}
        index["complete"] = len(chunk) < settings.shard_size
        _write(folder, index)
        progress(done.n_read, max(total or 0, done.n_read), "encoding")
    if not done.n:
        raise ValueError(f"{source}: not one readable pair in it")
    return done


def _keep_examples(index: dict[str, Any], captions: list[str], first: int) -> None:
    """Captions evenly spaced over all that came: every second one goes when there are too many."""
    for n, caption in enumerate(captions, start=first):
        if n % index["stride"] == 0:
            index["examples"].append(caption)
        if len(index["examples"]) > 2 * N_NAMED:
            index["examples"] = index["examples"][::2]
            index["stride"] *= 2


def _check_bad(source: str, done: Progressed, settings: CacheSettings) -> None:
    share = done.n_bad / max(done.n_read, 1)
    if share > settings.max_bad:
        raise ValueError(
            f"{source}: {done.n_bad} of {done.n_read} pairs cannot be read "
            f"({share:.1%}; the limit is {settings.max_bad:.1%}), the last one: {done.bad[-1]}"
        )


def _opened(folder: Path, made: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / INDEX
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder}: exists and is no cache; use another --out")
        empty: dict[str, Any] = {"shards": [], "examples": [], "stride": 1, "complete": False}
        return {**made, "n": 0, "n_read": 0, "n_bad": 0, "bad": [], **empty}
    index = read_json(path)
    for key, value in made.items():
        if index.get(key) != value:
            raise ValueError(
                f"{folder}: filled with another {key} ({index.get(key)}, now {value}); "
                "use another --out"
            )
    return index


def _write(folder: Path, index: Mapping[str, Any]) -> None:
    write_atomic(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())


@torch.no_grad()
def _encode(
    pipeline: Any, examples: list[Example], settings: CacheSettings, first: int
) -> dict[str, Tensor]:
    captions = [caption for _, caption in examples]
    pictures = [picture for picture, _ in examples if picture is not None]
    out: dict[str, Tensor] = {}
    if len(pictures) == len(examples):
        mean, std = _posterior(pipeline, torch.stack(pictures), settings.batch_size)
        out |= {"mean": mean, "std": std}
        if settings.flip:
            flipped = torch.stack(pictures).flip(-1)
            mean, std = _posterior(pipeline, flipped, settings.batch_size)
            out |= {"mean_flipped": mean, "std_flipped": std}
    else:  # prompts alone: the teacher draws
        drawing = SamplingSettings(
            settings.steps, settings.guidance_scale, settings.seed, settings.batch_size
        )
        out["mean"] = sample_latents(pipeline, captions, drawing, first)
        out["std"] = torch.zeros_like(out["mean"])
    unique = list(dict.fromkeys(captions))
    embeddings, added = encode_prompts(pipeline, unique)
    place = {caption: i for i, caption in enumerate(unique)}
    out["caption"] = torch.tensor([place[c] for c in captions])
    out["embedding"] = embeddings.half()
    for name, tensor in added.items():
        out[f"added.{name}"] = tensor.half() if name == "text_embeds" else tensor
    return {k: v.half() if k.startswith(("mean", "std")) else v for k, v in out.items()}


def _posterior(pipeline: Any, pictures: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of scaled latents."""
    vae = pipeline.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scale = float(vae.config.scaling_factor)
    parts = [vae.encode(p.to(vae.dtype)).latent_dist for p in pictures.split(batch_size)]
    mean = (torch.cat([p.mean.float() for p in parts]) - shift) * scale
    return mean, torch.cat([p.std.float() for p in parts]) * scale


# --- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Clean latents `[B, C, h, w]` and their conditions."""

    latents: Tensor
    embeddings: Tensor
    added: dict[str, Tensor]


class Cache:
    """A filled cache, or a folder of several, read sample by sample in any order.

    Several caches side by side are one: parts of the data can be encoded on several machines.

    Raises:
        ValueError: not a cache, not complete, made by different networks, or a shard is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        parts = [folder] if (folder / INDEX).exists() else sorted(folder.glob(f"*/{INDEX}"))
        parts = [part.parent if part.name == INDEX else part for part in parts]
        if not parts:
            raise ValueError(f"{folder}: no cache; make one with `bkprune cache`")
        indices = [_read_index(part) for part in parts]
        self.index = dict(indices[0])
        self._shards: list[tuple[Path, int]] = []
        for part, index in zip(parts, indices, strict=True):
            for key in ("vae", "text_encoder", "text_encoder_2", "size"):
                if index.get(key) != self.index.get(key):
                    raise ValueError(
                        f"{part}: made with another {key} than {parts[0]} "
                        f"({index.get(key)} and {self.index.get(key)})"
                    )
            self._shards += [(part / name, n) for name, n in index["shards"]]
        self.index["sources"] = [index.get("source") for index in indices]
        self._starts: list[int] = [0]
        for _, n in self._shards:
            self._starts.append(self._starts[-1] + n)
        self._open: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def order(self, epoch: int, seed: int) -> list[int]:
        """Every sample once, shuffled anew for each epoch.

        Caches of more shards than are held in memory are shuffled by groups of shards, so that each
        shard is read once an epoch.
        """
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        shards = torch.randperm(len(self._starts) - 1, generator=generator).tolist()
        out: list[int] = []
        for first in range(0, len(shards), _N_OPEN):
            group = shards[first : first + _N_OPEN]
            inside = [i for s in group for i in range(self._starts[s], self._starts[s + 1])]
            out += [inside[i] for i in torch.randperm(len(inside), generator=generator).tolist()]
        return out

    def check(self, pipeline: Any) -> None:
        """Refuse a cache that other networks have made.

        Raises:
            ValueError: the VAE or the text encoder is another one; both are named.
        """
        for name in ("vae", "text_encoder", "text_encoder_2"):
            network = getattr(pipeline, name, None)
            made = self.index.get(name)
            if network is not None and made is not None and fingerprint(network) != made:
                raise ValueError(
                    f"{self.folder}: made by another {name} ({made}; the teacher's is "
                    f"{fingerprint(network)}); make it again with `bkprune cache`"
                )

    def batch(self, indices: Iterable[int], generators: Iterable[torch.Generator]) -> Batch:
        """Samples of the posteriors, flipped at random where the cache has both ways round."""
        latents, embeddings = [], []
        added: dict[str, list[Tensor]] = {}
        for index, generator in zip(indices, generators, strict=True):
            shard, row = self._find(index)
            flips = "mean_flipped" in shard and float(torch.rand((), generator=generator)) < 0.5
            way = "_flipped" if flips else ""
            mean, std = shard[f"mean{way}"][row].float(), shard[f"std{way}"][row].float()
            latents.append(mean + std * torch.randn(mean.shape, generator=generator))
            caption = int(shard["caption"][row])
            embeddings.append(shard["embedding"][caption].float())
            for key in (k for k in shard if k.startswith("added.")):
                added.setdefault(key.removeprefix("added."), []).append(shard[key][caption].float())
        stacked = {name: torch.stack(rows) for name, rows in added.items()}
        return Batch(torch.stack(latents), torch.stack(embeddings), stacked)

    def _find(self, index: int) -> tuple[dict[str, Tensor], int]:
        shard = next(i for i in range(len(self._starts) - 1) if index < self._starts[i + 1])
        if shard not in self._open:
            while len(self._open) >= _N_OPEN:
                self._open.pop(next(iter(self._open)))
            self._open[shard] = self._read(shard)
        return self._open[shard], index - self._starts[shard]

    def _read(self, shard: int) -> dict[str, Tensor]:
        path, n = self._shards[shard]
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path}: missing or damaged ({first_line(error)}); make the cache again"
            ) from error
        if len(tensors.get("caption", ())) != n:
            raise ValueError(f"{path}: ends early; make the cache again")
        return tensors


def _read_index(folder: Path) -> dict[str, Any]:
    index = read_json(folder / INDEX)
    if index.get("format") != FORMAT:
        raise ValueError(
            f"{folder}: cache format {index.get('format')}, this version reads {FORMAT}"
        )
    if not index["complete"]:
        raise ValueError(
            f"{folder}: not complete ({index['n']} pairs so far); give the same `bkprune cache` "
            "command again"
        )
    return index


_N_OPEN = 64  # shards held in memory
