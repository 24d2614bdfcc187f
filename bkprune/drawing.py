"""How a U-Net is drawn as a U, and what all figures share: colours, scales, PNG bytes.

Knows places and shapes of blocks, no table and no meaning of a value.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from typing import Any, Literal

import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Colormap, LogNorm, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Colour = tuple[float, float, float, float]

KIND_COLOURS = {"residual": "#3b6fb6", "attention": "#d9822b", "mixed": "#6b7280"}
COLOURS: Colormap = colormaps["viridis"]
_DECADES = 4  # of a logarithmic colour scale; what is smaller is shown as the smallest
_INCH = 0.62  # of a figure for one unit of the drawing


def png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as PNG bytes, the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def png_and_svg(figure: Figure) -> tuple[bytes, bytes]:
    """Both, laid out once, with the first; the same bytes for the same figure.

    Each canvas draws once; `savefig` would draw a second time, to see how large all of it is.
    """
    svg, raster = io.BytesIO(), io.BytesIO()
    figure.set_dpi(72)  # what SVG counts in
    with rc_context({"svg.hashsalt": "bkprune"}):
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(svg, metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")
    figure.set_dpi(110)
    canvas = FigureCanvasAgg(figure)
    canvas.print_png(raster, metadata={"Software": None})
    return raster.getvalue(), svg.getvalue()


def unit_column(blocks: pd.DataFrame, units: pd.Series[Any]) -> str:
    """Which column of the block table names these units: `name`, `pair` or `stage`."""
    for column in ("name", "pair", "stage"):
        if set(units) <= set(blocks[column]):
            return column
    raise ValueError(f"the table names units that are no blocks: {units.iloc[0]!r}, ...")


def scale(scores: pd.Series[Any]) -> Normalize:
    """Logarithmic for scores above zero, four decades at most; linear otherwise."""
    top = float(scores.max())
    if float(scores.min()) > 0:
        return LogNorm(max(float(scores.min()), top / 10**_DECADES), top, clip=True)
    return Normalize(min(0.0, float(scores.min())), max(top, 1e-12), clip=True)


def extend(norm: Normalize, lowest: float) -> Literal["min", "neither"]:
    """An arrow at the scale's end where smaller values are drawn in its last colour."""
    return "min" if norm.vmin is not None and lowest < norm.vmin else "neither"


def plain(axes: Axes) -> None:
    """A light grid behind the data and no frame above and to the right."""
    axes.grid(color="#e4e7eb")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def logarithmic(axis: Axis) -> None:
    """Decades with their twos and fives, as plain numbers: labels that do not run together."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(_as_plain_number))
    axis.set_minor_formatter(NullFormatter())


def _as_plain_number(value: float, _: int) -> str:
    return f"{value:g}"


def size_of_u(blocks: pd.DataFrame, inch: float = _INCH) -> tuple[float, float]:
    """Inches that the drawing wants, width and height; `inch` is a block with its margin."""
    left, right, bottom, top = _bounds(places_of(blocks))
    return inch * (right - left), inch * (top - bottom)


def draw_u(
    axes: Axes,
    blocks: pd.DataFrame,
    values: Mapping[str, float],
    norm: Normalize,
    text_size: float = 9,
) -> None:
    """The U with every block coloured by its value; residual blocks are boxes, attention pills."""
    draw_blocks(axes, blocks, {n: COLOURS(norm(v)) for n, v in values.items()}, text_size)


def draw_removed(
    axes: Axes, blocks: pd.DataFrame, removed: Collection[str], text_size: float = 9
) -> None:
    """The U with kept blocks in the colours of their kinds, and removed ones empty and dashed."""
    faces = {
        name: None if name in removed else to_rgba(KIND_COLOURS[kind])
        for name, kind in zip(blocks["name"], blocks["kind"], strict=True)
    }
    draw_blocks(axes, blocks, faces, text_size)


def mask_figure(blocks: pd.DataFrame, removed: Collection[str]) -> Figure:
    """One U with what is removed drawn empty."""
    figure = Figure(figsize=size_of_u(blocks), layout="constrained")
    draw_removed(figure.subplots(), blocks, removed)
    return figure


def draw_blocks(
    axes: Axes, blocks: pd.DataFrame, faces: Mapping[str, Colour | None], text_size: float = 9
) -> None:
    """The U with every block in its own colour; those of None are drawn as gone."""
    places = places_of(blocks)
    _draw_levels(axes, blocks, places, text_size)
    for name, kind in zip(blocks["name"], blocks["kind"], strict=True):
        x, y = places[name]
        face = faces[name]
        box = FancyBboxPatch(
            (x - 0.42, y - 0.3),
            0.84,
            0.6,
            boxstyle=f"round,pad=0,rounding_size={0.08 if kind == 'residual' else 0.28}",
            facecolor="#f1f3f5" if face is None else face,
            edgecolor="#aab2bd" if face is None else "#1f2933",
            lw=0.8,
            ls="--" if face is None else "-",
        )
        axes.add_patch(box)
        text = f"{'R' if kind == 'residual' else 'A'}{name.rsplit('.', 1)[1]}"
        colour = "#aab2bd" if face is None else "white" if _is_dark(face) else "black"
        axes.text(x, y, text, ha="center", va="center", size=text_size, color=colour)
    left, right, bottom, top = _bounds(places)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_aspect("equal")
    axes.axis("off")


def _is_dark(face: Colour) -> bool:
    return sum(c * w for c, w in zip(face[:3], (0.3, 0.59, 0.11), strict=True)) < 0.5


def _bounds(places: Mapping[str, tuple[float, float]]) -> tuple[float, float, float, float]:
    xs, ys = zip(*places.values(), strict=True)
    return min(xs) - 2.4, max(xs) + 0.6, min(ys) - 0.5, 0.9


def _draw_levels(
    axes: Axes, blocks: pd.DataFrame, places: dict[str, tuple[float, float]], text_size: float
) -> None:
    """Skip connections, sizes and the names of the two sides."""
    grey = "#52606d"
    for _, members in blocks.groupby("level"):
        y = -float(members["level"].iloc[0])
        xs = [places[n][0] for n in members["name"] if places[n][1] == y]
        inner = (max(x for x in xs if x < 0), min(x for x in xs if x > 0))
        axes.annotate(
            "",
            (inner[1] - 0.5, y),
            (inner[0] + 0.5, y),
            arrowprops={"arrowstyle": "->", "color": "#b8c0cc", "lw": 1, "ls": "--"},
        )
        size = f"1/{members['resolution_factor'].iloc[0]}"
        channels = int(members["out"].mode().iloc[0])
        text = f"{channels} ch, {size}" if size != "1/1" else f"{channels} ch"
        axes.text(min(xs) - 0.6, y, text, ha="right", va="center", size=text_size, color=grey)
    xs_all = [x for x, _ in places.values()]
    axes.text(min(xs_all) - 0.42, 0.5, "down_blocks.0 ...", size=text_size, color=grey)
    axes.text(max(xs_all) + 0.42, 0.5, "... up_blocks", size=text_size, color=grey, ha="right")
    mid = [places[n] for n in blocks.loc[blocks["stage"] == "mid_block", "name"]]
    if mid:
        axes.text(0, mid[0][1] + 0.42, "mid_block", ha="center", size=text_size, color=grey)


def places_of(blocks: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Centre of every block: both arms of the U lean inwards, the mid block lies at its bottom."""
    places: dict[str, tuple[float, float]] = {}
    n_levels = int(blocks["level"].max()) + 1
    for stage, members in blocks.groupby("stage", sort=False):
        level, n = int(members["level"].iloc[0]), len(members)
        reach = 2.0 + 0.9 * (n_levels - 1 - level)
        if stage == "mid_block":
            start, y = -(n - 1) / 2, -float(n_levels)
        elif str(stage).startswith("down"):
            start, y = -reach - (n - 1), -float(level)
        else:
            start, y = reach, -float(level)
        for i, name in enumerate(members["name"]):
            places[name] = (start + i, y)
    return places
