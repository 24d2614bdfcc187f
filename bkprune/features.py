"""Features of pictures by a network, kept on the disk row by row, and statistics of real pictures.

Knows how pictures stream through a network in flat memory and go on after a kill, and the .npz
files that reference statistics come in: pytorch-fid's and our own, which name their network. It
does not know metrics' formulas.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bkprune.clip import ClipScore
from bkprune.inception import N_CLASSES, WIDTH, Inception
from bkprune.metrics import Features, Moments
from bkprune.models import fingerprint
from bkprune.study import write_atomic

Progress = Callable[[int, int, str], None]
Picture = NDArray[np.uint8]
BATCH = 32
_NOTE_EVERY = 20  # batches between two notes of how far it is


class Network(Protocol):
    """What turns pictures into rows.

    Attributes:
        name: `inception` or `clip`.
        key: names the weights and the resize.
        width: of the features; a row may have more columns after them.
        columns: of a row.
        resize: how pictures come to the network's size, for people.
    """

    name: str
    key: str
    width: int
    columns: int
    resize: str

    def rows(self, pictures: Tensor) -> Tensor:
        """`[N, columns]` of pictures `[N, 3, H, W]` in uint8."""


class InceptionRows:
    """2,048 features and 1,008 logits."""

    name, width, columns = "inception", WIDTH, WIDTH + N_CLASSES
    resize = "TensorFlow 1 bilinear to 299, no antialiasing"

    def __init__(self, weights: Path, device: str = "cpu") -> None:
        self._network = Inception.load(weights).to(device)
        self._device = device
        self.key = f"inception:{fingerprint(self._network)}"

    def rows(self, pictures: Tensor) -> Tensor:
        """Features and logits side by side."""
        return torch.cat(self._network(pictures.to(self._device)), 1).cpu()


class ClipRows:
    """Unit vectors of CLIP."""

    name = "clip"
    resize = "PIL bicubic, antialiased, in uint8"

    def __init__(self, clip: ClipScore, device: str = "cpu") -> None:
        self.clip = clip
        clip.model.to(device)
        self.key = f"clip:{fingerprint(clip.model)}"
        self.width = self.columns = clip.width

    def rows(self, pictures: Tensor) -> Tensor:
        """Features."""
        return self.clip.image_features(pictures.float() / 255)


def rows_of(
    path: Path,
    picture: Callable[[int], Picture],
    n: int,
    network: Network,
    progress: Progress = lambda done, total, what: None,
    what: str = "features",
) -> Features:
    """Rows `[n, columns]` of pictures 0 to n - 1, memory-mapped; goes on where a kill has stopped.

    Args:
        path: an .npy file; rows that it has are kept.
        picture: gives a picture by its number.
        n: how many.
        network: makes the rows.
        progress: told how many pictures are done.
        what: for the progress bar.
    """
    note = path.with_suffix(".json")
    have = _noted(note, path, network)
    if have >= n:
        whole: Features = np.load(path, mmap_mode="r")[:n]
        return whole
    path.parent.mkdir(parents=True, exist_ok=True)
    growing = path.with_suffix(".growing.npy")
    rows = np.lib.format.open_memmap(growing, "w+", np.float32, (n, network.columns))
    if have:
        rows[:have] = np.load(path, mmap_mode="r")[:have]
    os.replace(growing, path)
    for at, start in enumerate(range(have, n, BATCH)):
        stop = min(start + BATCH, n)
        rows[start:stop] = _rows([picture(i) for i in range(start, stop)], network).numpy()
        progress(stop, n, what)
        if at % _NOTE_EVERY == 0 or stop == n:
            rows.flush()
            told = {"network": network.key, "done": stop}
            write_atomic(note, (json.dumps(told) + "\n").encode())
    return rows


def _noted(note: Path, path: Path, network: Network) -> int:
    if not note.exists() or not path.exists():
        return 0
    try:
        told = json.loads(note.read_text(encoding="utf-8"))
        n, columns = np.load(path, mmap_mode="r").shape
        is_ours = told["network"] == network.key and columns == network.columns
        return min(int(told["done"]), n) if is_ours else 0
    except (ValueError, KeyError, OSError):
        return 0


def _rows(pictures: list[Picture], network: Network) -> Tensor:
    """Pictures of one size go through the network together."""
    tensors = [torch.from_numpy(p.copy()).permute(2, 0, 1) for p in pictures]
    if len({t.shape for t in tensors}) == 1:
        return network.rows(torch.stack(tensors))
    return torch.cat([network.rows(t[None]) for t in tensors])


# --- statistics of real pictures -------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What generated pictures are compared with.

    Attributes:
        moments: mean and covariance of the features.
        features: `[n, D]` where they are at hand: kernel distances need them.
        words: where they come from, for people.
    """

    moments: Moments
    features: Features | None
    words: str


def save_reference(
    path: Path, features: Features, network: Network, size: int | None, *, keep_features: bool
) -> None:
    """Write mu, sigma (pytorch-fid's names), how many, by which network, at which size."""
    moments = Moments.of(features)
    arrays: dict[str, Any] = {
        "mu": moments.mean,
        "sigma": moments.cov,
        "n": np.array(moments.n),
        "network": np.array(network.key),
        "size": np.array(size or 0),
    }
    if keep_features:
        arrays["features"] = np.asarray(features, np.float32)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def load_reference(path: Path, network: Network) -> Reference:
    """Read statistics, ours or pytorch-fid's, for this network.

    pytorch-fid's files do not name their network: they are taken for Inception's, 2,048 wide.

    Raises:
        ValueError: not there, damaged, or of another network.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such statistics; make them with `bkprune stats IMAGES`")
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
        mean, cov = found["mu"].astype(np.float64), found["sigma"].astype(np.float64)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no mu and sigma to be read in it ({error})") from error
    made_by = str(found["network"]) if "network" in found else ""
    if mean.shape != (network.width,) or cov.shape != (network.width, network.width):
        raise ValueError(
            f"{path}: statistics of {mean.size} features, where {network.name} has {network.width}"
        )
    if made_by and made_by != network.key:
        raise ValueError(f"{path}: made by network {made_by}, not by {network.key}")
    if not made_by and network.name != "inception":
        raise ValueError(f"{path}: does not name its network, so it is not taken for CLIP's")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"{path}: NaN or infinite statistics")
    n = int(found["n"]) if "n" in found else 0
    features = found.get("features")
    return Reference(Moments(mean, cov, n or 2 * network.width), features, path.name)
