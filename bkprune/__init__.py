"""bkprune: fit a Stable Diffusion checkpoint to a budget by removing blocks, with the evidence."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bkprune.blocks import Block, Inventory
    from bkprune.bypass import PrunedUNet, Replay, bypassed
    from bkprune.models import load
    from bkprune.presets import preset

__version__ = "0.1.0"
__all__ = ["Block", "Inventory", "PrunedUNet", "Replay", "bypassed", "load", "preset"]

_HOMES = {
    "Block": "blocks",
    "Inventory": "blocks",
    "PrunedUNet": "bypass",
    "Replay": "bypass",
    "bypassed": "bypass",
    "load": "models",
    "preset": "presets",
}


def __getattr__(name: str) -> Any:
    """Load a public name at its first use, so that `import bkprune` stays free of torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bkprune' has no attribute {name!r}")
    return getattr(import_module(f"bkprune.{_HOMES[name]}"), name)
