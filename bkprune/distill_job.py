"""One distillation from its checkpoints in to its checkpoint out.

Knows how student and teacher are matched, where the cache comes from, what is drawn on the way and
what the finished folder holds. Options are `cli_distill.py`'s, steps are `distill.py`'s.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bkprune import distill_view
from bkprune.terminal import notice, progress_bar

if TYPE_CHECKING:
    from bkprune.caching import Cache
    from bkprune.comparing import Identified
    from bkprune.distill import Distillation
    from bkprune.losses import Tap
    from bkprune.models import Parts
    from bkprune.recipe import DistillSettings

DISTILLED, CACHE, N_PREVIEW, PREVIEW_STEPS = "distilled", "cache", 8, 25


@dataclass(frozen=True)
class Asked:
    """What a run is made of, beside how it is trained."""

    student: str
    teacher: str
    data: str
    out: Path
    parts: Parts
    split: str | None = None
    device: str | None = None
    tensorboard: bool = False
    preview_guidance: float = 7.5


class Job:
    """Student, teacher and data, loaded and matched."""

    def __init__(self, asked: Asked, settings: DistillSettings, *, quiet: bool) -> None:
        import torch
        from accelerate import Accelerator

        from bkprune import models
        from bkprune.blocks import Inventory
        from bkprune.comparing import identify

        self.asked, self.settings, self.quiet = asked, settings, quiet
        if asked.tensorboard:
            _need_tensorboard()
        self.acc = Accelerator(
            cpu=asked.device == "cpu",
            mixed_precision=settings.precision,
            log_with="tensorboard" if asked.tensorboard else None,
            project_dir=str(asked.out),
        )
        on_gpu = self.acc.device.type == "cuda"
        self.teacher = models.load(
            asked.teacher, asked.parts, dtype=torch.float16 if on_gpu else torch.float32
        )
        self.student = models.load(asked.student, asked.parts, dtype=torch.float32)
        self.stored = models.stored_dtype(asked.student)
        self.found: Identified = identify(self.teacher.unet, self.student.unet)
        self.inventory = Inventory.of(self.teacher.unet)
        self.fingerprints = {
            "teacher": models.fingerprint(self.teacher.unet),
            "student": models.fingerprint(self.student.unet),
        }

    @property
    def taps(self) -> list[Tap]:
        """What is compared inside."""
        from bkprune.losses import taps

        if self.settings.losses.feature == 0:
            return []
        modules = self.found.twin.modules if self.found.twin else None
        return taps(self.inventory, self.found.plan, modules)

    def cache(self) -> Cache:
        """The cache that was given, or one made from the data in the run folder."""
        from bkprune.caching import INDEX, Cache

        given = Path(self.asked.data)
        if (given / INDEX).exists() or any(given.glob(f"*/{INDEX}")):
            cache = Cache(given)
            cache.check(self.teacher)
            return cache
        folder = self.asked.out / CACHE
        if self.acc.is_main_process:
            fill_cache(
                self.teacher, self.asked.data, self.asked.split, folder, {}, quiet=self.quiet
            )
        self.acc.wait_for_everyone()
        return Cache(folder)

    def distillation(self, cache: Cache) -> Distillation:
        """Everything that a step needs."""
        import copy

        from accelerate import DistributedType
        from diffusers import DDPMScheduler

        from bkprune.distill import Distillation

        losses, unet = self.settings.losses, self.student.unet
        is_sharded = self.acc.distributed_type == DistributedType.FSDP
        return Distillation(
            copy.deepcopy(unet) if is_sharded else unet,  # slices neither draw nor are exported
            self.teacher.unet if losses.needs_teacher else None,
            self.taps,
            cache,
            DDPMScheduler.from_config(self.teacher.scheduler.config),
            self.settings,
            self.acc,
        )

    def stamp(self, cache: Cache) -> str:
        """Names the run: other settings, networks or data are another run."""
        from bkprune.study import digest

        index = {k: v for k, v in cache.index.items() if k not in ("bad", "examples", "stride")}
        return digest([self.settings.stamped, self.fingerprints, index])

    # --- what a user asks for --------------------------------------------------------------------

    def dry_run(self) -> dict[str, Any]:
        """What a run would take, by two steps that are thrown away."""
        cache = self.cache()
        made = self.distillation(cache)
        seconds = made.rehearse(2)
        n = sum(p.numel() for p in self.student.unet.parameters())
        s, n_slices = self.settings, int(self.acc.num_processes) if made.is_sharded else 1
        return {
            "effective_batch": made.effective_batch,
            "pairs": len(cache),
            "steps_per_epoch": -(-len(cache) // made.effective_batch),
            "epochs": round(s.steps * made.effective_batch / len(cache), 2),
            "student_params": n,
            "taps": len(self.taps),
            "seconds_per_step": round(seconds, 4),
            "hours": round(seconds * s.steps / 3600, 3),
            "weights_and_optimiser_gb": round(_state_bytes(n / n_slices, s) / 1e9, 3),
            "peak_gb": round(distill_view.peak_bytes(self.acc.device) / 1e9, 3),
            "device": str(self.acc.device),
        }

    def run(self) -> bool:
        """Train, draw, and write the folder; False if it was asked to stop before the end."""
        cache, out = self.cache(), self.asked.out
        if self._is_finished(cache):
            notice(f"{out / DISTILLED} is up to date")
            return True
        made = self.distillation(cache)
        if self.asked.tensorboard:
            self.acc.init_trackers("distill")
        with (
            distill_view.memory_explained(self.settings),
            distill_view.stops_on_signals() as wants_stop,
            progress_bar(self._is_silent) as progress,
        ):
            is_done = made.run(
                out,
                self.stamp(cache),
                distill_view.told(
                    progress, made.effective_batch, self.acc.device, quiet=self._is_silent
                ),
                self._previews(cache, made) if self.settings.preview_every else lambda step: None,
                wants_stop,
            )
        if is_done:
            made.use_average()
            self._gather(made)
            if self.acc.is_main_process:
                self._finish(cache)
            self.acc.wait_for_everyone()
        self.acc.end_training()
        if not is_done:
            raise KeyboardInterrupt
        return True

    def _gather(self, made: Distillation) -> None:
        """The student's weights of now into its pipeline, where processes hold slices of them."""
        if made.is_sharded:
            weights = made.weights()
            if self.acc.is_main_process:
                self.student.unet.load_state_dict(weights)

    def _is_finished(self, cache: Cache) -> bool:
        from bkprune.checkpoints import RUN
        from bkprune.single_file import read_json

        if not (self.asked.out / DISTILLED).exists() or not (self.asked.out / RUN).exists():
            return False
        told = read_json(self.asked.out / RUN)
        return bool(told.get("stamp") == self.stamp(cache))

    @property
    def _is_silent(self) -> bool:
        return self.quiet or not self.acc.is_main_process

    # --- pictures on the way ---------------------------------------------------------------------

    def _previews(self, cache: Cache, made: Distillation) -> Any:
        """A grid at some step: teacher, pruned and now; the first two are drawn once, before."""
        from bkprune.checkpoints import PREVIEWS
        from bkprune.grids import grid_png
        from bkprune.study import write_atomic

        examples = list(cache.index.get("examples", []))
        prompts = examples[:: -(-len(examples) // N_PREVIEW) or 1]
        lacks = getattr(self.student, "vae", None) is None
        if lacks or getattr(self.student, "text_encoder", None) is None or not prompts:
            notice("no previews: the student brings no VAE or text encoder")
            return lambda step: None
        if not self.acc.is_main_process:
            return lambda step: self._gather(made)
        pipelines = {"teacher": self.teacher, "pruned": self.student}
        rows = {name: self._draw(pipeline, prompts) for name, pipeline in pipelines.items()}

        def preview(step: int) -> None:
            self._gather(made)
            label = {} if step == 0 else {f"step {step}": self._draw(self.student, prompts)}
            png = grid_png({**rows, **label}, prompts)
            write_atomic(self.asked.out / PREVIEWS / f"step-{step:08d}.png", png)

        return preview

    def _draw(self, pipeline: Any, prompts: list[str]) -> Any:
        from bkprune.sampling import SamplingSettings, decode, sample_latents

        was_training = pipeline.unet.training
        pipeline.unet.eval()
        for part in ("unet", "vae", "text_encoder"):
            getattr(pipeline, part).to(self.acc.device)
        settings = SamplingSettings(
            PREVIEW_STEPS, self.asked.preview_guidance, self.settings.seed, len(prompts)
        )
        latents = sample_latents(pipeline, prompts, settings)
        pictures = decode(pipeline.vae, latents).cpu()
        pipeline.unet.train(was_training)
        return pictures

    # --- the end ---------------------------------------------------------------------------------

    def _finish(self, cache: Cache) -> None:
        import pandas as pd

        from bkprune import export
        from bkprune.checkpoints import RUN, read_log
        from bkprune.drawing import png
        from bkprune.plots_distill import curves
        from bkprune.study import write_atomic

        out = self.asked.out
        log = pd.DataFrame(read_log(out))
        told = {
            "teacher": Path(self.asked.teacher).name,
            "student": Path(self.asked.student).name,
            **{f"{k}_weights": v for k, v in self.fingerprints.items()},
            "stamp": self.stamp(cache),
            "pairs": len(cache),
            "settings": self.settings.stamped,
            "taps": [vars(tap) for tap in self.taps],
            "last": {k: v for k, v in log.iloc[-1].items() if pd.notna(v)},
            "skipped_steps": int(log["skipped"].eq(True).sum()) if "skipped" in log else 0,
        }
        with export.new_folder(out / DISTILLED, force=True) as folder:
            export.with_new_weights(
                Path(folder), self.asked.student, self.student, self.stored, told
            )
        write_atomic(out / "figures" / "train.png", png(curves(log)))
        write_atomic(out / RUN, (json.dumps(told, indent=1, default=str) + "\n").encode())


def fill_cache(
    pipeline: Any,
    data: str,
    split: str | None,
    folder: Path,
    options: dict[str, Any],
    *,
    quiet: bool,
) -> Any:
    """Encode a source into a cache folder, with a progress bar."""
    from bkprune.caching import CacheSettings, fill
    from bkprune.sources import Source

    size = int(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)
    settings = CacheSettings(**{"size": size, **options})
    source = Source(data, split)
    with progress_bar(quiet) as progress:
        done = fill(
            folder,
            pipeline,
            source.examples(settings.size),
            source.key,
            settings,
            progress,
            source.n,
        )
    if done.n_bad and not quiet:
        notice(f"{done.n_bad} pairs could not be read, the last: {done.bad[-1]}")
    return done


def _need_tensorboard() -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise ValueError(
            "--tensorboard needs the package tensorboard: pip install 'bkprune[train]'"
        ) from None


def _state_bytes(n_params: float, s: DistillSettings) -> float:
    """Weights, gradients and optimiser of the student, float32, and its average."""
    per_weight = 4 + 4 + (2 if s.optimiser == "adamw8bit" else 8) + (4 if s.ema else 0)
    return n_params * per_weight
