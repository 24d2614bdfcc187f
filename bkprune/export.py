"""The pruned U-Net in the form that people can load, and the folder it is shipped in.

Knows the three forms (plain: an ordinary diffusers config; padded: the same with empty transformers
in place of removed attention; pruned: our own class with its module file beside it), how a pipeline
folder is laid out, and how it is written so that no kill and no full disk leaves half of one. It
does not know how a mask was chosen.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import UNet2DConditionModel

from bkprune import bypass
from bkprune.blocks import Inventory, Plan
from bkprune.bypass import PrunedUNet
from bkprune.card import distilled_card
from bkprune.counting import Call, count
from bkprune.models import folder_of
from bkprune.single_file import quiet, read_json
from bkprune.twin import NoTwinError, Twin, find_twin

Form = Literal["auto", "plain", "padded", "pruned"]
FORMS: tuple[Form, ...] = get_args(Form)
MASK, CARD, DRAWING = "mask.json", "README.md", "unet.png"
_CARRIED = ("safety_checker", "feature_extractor", "image_encoder")  # never loaded, copied as is
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")


@dataclass(frozen=True)
class Student:
    """A pruned U-Net in one of the forms; `twin` is None for the form `pruned`."""

    unet: UNet2DConditionModel
    form: Form
    twin: Twin | None = None

    @property
    def modules(self) -> dict[str, str]:
        """Own name -> teacher's name of every block and sampler that is called otherwise."""
        named = self.twin.modules if self.twin else {}
        return {own: teacher for own, teacher in named.items() if own != teacher}

    @property
    def n_params(self) -> int:
        """Parameters of the U-Net in this form."""
        return sum(p.numel() for p in self.unet.parameters())


def student(
    teacher: UNet2DConditionModel, inventory: Inventory, plan: Plan, form: Form = "auto"
) -> Student:
    """The teacher's U-Net under a plan, in the form asked for; it shares the teacher's weights.

    `auto` is plain where a plain twin exists, else pruned.

    Raises:
        ValueError: the form cannot hold this plan; the reason is given.
    """
    if form != "pruned":
        try:
            twin = find_twin(inventory, plan, teacher.config, padded=form == "padded")
            return Student(_filled(twin, teacher), "padded" if twin.padded else "plain", twin)
        except NoTwinError as error:
            if form != "auto":
                raise ValueError(
                    f"--form {form}: {error}; --form pruned holds any mask"
                    + ("" if form == "padded" else ", --form padded some more")
                ) from error
    return Student(PrunedUNet.from_teacher(teacher, plan, copy=False).eval(), "pruned")


def _filled(twin: Twin, teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    weights = teacher.state_dict()
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(twin.config)
    except (ValueError, TypeError) as error:
        raise NoTwinError(f"stock diffusers builds no such net ({error})") from error
    filled = {}
    for key, shape in ((key, tensor.shape) for key, tensor in unet.state_dict().items()):
        theirs = weights.get(twin.teacher_key(key))
        if theirs is None or theirs.shape != shape:
            raise NoTwinError(f"{twin.teacher_key(key)} does not fit the stock config")
        is_empty = any(key.startswith(f"{name}.proj_out.") for name in twin.padded)
        filled[key] = torch.zeros_like(theirs) if is_empty else theirs.detach()
    unet.load_state_dict(filled, assign=True)
    named = teacher.attn_processors
    unet.set_attn_processor({name: named[twin.teacher_key(name)] for name in unet.attn_processors})
    return unet.train(teacher.training).requires_grad_(True)


def counted(chosen: Student, call: Call) -> dict[str, int]:
    """Params and MACs of the form as it is, by counting: padding is not in any cost table."""
    with torch.device("meta"), quiet():
        bare = type(chosen.unet).from_config(chosen.unet.config).to(call.args[0].dtype).eval()
    whole = count(bare, call).whole
    return {name: getattr(whole, name) for name in ("params", "macs_paper", "macs", "weight_bytes")}


# --- the folder ----------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderSettings:
    """How a folder is written. float16 weights go into the `fp16` variant."""

    dtype: torch.dtype = torch.float32
    max_shard_size: str = "10GB"

    @property
    def variant(self) -> str | None:
        """The variant's name in file names."""
        return "fp16" if self.dtype == torch.float16 else None


def is_ours(folder: Path) -> bool:
    """Whether bkprune has written this folder."""
    return (folder / MASK).exists()


@contextmanager
def new_folder(out: Path, *, force: bool) -> Any:
    """A folder beside the target that takes its place once everything in it is on the disk.

    Raises:
        ValueError: something is in the way, and it was not said to be replaced.
    """
    if out.is_file():
        raise ValueError(f"{out}: a file is in the way; give a folder with --out")
    if out.exists() and any(out.iterdir()) and not force:
        whose = "holds another mask" if is_ours(out) else "is not a folder that bkprune has written"
        raise ValueError(f"{out}: exists and {whose}; use another --out, or --force to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield beside
        for path in beside.rglob("*"):
            if path.is_file():
                _sync(path)
        beside.chmod(0o755)
        _replace(beside, out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(beside: Path, out: Path) -> None:
    if not out.exists():
        beside.rename(out)
        return
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
    out.rename(aside / out.name)
    beside.rename(out)
    shutil.rmtree(aside, ignore_errors=True)


def write_folder(
    folder: Path,
    pipeline: Any,
    chosen: Student,
    source: Path | None,
    settings: FolderSettings,
    say: Callable[[str], None] = lambda what: None,
) -> None:
    """Write a pipeline with its U-Net replaced; of a U-Net alone, a U-Net folder.

    Args:
        folder: empty.
        pipeline: as `models.load` gives it; its U-Net is replaced in place.
        chosen: the pruned U-Net.
        source: folder of the teacher, from which parts that are never loaded and licences come.
        settings: dtype and shards.
        say: told what is being written.
    """
    saving = {"max_shard_size": settings.max_shard_size, "variant": settings.variant}
    is_pipeline = getattr(pipeline, "vae", None) is not None
    unet_folder = folder / "unet" if is_pipeline else folder
    with quiet():
        if is_pipeline:
            say("writing the pipeline")
            pipeline.register_modules(unet=chosen.unet)
            pipeline.save_pretrained(folder, safe_serialization=True, **saving)
        else:
            say("writing the U-Net")
            chosen.unet.save_pretrained(folder, safe_serialization=True, **saving)
    if chosen.form == "pruned":
        name = carry_module(unet_folder)
        if is_pipeline:
            _edit(folder / "model_index.json", {"unet": [name, PrunedUNet.__name__]})
    if source is not None:
        _carry(source, folder if is_pipeline else None)
        for pattern in _LICENCES:
            for path in sorted(source.glob(pattern)):
                shutil.copyfile(path, folder / path.name)
    for path in folder.rglob("*.json"):
        if path.name in ("config.json", "model_index.json"):
            _forget_paths(path)


def module_name() -> str:
    """Name of the module file in pruned folders: new whenever its content is.

    diffusers caches such a file under its bare name for all local models.
    """
    return f"bkprune_unet_{hashlib.sha256(_module_source()).hexdigest()[:10]}"


def _module_source() -> bytes:
    return Path(inspect.getfile(bypass)).read_bytes()


def carry_module(unet_folder: Path) -> str:
    """Put the class beside the weights, for those who load without bkprune installed."""
    name = module_name()
    (unet_folder / f"{name}.py").write_bytes(_module_source())
    auto_map = {"AutoModel": f"{name}.{PrunedUNet.__name__}"}
    _edit(unet_folder / "config.json", {"auto_map": auto_map})
    return name


def _carry(source: Path, folder: Path | None) -> None:
    """Parts that are never loaded here, and flags, as the teacher's folder has them."""
    if folder is None or not (source / "model_index.json").exists():
        return
    index, changes = read_json(source / "model_index.json"), {}
    for name in _CARRIED:
        entry = index.get(name)
        if isinstance(entry, list) and entry[0] is not None and (source / name).is_dir():
            shutil.copytree(
                source / name, folder / name, ignore=shutil.ignore_patterns("*.py", "*.pyc")
            )
            changes[name] = entry
    if "requires_safety_checker" in index:
        changes["requires_safety_checker"] = index["requires_safety_checker"]
    _edit(folder / "model_index.json", changes)


def _forget_paths(path: Path) -> None:
    value = read_json(path)
    if value.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _edit(path: Path, changes: Mapping[str, Any]) -> None:
    value = {**read_json(path), **changes}
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def with_new_weights(
    folder: Path, student: str, pipeline: Any, dtype: torch.dtype, told: Mapping[str, Any]
) -> None:
    """A student's folder again, its U-Net's weights replaced by those of the pipeline.

    Args:
        folder: empty.
        student: where the student lies.
        pipeline: as loaded from there, its U-Net trained since.
        dtype: in which the student was stored.
        told: what was done, for mask.json and the card.
    """
    source = folder_of(student)
    settings = FolderSettings(dtype)
    with quiet():
        unet = copy.deepcopy(pipeline.unet).to(device="cpu", dtype=dtype)
    form: Form = "pruned" if isinstance(unet, PrunedUNet) else "plain"
    if source is None:
        pipeline.unet = unet
        write_folder(folder, pipeline, Student(unet, form), None, settings)
        return
    weights = ("diffusion_pytorch_model*", "bkprune_unet_*.py")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    unet_folder = folder / "unet" if (folder / "model_index.json").exists() else folder
    for pattern in (*weights, "original.safetensors"):
        for path in (*unet_folder.glob(pattern), *folder.glob(pattern)):
            path.unlink()
    with quiet():
        unet.save_pretrained(unet_folder, safe_serialization=True, variant=settings.variant)
    if form == "pruned":
        name = carry_module(unet_folder)
        if unet_folder != folder:
            _edit(folder / "model_index.json", {"unet": [name, PrunedUNet.__name__]})
    _forget_paths(unet_folder / "config.json")
    if is_ours(folder):
        _edit(folder / MASK, {"distilled": json.loads(json.dumps(told, default=str))})
    card = folder / CARD
    if card.exists():
        card.write_text(distilled_card(card.read_text(encoding="utf-8"), told), encoding="utf-8")
