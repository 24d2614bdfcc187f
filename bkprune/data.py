"""Image-caption pairs and prompts, as they lie on the disk.

Knows the imagefolder convention (`metadata.jsonl` or `metadata.csv` with `file_name` and `text`),
in a folder or a zip, and says by file and line what is wrong with one. It does not know models.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

_METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Pairs:
    """Captioned images on disk; nothing is decoded before `image` asks for it."""

    source: Path
    rows: tuple[dict[str, str], ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def captions(self) -> list[str]:
        """The captions, in the order of the file."""
        return [row["text"] for row in self.rows]

    def subset(self, indices: Sequence[int]) -> Pairs:
        """These pairs, in this order; an index may come twice."""
        return replace(self, rows=tuple(self.rows[i] for i in indices))

    def split(self, name: str) -> Pairs:
        """The pairs whose `split` column says `name`."""
        return replace(self, rows=tuple(row for row in self.rows if row.get("split") == name))

    def image(self, index: int, size: int) -> Tensor:
        """One image `[3, size, size]` in [-1, 1]: shorter side resized (bicubic), centre crop."""
        return fit(self._open(index), size)

    def picture(self, index: int, size: int | None = None) -> NDArray[np.uint8]:
        """One image `[H, W, 3]` in uint8, resized and cropped where a size is given."""
        image = self._open(index)
        return np.asarray(image) if size is None else fitted(image, size)

    def _open(self, index: int) -> Image.Image:
        name = self.rows[index]["file_name"]
        try:
            data = _Store(self.source).read(name)
            return Image.open(io.BytesIO(data)).convert("RGB")
        except (KeyError, FileNotFoundError):
            raise ValueError(
                f"{self.source}: {name} is in the caption file but not there"
            ) from None
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"{self.source}/{name}: not a readable image ({error})") from error

    def images(self, size: int) -> Tensor:
        """All images `[N, 3, size, size]` in [-1, 1]."""
        return torch.stack([self.image(i, size) for i in range(len(self))])


def fit(image: Image.Image, size: int) -> Tensor:
    """An RGB image as `[3, size, size]` in [-1, 1]: shorter side resized (bicubic), centre crop."""
    return torch.from_numpy(fitted(image, size).copy()).permute(2, 0, 1).float() / 127.5 - 1


def fitted(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """`[size, size, 3]`: shorter side resized (PIL bicubic, antialiased, in uint8), centre crop."""
    scale = size / min(image.size)
    if scale != 1:
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


class _Store:
    """A folder or a zip, read by relative names that may not leave it."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def read(self, name: str) -> bytes:
        parts = PurePosixPath(name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts:
            raise ValueError(f"{self.source}: file name {name!r} leaves the folder; refused")
        if self.source.is_dir():
            return (self.source / name).read_bytes()
        return _archive(self.source, self.source.stat().st_mtime_ns, os.getpid()).read(name)


@functools.lru_cache(maxsize=4)
def _archive(source: Path, changed: int, process: int) -> zipfile.ZipFile:
    """Opened once a process: reading a zip's directory takes longer than reading a picture."""
    return zipfile.ZipFile(source)


def read_pairs(source: Path) -> Pairs:
    """Read the caption file of a folder or zip of images.

    Raises:
        ValueError: missing, empty, without the columns, or not what its name says.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such folder of images")
    store = _Store(source)
    for name in _METADATA:
        try:
            text = store.read(name).decode("utf-8-sig")
            break
        except (KeyError, FileNotFoundError):
            continue
        except (zipfile.BadZipFile, UnicodeDecodeError) as error:
            raise ValueError(f"{source}: unreadable ({error})") from error
    else:
        raise ValueError(
            f"{source}: no metadata.jsonl or metadata.csv in it; each line pairs a file_name with "
            "its text"
        )
    rows = tuple(_rows(source / name, text))
    if not rows:
        raise ValueError(f"{source / name}: no pairs in it")
    return Pairs(source, rows)


def _rows(path: Path, text: str) -> Iterator[dict[str, str]]:
    if path.suffix == ".csv":
        numbered: Iterator[tuple[int, Any]] = enumerate(csv.DictReader(io.StringIO(text)), start=2)
    else:
        numbered = _json_lines(path, text)
    for number, row in numbered:
        missing = {"file_name", "text"} - set(row)
        if missing:
            raise ValueError(
                f"{path}, line {number}: no column {' or '.join(sorted(missing))} "
                f"(found {', '.join(map(str, row))})"
            )
        yield {str(key): str(value) for key, value in row.items()}


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object")
        yield number, row


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: prompts cannot be read ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: no prompts in it")
    return prompts


def read_source(source: str) -> Pairs | list[str]:
    """What `--data` may name: a folder or zip of captioned images, or a text file of prompts."""
    path = Path(source)
    if path.suffix == ".txt":
        return read_prompts(path)
    return read_pairs(path)
