"""Pipelines in the original (LDM) layout: one file, as older tools want it.

Knows the original names of U-Net, VAE and CLIP text encoder of SD v1 and writes them; reading is
`single_file.py`'s. Only uniform stock U-Nets have such names: padded and pruned forms are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save
from torch import Tensor, nn

from bkprune.study import write_atomic

_UNET, _VAE, _TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_WORDS = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
}


def unet_names(unet: nn.Module) -> dict[str, str]:
    """The original name of every tensor of a stock U-Net, `{diffusers name: LDM name}`.

    Raises:
        ValueError: its levels have not all the same number of layers, or it is no stock U-Net.
    """
    config: Any = unet.config
    layers = config["layers_per_block"]
    if type(unet) is not UNet2DConditionModel or not isinstance(layers, int):
        raise ValueError(
            "the original layout has names for stock U-Nets with the same number of layers at "
            f"every level alone (this one: {type(unet).__name__}, layers_per_block {layers})"
        )
    depths = config["transformer_layers_per_block"]
    if isinstance(depths, list | tuple) and any(isinstance(d, list | tuple) for d in depths):
        raise ValueError("the original layout has no names for padded U-Nets")
    modules = dict(_modules(unet, layers))
    names = {}
    for key in unet.state_dict():
        for own, original in modules.items():
            if key.startswith(f"{own}."):
                inner = key.removeprefix(f"{own}.")
                if ".resnets." in f".{own}":
                    word, _, rest = inner.partition(".")
                    inner = f"{_RESNET[word]}.{rest}"
                names[key] = f"{_UNET}{original}.{inner}"
    missing = sorted(unet.state_dict().keys() - names.keys())
    if missing:
        raise ValueError(f"the original layout has no name for {missing[0]}")
    return names


def _modules(unet: Any, layers: int) -> Iterator[tuple[str, str]]:
    yield from _TOP.items()
    for level in range(len(unet.down_blocks)):
        for i in range(layers):
            place = f"input_blocks.{1 + level * (layers + 1) + i}"
            yield f"down_blocks.{level}.resnets.{i}", f"{place}.0"
            yield f"down_blocks.{level}.attentions.{i}", f"{place}.1"
        place = f"input_blocks.{(level + 1) * (layers + 1)}"
        yield f"down_blocks.{level}.downsamplers.0.conv", f"{place}.0.op"
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    for up, stage in enumerate(unet.up_blocks):
        for i in range(layers + 1):
            place = f"output_blocks.{up * (layers + 1) + i}"
            yield f"up_blocks.{up}.resnets.{i}", f"{place}.0"
            yield f"up_blocks.{up}.attentions.{i}", f"{place}.1"
        after = 2 if getattr(stage, "attentions", None) else 1
        place = f"output_blocks.{up * (layers + 1) + layers}.{after}"
        yield f"up_blocks.{up}.upsamplers.0.conv", f"{place}.conv"


def vae_name(key: str, n_levels: int) -> str:
    """The original name of one tensor of an `AutoencoderKL`."""
    parts = key.split(".")
    if parts[1] in ("down_blocks", "up_blocks"):
        level = int(parts[2]) if parts[1] == "down_blocks" else n_levels - 1 - int(parts[2])
        side = parts[1].removesuffix("_blocks")
        if parts[3] == "resnets":
            inner = ["block", *parts[4:]]
        else:
            inner = [parts[3].removesuffix("rs"), *parts[5:]]  # downsample, upsample
        parts = [parts[0], side, str(level), *inner]
    elif parts[1] == "mid_block":
        kind = "block_" if parts[2] == "resnets" else "attn_"
        parts = [parts[0], "mid", f"{kind}{int(parts[3]) + 1}", *parts[4:]]
    name = ".".join(_VAE_WORDS.get(part, part) for part in parts)
    return _VAE + name.replace("to_out.0", "proj_out")


def state_dict(pipeline: Any) -> dict[str, Tensor]:
    """Every weight of a pipeline under its original name.

    Raises:
        ValueError: the U-Net has no such names, or the text encoder is not CLIP ViT-L's layout.
    """
    own = pipeline.unet.state_dict()
    out = {name: own[key] for key, name in unet_names(pipeline.unet).items()}
    if getattr(pipeline, "vae", None) is not None:
        n_levels = len(pipeline.vae.config["block_out_channels"])
        for key, tensor in pipeline.vae.state_dict().items():
            is_projection = ".attentions." in key and tensor.ndim == 2
            out[vae_name(key, n_levels)] = tensor[:, :, None, None] if is_projection else tensor
    encoder = getattr(pipeline, "text_encoder", None)
    if encoder is not None:
        if getattr(pipeline, "text_encoder_2", None) is not None:
            raise ValueError("the original layout of SDXL's two text encoders is not written here")
        for key, tensor in encoder.state_dict().items():
            name = key if key.startswith("text_model.") else f"text_model.{key}"
            out[_TEXT + name] = tensor
    return out


def write(pipeline: Any, path: Path) -> None:
    """Write a pipeline as one safetensors file in the original layout, atomically.

    Raises:
        ValueError: as `state_dict`.
    """
    tensors = {name: tensor.contiguous() for name, tensor in state_dict(pipeline).items()}
    with torch.no_grad():
        write_atomic(path, save(tensors, metadata={"format": "pt"}))
