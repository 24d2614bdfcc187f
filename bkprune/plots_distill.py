"""The log of a training run in, figures out.

Knows how losses over steps are shown. Works from the log alone.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from bkprune.drawing import logarithmic, plain

_COLOURS = {"loss_task": "#9aa5b1", "loss_output": "#3b6fb6", "loss_feature": "#d9822b"}


def curves(log: pd.DataFrame) -> Figure:
    """Task, output and feature loss over steps: every step faint, their running mean strong."""
    names = [name for name in _COLOURS if name in log.columns and (log[name] > 0).any()]
    figure = Figure(figsize=(3.6 * len(names), 3.2), layout="constrained")
    window = max(len(log) // 40, 1)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axes.plot(log["step"], log[name], color=_COLOURS[name], lw=0.5, alpha=0.4)
        smooth = log[name].rolling(window, min_periods=1).mean()
        axes.plot(log["step"], smooth, color=_COLOURS[name], lw=1.6)
        axes.set_yscale("log")
        logarithmic(axes.yaxis)
        axes.set_title(f"{name.removeprefix('loss_')} loss", size=10)
        axes.set_xlabel("step")
        plain(axes)
    return figure
