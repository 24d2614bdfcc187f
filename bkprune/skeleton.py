"""A model's networks without their weights, on the meta device: enough to count and to time.

Knows every form a model has (see `models.load`), a bare config.json, and a family's name such as
`sd_v1`. It reads configs and headers, so that a model of any size takes seconds, and can give a
network random weights where a clock needs some. It does not load checkpoints and counts nothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from bkprune.models import BUILT_IN, HUB_ID, Parts, download, text_class
from bkprune.single_file import families, first_line, quiet, read_configs, read_json


@dataclass(frozen=True)
class Skeleton:
    """The networks of a model on the meta device; what it does not have is None or left out."""

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL | None = None
    text_encoders: dict[str, nn.Module] = field(default_factory=dict)


def skeleton(model: str | Path, parts: Parts | None = None) -> Skeleton:
    """Build the networks that a model's configs describe, without reading a weight.

    Args:
        model: anything `models.load` takes, a U-Net's config.json, or a family's name.
        parts: folders or config.json files of what the model lacks.

    Raises:
        ValueError: nothing there, not a U-Net of the Stable Diffusion family, pruned already.
    """
    configs = _configs(model)
    for part in ("vae", "text_encoder"):
        path = getattr(parts, part, None)
        if path is not None:
            configs[part] = read_json(path / "config.json" if path.is_dir() else path)
    found = configs["unet"].get("_class_name", UNet2DConditionModel.__name__)
    if found != UNet2DConditionModel.__name__:
        raise ValueError(
            f"{model}: holds {found}, where a UNet2DConditionModel is expected"
            + ("; profile the teacher it came from with --mask" if found == "PrunedUNet" else "")
        )
    try:
        with torch.device("meta"), quiet():
            vae = configs.get("vae")
            return Skeleton(
                str(model),
                UNet2DConditionModel.from_config(configs["unet"]).eval(),
                AutoencoderKL.from_config(vae).eval() if vae else None,
                {
                    name: _text_encoder(config)
                    for name, config in configs.items()
                    if name.startswith("text_encoder")
                },
            )
    except (TypeError, KeyError, RuntimeError, ValueError, AttributeError) as error:
        raise ValueError(f"{model}: its config builds no network ({first_line(error)})") from error


def with_random_weights(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network of the meta device on a real one, filled with small noise: good for a clock only.

    The weights of a network do not change how long it takes, as long as none is denormal or NaN.
    """
    with quiet():
        real = copy.deepcopy(network).to(dtype).to_empty(device=device)
    with torch.no_grad():
        for tensor in (*real.parameters(), *real.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(-0.02, 0.02)
            else:
                tensor.zero_()
    return real.eval()


def _configs(model: str | Path) -> dict[str, dict[str, Any]]:
    path = Path(model)
    if path.suffix == ".json" and path.is_file():
        config = read_json(path)
        if "block_out_channels" not in config or "cross_attention_dim" not in config:
            kind = config.get("_class_name") or config.get("model_type") or "something else"
            raise ValueError(f"{path}: describes {kind}, where a U-Net's config is expected")
        return {"unet": config}
    if path.is_file():
        return dict(read_configs(path)[1])
    if str(model) in BUILT_IN and not path.exists():
        path = BUILT_IN[str(model)]
    if not path.exists() and str(model) in families():
        return {part: c for part, c in families()[str(model)].items() if part != "scheduler"}
    if not path.exists() and HUB_ID.fullmatch(str(model)):
        path = download(str(model))
    if not path.is_dir():
        raise ValueError(
            f"{model}: no such file or folder (built-in models: {', '.join(BUILT_IN)}; families "
            f"known by name: {', '.join(families())})"
        )
    if not (path / "model_index.json").exists():
        return {"unet": read_json(path / "config.json")}
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    configs = {
        part: read_json(path / part / "config.json")
        for part, entry in read_json(path / "model_index.json").items()
        if part in parts and isinstance(entry, list) and entry[0] is not None
    }
    if "unet" not in configs:
        raise ValueError(f"{path}: its model_index.json names no U-Net; bkprune prunes U-Nets")
    return configs


def _text_encoder(config: dict[str, Any]) -> nn.Module:
    if "architectures" not in config:
        config = {**config, "architectures": ["CLIPTextModel"]}
    cls = text_class(config)
    network: nn.Module = cls(cls.config_class(**config))
    return network.eval()
