"""Stage 1: captioned emoji from the npm registry, rasterised, with a tenth held out.

It knows the icon sets, how their code points join the CLDR labels, and what is left out: skin-tone
variants (more than half of all images), flags, and single letters of flags. The result is one zip:
`metadata.jsonl` (file_name, text, style, group, split) beside lossless WebP images of 64x64.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image
from recipe import BUILD, DATASET, SIZE, STYLES

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "labels": "emojibase-data@17.0.0",
}
SKIPPED_GROUPS = {2: "component", 9: "flags"}


def fetch(name: str) -> Path:
    """Download one npm package and unpack it; return its folder. Does nothing the second time."""
    folder = BUILD / "npm" / name
    if not (folder / "package" / "package.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", "--pack-destination", str(folder), PACKAGES[name]],
            check=True,
            capture_output=True,
            text=True,
        )
        with tarfile.open(folder / packed.stdout.strip().splitlines()[-1]) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def code_points(hexcode: str) -> str:
    """The join key: lower-case code points without the emoji presentation selector."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def rasterise(icons: dict[str, Any], name: str) -> Image.Image:
    """Draw one icon on white, in RGB, at the size of the model."""
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{SIZE}" height="{SIZE}">'
        f"{icon['body']}</svg>"
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff")
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def is_held_out(label: str, style: str) -> bool:
    """One (caption, style) pair in ten, decided by its name alone: stable under new icons."""
    return hashlib.sha256(f"{style}/{label}".encode()).digest()[0] < 26


def main() -> None:
    labels = read_json(fetch("labels") / "en" / "data.json")
    rows: list[dict[str, Any]] = []
    images: list[bytes] = []
    for style, phrase in STYLES.items():
        package = fetch(style)
        icons, chars = read_json(package / "icons.json"), read_json(package / "chars.json")
        names = {code_points(points): name for points, name in chars.items()}
        for entry in labels:
            name = names.get(code_points(entry["hexcode"]))
            if (
                name is None
                or name not in icons["icons"]
                or entry.get("group", 2) in SKIPPED_GROUPS
            ):
                continue
            buffer = io.BytesIO()
            rasterise(icons, name).save(buffer, "WEBP", lossless=True, quality=100, method=4)
            images.append(buffer.getvalue())
            label = entry["label"].lower()
            rows.append(
                {
                    "file_name": f"{style}/{code_points(entry['hexcode'])}.webp",
                    "text": f"{label}, {phrase}",
                    "style": style,
                    "group": entry["group"],
                    "split": "heldout" if is_held_out(label, style) else "train",
                }
            )
    beside = DATASET.with_suffix(".part")
    with zipfile.ZipFile(beside, "w") as archive:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        archive.writestr(zipfile.ZipInfo("metadata.jsonl"), text, zipfile.ZIP_DEFLATED)
        for row, data in zip(rows, images, strict=True):
            archive.writestr(zipfile.ZipInfo(row["file_name"]), data)
    os.replace(beside, DATASET)
    held_out = sum(row["split"] == "heldout" for row in rows)
    print(f"{DATASET}: {len(rows)} pairs, {held_out} held out, {DATASET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
