"""Does a folder load without bkprune, and does it give the same picture?

Knows how a fresh process is started in which `import bkprune` fails, what it runs with diffusers
alone, and how its result is compared with ours, bit by bit. It does not know how folders are
written.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bkprune import models
from bkprune.counting import unet_call
from bkprune.single_file import read_json

PROMPT, SEED, STEPS = "a photo of a cat", 1234, 2
_FRESH = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "bkprune" or name.startswith("bkprune."):
            raise ImportError("bkprune is kept away from this process")
sys.meta_path.insert(0, Refuse())
import warnings
warnings.simplefilter("ignore")
import numpy as np, torch, diffusers
diffusers.utils.logging.set_verbosity_error()
folder, given, result, variant, trusted = sys.argv[1:6]
dtype = torch.float16 if variant == "fp16" else None
settings = dict(local_files_only=True, variant=variant or None, dtype=dtype)
inputs = np.load(given)
if "sample" in inputs:
    if trusted:
        settings["trust_remote_code"] = True
    door = diffusers.AutoModel if trusted else diffusers.UNet2DConditionModel
    unet = door.from_pretrained(folder, **settings).float().eval()
    tensors = {name: torch.from_numpy(inputs[name]) for name in inputs.files}
    added = {n: tensors.pop(n) for n in ("text_embeds", "time_ids") if n in tensors}
    with torch.no_grad():
        out = unet(**tensors, added_cond_kwargs=added or None, return_dict=False)[0].numpy()
else:
    if trusted:
        settings["trust_remote_code"] = True
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None, **settings)
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(torch.float32)
    out = pipe(str(inputs["prompt"]), num_inference_steps=int(inputs["steps"]), output_type="np",
               generator=torch.Generator().manual_seed(int(inputs["seed"]))).images[0]
np.save(result, out)
"""


@dataclass(frozen=True)
class Checked:
    """What came out: `differences` counts values of `n` that are not bitwise the same."""

    what: str
    n: int
    differences: int
    largest: float

    @property
    def is_same(self) -> bool:
        """Whether both are bitwise equal."""
        return self.differences == 0


def check(folder: Path) -> Checked:
    """Load a folder in a process without bkprune, run it, and compare with what we get of it.

    A pipeline draws one picture, a U-Net alone takes one step, both in float32 on the CPU.

    Raises:
        ValueError: it does not load there; the process's last words are given.
    """
    pipeline = models.load(folder)
    index = folder / "model_index.json"
    config = read_json(
        folder / "unet" / "config.json" if index.exists() else folder / "config.json"
    )
    is_trusted = config.get("_class_name") == "PrunedUNet"
    if index.exists():
        prompt = PROMPT if pipeline.text_encoder is not None else None
        if prompt is None:
            raise ValueError(f"{folder}: has no text encoder, so it draws no picture to compare")
        inputs: dict[str, Any] = {"prompt": prompt, "steps": STEPS, "seed": SEED}
        what = f"one picture, {prompt!r}, {STEPS} steps"
        ours = pipeline(
            prompt,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(SEED),
            output_type="np",
        ).images[0]
    else:
        inputs = _noise(pipeline.unet.config)
        what = "one U-Net step"
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        added = {n: tensors.pop(n) for n in ("text_embeds", "time_ids") if n in tensors}
        with torch.no_grad():
            out = pipeline.unet(**tensors, added_cond_kwargs=added or None, return_dict=False)
        ours = out[0].numpy()
    theirs = _elsewhere(folder, inputs, is_trusted)
    same = ours == theirs
    return Checked(
        what, int(ours.size), int((~same).sum()), float(np.abs(ours - theirs).max(initial=0.0))
    )


def _noise(config: Any) -> dict[str, Any]:
    call = unet_call(config, device="cpu")
    names = ("sample", "timestep", "encoder_hidden_states")
    inputs = {name: tensor.numpy() for name, tensor in zip(names, call.args, strict=True)}
    added = call.kwargs.get("added_cond_kwargs", {})
    return {**inputs, **{name: tensor.numpy() for name, tensor in added.items()}}


def _elsewhere(folder: Path, inputs: dict[str, Any], is_trusted: bool) -> Any:
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    with tempfile.TemporaryDirectory(prefix="bkprune-") as name:
        place = Path(name)
        np.savez(place / "inputs.npz", **inputs)
        words = [sys.executable, "-c", _FRESH, str(folder.resolve()), str(place / "inputs.npz")]
        words += [str(place / "out.npy"), models.stored_variant(unet) or ""]
        words.append("trust" if is_trusted else "")
        environment = {**os.environ, "HF_MODULES_CACHE": str(place / "modules")}
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # bits depend on it
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            words, cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise ValueError(f"{folder}: does not load without bkprune: {said}")
        return np.load(place / "out.npy")
