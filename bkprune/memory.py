"""How much memory there is, what a pass takes of it, and what to say when it is not enough.

Knows each device's free memory and highest use, and turns a device's complaints into what a user
can do about them. It does not know what the networks are for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from bkprune.backends import Target
from bkprune.cost import REST
from bkprune.counting import Call, activation_peaks
from bkprune.single_file import first_line


class OutOfMemoryError(ValueError):
    """The target has not enough memory for what was asked."""


def available_bytes(device: str) -> int:
    """Memory that is free on the device now."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def check_memory(target: Target, weight_bytes: int, activation_bytes: int, batch_size: int) -> None:
    """Refuse a batch that cannot fit, and name the one that would.

    Raises:
        OutOfMemoryError: weights and activations need more than is free on the device.
    """
    free = available_bytes(target.device)
    if weight_bytes + activation_bytes <= free:
        return
    fits = int((free - weight_bytes) / (activation_bytes / batch_size) * 0.9)
    advice = (
        f"--batch-size {fits} would fit"
        if fits >= 1
        else "not even batch size 1 would fit: lower the resolution, or use --dtype float16"
    )
    raise OutOfMemoryError(
        f"batch size {batch_size} needs about {(weight_bytes + activation_bytes) / 1e9:.1f} GB on "
        f"{target.device}, {free / 1e9:.1f} GB are free; {advice}"
    )


@contextmanager
def explained(
    target: Target, weight_bytes: int, activation_bytes: int, batch_size: int
) -> Iterator[None]:
    """Turn what a device complains of while it runs into what a user can do about it."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        check_memory(target, weight_bytes, activation_bytes, batch_size)
        raise OutOfMemoryError(
            f"out of memory on {target.device} at batch size {batch_size} "
            f"({first_line(error)}); try --batch-size {max(1, batch_size // 2)}"
        ) from error
    except RuntimeError as error:  # torch's one exception for all of it: told apart by its words
        text = first_line(error)
        if "can't allocate memory" in text or "not enough memory" in text:
            raise OutOfMemoryError(
                f"out of memory on {target.device} at batch size {batch_size}; "
                f"try --batch-size {max(1, batch_size // 2)}"
            ) from error
        if "not implemented for" in text or "not supported" in text:
            raise ValueError(
                f"{target.device} cannot run this network in {target.dtype} ({text}); "
                "choose another --dtype"
            ) from error
        raise


def peak_rss_reset() -> bool:
    """Forget the process's highest memory use so far; only Linux can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss_mb() -> float | None:
    """The process's highest resident memory since the last reset, in MB of 1e6 bytes."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 / 1e6 if found else None


def allocated_mb(target: Target) -> float:
    """What this process holds on a CUDA device now, in MB of 1e6 bytes; 0 elsewhere."""
    if not target.device.startswith("cuda"):
        return 0.0
    return torch.cuda.memory_allocated(target.device) / 1e6


def peaks(
    module: nn.Module, call: Call, names: Collection[str], target: Target, baseline_mb: float
) -> dict[str, float]:
    """Highest memory while each named module ran, `rest` between them, `""` in all, in MB.

    On CUDA the allocator's peak over what was there before the network; elsewhere weights and
    tensors alive in a real pass, without the scratch memory of kernels. Eager only.
    """
    if target.backend != "eager":
        return {}
    if not target.device.startswith("cuda"):
        weights = sum(p.numel() * p.element_size() for p in module.parameters())
        alive = activation_peaks(module, call, names)
        return {name: (weights + n_bytes) / 1e6 for name, n_bytes in alive.items()}
    highest = dict.fromkeys(("", REST, *names), 0.0)
    running = [REST]

    def see(*_: Any) -> None:
        torch.cuda.synchronize()
        now = torch.cuda.max_memory_allocated(target.device) / 1e6 - baseline_mb
        for name in ("", running[-1]):
            highest[name] = max(highest[name], now)
        torch.cuda.reset_peak_memory_stats(target.device)

    hooks = []
    for name in names:

        def enter(*_: Any, name: str = name) -> None:
            see()
            running.append(name)

        def leave(*_: Any) -> None:
            see()
            running.pop()

        inner = module.get_submodule(name)
        hooks += [inner.register_forward_pre_hook(enter), inner.register_forward_hook(leave)]
    torch.cuda.reset_peak_memory_stats(target.device)
    try:
        with torch.inference_mode():
            module(*call.args, **call.kwargs)
        see()
    finally:
        for hook in hooks:
            hook.remove()
    return highest
