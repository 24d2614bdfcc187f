"""Where a network's MACs go, operator by operator, as fvcore traces them.

Knows which operators count, which are free, and that anything else must not pass in silence. The
sum of what `macs` counts is checked against `torch.utils.flop_counter`: two counters that share no
code have to agree to the last digit.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bkprune.counting import Call

COUNTED = ("conv", "linear", "matmul", "addmm", "bmm", "baddbmm", "scaled_dot_product_attention")
EXTRA = ("group_norm", "layer_norm", "upsample_nearest2d", "upsample_bilinear2d", "avg_pool2d")
# fmt: off
_FREE = {
    "add", "add_", "sub", "rsub", "mul", "mul_", "div", "div_", "neg", "exp", "sin", "cos",
    "sqrt", "pow", "silu", "silu_", "gelu", "sigmoid", "tanh", "softmax", "clamp", "mean", "sum",
    "cat", "chunk", "split", "pad", "repeat", "expand", "copy_", "fill_", "zeros", "ones", "full",
    "arange", "embedding", "masked_fill", "where", "lt", "le", "gt", "ge", "eq", "cumsum",
    "argmax", "triu", "dropout", "contiguous", "type_as", "max", "min",
}
# fmt: on


def operators(network: nn.Module, call: Call) -> pd.DataFrame:
    """Count a network's operators in one pass on real tensors.

    Returns:
        `operator, macs, in_macs, share`: one row for each operator, the most expensive first;
        `in_macs` says whether the convention `macs` counts it, `share` is over those that it does.

    Raises:
        ValueError: an operator is neither counted nor known to be free, or the two counters differ.
    """
    with warnings.catch_warnings():  # fvcore scripts a loss of its own while it is imported
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis
    analysis = FlopCountAnalysis(_Positional(network, call), _tensors(call))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention)
    analysis.set_op_handle("aten::baddbmm", _baddbmm)
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        by_operator = analysis.by_operator()
        unlisted = {
            name: n
            for name, n in analysis.unsupported_ops().items()
            if name.removeprefix("aten::") not in _FREE
        }
    unlisted |= {name: 1 for name in by_operator if name not in (*COUNTED, *EXTRA)}
    if unlisted:
        raise ValueError(
            "operators that no rule covers: "
            + ", ".join(f"{name} ({n} calls)" for name, n in sorted(unlisted.items()))
            + "; their MACs would be missing, so nothing is reported"
        )
    table = pd.DataFrame(
        [
            {"operator": name, "macs": int(n), "in_macs": name in COUNTED}
            for name, n in by_operator.most_common()
        ]
    )
    counted = int(table.loc[table["in_macs"], "macs"].sum())
    expected = reference_macs(network, call)
    if counted != expected:
        raise ValueError(
            f"fvcore counts {counted:,} MACs and torch.utils.flop_counter {expected:,}: "
            "one of them misses an operator, so nothing is reported"
        )
    table["share"] = table["macs"] / counted
    return table


def reference_macs(network: nn.Module, call: Call) -> int:
    """MACs by `torch.utils.flop_counter` on the meta device, attention taken apart into matmuls."""
    flops = FlopCounterMode(display=False)
    shadow = _shadow(network)
    with torch.no_grad(), flops:
        shadow(*_meta(call.args), **_meta(dict(call.kwargs)))
    return int(flops.get_total_flops()) // 2


def _shadow(network: nn.Module) -> nn.Module:
    """The same network on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=False
        )
    for buffer in network.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    shadow: nn.Module = copy.deepcopy(network, memo)
    return shadow


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple | list):
        return type(value)(map(_meta, value))
    if isinstance(value, dict):
        return {name: _meta(item) for name, item in value.items()}
    return value


def _tensors(call: Call) -> tuple[Tensor, ...]:
    added = call.kwargs.get("added_cond_kwargs", {})
    return (*call.args, *added.values())


class _Positional(nn.Module):
    """The network as a function of tensors alone, which is what a tracer takes."""

    def __init__(self, network: nn.Module, call: Call) -> None:
        super().__init__()
        self.network = network
        self._n = len(call.args)
        self._names = list(call.kwargs.get("added_cond_kwargs", {}))

    def forward(self, *tensors: Tensor) -> Tensor:
        kwargs: dict[str, Any] = {"return_dict": False}
        if self._names:
            added = dict(zip(self._names, tensors[self._n :], strict=True))
            kwargs["added_cond_kwargs"] = added
        out: Tensor = self.network(*tensors[: self._n], **kwargs)[0]
        return out


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Q K^T and A V for `[..., n, d]` queries and `[..., m, d]` keys."""
    query, key, value = (x.type().sizes() for x in inputs[:3])
    return int(math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def _baddbmm(inputs: list[Any], outputs: list[Any]) -> int:
    """`[b, n, k] @ [b, k, m]`; adding the first operand is free."""
    left, right = inputs[1].type().sizes(), inputs[2].type().sizes()
    return int(math.prod(left) * right[-1])
