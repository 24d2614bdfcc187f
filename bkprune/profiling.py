"""What a profile is of: a model's networks, what one pass gives them, and their counted table.

Knows the settings of a profile and which parts a model has. Networks are skeletons, so a model of
any size is counted from its configs in seconds; when they are timed, by `measuring.py`, weights are
random, which changes no cost.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import nn

from bkprune import cost, machine
from bkprune.backends import Target
from bkprune.blocks import Inventory
from bkprune.cost import COLUMNS, COUNTS, REST, CostTable
from bkprune.counting import Call, Count, Counted, count
from bkprune.counting import unet_call as unet_arguments
from bkprune.latency import TimingSettings
from bkprune.single_file import quiet
from bkprune.skeleton import Skeleton
from bkprune.study import digest


@dataclass(frozen=True)
class ProfileSettings:
    """What is counted and timed; everything here enters the record's stamp.

    `height` and `width` are those of the latents; None takes the model's own. With `guidance` one
    step of one image is a batch of two.
    """

    target: Target = field(default_factory=Target)
    timing: TimingSettings = field(default_factory=TimingSettings)
    latency: bool = True
    batch_size: int = 1
    height: int | None = None
    width: int | None = None
    n_tokens: int | None = None
    guidance: bool = False
    steps: int = 25

    def __post_init__(self) -> None:
        for name in ("batch_size", "height", "width", "n_tokens", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")

    @property
    def stamped(self) -> dict[str, Any]:
        """The settings as plain data."""
        plain = asdict(self)
        nested = {**plain.pop("target"), **plain.pop("timing")}
        return {**plain, **nested}

    @property
    def n_rows(self) -> int:
        """Batch of one U-Net step."""
        return self.batch_size * (2 if self.guidance else 1)


class Profile:
    """A model on a target: its inventory, its counts, and what is timed of it."""

    def __init__(self, bones: Skeleton, settings: ProfileSettings) -> None:
        self.bones = bones
        self.settings = settings
        self.inventory = Inventory.of(bones.unet)
        self.n_tokens = settings.n_tokens or _n_tokens(bones)
        self.latent_size = _latent_size(bones, settings)
        self.counts = self._count()
        self.table = CostTable(self._rows(), self.inventory)

    # --- counts ------------------------------------------------------------------------------

    def _count(self) -> Counted:
        dtype = self.settings.target.torch_dtype
        with quiet():
            unet = self.bones.unet.to(dtype)
        names = [*cost.rows_of(self.inventory), *self.shortcuts()]
        return count(unet, self.unet_call("meta"), names)

    def unet_call(self, device: str, *, guidance: bool | None = None) -> Call:
        """Arguments of one step; `guidance` overrides whether the batch is doubled."""
        s = self.settings
        doubled = s.guidance if guidance is None else guidance
        return unet_arguments(
            self.bones.unet.config,
            batch_size=s.batch_size * (2 if doubled else 1),
            height=self.latent_size[0],
            width=self.latent_size[1],
            n_tokens=self.n_tokens,
            device=device,
            dtype=s.target.torch_dtype,
        )

    def shortcuts(self) -> list[str]:
        """Every 1x1 convolution that a bypass may keep."""
        names = (f"{b.name}.conv_shortcut" for b in self.inventory if b.kind == "residual")
        modules = dict(self.bones.unet.named_modules())
        return [name for name in names if modules.get(name) is not None]

    def _rows(self) -> pd.DataFrame:
        """The counted half of the cost table."""
        blocks = set(self.inventory.names)
        modules = cost.rows_of(self.inventory)
        rows = [
            _row(name, cost.BLOCK if name in blocks else cost.SAMPLER, self.counts.modules[name])
            for name in modules
        ]
        for row in rows:
            if row["part"] == cost.BLOCK:
                row["pixels"] = self._pixels(self.inventory[row["unit"]].level)
        rows.append(_row(REST, REST, self.counts.rest))
        for name in self.shortcuts():
            kept = self.counts.modules[name]
            row = rows[modules.index(name.removesuffix(".conv_shortcut"))]
            row |= {f"shortcut_{c}": getattr(kept, c) for c in COUNTS}
        for name, (network, call) in self.others("meta").items():
            rows.append(_row(name, name, count(network, call).whole))
        table = pd.DataFrame(rows).reindex(columns=COLUMNS)
        whole_numbers = ["pixels", *COUNTS, *(f"shortcut_{name}" for name in COUNTS)]
        return table.astype(dict.fromkeys(whole_numbers, "Int64"))

    def _pixels(self, level: int) -> int:
        """Positions at which a level runs: every downsampler halves each side, rounding up."""
        height, width = self.latent_size
        for _ in range(level):
            height, width = -(-height // 2), -(-width // 2)
        return height * width

    def others(self, device: str) -> dict[str, tuple[nn.Module, Call]]:
        """Text encoders and VAE decoder on the meta device, with what one image gives them."""
        s = self.settings
        found: dict[str, tuple[nn.Module, Call]] = {}
        for name, encoder in self.bones.text_encoders.items():
            shape = (s.n_rows, self.n_tokens)
            ids = torch.zeros(shape, dtype=torch.long, device=device)
            encoder = encoder.to(s.target.torch_dtype)
            found[name] = (encoder, Call((ids,), {"return_dict": False}))
        if self.bones.vae is not None:
            decoder = self.bones.vae.decoder.to(s.target.torch_dtype)
            channels = int(self.bones.vae.config.latent_channels)
            size = (s.batch_size, channels, *self.latent_size)
            latents = torch.zeros(size, dtype=s.target.torch_dtype, device=device)
            found["vae_decoder"] = (decoder, Call((latents,), {}))
        return found


def identity(profile: Profile) -> dict[str, str]:
    """What a profile was made of: configs and the machine, for its stamp."""
    bones, target = profile.bones, profile.settings.target
    found = {"unet": digest(dict(bones.unet.config))}
    for name, encoder in bones.text_encoders.items():
        config: Any = encoder.config
        found[name] = digest(config.to_dict())
    if bones.vae is not None:
        found["vae"] = digest(dict(bones.vae.config))
    if profile.settings.latency:
        gpu = torch.cuda.get_device_name(target.device) if "cuda" in target.device else None
        found |= machine.identity(target.device, gpu)
        found["threads"] = str(target.n_threads)
        found["torch"] = torch.__version__
    return found


def _row(name: str, part: str, found: Count) -> dict[str, Any]:
    counts = {c: getattr(found, c) for c in COUNTS}
    return {"unit": name, "part": part, **counts, "activation_mb": found.activation_bytes / 1e6}


def _n_tokens(bones: Skeleton) -> int:
    for encoder in bones.text_encoders.values():
        config: Any = encoder.config
        return int(config.max_position_embeddings)
    return 77


def _latent_size(bones: Skeleton, settings: ProfileSettings) -> tuple[int, int]:
    size = bones.unet.config.sample_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return settings.height or int(height), settings.width or int(width)
