"""A random teacher of Stable Diffusion's topology, small enough to build in a tenth of a second."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it; tables are then cut to its terminal

import pytest
import torch

with warnings.catch_warnings():  # the libraries' own, while they are imported
    warnings.simplefilter("ignore")
    import diffusers
    import transformers  # noqa: F401
    from diffusers import UNet2DConditionModel

from bkprune.blocks import Inventory

Forward = Callable[..., torch.Tensor]

SMALL: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 128, 128),
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": (2, 4, 4, 4),
}
SMALL_V2 = {**SMALL, "use_linear_projection": True, "upcast_attention": True}
SMALL_XL: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 128),
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": (2, 4, 4),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
}


def build(config: dict[str, Any]) -> UNet2DConditionModel:
    """The same random network every time, its norms and biases shaken so that none is idle."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**config)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return unet.eval()


def forward(unet: Any, size: int = 16) -> torch.Tensor:
    """The output on one fixed batch of two."""
    generator = torch.Generator().manual_seed(1)
    config = unet.config
    sample = torch.randn(2, config.in_channels, size, size, generator=generator)
    text = torch.randn(2, 7, config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        out: torch.Tensor = unet(sample, torch.tensor([10, 700]), text).sample
    return out


@pytest.fixture(scope="session")
def teacher() -> UNet2DConditionModel:
    return build(SMALL)


@pytest.fixture(scope="session")
def inventory(teacher: UNet2DConditionModel) -> Inventory:
    return Inventory.of(teacher)


@pytest.fixture(scope="session")
def meta() -> Callable[[str], UNet2DConditionModel]:
    """A full-size U-Net of a family, on the meta device: shapes without weights."""
    from bkprune.single_file import families

    def make(family: str) -> UNet2DConditionModel:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(families()[family]["unet"])

    return make


@pytest.fixture
def unet_folder(teacher: UNet2DConditionModel, tmp_path: Path) -> Path:
    folder = tmp_path / "unet"
    teacher.save_pretrained(folder)
    return folder


@pytest.fixture
def edit_json() -> Callable[..., None]:
    def edit(path: Path, **changes: Any) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


diffusers.utils.logging.disable_progress_bar()
