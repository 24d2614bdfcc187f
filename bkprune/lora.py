"""LoRA files made for the teacher, on a U-Net that has lost some of its blocks.

Knows which of a file's tensors belong to removed blocks (they are skipped and counted), how names
change in a plain twin, and when a file is for another architecture altogether. peft does the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bkprune.single_file import read_header, some_names

_PREFIX = "unet."


@dataclass(frozen=True)
class LoraReport:
    """What became of a file: tensors loaded and skipped, and the removed blocks skipped for."""

    n_loaded: int
    n_skipped: int
    blocks: tuple[str, ...]


def load_lora(
    pipeline: Any,
    path: Path | str,
    record: Mapping[str, Any] | None = None,
    adapter_name: str = "default",
) -> LoraReport:
    """Attach a LoRA that was trained on the teacher; what belongs to removed blocks is left out.

    Args:
        pipeline: with the pruned U-Net.
        path: a `.safetensors` file.
        record: content of the folder's mask.json; a `PrunedUNet` knows it by itself.
        adapter_name: peft's name of it.

    Raises:
        ValueError: not a safetensors file, damaged, without a tensor for the U-Net, or for another
            architecture; peft is missing.
    """
    _need_peft()
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a .safetensors file is expected; pickled LoRA files are refused")
    read_header(path)
    state, alphas, metadata = pipeline.lora_state_dict(str(path), return_lora_metadata=True)
    removed, own_names = _removed(pipeline.unet, record)
    kept: dict[str, Tensor] = {}
    skipped: list[str] = []
    gone: set[str] = set()
    strange: list[str] = []
    for key, tensor in state.items():
        if not key.startswith(_PREFIX):
            kept[key] = tensor
            continue
        name = key.removeprefix(_PREFIX)
        block = _block(name, removed)
        if block is not None:
            skipped.append(key)
            gone.add(block)
            continue
        own = _own_name(name, own_names)
        if not _fits(pipeline.unet, own, tensor):
            strange.append(name)
        kept[_PREFIX + own] = tensor
    n_unet = sum(key.startswith(_PREFIX) for key in kept)
    if strange or not n_unet:
        what = some_names(sorted(strange)) if strange else "no tensor for a U-Net of this kind"
        raise ValueError(f"{path}: a LoRA of another architecture: {what}")
    if skipped:
        warnings.warn(
            f"{path.name}: {len(skipped)} of {len(state)} tensors skipped, for {len(gone)} blocks "
            f"that this U-Net has not ({some_names(sorted(gone))})",
            stacklevel=2,
        )
    if alphas:
        alphas = {_alpha_name(k, own_names): v for k, v in alphas.items() if not _block_of(k, gone)}
    pipeline.load_lora_into_unet(
        kept,
        network_alphas=alphas,
        unet=pipeline.unet,
        adapter_name=adapter_name,
        metadata=metadata if not own_names else None,
        _pipeline=pipeline,
    )
    return LoraReport(len(kept), len(skipped), tuple(sorted(gone)))


def _need_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ValueError("LoRA needs the package peft: pip install 'bkprune[lora]'") from None


def _removed(
    unet: nn.Module, record: Mapping[str, Any] | None
) -> tuple[frozenset[str], dict[str, str]]:
    """Names that are gone, and the teacher's name -> own name of the others."""
    if record is None:
        config: Any = unet.config
        return frozenset(config.get("plan") or {}), {}
    renamed = {teacher: own for own, teacher in record.get("modules", {}).items()}
    return frozenset(record["plan"]) | frozenset(record["removed"]), renamed


def _block(name: str, removed: frozenset[str]) -> str | None:
    parts = name.split(".")
    return next((b for n in (3, 4) if (b := ".".join(parts[:n])) in removed), None)


def _block_of(alpha: str, gone: set[str]) -> bool:
    name = alpha.removeprefix(_PREFIX)
    return _block(name, frozenset(gone)) is not None


def _own_name(name: str, renamed: Mapping[str, str]) -> str:
    parts = name.split(".")
    for n in (3, 4):
        module = ".".join(parts[:n])
        if module in renamed:
            return ".".join([renamed[module], *parts[n:]])
    return name


def _alpha_name(key: str, renamed: Mapping[str, str]) -> str:
    return _PREFIX + _own_name(key.removeprefix(_PREFIX), renamed)


def _fits(unet: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether the module is there and the tensor's outer sides are its channels."""
    module_name, _, what = name.partition(".lora")
    if not what:
        return False
    try:
        weight: Any = unet.get_submodule(module_name).weight
    except AttributeError:
        return False
    is_down = what.startswith(("_A", ".down"))
    side = 1 if is_down else 0
    return bool(tensor.ndim == weight.ndim and tensor.shape[side] == weight.shape[side])
