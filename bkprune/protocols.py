"""What is drawn and measured under a protocol's name, and where prompts come from.

Knows the published protocol of BK-SDM, that of the built-in model, and prompt files. It does not
know how anything is drawn or measured.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bkprune.data import Pairs, read_pairs, read_prompts
from bkprune.models import BUILT_IN
from bkprune.sampling import SamplingSettings

_CAPTIONS = ("text", "caption", "prompt")
INCEPTION_METRICS = ("fid", "kid", "is")
CLIP_METRICS = ("clip_score", "frechet_clip", "kernel_clip")
PAIRED_METRICS = ("lpips", "psnr", "ssim")
SPEED = "speed"
CHOICES = (*INCEPTION_METRICS, *CLIP_METRICS, *PAIRED_METRICS, "output_error", SPEED)


@dataclass(frozen=True)
class Protocol:
    """Settings that make numbers comparable.

    Attributes:
        name: as in the tables.
        sampling: how pictures are drawn.
        n: how many, where the user does not say; 0 is one a prompt.
        size: pixels that pictures are reduced to before anything looks at them, or None.
        metrics: what is measured, where the user does not say.
        keeps_checker: whether a model's safety checker stays in.
    """

    name: str
    sampling: SamplingSettings
    n: int = 0
    size: int | None = None
    metrics: tuple[str, ...] = ()
    keeps_checker: bool = True


PROTOCOLS = {
    p.name: p
    for p in (
        # 30,000 captions of MS-COCO val2014; arXiv 2305.15798, section 4.1
        Protocol(
            "coco30k",
            SamplingSettings(25, 7.5, 1234, scheduler="pndm"),
            n=30_000,
            size=256,
            metrics=("fid", "is", "clip_score"),
            keeps_checker=False,
        ),
        # captions that neither the built-in model nor its students were trained on
        Protocol(
            "emoji",
            SamplingSettings(25, 3.0, 1234, scheduler="ddim"),
            metrics=("clip_score", "frechet_clip", "psnr", "ssim", "output_error", SPEED),
        ),
        Protocol(
            "own",
            SamplingSettings(25, 7.5, 1234),
            metrics=("clip_score", "psnr", "ssim", "output_error", SPEED),
        ),
    )
}


@dataclass(frozen=True)
class Prompts:
    """What is drawn, and the real pictures that go with it where there are any.

    Attributes:
        texts: one prompt each; more pictures than prompts take them in turn, with other seeds.
        pairs: their pictures.
        words: where they come from.
    """

    texts: list[str]
    pairs: Pairs | None
    words: str

    def __getitem__(self, index: int) -> str:
        return self.texts[index % len(self.texts)]

    @property
    def n_duplicates(self) -> int:
        """How many prompts repeat an earlier one."""
        return len(self.texts) - len(Counter(self.texts))


def read(source: str | None, protocol: Protocol, n: int | None = None) -> Prompts:
    """Prompts of a file (.txt, .csv, .jsonl), of captioned pictures, or of the protocol.

    The built-in captions lie by group, faces first: where fewer pictures than captions are asked
    for, n captions evenly spread over all are taken.

    Raises:
        ValueError: nothing there, no column with captions, an empty caption.
    """
    if source is None and protocol.name == "emoji":
        held = read_pairs(BUILT_IN["emoji"] / "pairs.zip").split("heldout")
        if n is not None and n < len(held):
            held = held.subset([i * len(held) // n for i in range(n)])
        return Prompts(held.captions, held, "held-out captions of the built-in pairs")
    if source is None:
        what = "MS-COCO captions, e.g. metadata.csv" if protocol.name == "coco30k" else "prompts"
        raise ValueError(
            f"protocol {protocol.name}: give --prompts FILE ({what}; .txt with a prompt a line, or "
            ".csv or .jsonl with a column text)"
        )
    path = Path(source)
    if path.is_dir() or path.suffix == ".zip":
        pairs = read_pairs(path)
        return Prompts(pairs.captions, pairs, path.name)
    if path.suffix in (".csv", ".jsonl"):
        return Prompts(_table(path), None, path.name)
    return Prompts(read_prompts(path), None, path.name)


def _table(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows: list[dict[str, Any]]
        if path.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: prompts cannot be read ({error})") from error
    if not rows:
        raise ValueError(f"{path}: no prompts in it")
    out = []
    for number, row in enumerate(rows, start=2 if path.suffix == ".csv" else 1):
        column = next((c for c in _CAPTIONS if c in row), None)
        if column is None:
            raise ValueError(
                f"{path}, line {number}: no column {', '.join(_CAPTIONS)} (found "
                f"{', '.join(map(str, row))})"
            )
        caption = str(row[column] or "").strip()
        if not caption:
            raise ValueError(f"{path}, line {number}: the prompt is empty")
        out.append(caption)
    return out
