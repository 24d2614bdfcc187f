"""Params, MACs and activation bytes of a network, counted from shapes on the meta device.

Knows the two conventions in which MACs are published, what each module and each bypass accounts
for, and how tensors live and die in a pass. It needs no weight, measures nothing, and does not know
masks, budgets or clocks.

    macs_paper  as BK-SDM counts (thop): weights of convolutions and linear layers without bias,
                and 4 x the elements of each LayerNorm; no attention matmuls
    macs        convolutions, linear layers and matmuls, those of attention included; no norms
                (half of what `torch.utils.flop_counter` reports)

Both are per pass of the batch that is given, whatever its size: guidance doubles the batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

REST = "rest"


@dataclass(frozen=True)
class Count:
    """What one module accounts for, its submodules included.

    `activation_bytes` is the most that was alive in the whole network while the module ran, and
    for `Counted.rest` while none of the modules did.
    """

    params: int
    weight_bytes: int
    macs_paper: int
    macs: int
    activation_bytes: int

    def __sub__(self, other: Count) -> Count:
        """What is left without a part; the activation peak is left as it is."""
        return replace(
            self,
            params=self.params - other.params,
            weight_bytes=self.weight_bytes - other.weight_bytes,
            macs_paper=self.macs_paper - other.macs_paper,
            macs=self.macs - other.macs,
        )


@dataclass(frozen=True)
class Counted:
    """A network, some modules in it, and what is left of it without them."""

    whole: Count
    modules: dict[str, Count]
    rest: Count


@dataclass(frozen=True)
class Call:
    """How a network is called: positional and keyword arguments, tensors of any device."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def unet_call(
    config: Mapping[str, Any],
    *,
    batch_size: int = 1,
    height: int | None = None,
    width: int | None = None,
    n_tokens: int = 77,
    device: str = "meta",
    dtype: torch.dtype = torch.float32,
) -> Call:
    """Arguments of one denoising step; `height` and `width` are those of the latents.

    The default size is the one in the config. Values off the meta device are unit Gaussian noise.
    """
    size = config["sample_size"]
    own_height, own_width = size if isinstance(size, list | tuple) else (size, size)
    shape = (batch_size, int(config["in_channels"]), height or own_height, width or own_width)
    text = config["cross_attention_dim"]
    text_width = int(text if isinstance(text, int) else text[0])

    def noise(*shape: int) -> Tensor:
        if device == "meta":
            return torch.empty(shape, device=device, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(device, dtype)

    timesteps = torch.full((batch_size,), 500, dtype=torch.long, device=device)
    kwargs: dict[str, Any] = {"return_dict": False}
    if config.get("addition_embed_type") == "text_time":
        n_ids = 6
        pooled = int(config["projection_class_embeddings_input_dim"]) - n_ids * int(
            config["addition_time_embed_dim"]
        )
        added = {"text_embeds": noise(batch_size, pooled), "time_ids": noise(batch_size, n_ids)}
        kwargs["added_cond_kwargs"] = added
    return Call((noise(*shape), timesteps, noise(batch_size, n_tokens, text_width)), kwargs)


def count(network: nn.Module, call: Call, names: Collection[str] = ()) -> Counted:
    """Count a network on the meta device, and each of the named modules in it.

    Args:
        network: with its parameters on the meta device; it is left as it is.
        call: its arguments, on the meta device as well.
        names: module paths; one may lie inside another.

    Raises:
        ValueError: the network cannot be run on these shapes.
    """
    modules = {name: network.get_submodule(name) for name in ("", *names)}
    paper, lifetimes = _PaperMacs(), _Lifetimes()
    flops = FlopCounterMode(display=False)
    with torch.no_grad(), paper.watching(modules), lifetimes.watching(modules), flops:
        try:
            with _ExactAttention():
                network(*call.args, **call.kwargs)
        except RuntimeError as error:
            shapes = [list(a.shape) for a in call.args if isinstance(a, Tensor)]
            raise ValueError(
                f"{type(network).__name__} cannot be run on inputs {shapes}: "
                f"{str(error).splitlines()[0]}"
            ) from error
    by_module = flops.get_flop_counts()
    found = {}
    for name, module in modules.items():
        key = f"{type(network).__name__}.{name}" if name else "Global"
        parameters = list(module.parameters())
        found[name] = Count(
            params=sum(p.numel() for p in parameters),
            weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
            macs_paper=paper.macs[name],
            macs=sum(by_module[key].values()) // 2,
            activation_bytes=lifetimes.peak[name],
        )
    rest = whole = found.pop("")
    for name, part in found.items():
        if not any(name.startswith(f"{other}.") for other in found):
            rest = rest - part
    return Counted(whole, found, replace(rest, activation_bytes=lifetimes.peak[REST]))


@torch.no_grad()
def activation_peaks(network: nn.Module, call: Call, names: Collection[str]) -> dict[str, int]:
    """Bytes of tensors alive in a real pass, the highest while each module ran.

    `""` is the whole pass and `rest` what lies between the modules. The network and its inputs may
    be on any device. Weights, inputs and the scratch memory of kernels are left out.
    """
    lifetimes = _Lifetimes()
    with lifetimes.watching({name: network.get_submodule(name) for name in ("", *names)}):
        network(*call.args, **call.kwargs)
    return lifetimes.peak


class _PaperMacs:
    """Counts as thop does, by hooks on the layers it knows."""

    def __init__(self) -> None:
        self.macs: dict[str, int] = {}

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        self.macs = dict.fromkeys(modules, 0)
        owners: dict[nn.Module, list[str]] = {}
        for name, module in modules.items():
            for layer in module.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear | nn.LayerNorm):
                    owners.setdefault(layer, []).append(name)

        def add(layer: nn.Module, args: Any, output: Tensor) -> None:
            for name in owners[layer]:
                self.macs[name] += _paper_macs(layer, args[0], output)

        hooks = [layer.register_forward_hook(add) for layer in owners]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _paper_macs(layer: nn.Module, given: Tensor, output: Tensor) -> int:
    if isinstance(layer, nn.LayerNorm):
        return 4 * given.numel()
    if isinstance(layer, nn.Conv2d):
        return output.numel() * layer.weight[0].numel()
    assert isinstance(layer, nn.Linear)
    return output.numel() * layer.in_features


class _ExactAttention(TorchFunctionMode):
    """Attention as fused kernels run it: the matmuls are counted, no score matrix is kept."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3] if len(args) >= 3 else _named(args, kwargs)
        return _fused_attention(query, key, value)


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    bound = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
    return bound["query"], bound["key"], bound["value"]


def _fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Q K^T and A V as two matmuls whose operands are kept and whose scores are not."""
    n_query, n_key = query.shape[-2], key.shape[-2]
    batch = query.shape[:-2].numel()
    with _Lifetimes.paused():
        flat = [t.reshape(batch, t.shape[-2], t.shape[-1]) for t in (query, key, value)]
        scores = torch.bmm(flat[0], flat[1].transpose(1, 2))
        assert scores.shape == (batch, n_query, n_key)
        torch.bmm(scores, flat[2])
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


class _Lifetimes(TorchDispatchMode):
    """Bytes of all tensors alive at a time, parameters left out, and the peak while a module ran.

    Storages are counted once however many views share them, and leave when Python lets them go,
    which is when an eager run frees them.
    """

    _paused = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: dict[str, int] = {}
        self._alive: dict[int, int] = {}
        self._now = 0
        self._running: list[str] = []

    @classmethod
    @contextmanager
    def paused(cls) -> Iterator[None]:
        """Leave out what is made in here."""
        cls._paused = True
        try:
            yield
        finally:
            cls._paused = False

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        self.peak = dict.fromkeys((*modules, REST), 0)
        names: dict[nn.Module, list[str]] = {}
        for name, module in modules.items():
            names.setdefault(module, []).append(name)
            for parameter in module.parameters():
                self._alive[id(parameter.untyped_storage())] = 0

        def enter(module: nn.Module, args: Any) -> None:
            self._running += names[module]
            self._see()

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            for name in names[module]:
                self._running.remove(name)

        hooks = [module.register_forward_pre_hook(enter) for module in names]
        hooks += [module.register_forward_hook(leave) for module in names]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._paused:
            for value in out if isinstance(out, list | tuple) else (out,):
                if isinstance(value, Tensor):
                    self._add(value)
            self._see()
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive:
            return
        n_bytes = storage.nbytes()
        self._alive[key] = n_bytes
        self._now += n_bytes
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._now -= self._alive.pop(key, 0)

    def _see(self) -> None:
        for name in self._running if len(self._running) > 1 else ("", REST):
            self.peak[name] = max(self.peak[name], self._now)
