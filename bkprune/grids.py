"""Pictures side by side, as rows and columns of one labelled PNG.

Knows how tensors become one labelled PNG. It does not know who drew them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_LEFT, _TOP, _GAP = 76, 30, 2


def grid_png(
    rows: Mapping[str, Tensor], captions: Sequence[str] = (), scale: int = 1, left: int = _LEFT
) -> bytes:
    """PNG bytes of labelled rows of pictures `[N, 3, H, W]` in [0, 1].

    Args:
        rows: pictures by label: one row a model, with captions above.
        captions: one a column.
        scale: whole pixels for one.
        left: pixels for the labels.
    """
    first = next(iter(rows.values()))
    n, _, height, width = first.shape
    height, width = height * scale, width * scale
    top = _TOP if captions else _GAP
    size = (left + n * (width + _GAP), top + len(rows) * (height + _GAP))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, caption in enumerate(captions[:n]):
        _wrapped(pen, (left + i * (width + _GAP), 2), caption, width, font)
    for r, (label, pictures) in enumerate(rows.items()):
        y = top + r * (height + _GAP)
        _wrapped(pen, (4, y + 4), label, left - 6, font, lines=4)
        for i, picture in enumerate(pictures):
            array = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            tile = Image.fromarray(np.ascontiguousarray(array))
            if scale != 1:
                tile = tile.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + i * (width + _GAP), y))
    buffer = io.BytesIO()
    sheet.save(buffer, format="png")
    return buffer.getvalue()


def _wrapped(
    pen: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    width: int,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    lines: int = 2,
) -> None:
    """Text broken at spaces, as many lines as there is room for."""
    out: list[str] = [""]
    for word in text.split():
        longer = f"{out[-1]} {word}".strip()
        if out[-1] and pen.textlength(longer, font=font) > width:
            out.append(word)
        else:
            out[-1] = longer
    for i, line in enumerate(out[:lines]):
        pen.text((place[0], place[1] + 13 * i), line, fill="black", font=font)
