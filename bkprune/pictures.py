"""A folder of generated pictures: numbered PNGs written whole or not at all, and their manifest.

Knows file names, what is still missing, what was wrong with a picture (it is written into the PNG),
and that pictures of other settings never end up in one folder. It does not know how they are drawn.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from bkprune.data import fitted
from bkprune.single_file import read_json
from bkprune.study import digest, write_atomic

MANIFEST = "manifest.json"
_TROUBLE = "bkprune:trouble"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Picture = NDArray[np.uint8]  # [H, W, 3]


class PictureFolder:
    """Pictures 0, 1, 2, ... of one model under one set of settings.

    Args:
        folder: is made if it is not there.
        manifest: what makes the pictures what they are, JSON-ready.

    Raises:
        ValueError: the folder holds pictures of something else.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, dict(manifest)
        path = folder / MANIFEST
        if path.exists():
            if digest(read_json(path)) != digest(self.manifest):
                raise ValueError(f"{path}: these pictures were drawn otherwise; use another folder")
        else:
            text = json.dumps(self.manifest, indent=1, default=str) + "\n"
            write_atomic(path, text.encode())

    def path(self, index: int) -> Path:
        """Where a picture lies: a thousand to a folder."""
        return self.folder / f"{index // 1000:03d}" / f"{index:06d}.png"

    def is_there(self, index: int) -> bool:
        """Whether a picture has been drawn."""
        return self.path(index).exists()

    def missing(self, n: int) -> list[int]:
        """Which of the first n pictures are still to be drawn."""
        have: set[str] = set()
        for start in range(0, n, 1000):
            have.update(p.name for p in self.path(start).parent.glob("*.png"))
        return [i for i in range(n) if self.path(i).name not in have]

    def save(self, index: int, picture: Picture, trouble: str = "") -> None:
        """Write one picture, whole or not at all."""
        about = PngInfo()
        if trouble:
            about.add_text(_TROUBLE, trouble)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="png", pnginfo=about)
        write_atomic(self.path(index), buffer.getvalue())

    def load(self, index: int) -> Picture:
        """One picture.

        Raises:
            ValueError: not there, or damaged.
        """
        return np.asarray(_open(self.path(index)).convert("RGB"))

    def trouble(self, index: int) -> str:
        """What was wrong with a picture: not_finite, flagged, black, or nothing."""
        image = _open(self.path(index))
        noted = str(getattr(image, "text", {}).get(_TROUBLE, ""))
        if noted:
            return noted
        return "black" if image.convert("L").getextrema() == (0, 0) else ""


def picture_files(folder: Path) -> list[Path]:
    """All picture files below a folder, in the order of their names.

    Raises:
        ValueError: none there.
    """
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
    if not found:
        raise ValueError(f"{folder}: no pictures in it ({', '.join(_SUFFIXES)})")
    return found


def read_picture(path: Path, size: int | None) -> Picture:
    """A picture file as RGB; with a size, shorter side resized (PIL bicubic) and centre-cropped."""
    image = _open(path).convert("RGB")
    return np.asarray(image) if size is None else fitted(image, size)


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such picture") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not a readable picture ({error})") from error
    return image
