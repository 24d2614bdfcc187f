"""`bkprune prune` and `bkprune diff`: a mask as a checkpoint, and which mask a checkpoint is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bkprune.terminal import (
    JSON,
    MODEL,
    PREDICTION,
    QUIET,
    TEXT_ENCODER,
    TOKENIZER,
    VAE,
    choice,
    notice,
    one_line_errors,
    print_table,
)

if TYPE_CHECKING:
    from bkprune.blocks import Inventory
    from bkprune.card import CardFacts
    from bkprune.export import Student
    from bkprune.models import Parts

_FORMS = ("auto", "plain", "padded", "pruned")


def prune(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="The teacher; as in `analyze`.")
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(
            help="winner.json or another mask file, a preset (bk-sdm-base, -small, -tiny), or "
            "comma-separated blocks, units or globs."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pruned model. Default: NAME-pruned.")
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            help="plain: an ordinary diffusers config, where one exists. padded: attention that no "
            "config can leave out stays as empty transformers. pruned: any mask, by a class that "
            "the folder carries. auto: plain, else pruned."
        ),
    ] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 (written as the fp16 variant) or bfloat16. Default: as stored."
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Split larger weight files.")] = "10GB",
    keep_shortcuts: Annotated[
        bool,
        typer.Option(
            "--keep-shortcuts",
            help="Removed residual blocks of the up stages keep their 1x1 convolution, which reads "
            "the skip.",
        ),
    ] = False,
    single_file: Annotated[
        bool,
        typer.Option(
            "--single-file",
            help="Write original.safetensors as well: the original layout, for older tools. Plain "
            "forms with the same number of layers at every level.",
        ),
    ] = False,
    cost: Annotated[
        Path | None,
        typer.Option(help="Cost table for the card's milliseconds. Default: beside the mask."),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Load this folder in a fresh process without bkprune, run it, and compare bitwise."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what lies in --out.")] = False,
    as_json: JSON = False,
    quiet: QUIET = False,
    tokenizer: TOKENIZER = None,
    text_encoder: TEXT_ENCODER = None,
    vae: VAE = None,
    prediction_type: PREDICTION = None,
) -> None:
    """Write the model without the mask's blocks, as a folder that loads in diffusers.

    The folder holds the whole pipeline, mask.json, and a model card with the drawn U, costs before
    and after, and how to load it.
    """
    with one_line_errors("nothing was written"):
        from bkprune.models import Parts

        if check is not None:
            if model is not None or mask is not None:
                raise ValueError("--check takes a folder and neither MODEL nor --mask")
            _check(check, as_json=as_json)
            return
        if model is None or mask is None:
            raise ValueError("a MODEL and a --mask are needed (or --check DIR)")
        job = _Job(model, Parts(tokenizer, text_encoder, vae, prediction_type), mask)
        folder = out or Path(f"{Path(model).stem}-pruned")
        found = job.run(
            folder,
            form=choice("--form", form, _FORMS),
            dtype=dtype,
            max_shard_size=max_shard_size,
            keep_shortcuts=keep_shortcuts,
            single_file=single_file,
            cost=cost,
            force=force,
            quiet=quiet or as_json,
        )
        if as_json:
            typer.echo(json.dumps(found, indent=1))
        typer.echo(str(folder), err=as_json)


def _check(folder: Path, *, as_json: bool) -> None:
    from bkprune.check import check

    found = check(folder)
    if as_json:
        typer.echo(json.dumps({**vars(found), "is_same": found.is_same}))
    elif found.is_same:
        typer.echo(f"{folder} loads without bkprune; {found.what}: bitwise the same")
    if not found.is_same:
        raise ValueError(
            f"{folder}: {found.what} in plain diffusers differs from ours in {found.differences:,} "
            f"of {found.n:,} values, by {found.largest:.3g} at most"
        )


class _Job:
    """One pruning of one model."""

    def __init__(self, model: str, parts: Parts, mask: str) -> None:
        self.model, self.parts, self.mask_text = model, parts, mask

    def run(
        self,
        out: Path,
        *,
        form: Any,
        dtype: str | None,
        max_shard_size: str,
        keep_shortcuts: bool,
        single_file: bool,
        cost: Path | None,
        force: bool,
        quiet: bool,
    ) -> dict[str, Any]:
        from bkprune import export, ldm, models
        from bkprune.backends import DTYPES
        from bkprune.blocks import Inventory
        from bkprune.masks import mask_record, read_mask

        wanted = (
            models.stored_dtype(self.model)
            if dtype is None
            else DTYPES[choice("--dtype", dtype, tuple(DTYPES))]
        )
        settings = export.FolderSettings(wanted, max_shard_size)
        pipeline = models.load(self.model, self.parts, dtype=wanted)
        inventory = Inventory.of(pipeline.unet)
        removed = read_mask(self.mask_text, inventory)
        if not removed:
            raise ValueError(f"--mask {self.mask_text!r} removes nothing")
        plan = inventory.plan(removed, keep_shortcuts=keep_shortcuts)
        chosen = export.student(pipeline.unet, inventory, plan, form)
        record = {
            "format": 1,
            **mask_record(removed, inventory, plan),
            "form": chosen.form,
            "modules": chosen.modules,
            "padded": list(chosen.twin.padded) if chosen.twin else [],
            "teacher": {
                "model": Path(self.model).name,
                "unet": models.fingerprint(pipeline.unet),
                "dtype": str(wanted).removeprefix("torch."),
            },
        }
        if _is_same(out, record) and not force:
            notice(f"{out} is up to date")
            return record
        if single_file:
            ldm.unet_names(chosen.unet)  # says what stands in the way
        facts = self._facts(pipeline, inventory, chosen, record, cost, settings.variant)
        say = (lambda what: None) if quiet else notice
        with export.new_folder(out, force=force) as folder:
            source = models.folder_of(self.model)
            export.write_folder(folder, pipeline, chosen, source, settings, say)
            if single_file:
                say("writing original.safetensors")
                ldm.write(pipeline, folder / "original.safetensors")
            self._describe(folder, facts, record, inventory)
        if not quiet:
            _print(facts, chosen)
        return record

    def _facts(
        self,
        pipeline: Any,
        inventory: Inventory,
        chosen: Student,
        record: dict[str, Any],
        cost: Path | None,
        variant: str | None,
    ) -> CardFacts:
        import bkprune
        from bkprune import export, models, study
        from bkprune.card import CardFacts, licence_of
        from bkprune.cost import read
        from bkprune.profiling import Profile, ProfileSettings
        from bkprune.skeleton import skeleton

        made = Profile(skeleton(self.model, self.parts), ProfileSettings())
        table = made.table
        path = cost or Path(self.mask_text).parent / study.COST
        if cost is not None or (Path(self.mask_text).is_file() and path.is_file()):
            table = read(path, table)
        before, after = vars(table.cost_of()), vars(table.cost_of_plan(record["plan"]))
        if chosen.form == "padded":
            after = {**after, **export.counted(chosen, made.unet_call("meta"))}
        height, width = made.latent_size
        return CardFacts(
            Path(self.model).name,
            chosen.form,
            record["removed"],
            len(inventory),
            before,
            after,
            export.DRAWING,
            bkprune.__version__,
            getattr(pipeline, "vae", None) is not None,
            variant,
            record["padded"],
            licence_of(models.folder_of(self.model)),
            f"Batch 1, {height}x{width} latents, {made.n_tokens} tokens, no guidance.",
        )

    def _describe(
        self, folder: Path, facts: CardFacts, record: dict[str, Any], inventory: Inventory
    ) -> None:
        import pandas as pd

        from bkprune import export
        from bkprune.card import model_card
        from bkprune.drawing import mask_figure, png

        told = {**record, "cost": {"teacher": dict(facts.before), "student": dict(facts.after)}}
        (folder / export.MASK).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        (folder / export.CARD).write_text(model_card(facts), encoding="utf-8")
        figure = mask_figure(pd.DataFrame(inventory.rows()), record["removed"])
        (folder / export.DRAWING).write_bytes(png(figure))


def _is_same(out: Path, record: dict[str, Any]) -> bool:
    from bkprune.export import MASK

    try:
        found = json.loads((out / MASK).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    keys = ("stamp", "form", "teacher", "format")
    return isinstance(found, dict) and all(found.get(key) == record[key] for key in keys)


def _print(facts: CardFacts, chosen: Student) -> None:
    import pandas as pd

    rows = []
    for name in ("params", "macs_paper", "macs", "latency_ms"):
        before, after = facts.before.get(name), facts.after.get(name)
        if before and after:
            shown = [f"{v:,.2f}" if name == "latency_ms" else f"{v:,}" for v in (before, after)]
            row = {"U-Net": name, "teacher": shown[0], "pruned": shown[1]}
            rows.append({**row, "ratio": f"{after / before:.3f}x"})
    title = f"{len(facts.removed)} of {facts.n_blocks} blocks removed, form {chosen.form}"
    print_table(pd.DataFrame(rows), title)
    notice(facts.inputs)
    if chosen.form == "pruned":
        notice(
            "no stock config describes this mask: diffusers loads it with trust_remote_code=True, "
            "bkprune.load without; --form padded may make a stock one at some cost"
        )
    else:
        notice("stock diffusers loads it")


def diff(
    a: MODEL,
    b: Annotated[str, typer.Argument(metavar="STUDENT", help="Another model of its family.")],
    as_json: JSON = False,
    quiet: QUIET = False,
) -> None:
    """Print which blocks two checkpoints differ in.

    MODEL is a teacher; STUDENT may be pruned by bkprune, published by others (BK-SDM's folders are
    recognised as their masks), or another model of the same shape.
    """
    with one_line_errors("nothing was written"):
        from bkprune.comparing import compare_models

        found = compare_models(a, b)
        if as_json:
            typer.echo(json.dumps(found.as_json(), indent=1))
            return
        notice(found.summary)
        if not quiet:
            print_table(found.table, f"{a} and {b}, block by block")
