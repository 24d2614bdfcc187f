"""Image-caption pairs in every form people keep them in, as one stream.

Knows folders and zips with a caption file, text files beside pictures, webdataset shards (local or
by URL, read once from front to back) and Hugging Face datasets on disk. Whatever cannot be read
comes as a complaint in place of a pair. It does not know models.
"""

from __future__ import annotations

import io
import json
import tarfile
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bkprune.data import Pairs, fit, read_prompts, read_source
from bkprune.study import digest

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
Example = tuple[Tensor | None, str]


@dataclass(frozen=True)
class Source:
    """A stream of pairs, what it is called, and how many there are where that is known.

    `split` keeps the rows of a caption file whose column `split` says so.
    """

    text: str
    split: str | None = None

    def examples(self, size: int) -> Iterator[Example | str]:
        """Pictures `[3, size, size]` in [-1, 1] with captions, in the source's own order.

        Raises:
            ValueError: nothing there, no captions, or a form that needs a missing package.
        """
        path = Path(self.text)
        if self.is_shards:
            return _webdataset(self.text, size)
        if path.is_dir() and (path / "dataset_info.json").exists():
            return _hugging_face(path, size)
        if path.is_dir() and not _has_captions(path):
            return _beside(path, size)
        found = self._read()
        if isinstance(found, Pairs):
            return _pairs(found, size)
        return ((None, prompt) for prompt in found)

    @property
    def is_shards(self) -> bool:
        """Whether it is read as webdataset shards."""
        return ".tar" in self.text or self.text.startswith(("http://", "https://", "pipe:"))

    @property
    def n(self) -> int | None:
        """How many pairs there are, or None where only reading would tell."""
        path = Path(self.text)
        if self.is_shards or (path.is_dir() and not _has_captions(path)):
            return None
        return len(self._read())

    @property
    def key(self) -> str:
        """Changes when the source's name or caption file does."""
        path = Path(self.text)
        if self.is_shards or (path.is_dir() and not _has_captions(path)):
            return digest([self.text])
        found = self._read()
        return digest(found.rows if isinstance(found, Pairs) else found)

    def _read(self) -> Pairs | list[str]:
        path = Path(self.text)
        if path.suffix == ".txt":
            return read_prompts(path)
        found = read_source(self.text)
        if isinstance(found, Pairs) and self.split is not None:
            found = found.split(self.split)
            if not len(found):
                raise ValueError(f"{self.text}: no row with split {self.split!r}")
        return found


def _has_captions(path: Path) -> bool:
    return any((path / name).exists() for name in ("metadata.jsonl", "metadata.csv"))


def _pairs(pairs: Pairs, size: int) -> Iterator[Example | str]:
    for i, caption in enumerate(pairs.captions):
        try:
            yield pairs.image(i, size), caption
        except ValueError as error:
            yield str(error)


def _beside(folder: Path, size: int) -> Iterator[Example | str]:
    """Pictures with a `.txt` of the same name beside them."""
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _PICTURES)
    if not pictures:
        raise ValueError(
            f"{folder}: no pictures in it; give a folder with metadata.jsonl, metadata.csv or a "
            ".txt beside each picture"
        )

    def stream() -> Iterator[Example | str]:
        for path in pictures:
            beside = path.with_suffix(".txt")
            if not beside.exists():
                yield f"{path}: no caption ({beside.name} is not there)"
                continue
            try:
                caption = beside.read_text(encoding="utf-8").strip()
                yield _picture(path.read_bytes(), size), caption
            except (UnidentifiedImageError, OSError, SyntaxError, UnicodeDecodeError) as error:
                yield f"{path}: not readable ({error})"

    return stream()


def _picture(data: bytes, size: int) -> Tensor:
    return fit(Image.open(io.BytesIO(data)).convert("RGB"), size)


def _webdataset(text: str, size: int) -> Iterator[Example | str]:
    try:
        import webdataset
    except ImportError:
        raise ValueError(
            f"{text}: webdataset shards need the package webdataset: pip install 'bkprune[train]'"
        ) from None
    urls = webdataset.shardlists.expand_urls(text)

    def stream() -> Iterator[Example | str]:
        for url in urls:
            yield from _one_shard(url, size)

    return stream()


def _one_shard(url: str, size: int) -> Iterator[Example | str]:
    from webdataset import tariterators
    from webdataset.gopen import gopen

    complaints: list[str] = []

    def keep(error: Exception) -> bool:
        complaints.append(f"{url}: {type(error).__name__}: {error}")
        return isinstance(error, tarfile.TarError | OSError | EOFError | ValueError)

    try:
        with gopen(url, "rb") as opened:
            files = tariterators.tar_file_expander([{"url": url, "stream": opened}], handler=keep)
            for sample in tariterators.group_by_keys(files, handler=keep):
                yield _of_shard(sample, size)
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(f"{url}: cannot be read ({error})") from error
    yield from complaints


def _of_shard(sample: dict[str, Any], size: int) -> Example | str:
    name = f"{sample.get('__url__', '')}/{sample.get('__key__', '?')}"
    data = next((sample[k[1:]] for k in _PICTURES if k[1:] in sample), None)
    caption = sample.get("txt") or sample.get("caption")
    try:
        if caption is None and "json" in sample:
            fields = json.loads(sample["json"])
            caption = str(fields.get("caption") or fields.get("text") or "").encode() or None
        if data is None or caption is None:
            missing = "picture" if data is None else "caption (txt, or json with caption)"
            return f"{name}: no {missing}"
        return _picture(data, size), caption.decode("utf-8").strip()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        return f"{name}: not readable ({error})"


def _hugging_face(path: Path, size: int) -> Iterator[Example | str]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{path}: a Hugging Face dataset needs the package datasets: "
            "pip install 'bkprune[train]'"
        ) from None
    try:
        rows = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a dataset ({error})") from error
    names = getattr(rows, "column_names", [])
    image = next((n for n in ("image", "jpg", "png") if n in names), None)
    text = next((n for n in ("text", "caption", "prompt") if n in names), None)
    if image is None or text is None:
        raise ValueError(
            f"{path}: columns image and text (or caption) are expected, found {', '.join(names)}"
        )
    rows = rows.cast_column(image, datasets.Image(decode=False))

    def stream() -> Iterator[Example | str]:
        for i, row in enumerate(rows):
            try:
                data = row[image]["bytes"] or Path(row[image]["path"]).read_bytes()
                yield _picture(data, size), str(row[text])
            except (UnidentifiedImageError, OSError, SyntaxError, TypeError, KeyError) as error:
                yield f"{path}, row {i}: not readable ({error})"

    return stream()
