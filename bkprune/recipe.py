"""How a student is trained: the settings of a run, its optimiser, its learning rate.

Knows BK-SDM's recipe (AdamW, constant rate 5e-5, gradients clipped at 1) as defaults, what values
make sense, and which of them change the weights. It does not know steps, data or losses' formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from bkprune.losses import LossSettings

OPTIMISERS = ("adamw", "adamw8bit")
SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True)
class DistillSettings:
    """How a student is trained; the defaults are BK-SDM's but for the batch and the steps."""

    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 5e-5
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 1.0
    ema: float | None = None
    optimiser: str = "adamw"
    precision: str = "no"
    checkpointing: bool = False
    channels_last: bool = True
    compile: bool = False
    seed: int = 1234
    save_every: int = 200
    preview_every: int = 0
    losses: LossSettings = field(default_factory=LossSettings)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.lr <= 0 or self.clip_norm <= 0:
            raise ValueError("lr and clip_norm must be above 0")
        if self.optimiser not in OPTIMISERS or self.schedule not in SCHEDULES:
            raise ValueError(
                f"optimiser {self.optimiser!r}, schedule {self.schedule!r}: choose from "
                f"{', '.join(OPTIMISERS)} and {', '.join(SCHEDULES)}"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is {self.ema}: a decay between 0 and 1 is expected")

    @property
    def stamped(self) -> dict[str, Any]:
        """The settings that change the weights."""
        free = ("save_every", "preview_every", "compile", "checkpointing", "channels_last")
        return {name: value for name, value in asdict(self).items() if name not in free}


def from_words(words: Sequence[str], **fixed: Any) -> DistillSettings:
    """Settings from `NAME=VALUE`, as `bkprune distill` calls them; what is fixed is refused.

    Raises:
        ValueError: not of that form, no such name, or a value that makes no sense.
    """
    own = {f.name: f.type for f in fields(DistillSettings) if f.name not in (*fixed, "losses")}
    losses = {f.name: f.type for f in fields(LossSettings)}
    known = ", ".join(name.replace("_", "-") for name in (*own, *losses) if name != "betas")
    given: dict[str, Any] = {}
    for word in words:
        name, sign, text = word.partition("=")
        field_name = name.strip().replace("-", "_")
        kind = str({**own, **losses}.get(field_name, ""))
        if not sign or not kind or field_name == "betas":
            raise ValueError(f"--kd {word!r}: expected NAME=VALUE with one of {known}")
        try:
            given[field_name] = _value(kind, text.strip())
        except ValueError:
            raise ValueError(f"--kd {word!r}: {text.strip()!r} is not a {kind}") from None
    try:
        return DistillSettings(
            **{k: v for k, v in given.items() if k in own},
            **fixed,
            losses=LossSettings(**{k: v for k, v in given.items() if k in losses}),
        )
    except ValueError as error:
        raise ValueError(f"--kd: {error}") from error


def _value(kind: str, text: str) -> Any:
    if kind == "bool":
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return {"int": int, "str": str}.get(kind.split(" ")[0], float)(text)


def optimiser(parameters: list[nn.Parameter], s: DistillSettings) -> Any:
    """What updates the weights.

    Raises:
        ValueError: the optimiser's package is missing.
    """
    settings: dict[str, Any] = {
        "lr": s.lr,
        "betas": s.betas,
        "weight_decay": s.weight_decay,
        "eps": 1e-8,
    }
    if s.optimiser == "adamw":
        return torch.optim.AdamW(parameters, **settings, fused=True)
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError(
            "--optimiser adamw8bit needs the package bitsandbytes: pip install 'bkprune[8bit]'"
        ) from None
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def schedule(optimiser: Any, s: DistillSettings) -> Any:
    """The learning rate over steps: warm-up, then constant, cosine or linear."""
    name = "constant_with_warmup" if s.schedule == "constant" else s.schedule
    return get_scheduler(name, optimiser, num_warmup_steps=s.warmup, num_training_steps=s.steps)
