"""A profile for people: tables of blocks, masks, times and operators at the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from bkprune.terminal import notice, print_table

if TYPE_CHECKING:
    from bkprune.profiling import Profile


def print_profile(shown: dict[str, Any], made: Profile, model: str) -> None:
    """Everything a profile has to show, for people: tables on stdout, conventions on stderr."""
    from bkprune.cost import CONVENTIONS

    s = made.settings
    target = s.target
    height, width = made.latent_size
    given = (
        f"batch {s.batch_size}{' x 2 (guidance)' if s.guidance else ''}, {height}x{width} latents, "
        f"{made.n_tokens} tokens, {target.dtype}"
    )
    _print_blocks(shown["cost"], f"{model}: {given}")
    _print_masks(shown, made)
    if shown["latency"]:
        _print_wholes(
            shown["latency"],
            f"{target.device}, {target.backend}, {target.n_threads} threads, {target.dtype}",
        )
    if "operators" in shown:
        _print_operators(shown["operators"])
    for name, meaning in CONVENTIONS.items():
        notice(f"{name}: {meaning}")
    notice("memory: weights + the highest activation peak of one pass; MB are 1e6 bytes")
    if "accuracy" in shown:
        found = shown["accuracy"]
        notice(
            f"predicted against measured over {len(shown['compared'])} masks: MAPE "
            f"{found['mape_percent']:.1f} %, Spearman {found['spearman']:.3f}, "
            f"Kendall {found['kendall']:.3f}"
        )


def _print_blocks(rows: list[dict[str, Any]], title: str) -> None:
    table = pd.DataFrame(rows)
    view = table[["unit", "params", "macs_paper", "macs"]].copy()
    view["weights MB"] = [f"{b / 1e6:,.1f}" for b in table["weight_bytes"]]
    view["activation MB"] = [f"{mb:,.2f}" for mb in table["activation_mb"]]
    if table["latency_ms"].notna().any():
        view["ms"] = [_ms(row, "latency_ms", "latency_ms_") for row in rows]
    of_unet = table["part"].isin(("block", "sampler", "rest"))
    total: dict[str, Any] = {
        "unit": "U-Net",
        **{c: int(table.loc[of_unet, c].sum()) for c in view.columns[1:4]},
    }
    total["weights MB"] = f"{table.loc[of_unet, 'weight_bytes'].sum() / 1e6:,.1f}"
    total["activation MB"] = f"{table.loc[of_unet, 'activation_mb'].max():,.2f}"
    if "ms" in view:
        total["ms"] = f"{table.loc[of_unet, 'latency_ms'].sum():.3g}"
    n = int(of_unet.sum())
    view = pd.concat([view[:n], pd.DataFrame([total]), view[n:]], ignore_index=True)
    print_table(view, title)


def _ms(row: dict[str, Any], name: str, interval: str) -> str:
    if row[name] is None:
        return ""
    low, high = row.get(f"{interval}low"), row.get(f"{interval}high")
    spread = f"  {low:.3g} .. {high:.3g}" if low is not None and high is not None else ""
    return f"{row[name]:.3g}{spread}"


def _print_masks(shown: dict[str, Any], made: Profile) -> None:
    teacher = shown["masks"][0]
    measured = {row["mask"]: row for row in shown.get("compared", ())}
    rows = []
    for row in shown["masks"]:
        line = {"mask": row["mask"]}
        for column in ("params", "macs_paper", "macs"):
            line[column] = f"{row[column]:,} ({row[column] / teacher[column]:.3f}x)"
        line["memory MB"] = f"{row['memory_mb']:,.1f}"
        if row["latency_ms"] is not None:
            share = row["latency_ms"] / teacher["latency_ms"]
            line["ms, predicted"] = f"{row['latency_ms']:.3g} ({share:.3f}x)"
            found = measured.get(row["mask"])
            line["ms, measured"] = _ms(found, "measured_ms", "measured_ms_") if found else ""
        rows.append(line)
    if len(rows) > 1:
        print_table(pd.DataFrame(rows), "Masks")
    others = [row for row in measured.values() if row["mask"] not in {r["mask"] for r in rows}]
    if others:
        view = pd.DataFrame(others)[["mask", "n_removed"]]
        view["ms, predicted"] = [f"{row['predicted_ms']:.3g}" for row in others]
        view["ms, measured"] = [_ms(row, "measured_ms", "measured_ms_") for row in others]
        view["error"] = [
            f"{100 * (r['predicted_ms'] / r['measured_ms'] - 1):+.1f} %" for r in others
        ]
        print_table(view, "Masks that the table had to predict")


def _print_wholes(rows: list[dict[str, Any]], title: str) -> None:
    view = pd.DataFrame({"part": [row["part"] for row in rows]})
    view["ms, median"] = [f"{row['median']:.4g}" for row in rows]
    view["95 % interval"] = [f"{row['low']:.4g} .. {row['high']:.4g}" for row in rows]
    view["p10 .. p90"] = [f"{row['p10']:.4g} .. {row['p90']:.4g}" for row in rows]
    view["runs"] = [row["n"] for row in rows]
    view["set aside"] = [row["n_set_aside"] for row in rows]
    view[""] = ["noisy" if row["noisy"] else "" for row in rows]
    print_table(view, f"Time: {title}")
    if {"unet", "vae_decoder"} <= set(view["part"]) and "image" not in set(view["part"]):
        notice("one whole image would take longer than --max-seconds: not measured")


def _print_operators(rows: list[dict[str, Any]]) -> None:
    view = pd.DataFrame(rows)
    view["share"] = [f"{100 * share:.2f} %" for share in view["share"]]
    view["in_macs"] = ["yes" if counted else "no" for counted in view["in_macs"]]
    print_table(view, "U-Net by operator (fvcore)")
    notice("operators in macs add up to what torch.utils.flop_counter counts")
