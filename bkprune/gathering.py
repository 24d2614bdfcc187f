"""Whole tensors out of a network that processes may hold in parts, and back into it.

Knows that under FSDP every process has a slice of each weight, of the optimiser's moments and of
the moving average, and that each of these calls is then made by all processes together. What is
whole is named by the network's own parameters: a run goes on under another number of processes, or
with slices where it had none. It does not know what the network is, nor what the files look like.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def weights(network: nn.Module) -> dict[str, Tensor]:
    """The network's whole state, on the CPU.

    Where there are slices it is given to the main process, and the others get an empty one. Where
    there are none, and the network is on the CPU, the tensors are the network's own.
    """
    state: Mapping[str, Any] = get_model_state_dict(network, options=_WHOLE)
    return dict(state)


def set_weights(network: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Put `weights` back; every process brings them whole."""
    set_model_state_dict(network, dict(whole), options=_WHOLE)


def moments(network: nn.Module, optimiser: Any) -> dict[str, Any]:
    """What the optimiser keeps of each parameter, by its name; as `weights`."""
    return dict(get_optimizer_state_dict(network, _own(optimiser), options=_WHOLE))


def set_moments(network: nn.Module, optimiser: Any, whole: Mapping[str, Any]) -> None:
    """Put `moments` back; an optimiser that had not stepped yet stays as it is."""
    if not whole["state"]:
        return
    set_optimizer_state_dict(network, _own(optimiser), dict(whole), options=_WHOLE)
    for parameter, kept in _own(optimiser).state.items():
        for name, value in kept.items():
            if _lies_otherwise(value, parameter):
                kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _lies_otherwise(value: Any, parameter: Tensor) -> bool:
    """A moment in another memory layout than its weight: fused optimisers pair them wrongly.

    A checkpoint of slices is contiguous; a student that is whole is in channels-last layout.
    """
    if not isinstance(value, Tensor) or isinstance(value, DTensor):
        return False
    return value.shape == parameter.shape and value.stride() != parameter.stride()


def tensors(slices: Sequence[Tensor]) -> list[Tensor]:
    """Loose tensors that lie as the parameters do, whole and on the CPU, on every process."""
    return [(s.full_tensor() if isinstance(s, DTensor) else s).cpu() for s in slices]


def set_tensors(slices: Sequence[Tensor], whole: Sequence[Tensor]) -> None:
    """Put `tensors` back."""
    with torch.no_grad():
        for own, value in zip(slices, whole, strict=True):
            given = value.to(own.device)
            if isinstance(own, DTensor):
                given = distribute_tensor(given, own.device_mesh, own.placements)
            own.copy_(given)


def _own(optimiser: Any) -> Any:
    """torch's optimiser inside accelerate's."""
    return getattr(optimiser, "optimizer", optimiser)
