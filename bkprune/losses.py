"""Knowledge distillation of a U-Net: what a student is compared with, and how.

Knows which modules are tapped under a mask (for BK-SDM's students exactly the published lists), how
taps hang on module objects for a while, and the three losses of BK-SDM (arXiv 2305.15798, section
3.2). It does not know data, optimisers or steps.

    L = l_task E ||eps_S - y||^2 + l_output E ||eps_S - eps_T||^2
        + l_feature sum_l E ||f_S^l - f_T^l||^2

with y the scheduler's target (noise or velocity), eps the outputs, f_l the tapped features; squares
are means over elements, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bkprune.blocks import Inventory


@dataclass(frozen=True)
class Tap:
    """A pair of modules whose outputs are compared; `name` is the teacher's."""

    name: str
    student: str


def taps(
    inventory: Inventory, plan: Mapping[str, str], modules: Mapping[str, str] | None = None
) -> list[Tap]:
    """What is tapped under a plan: the output of every stage that is left, but the mid block.

    A down stage whose downsampler is gone with a dead level has another size there: its last
    attention's `proj_out` (or last residual block) is tapped instead, the teacher's last against
    the student's last, as BK-SDM does for tiny.

    Args:
        inventory: of the teacher.
        plan: what the student has bypassed.
        modules: the student's names of blocks and samplers where they are not the teacher's,
            `{own: teacher's}`; see `Twin.modules`.
    """
    own_names = {teacher: own for own, teacher in (modules or {}).items()}
    dead = [level for level in inventory.levels if level.downsampler in plan]
    n, n_alive = len(inventory.levels), len(inventory.levels) - len(dead)
    shift = len(dead) if own_names else 0
    found: list[Tap] = []
    for level in range(n_alive):
        stage = f"down_blocks.{level}"
        if level == n_alive - 1 and dead:
            found += _last(inventory, plan, stage, own_names)
        else:
            found.append(Tap(stage, stage))
    for index in range(n - n_alive, n):
        found.append(Tap(f"up_blocks.{index}", f"up_blocks.{index - shift}"))
    return found


def _last(
    inventory: Inventory, plan: Mapping[str, str], stage: str, own_names: Mapping[str, str]
) -> Iterator[Tap]:
    for kind, leaf in (("attention", ".proj_out"), ("residual", "")):
        names = [b.name for b in inventory if b.stage == stage and b.kind == kind]
        kept = [name for name in names if name not in plan]
        if kept:
            own = own_names.get(kept[-1], kept[-1])
            yield Tap(names[-1] + leaf, own + leaf)
            return


class Watched(nn.Module):
    """A U-Net that gives, beside its output, what some of its modules gave.

    `forward(*args, **kwargs) -> (output [B, C, H, W], [feature, ...])` in the order of `names`.
    """

    def __init__(self, unet: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.unet = unet
        self.names = tuple(names)
        self._seen: dict[str, Tensor] = {}
        classes = {type(module).__name__ for module in unet.modules()}
        whole = getattr(unet, "_no_split_modules", None) or ()
        self._no_split_modules = [name for name in whole if name in classes]  # FSDP's units

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """As the U-Net is called; its output and the features."""
        self._seen = {}
        output = self.unet(*args, **kwargs, return_dict=False)[0]
        return output, [self._seen[name] for name in self.names]

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._seen[name] = output[0] if isinstance(output, tuple) else output

        return hook


@contextmanager
def watched(unet: nn.Module, names: Sequence[str]) -> Iterator[Watched]:
    """Hang taps on the named modules inside the `with`.

    Raises:
        ValueError: the network has no such module.
    """
    out = Watched(unet, names)
    hooks = []
    try:
        for name in names:
            try:
                module = unet.get_submodule(name)
            except AttributeError:
                raise ValueError(f"{name}: this U-Net has no such module to tap") from None
            hooks.append(module.register_forward_hook(out._keep(name)))
        yield out
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class LossSettings:
    """Weights of the three losses, and two options.

    `normalise_features` divides each feature term by the teacher feature's own mean square
    (LAPTOP-Diff, arXiv 2404.11098), because a few layers of large norm rule the sum otherwise.
    `snr_gamma` weights each sample's task and output loss by min-SNR (arXiv 2303.09556, eq. 5).
    """

    task: float = 1.0
    output: float = 1.0
    feature: float = 1.0
    normalise_features: bool = False
    snr_gamma: float | None = None

    def __post_init__(self) -> None:
        weights = (self.task, self.output, self.feature)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError("loss weights cannot be negative, and one must be above 0")
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise ValueError(f"snr_gamma is {self.snr_gamma}: it must be above 0")

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is compared with the teacher at all."""
        return self.output > 0 or self.feature > 0


def sample_weights(scheduler: Any, timesteps: Tensor, gamma: float | None) -> Tensor | None:
    """min-SNR weights `[B]` on squared errors of the model's own output, or None for uniform."""
    if gamma is None:
        return None
    abar = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    snr: Tensor = abar / (1 - abar)
    is_v = scheduler.config.prediction_type == "v_prediction"
    return snr.clamp(max=gamma) / (snr + 1 if is_v else snr)


def distillation_losses(
    student: tuple[Tensor, Sequence[Tensor]],
    teacher: tuple[Tensor, Sequence[Tensor]] | None,
    target: Tensor,
    names: Sequence[str],
    settings: LossSettings,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum to minimise, and every term of it before weighting.

    Args:
        student: output and tapped features.
        teacher: the same of the teacher, or None where only the task counts.
        target: what the scheduler wants predicted.
        names: of the taps.
        settings: weights and options.
        weights: of the samples, for the task and the output.

    Returns:
        The weighted sum, and `loss_task`, `loss_output`, `loss_feature`, `tap/NAME` for each tap.
    """
    terms = {"loss_task": _error(student[0], target, weights)}
    total = settings.task * terms["loss_task"]
    if teacher is None:
        return total, terms
    terms["loss_output"] = _error(student[0], teacher[0], weights)
    total = total + settings.output * terms["loss_output"]
    feature = torch.zeros((), device=target.device)
    for name, own, theirs in zip(names, student[1], teacher[1], strict=True):
        reference = theirs.detach().float()
        error = (own.float() - reference).square().mean()
        if settings.normalise_features:
            error = error / reference.square().mean().clamp(min=1e-12)
        terms[f"tap/{name}"] = error
        feature = feature + error
    terms["loss_feature"] = feature
    return total + settings.feature * feature, terms


def _error(own: Tensor, other: Tensor, weights: Tensor | None) -> Tensor:
    squared = (own.float() - other.detach().float()).square()
    if weights is None:
        return squared.mean()
    return (squared.flatten(1).mean(1) * weights).mean()
