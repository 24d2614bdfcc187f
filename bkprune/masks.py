"""How masks are written down: published names, names and globs, and files.

Knows what a mask file holds (the removed names, a digest of the U-Net they were chosen for, a stamp
over both) and refuses one that was made for another U-Net or edited since. It does not know what a
mask costs or does.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bkprune.blocks import Inventory, Mask, Plan
from bkprune.presets import PRESETS, preset
from bkprune.study import digest


def mask_record(
    removed: Collection[str], inventory: Inventory, plan: Plan | None = None
) -> dict[str, Any]:
    """What a mask file says of its mask; writers may add what they like beside it.

    Keys: `removed` in order of execution, `plan` (what stands in for each), `blocks` (digest of the
    U-Net's inventory), `stamp` (digest of the three).
    """
    mask = inventory.expand(removed)
    record: dict[str, Any] = {
        "removed": [name for name in inventory.names if name in mask],
        "plan": dict(plan or inventory.plan(mask)),
        "blocks": digest(inventory.rows()),
    }
    return {**record, "stamp": digest(record)}


def read_mask(text: str, inventory: Inventory) -> Mask:
    """A mask as a user gives it: a preset's name, a file, or comma-separated names and globs.

    Files: JSON with `removed` (winner.json, mask.json), a JSON list, or one name a line.

    Raises:
        ValueError: unknown names, an unreadable file, one made for another U-Net, or one whose
            stamp does not fit.
    """
    if text in PRESETS:
        return preset(text, inventory)
    path = Path(text)
    if path.is_dir():
        path = path / "mask.json"
    if path.suffix in (".json", ".txt") or path.is_file():
        return _from_file(path, inventory)
    return inventory.expand(_names(text.split(",")))


def _names(words: Collection[str]) -> set[str]:
    names = {word.strip() for word in words}
    return {name for name in names if name and not name.startswith("#")}


def _from_file(path: Path, inventory: Inventory) -> Mask:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the mask cannot be read ({error})") from error
    if path.suffix != ".json":
        return _expanded(path, inventory, _names(content.splitlines()))
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    names = value.get("removed") if isinstance(value, dict) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: a list of block names is expected, by itself or as `removed`")
    if isinstance(value, dict) and "stamp" in value:
        _check(path, value, inventory)
    return _expanded(path, inventory, set(names))


def _check(path: Path, value: dict[str, Any], inventory: Inventory) -> None:
    signed = {key: value.get(key) for key in ("removed", "plan", "blocks")}
    if value["stamp"] != digest(signed):
        raise ValueError(
            f"{path}: its stamp {value['stamp']!r} does not fit its mask: edited since it was "
            "written, or torn; make it again, or give the names themselves"
        )
    ours = digest(inventory.rows())
    if value["blocks"] != ours:
        raise ValueError(
            f"{path}: made for another U-Net (blocks {value['blocks']}, this one {ours}, "
            f"{len(inventory)} blocks); give the names themselves to use them here all the same"
        )


def _expanded(path: Path, inventory: Inventory, names: set[str]) -> Mask:
    try:
        return inventory.expand(names) if names else frozenset()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
