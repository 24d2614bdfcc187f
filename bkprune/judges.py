"""The networks and real pictures at hand, and which metrics they allow.

Knows what each metric needs and which file is missing for it. Nothing is replaced by something else
in silence: a metric asked for without its network is an error that says where the network is. It
does not know generated pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bkprune import inception, lpips
from bkprune.clip import ClipScore
from bkprune.data import read_pairs
from bkprune.features import (
    ClipRows,
    InceptionRows,
    Network,
    Reference,
    load_reference,
    rows_of,
)
from bkprune.lpips import Lpips
from bkprune.metrics import Moments
from bkprune.models import BUILT_IN
from bkprune.pictures import picture_files, read_picture
from bkprune.protocols import CLIP_METRICS, INCEPTION_METRICS, PAIRED_METRICS, Protocol
from bkprune.study import digest

Progress = Callable[[int, int, str], None]
_KERNELS = ("kid", "kernel_clip")


@dataclass(frozen=True)
class Nets:
    """Where networks and real pictures are; None is not given."""

    inception: Path | None = None
    clip: Path | None = None
    lpips: Path | None = None
    reference: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Judges:
    """The networks that look at pictures, and real pictures' statistics by network name."""

    inception: InceptionRows | None = None
    clip: ClipRows | None = None
    lpips: Lpips | None = None
    references: Mapping[str, Reference] = field(default_factory=dict)


def affordable(
    asked: tuple[str, ...] | None, protocol: Protocol, nets: Nets, *, has_teacher: bool
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The metrics that can be measured, and what the others of the protocol's list would need.

    Raises:
        ValueError: one that was asked for by name, or by a published protocol, cannot be.
    """
    lacks: dict[str, str] = {}
    if nets.inception is None:
        need = f"--inception FILE ({inception.WEIGHTS}, from {inception.WHERE})"
        lacks |= dict.fromkeys(INCEPTION_METRICS, need)
    if nets.clip is None and protocol.name != "emoji":
        need = "--clip DIR (a CLIPModel folder of transformers)"
        lacks |= dict.fromkeys(CLIP_METRICS, need)
    if nets.lpips is None:
        lacks["lpips"] = f"--lpips FILE ({lpips.WEIGHTS}, from {lpips.WHERE})"
    if not has_teacher:
        need = "--teacher MODEL, which pictures are compared with"
        lacks |= dict.fromkeys((*PAIRED_METRICS, "output_error"), need)
    wanted = asked or protocol.metrics
    left_out = {name: lacks[name] for name in wanted if name in lacks}
    if left_out and (asked is not None or protocol.name == "coco30k"):
        name, need = next(iter(left_out.items()))
        raise ValueError(f"{name} needs {need}")
    return tuple(name for name in wanted if name not in lacks), left_out


def load_judges(
    nets: Nets,
    metrics: tuple[str, ...],
    protocol: Protocol,
    cache: Path,
    progress: Progress = lambda done, total, what: None,
) -> tuple[Judges, dict[str, str]]:
    """Networks and references for these metrics, and by metric what it is measured with.

    Raises:
        ValueError: a file is missing, is something else, or was made by another network.
    """
    wanted, how = set(metrics), dict[str, str]()
    seeing = clip = None
    if nets.inception is not None and wanted & set(INCEPTION_METRICS):
        seeing = InceptionRows(nets.inception, nets.device)
    if wanted & set(CLIP_METRICS):
        clip = ClipRows(ClipScore.load(nets.clip), nets.device)
    references: dict[str, Reference] = {}
    for network, names, distances in (
        (seeing, INCEPTION_METRICS, ("fid", "kid")),
        (clip, CLIP_METRICS, ("frechet_clip", "kernel_clip")),
    ):
        if network is None:
            continue
        how |= dict.fromkeys(names, f"{network.key}; {network.resize}")
        if not wanted & set(distances):
            continue
        found = _reference(nets.reference, network, protocol, cache, progress)
        if wanted & set(distances) & set(_KERNELS) and found.features is None:
            raise ValueError(
                f"{nets.reference}: holds no features, which a kernel distance needs; make it with "
                "`bkprune stats --features`"
            )
        references[network.name] = found
        for name in distances:
            how[name] += f"; against {found.words}"
    far = Lpips.load(nets.lpips) if nets.lpips and "lpips" in wanted else None
    return Judges(seeing, clip, far, references), how


def _reference(
    given: str | None, network: Network, protocol: Protocol, cache: Path, progress: Progress
) -> Reference:
    if given is None and protocol.name == "emoji":
        given = "emoji"
    if given is None:
        raise ValueError(
            "a distance needs --reference: a folder of real pictures, or the .npz that `bkprune "
            "stats` or pytorch-fid makes of them"
        )
    if given.endswith(".npz"):
        return load_reference(Path(given), network)
    return real_statistics(given, network, protocol.size, cache, progress)


def real_statistics(
    source: str, network: Network, size: int | None, cache: Path, progress: Progress
) -> Reference:
    """Statistics of a folder of pictures, of a zip of pairs, or of the built-in pictures.

    Raises:
        ValueError: no pictures there, or unreadable ones.
    """
    picture, n, key = _real_pictures(source, size)
    name = f"{network.name}-{digest([network.key, key, size])[:8]}.npy"
    what = f"{network.name} features of {source}"
    rows = rows_of(cache / name, picture, n, network, progress, what)
    features = rows[:, : network.width]
    return Reference(Moments.of(features), features, f"{n} pictures of {Path(source).name}")


def _real_pictures(source: str, size: int | None) -> tuple[Any, int, str]:
    path = Path(source)
    if source in BUILT_IN and not path.exists():
        path = BUILT_IN[source] / "pairs.zip"
    if path.suffix == ".zip":
        pairs = read_pairs(path)
        return lambda i: pairs.picture(i, size), len(pairs), digest(pairs.rows)
    if not path.is_dir():
        raise ValueError(f"{source}: no such folder of real pictures, zip of pairs, or .npz")
    found = picture_files(path)
    sizes = [[str(p), p.stat().st_size] for p in found]
    return lambda i: read_picture(found[i], size), len(found), digest(sizes)
