"""The one door through which checkpoints come in.

Knows the forms a model may have (built in, pipeline folder, U-Net folder, original-layout single
file, hub id), loads each of them strictly, and refuses what it cannot trust: pickles with code in
them, remote code, missing or unexpected weights, values that are not finite. It does not know what
is done with a model.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import nn

from bkprune import single_file
from bkprune.bypass import PrunedUNet
from bkprune.single_file import (
    ASSETS,
    families,
    first_line,
    quiet,
    read_header,
    read_json,
    some_names,
)

BUILT_IN = {"emoji": ASSETS / "emoji"}
_LIBRARIES = ("diffusers", "transformers", PrunedUNet.__module__)
_MODEL_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Parts:
    """Parts that the model does not bring itself: diffusers folders, and what a file cannot say."""

    tokenizer: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    prediction_type: str | None = None


def load(
    model: str | Path,
    parts: Parts | None = None,
    *,
    dtype: torch.dtype | None = None,
    keep_checker: bool = False,
) -> Any:
    """Load a model as a diffusers pipeline on the CPU, in evaluation mode.

    A part that neither the model nor `parts` has is None in the pipeline: a U-Net alone can be
    profiled, not prompted. The safety checker is left out, as in the papers' protocols, unless it
    is asked for.

    Args:
        model: `emoji`, a diffusers pipeline or U-Net folder, a `.safetensors` or `.ckpt` file in
            the original layout, or a hub id (which downloads).
        parts: folders for what the model lacks.
        dtype: of the weights; float32 by default.
        keep_checker: keep the safety checker of a pipeline folder that has one.

    Raises:
        ValueError: nothing there, not a U-Net of the Stable Diffusion family, damaged, not strict.
    """
    with quiet():
        pipeline = _load(model, parts or Parts(), dtype)
        folder = folder_of(model) if keep_checker else None
        if folder is not None:
            _add_checker(pipeline, folder, dtype)
    _refuse_broken_weights(pipeline.unet, str(model))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load(model: str | Path, parts: Parts, dtype: torch.dtype | None) -> Any:
    path = Path(model)
    if str(model) in BUILT_IN and not path.exists():
        path = BUILT_IN[str(model)]
    if path.is_file():
        file = single_file.read(path, dtype)
        pipeline = _assemble(file.unet, file.family, parts, dtype, file.vae, file.text_encoder)
    elif path.is_dir():
        pipeline = _from_folder(path, parts, dtype)
    elif HUB_ID.fullmatch(str(model)):
        pipeline = _from_folder(download(str(model)), parts, dtype)
    else:
        raise ValueError(
            f"{model}: no such file or folder (built-in models: {', '.join(BUILT_IN)}; "
            "a hub id looks like owner/name)"
        )
    if parts.prediction_type is not None:
        settings = {**pipeline.scheduler.config, "prediction_type": parts.prediction_type}
        pipeline.scheduler = type(pipeline.scheduler).from_config(settings)
    return pipeline


def need(pipeline: Any, part: str, why: str) -> Any:
    """A part of the pipeline, or an error that asks for it by name."""
    value = getattr(pipeline, part, None)
    if value is None:
        raise ValueError(
            f"{why} needs a {part}, which this model lacks: give --{_option(part)} DIR"
        )
    return value


def fingerprint(module: nn.Module) -> str:
    """Short hash of names, shapes and a strided sample of the values; seconds for 1e9 weights."""
    from bkprune.study import digest

    rows = []
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].double().tolist()
        rows.append([name, list(tensor.shape), str(tensor.dtype), sample])
    return digest(rows)


def _option(part: str) -> str:
    return part.replace("_", "-")


def folder_of(model: str | Path) -> Path | None:
    """The folder that a model lies in: built in, local or fetched; None for a single file."""
    path = Path(model)
    if path.exists():
        return path if path.is_dir() else None
    if str(model) in BUILT_IN:
        return BUILT_IN[str(model)]
    return download(str(model)) if HUB_ID.fullmatch(str(model)) else None


def stored_dtype(model: str | Path) -> torch.dtype:
    """The dtype in which the U-Net's weights are stored; float32 where only loading would tell."""
    folder = folder_of(model)
    path = Path(model)
    if folder is not None:
        inner = folder / "unet" if (folder / "unet").is_dir() else folder
        names = sorted(inner.glob("*.safetensors"))
        if stored_variant(inner) is None:
            names = [name for name in names if ".fp16." not in name.name]
        path = names[0] if names else folder
    return single_file.weight_dtype(path) if path.suffix == ".safetensors" else torch.float32


def download(hub_id: str) -> Path:
    """The local folder of a model on the hub, fetched unless it is there already."""
    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True))
    except Exception as error:
        raise ValueError(
            f"{hub_id}: no such folder here, and the hub does not give it; check the name or the "
            f"connection (`bkprune --debug` shows more): {first_line(error)[:160]}"
        ) from error


# --- folders ---------------------------------------------------------------------------------


def _from_folder(folder: Path, parts: Parts, dtype: torch.dtype | None) -> Any:
    if (folder / "model_index.json").exists():
        return _from_pipeline_folder(folder, parts, dtype)
    if (folder / "config.json").exists():
        unet = _unet_from_folder(folder, dtype)
        return _assemble(unet, _family_of_config(unet.config), parts, dtype)
    raise ValueError(
        f"{folder}: neither model_index.json (a pipeline) nor config.json (a U-Net) is in it"
    )


def _from_pipeline_folder(folder: Path, parts: Parts, dtype: torch.dtype | None) -> Any:
    index = read_json(folder / "model_index.json")
    if "unet" not in index:
        held = [name for name in index if not name.startswith("_")]
        raise ValueError(
            f"{folder}: {index.get('_class_name')} has no U-Net (it holds {', '.join(held)}); "
            "bkprune takes U-Nets of the Stable Diffusion family apart, not transformers"
        )
    pipeline_name = str(index.get("_class_name"))
    pipeline_class = getattr(diffusers, pipeline_name, None)
    if pipeline_class is None:
        raise ValueError(f"{folder}/model_index.json: diffusers has no pipeline {pipeline_name!r}")
    loaded: dict[str, Any] = {}
    for name, entry in index.items():
        if name.startswith("_"):
            continue
        if not isinstance(entry, list) or entry[0] is None:
            loaded[name] = None if isinstance(entry, list) else entry  # else a flag
            continue
        if name in ("safety_checker", "feature_extractor", "image_encoder"):
            loaded[name] = None
            continue
        library, class_name = entry
        if name == "unet":
            loaded[name] = _unet_from_folder(folder / name, dtype)
        elif name in _MODEL_PARTS:
            override = getattr(parts, name, None)
            cls = _trusted_class(folder, library, class_name)
            loaded[name] = _strict(cls, override or folder / name, dtype)
        elif name == "tokenizer" and parts.tokenizer is not None:
            loaded[name] = _tokenizer(parts.tokenizer)
        else:
            cls = _trusted_class(folder, library, class_name)
            loaded[name] = _weightless(cls, folder / name)
    if "requires_safety_checker" in loaded:
        loaded["requires_safety_checker"] = False
    try:
        return pipeline_class(**loaded)
    except TypeError as error:
        raise ValueError(f"{folder}/model_index.json: {first_line(error)}") from error


def _add_checker(pipeline: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """The safety checker, where the pipeline's folder names one."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    index = folder / "model_index.json"
    entry = read_json(index).get("safety_checker") if index.exists() else None
    if entry and entry[0] is not None:
        pipeline.register_modules(
            safety_checker=_strict(StableDiffusionSafetyChecker, folder / "safety_checker", dtype),
            feature_extractor=_weightless(
                transformers.CLIPImageProcessor, folder / "feature_extractor"
            ),
        )


def _weightless(cls: Any, folder: Path) -> Any:
    """A tokenizer, scheduler or image processor."""
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: cannot be loaded as {cls.__name__} ({first_line(error)})"
        ) from error


def _unet_from_folder(folder: Path, dtype: torch.dtype | None) -> Any:
    config = read_json(folder / "config.json")
    class_name = config.get("_class_name")
    classes = {"UNet2DConditionModel": UNet2DConditionModel, "PrunedUNet": PrunedUNet}
    if class_name not in classes:
        kind = class_name or config.get("model_type") or "an unnamed model"
        raise ValueError(
            f"{folder}: holds {kind}, where a UNet2DConditionModel is expected "
            "(Stable Diffusion v1, v2 or XL)"
        )
    return _strict(classes[class_name], folder, dtype)


def _trusted_class(folder: Path, library: str, class_name: str) -> Any:
    if library == "stable_diffusion":
        library = "diffusers"
    if library not in _LIBRARIES:
        raise ValueError(
            f"{folder}/model_index.json asks to import {library}.{class_name}: code from a model "
            f"is not run; only {', '.join(_LIBRARIES)} are"
        )
    cls = getattr(import_module(library), class_name, None)
    if cls is None:
        raise ValueError(f"{folder}/model_index.json: {library} has no class {class_name!r}")
    return cls


def _strict(cls: Any, folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """`from_pretrained`, except that a weight missing, left over or misshapen is an error."""
    _check_weight_files(folder)
    settings: dict[str, Any] = {
        "local_files_only": True,
        "output_loading_info": True,
        "dtype": dtype or torch.float32,
        "variant": stored_variant(folder),
    }
    try:
        module, info = cls.from_pretrained(folder, **settings)
    except (OSError, ValueError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{folder}: cannot be loaded as {cls.__name__} ({first_line(error)})"
        ) from error
    for trouble in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(key) for key in info.get(trouble, ()))
        if names:
            raise ValueError(f"{folder}: {trouble.replace('_', ' ')}: {some_names(names)}")
    out: nn.Module = module.eval()
    return out


def stored_variant(folder: Path) -> str | None:
    """`fp16` for a folder that holds nothing but half-precision weights."""
    names = [path.name for path in folder.glob("*.safetensors")]
    return "fp16" if names and all(".fp16." in name for name in names) else None


def _check_weight_files(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    read_json(folder / "config.json")
    for path in sorted(folder.glob("*.safetensors")):
        read_header(path)


def _tokenizer(folder: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no tokenizer in it ({first_line(error)})") from error


# --- families and assembly -------------------------------------------------------------------


def _family_of_config(config: Mapping[str, Any]) -> str:
    """The family whose scheduler and pipeline a bare U-Net most likely wants."""
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    if config.get("use_linear_projection"):
        return "sd_v2_768" if config.get("sample_size") == 96 else "sd_v2_base"
    channels = {9: "sd_v1_inpaint", 8: "sd_v1_instruct_pix2pix"}
    return channels.get(int(config.get("in_channels", 4)), "sd_v1")


def _assemble(
    unet: nn.Module,
    family: str,
    parts: Parts,
    dtype: torch.dtype | None,
    vae: nn.Module | None = None,
    text_encoder: nn.Module | None = None,
) -> Any:
    settings = families()[family]["scheduler"]
    components: dict[str, Any] = {
        "unet": unet,
        "scheduler": getattr(diffusers, settings["_class_name"]).from_config(settings),
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": None,
    }
    if parts.vae is not None:
        components["vae"] = _strict(AutoencoderKL, parts.vae, dtype)
    if parts.text_encoder is not None:
        components["text_encoder"] = _strict(
            text_class(read_json(parts.text_encoder / "config.json")), parts.text_encoder, dtype
        )
    if parts.tokenizer is not None:
        components["tokenizer"] = _tokenizer(parts.tokenizer)
    if family == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            **components, text_encoder_2=None, tokenizer_2=None, add_watermarker=False
        )
    return diffusers.StableDiffusionPipeline(
        **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def text_class(config: Mapping[str, Any]) -> Any:
    """The class that a text encoder's own config names; CLIP is not assumed."""
    names = config.get("architectures") or ["none"]
    cls = getattr(transformers, str(names[0]), None)
    if cls is None:
        raise ValueError(f"text encoder: transformers has no class {names[0]!r}")
    return cls


def _refuse_broken_weights(unet: nn.Module, model: str) -> None:
    broken = [
        name for name, tensor in unet.named_parameters() if not bool(torch.isfinite(tensor).all())
    ]
    if broken:
        raise ValueError(f"{model}: NaN or infinite weights in {some_names(broken)}")
