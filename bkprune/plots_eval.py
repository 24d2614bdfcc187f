"""The evaluation table in, figures out.

Knows how values with errors are set side by side. Works from the table alone.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from bkprune.drawing import plain

_TITLES = {
    "fid": "FID",
    "kid": "KID",
    "is": "Inception score",
    "clip_score": "CLIP score",
    "frechet_clip": "Frechet distance, CLIP",
    "kernel_clip": "kernel distance, CLIP",
    "lpips": "LPIPS to the teacher",
    "psnr": "PSNR to the teacher, dB",
    "ssim": "SSIM to the teacher",
    "output_error": "output error",
    "s_per_image": "seconds per picture",
}
_A_ROW = 4


def quality(values: pd.DataFrame) -> Figure:
    """One panel a metric, one row a model, 95 % intervals; the arrow says where better is."""
    names = [name for name in _TITLES if name in set(values["metric"])]
    models = list(dict.fromkeys(values["model"]))
    n_rows = -(-len(names) // _A_ROW) or 1
    width, height = min(len(names), _A_ROW) or 1, 0.8 + 0.28 * len(models)
    figure = Figure(figsize=(2.7 * width + 1.2, height * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, width, squeeze=False, sharey=True)
    for axes, name in zip(grid.flat, names, strict=False):
        rows = values[values["metric"] == name].set_index("model").reindex(models)
        places = range(len(models))
        axes.errorbar(
            rows["value"],
            places,
            xerr=1.96 * rows["stderr"].fillna(0),
            fmt="o",
            ms=4,
            color="#3b6fb6",
            ecolor="#9aa5b1",
            capsize=2,
        )
        better = str(rows["better"].dropna().iloc[0])
        arrow = {"lower": "\N{LEFTWARDS ARROW} better", "higher": "better \N{RIGHTWARDS ARROW}"}
        axes.set_title(_TITLES[name], size=9.5)
        axes.set_xlabel(arrow.get(better, ""), size=8)
        axes.tick_params(labelsize=8)
        plain(axes)
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    grid[0, 0].set_yticks(range(len(models)), models)
    grid[0, 0].invert_yaxis()
    return figure
