"""The model card of a pruned folder: what was removed, what it costs, how it is loaded.

Knows what a card says and in which order, and which lines of the teacher's own card (its licence)
must travel with the weights. Works from plain tables: it needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bkprune.cost import CONVENTIONS

_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.S)
_LICENCE_LINE = re.compile(r"^(license(?:_name|_link)?):\s*(\S.*)$", re.M)
_MEASURES = {
    "params": ("Parameters of the U-Net", "{:,.0f}"),
    "macs_paper": ("MACs of one step, `macs_paper`", "{:,.0f}"),
    "macs": ("MACs of one step, `macs`", "{:,.0f}"),
    "latency_ms": ("Milliseconds of one step, predicted", "{:,.1f}"),
}


UNTRAINED = (
    "Pruned only: the quality is that of before any retraining. Distil it against its teacher "
    "before you judge it (`bkprune distill`)."
)


@dataclass(frozen=True)
class CardFacts:
    """Everything a card states."""

    teacher: str
    form: str
    removed: Sequence[str]
    n_blocks: int
    before: Mapping[str, float | None]
    after: Mapping[str, float | None]
    drawing: str
    version: str
    is_pipeline: bool
    variant: str | None = None
    padded: Sequence[str] = ()
    licence: Mapping[str, str] = field(default_factory=dict)
    inputs: str = ""


def licence_of(folder: Path | None) -> dict[str, str]:
    """The licence lines of a model card's front matter, as they stand."""
    card = folder / "README.md" if folder is not None else None
    if card is None or not card.is_file():
        return {}
    found = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    return dict(_LICENCE_LINE.findall(found[1])) if found else {}


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with front matter."""
    front = [f"{key}: {value}" for key, value in facts.licence.items()]
    front += ["library_name: diffusers", "tags: [stable-diffusion, bkprune, pruned]"]
    if facts.is_pipeline:
        front.append("pipeline_tag: text-to-image")
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {facts.teacher}, {len(facts.removed)} of {facts.n_blocks} U-Net blocks removed",
        "",
        UNTRAINED,
        "",
        f"![The U-Net; removed blocks are empty]({facts.drawing})",
        "",
        *_costs(facts),
        "",
        "## Load it",
        "",
        *_loading(facts),
        "",
        "## Removed blocks",
        "",
        "Named by the teacher's diffusers module paths; R residual, A attention in the drawing.",
        "",
        *(f"- `{name}`" for name in facts.removed),
        "",
        f"Made by bkprune {facts.version}. `mask.json` holds the mask"
        + (" and the teacher's names of the blocks." if facts.form != "pruned" else "."),
        "",
    ]
    return "\n".join(lines)


def distilled_card(card: str, told: Mapping[str, Any]) -> str:
    """A pruned model's card after retraining."""
    s = told["settings"]
    batch = s["batch_size"] * s["accumulate"]
    said = (
        f"Distilled against its teacher for {s['steps']:,} steps of {batch} samples a process, "
        f"from {told['pairs']:,} pairs (AdamW, rate {s['lr']:g}, loss weights: task "
        f"{s['losses']['task']:g}, output {s['losses']['output']:g}, feature "
        f"{s['losses']['feature']:g}). `mask.json` has every setting."
    )
    return card.replace(UNTRAINED, said)


def _costs(facts: CardFacts) -> list[str]:
    rows = ["| | teacher | this model | |", "| --- | ---: | ---: | ---: |"]
    for name, (label, form) in _MEASURES.items():
        before, after = facts.before.get(name), facts.after.get(name)
        if before and after:
            ratio = f"{after / before:.3f}x"
            rows.append(f"| {label} | {form.format(before)} | {form.format(after)} | {ratio} |")
    words = [f"`{name}`: {CONVENTIONS[name]}." for name in ("macs_paper", "macs")]
    return [*rows, "", f"{facts.inputs} {' '.join(words)}".strip()]


def _loading(facts: CardFacts) -> list[str]:
    arguments = f', variant="{facts.variant}", dtype=torch.float16' if facts.variant else ""
    if facts.form == "pruned":
        arguments += ", trust_remote_code=True"
    imports = ["import torch"] if facts.variant else []
    door = "DiffusionPipeline" if facts.is_pipeline else "UNet2DConditionModel"
    if facts.form == "pruned" and not facts.is_pipeline:
        door = "AutoModel"
    load = f'model = {door}.from_pretrained("PATH"{arguments})'
    code = ["```python", *imports, f"from diffusers import {door}", "", load, "```"]
    if facts.form == "plain":
        return ["Stock diffusers, nothing else needed:", "", *code]
    if facts.form == "padded":
        return [
            "Stock diffusers, nothing else needed:",
            "",
            *code,
            "",
            f"{len(facts.padded)} removed attention blocks stay as empty transformers (a norm and "
            "two projections, the last one zero), because no stock config leaves them out.",
        ]
    return [
        "No stock config describes this mask, so the folder carries the class that does (it "
        "imports torch and diffusers alone). Read it, then:",
        "",
        *code,
        "",
        "Stock `UNet2DConditionModel.from_pretrained` refuses the folder rather than make weights "
        "up. With bkprune installed, `bkprune.load(PATH)` needs no trust.",
    ]
