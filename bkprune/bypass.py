"""The one mechanism: a removed block is replaced, in place and under its own name, by its bypass.

diffusers zips residual with attention blocks and pops one skip per residual block, so as long as
the module lists keep their lengths the skip stack cannot go wrong. This file knows bypasses, how to
put them into a U-Net for a while or for good, and how to replay a recorded pass up to the first of
them. It needs torch and diffusers alone and does not know which plans make sense.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ModelMixin, Transformer2DModel, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

__all__ = [
    "ModelMixin",
    "PrunedUNet",
    "Replay",
    "bypassed",
    "variant",
]  # diffusers looks here for ModelMixin

GUARD = "bkprune:"  # before mid_block_type, so that stock diffusers refuses a pruned config


class AttentionIdentity(nn.Module):
    """Stands where a `Transformer2DModel` was: `[B, C, H, W] -> ([B, C, H, W],)`."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        return (hidden_states,)


class Identity(nn.Module):
    """Stands where a width-keeping `ResnetBlock2D` or a dead level's sampler was."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class DropSkip(nn.Module):
    """Stands where an up stage's `ResnetBlock2D` was: forgets the skip, keeps `n_hidden` channels.

    `[B, n_hidden + n_skip, H, W] -> [B, n_hidden, H, W]`.
    """

    def __init__(self, n_hidden: int) -> None:
        super().__init__()
        self.n_hidden = n_hidden

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states[:, : self.n_hidden]


class Shortcut(nn.Module):
    """Stands where a width-changing `ResnetBlock2D` was: the teacher's own 1x1 `conv_shortcut`."""

    def __init__(self, conv_shortcut: nn.Module) -> None:
        super().__init__()
        self.conv_shortcut = conv_shortcut

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        out: Tensor = self.conv_shortcut(hidden_states)
        return out


def _bypass_for(name: str, kind: str, module: nn.Module) -> nn.Module:
    if isinstance(module, AttentionIdentity | Identity | DropSkip | Shortcut):
        raise ValueError(f"{name} is bypassed already")
    is_attention = isinstance(module, Transformer2DModel)
    shortcut = getattr(module, "conv_shortcut", None)
    if kind == "attention_identity" and is_attention:
        return AttentionIdentity()
    if kind == "identity" and not is_attention and shortcut is None:
        return Identity()
    if kind == "drop_skip" and isinstance(module, ResnetBlock2D) and shortcut is not None:
        return DropSkip(module.out_channels)
    if kind == "shortcut" and shortcut is not None:
        return Shortcut(shortcut)
    raise ValueError(f"{name}: a {type(module).__name__} cannot be bypassed by {kind}")


def _module(unet: nn.Module, name: str) -> nn.Module:
    try:
        return unet.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{name}: this U-Net has no such module") from None


def _put(unet: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        unet.get_submodule(parent)._modules[child] = module


@contextmanager
def _swapped(unet: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    originals = {name: _module(unet, name) for name in modules}
    _put(unet, modules)
    try:
        yield
    finally:
        _put(unet, originals)


def _bypasses(unet: nn.Module, plan: Mapping[str, str]) -> dict[str, nn.Module]:
    return {name: _bypass_for(name, kind, _module(unet, name)) for name, kind in plan.items()}


@contextmanager
def bypassed(unet: UNet2DConditionModel, plan: Mapping[str, str]) -> Iterator[UNet2DConditionModel]:
    """Run a U-Net without the plan's blocks inside the `with`; afterwards it is as it was.

    No weight is copied or touched, and the network comes back even when the body raises. One
    network must not be bypassed from two threads at once.

    Raises:
        ValueError: the plan names a module that is not there, or that the bypass does not fit.
    """
    with _swapped(unet, _bypasses(unet, plan)):
        yield unet


def variant(unet: UNet2DConditionModel, plan: Mapping[str, str]) -> UNet2DConditionModel:
    """A second network without the plan's blocks that shares the first one's weights.

    Both can be run side by side at the price of one: no weight is copied. The modules are the
    variant's own, so that what is put into one network is not in the other.

    Raises:
        ValueError: as `bypassed`.
    """
    shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    other: UNet2DConditionModel = copy.deepcopy(unet, shared)
    _put(other, _bypasses(other, plan))
    return other


class PrunedUNet(UNet2DConditionModel):  # type: ignore[misc]
    """A `UNet2DConditionModel` whose config carries the plan: built whole, then bypassed.

    Names are the teacher's, so its state dict is a subset of the teacher's. Module path and class
    name stand in every saved `model_index.json`: they are part of the file format. The saved
    `mid_block_type` wears a prefix, so that stock `UNet2DConditionModel` refuses the folder rather
    than fill the missing blocks with random weights.
    """

    def __init__(self, *, plan: Mapping[str, str] | None = None, **settings: Any) -> None:
        mid = settings.get("mid_block_type", "UNetMidBlock2DCrossAttn")
        if isinstance(mid, str) and mid.startswith(GUARD):
            mid = mid.removeprefix(GUARD) or None
        super().__init__(**{**settings, "mid_block_type": mid})
        self.register_to_config(plan=dict(plan or {}), mid_block_type=f"{GUARD}{mid or ''}")
        _put(self, _bypasses(self, self.config["plan"]))

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **settings: Any) -> Any:
        """As diffusers does it; `auto_map` is for the loader alone."""
        known = {key: value for key, value in config_dict.items() if key != "auto_map"}
        return super().extract_init_dict(known, **settings)

    @classmethod
    def from_pretrained(cls, *args: Any, **settings: Any) -> Any:
        """As diffusers does it, but no weight is ever made up.

        Raises:
            ValueError: a tensor is missing, left over or of the wrong shape; names are listed.
        """
        wants_info = settings.pop("output_loading_info", False)
        settings |= {"output_loading_info": True}
        model, info = super().from_pretrained(*args, **settings)
        for trouble in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            names = sorted(str(key) for key in info.get(trouble) or ())
            if names and not wants_info:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                raise ValueError(f"{trouble.replace('_', ' ')}: {', '.join(names[:5])}{more}")
        return (model, info) if wants_info else model

    @classmethod
    def from_teacher(
        cls, teacher: UNet2DConditionModel, plan: Mapping[str, str], *, copy: bool = True
    ) -> PrunedUNet:
        """A network of its own with the teacher's remaining weights.

        Device, dtype, training mode and attention processors are the teacher's. With `copy` the
        weights are the student's own, which is what training needs; without it they are the
        teacher's very tensors and cost no memory.

        Raises:
            ValueError: the teacher is pruned already, or the plan does not fit it.
        """
        if isinstance(teacher, cls):
            raise ValueError("the teacher is pruned already: prune the network it came from")
        known = inspect.signature(cls.__init__).parameters
        settings = {key: value for key, value in teacher.config.items() if key in known}
        with torch.device("meta"):
            student = cls(plan=plan, **settings)
        weights = teacher.state_dict()
        kept = {name: weights[name].detach() for name in student.state_dict()}
        if copy:
            kept = {name: tensor.clone() for name, tensor in kept.items()}
        student.load_state_dict(kept, assign=True)
        processors = teacher.attn_processors
        student.set_attn_processor({name: processors[name] for name in student.attn_processors})
        student.requires_grad_(True)
        student.train(teacher.training)
        return student


def _signature() -> inspect.Signature:
    """diffusers reads a model's config keys from the signature of its `__init__`: show them all."""
    own = inspect.signature(PrunedUNet.__init__).parameters
    stock = inspect.signature(UNet2DConditionModel.__init__).parameters
    return inspect.Signature([*stock.values(), own["plan"]])


PrunedUNet.__init__.__signature__ = _signature()  # type: ignore[attr-defined]


class _Recorded(nn.Module):
    """Returns what its module returned in the recorded pass."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


class Replay:
    """Ablation at the price of the suffix: one recorded pass, then any number of plans.

    Every module before a plan's first bypass returns what it returned in the recorded pass, and
    diffusers' own forward runs on. On one device and dtype the outputs are bitwise those of a full
    pass. Memory: the outputs of all recorded modules for one batch, `recorded_bytes`.

    Args:
        unet: the teacher; it is left as it is.
        sample: noisy latents `[B, C, H, W]`.
        timestep: `[B]` or a scalar.
        encoder_hidden_states: text embeddings `[B, tokens, width]`.
        conditions: anything else the U-Net's `forward` takes, `added_cond_kwargs` for SDXL.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        **conditions: Any,
    ) -> None:
        self.unet = unet
        self._args = (sample, timestep, encoder_hidden_states)
        self._conditions = {**conditions, "return_dict": False}
        self._outputs: dict[str, Any] = {}
        hooks = [
            module.register_forward_hook(self._recorder(name))
            for name, module in unet.named_modules()
            if _is_step(name)
        ]
        try:
            self.output: Tensor = self._forward()
        finally:
            for hook in hooks:
                hook.remove()
        self._order = {name: index for index, name in enumerate(self._outputs)}

    @property
    def recorded_bytes(self) -> int:
        """Bytes held by the recordings."""
        return sum(_n_bytes(output) for output in self._outputs.values())

    def ablate(self, plan: Mapping[str, str]) -> Tensor:
        """The U-Net's output `[B, C, H, W]` without the plan's blocks."""
        if not plan:
            return self.output
        for name in plan:
            _module(self.unet, name)
        first = min(self._order[name] for name in plan)
        modules: dict[str, nn.Module] = {
            name: _Recorded(output)
            for name, output in self._outputs.items()
            if self._order[name] < first
        }
        modules |= _bypasses(self.unet, plan)
        with _swapped(self.unet, modules):
            return self._forward()

    @torch.no_grad()
    def _forward(self) -> Tensor:
        output: Tensor = self.unet(*self._args, **self._conditions)[0]
        return output

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            self._outputs[name] = output

        return record


_STEPS = ("resnets", "attentions", "downsamplers", "upsamplers")


def _is_step(name: str) -> bool:
    """Whether a module is one step of the U-Net's forward: `conv_in`, a block or a sampler."""
    parts = name.split(".")
    return name == "conv_in" or (len(parts) in (3, 4) and parts[-2] in _STEPS)


def _n_bytes(output: Any) -> int:
    if isinstance(output, Tensor):
        return output.numel() * output.element_size()
    return sum(_n_bytes(part) for part in output)
