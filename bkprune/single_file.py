"""Checkpoints in the original (LDM) layout, one file each, and what they rest on.

Knows how a family is recognised by names and shapes, the shipped configs of the families, and how
weights are assigned strictly. diffusers owns the key map. It does not know pipelines or folders.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

ASSETS = Path(str(files("bkprune") / "assets"))
_LDM_UNET = "model.diffusion_model."


@dataclass(frozen=True)
class SingleFile:
    """What a file in the original layout brings; a part that it lacks, or is not read, is None."""

    family: str
    unet: nn.Module
    vae: nn.Module | None
    text_encoder: nn.Module | None


def read(path: Path, dtype: torch.dtype | None = None) -> SingleFile:
    """Read a `.safetensors` or `.ckpt` file in the original layout, strictly.

    Raises:
        ValueError: damaged, not trustworthy, of no known family, or not exactly its weights.
    """
    weights = _read_weights(path)
    shapes = {name: tuple(t.shape) for name, t in weights.items()}
    family = _family_of_weights(path, shapes)
    configs = families()[family]
    unet_config = {**configs["unet"], **_widths(shapes)}
    n_unet = sum(name.startswith(_LDM_UNET) for name in weights)
    try:
        unet = single_file_utils.convert_ldm_unet_checkpoint(dict(weights), unet_config)
    except KeyError as error:
        raise ValueError(f"{path}: missing keys: {error.args[0]}") from error
    if len(unet) != n_unet:
        raise ValueError(
            f"{path}: {n_unet} U-Net tensors, of which {len(unet)} fit {family}: an unknown variant"
        )
    module = _fill(path, UNet2DConditionModel, unet_config, unet, dtype)
    vae = text_encoder = None
    if any(name.startswith("first_stage_model.") for name in weights):
        found = single_file_utils.convert_ldm_vae_checkpoint(dict(weights), configs["vae"])
        vae = _fill(path, AutoencoderKL, configs["vae"], found, dtype)
    if "text_encoder" in configs:
        text_encoder = _text_encoder(path, weights, configs["text_encoder"], dtype)
    return SingleFile(family, module, vae, text_encoder)


def read_configs(path: Path) -> tuple[str, dict[str, Any]]:
    """Family and configs `{unet, vae, text_encoder}` of what a file holds, from shapes alone.

    Raises:
        ValueError: damaged, or of no known family.
    """
    shapes = (
        read_header(path)
        if path.suffix == ".safetensors"
        else {name: tuple(t.shape) for name, t in _read_weights(path).items()}
    )
    family = _family_of_weights(path, shapes)
    configs = families()[family]
    held = {"unet": {**configs["unet"], **_widths(shapes)}}
    for part, prefix in (("vae", "first_stage_model."), ("text_encoder", "cond_stage_model.")):
        if part in configs and any(name.startswith(prefix) for name in shapes):
            held[part] = configs[part]
    return family, held


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        read_header(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if path.suffix not in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"{path}: a .safetensors or .ckpt file is expected")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: a pickle that holds more than tensors, so loading it could run code; "
            "convert it to .safetensors where you trust it"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: truncated or corrupt ({first_line(error)}); fetch it again"
        ) from error
    if isinstance(loaded, Mapping):
        loaded = loaded.get("state_dict", loaded)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, not a table of tensors")
    return {str(name): t for name, t in loaded.items() if isinstance(t, Tensor)}


def fill(module: nn.Module, path: Path, name: str, where: str, prefix: str = "") -> None:
    """Give a network its published weights from a local file, strictly.

    Args:
        module: takes every tensor of the file whose name begins with `prefix`.
        path: of the file.
        name: of the file as it is published, for errors.
        where: it can be had.
        prefix: is taken off the names.

    Raises:
        ValueError: not there, or other weights.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {name} is wanted, at {where}")
    try:
        found = _read_weights(path)
        own = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
        module.load_state_dict(own)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not the weights {name} ({first_line(error)})") from error


def _family_of_weights(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Which family an original-layout file belongs to, from names and shapes alone."""
    if f"{_LDM_UNET}input_blocks.0.0.weight" not in shapes:
        if any(name.startswith("down_blocks.") for name in shapes):
            why = "diffusers weights without their config: give the folder that holds config.json"
        elif any("double_blocks." in name or "joint_blocks." in name for name in shapes):
            why = "a Flux or SD3 transformer; bkprune takes U-Nets of the SD family apart"
        elif any(name.startswith(("encoder.down", "first_stage_model.")) for name in shapes):
            why = "a VAE, where a U-Net is expected"
        else:
            why = f"no U-Net in the original layout ({_LDM_UNET}*) is in it"
        raise ValueError(f"{path}: {why}")
    in_channels = shapes[f"{_LDM_UNET}input_blocks.0.0.weight"][1]
    if f"{_LDM_UNET}label_emb.0.0.weight" in shapes:
        return "sdxl"
    projection = f"{_LDM_UNET}input_blocks.1.1.proj_in.weight"
    if projection not in shapes:
        raise ValueError(f"{path}: its first level has no attention: not SD v1, v2 or XL")
    is_v1 = len(shapes[projection]) == 4
    by_channels = {4: "sd_v1" if is_v1 else "sd_v2_768"}
    if is_v1:
        by_channels |= {9: "sd_v1_inpaint", 8: "sd_v1_instruct_pix2pix"}
    if in_channels not in by_channels:
        raise ValueError(f"{path}: {in_channels} input channels fit no known family")
    return by_channels[in_channels]


def _widths(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Block widths and text width as they stand in the file: narrower relatives load as well."""
    widths = []
    for level in range(4):
        shape = shapes.get(f"{_LDM_UNET}input_blocks.{3 * level + 1}.0.out_layers.3.weight")
        if shape is not None:
            widths.append(shape[0])
    text_widths = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    if not text_widths:
        raise ValueError("no cross-attention in it: not SD v1, v2 or XL")
    return {"block_out_channels": widths, "cross_attention_dim": int(text_widths[0])}


def _text_encoder(
    path: Path, weights: Mapping[str, Tensor], config: dict[str, Any], dtype: torch.dtype | None
) -> nn.Module | None:
    is_clip = any(name.startswith("cond_stage_model.transformer.") for name in weights)
    is_open_clip = any(name.startswith("cond_stage_model.model.") for name in weights)
    if not (is_clip or is_open_clip):
        return None
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    if is_clip:
        found = single_file_utils.convert_ldm_clip_checkpoint(dict(weights))
    else:
        found = single_file_utils.convert_open_clip_checkpoint(model, dict(weights))
    found = {
        name.removeprefix("text_model."): tensor
        for name, tensor in found.items()
        if not name.endswith("position_ids") and not name.startswith("text_projection")
    }
    return _assign(path, model, found, dtype)


def _fill(
    path: Path, cls: Any, config: dict[str, Any], weights: dict[str, Any], dtype: torch.dtype | None
) -> nn.Module:
    with torch.device("meta"):
        module = cls.from_config(config)
    return _assign(path, module, weights, dtype)


def _assign(
    path: Path, module: nn.Module, weights: dict[str, Any], dtype: torch.dtype | None
) -> nn.Module:
    wanted = module.state_dict()
    for trouble, names in (
        ("missing keys", wanted.keys() - weights.keys()),
        ("unexpected keys", weights.keys() - wanted.keys()),
        (
            "mismatched keys",
            {n for n in wanted.keys() & weights.keys() if wanted[n].shape != weights[n].shape},
        ),
    ):
        if names:
            raise ValueError(
                f"{path}: {type(module).__name__}: {trouble}: {some_names(sorted(names))}"
            )
    module.load_state_dict(weights, assign=True)
    return module.to(dtype=dtype or torch.float32).eval()


def families() -> dict[str, dict[str, Any]]:
    """The shipped configs, `{family: {unet, vae, text_encoder, scheduler}}`."""
    return read_json(ASSETS / "families.json")


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file; its sizes are checked against the file's length."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated or corrupt ({error}); fetch it again") from error


def weight_dtype(path: Path) -> torch.dtype:
    """The dtype of a safetensors file's first U-Net tensor, or of its first tensor."""
    read_header(path)
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        name = next((n for n in names if n.startswith(_LDM_UNET)), names[0] if names else None)
        stored = file.get_slice(name).get_dtype() if name else "F32"
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(stored, torch.float32)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a ValueError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def some_names(names: list[str]) -> str:
    """The first five names and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' loading chatter: what matters of it is raised as an error."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    levels = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)


def first_line(error: BaseException) -> str:
    """The first line of a library's complaint, enough to say what is wrong."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
