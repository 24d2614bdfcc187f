"""Drawing the pictures of one model into a folder: what is missing, in parallel, until it is whole.

Knows how pictures are shared out over processes of this machine, or over those of `accelerate
launch`, and that a picture depends on nothing but its number. It does not know metrics.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from bkprune.data import Pairs, fitted
from bkprune.models import Parts, fingerprint, load, need
from bkprune.pictures import PictureFolder
from bkprune.sampling import Drawn, SamplingSettings, draw, split_sampling, use_scheduler
from bkprune.study import digest

Progress = Callable[[int, int, str], None]
_FROM_IMAGE = {
    "StableDiffusionPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLImg2ImgPipeline",
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Generation:
    """One model's pictures, as plain data that another process can take over.

    Attributes:
        label: the model's name in tables.
        model: as `models.load` takes it.
        prompts: picture i takes prompt i modulo their number.
        settings: how pictures are drawn.
        parts: what the model lacks.
        teacher: the model that takes the first `teacher_steps` steps, for split sampling.
        start: real pictures that image-to-image begins from, one a prompt.
        size: pixels that pictures are reduced to (PIL bicubic), or None.
        keeps_checker: whether the model's safety checker stays in.
    """

    label: str
    model: str
    prompts: tuple[str, ...]
    settings: SamplingSettings
    parts: Parts = field(default_factory=Parts)
    teacher: str | None = None
    teacher_steps: int | None = None
    start: Pairs | None = None
    size: int | None = None
    keeps_checker: bool = True
    device: str = "cpu"
    dtype: str = "float32"

    def pipeline(self) -> Any:
        """The model on its device, with its scheduler."""
        pipeline = self._load(self.model)
        if self.start is not None:
            kind = type(pipeline).__name__
            if kind not in _FROM_IMAGE:
                raise ValueError(f"{self.model}: image-to-image is not known for {kind}")
            pipeline = getattr(diffusers, _FROM_IMAGE[kind])(**pipeline.components)
            pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _load(self, model: str) -> Any:
        pipeline = load(
            model, self.parts, dtype=DTYPES[self.dtype], keep_checker=self.keeps_checker
        )
        for part in ("text_encoder", "tokenizer", "vae"):
            need(pipeline, part, "drawing pictures")
        use_scheduler(pipeline, self.settings.scheduler)
        return pipeline.to(self.device)

    def manifest(self) -> dict[str, Any]:
        """What makes the pictures what they are: equal manifests, equal pictures."""
        pipeline = self.pipeline()
        settings = asdict(self.settings)
        if self.settings.is_exact:
            del settings["batch_size"]
        scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
        return {
            "weights": {
                part: fingerprint(getattr(pipeline, part))
                for part in ("unet", "vae", "text_encoder", "text_encoder_2", "safety_checker")
                if getattr(pipeline, part, None) is not None
            },
            "scheduler": {"class": type(pipeline.scheduler).__name__, **scheduler},
            "settings": settings,
            "prompts": digest(self.prompts),
            "start": None if self.start is None else digest(self.start.rows),
            "teacher": None
            if self.teacher is None
            else [fingerprint(self._load(self.teacher).unet), self.teacher_steps],
            "size": self.size,
            "dtype": self.dtype,
            "kind": self.device.split(":")[0],
        }

    def folder(self, inside: Path, manifest: dict[str, Any]) -> PictureFolder:
        """The folder of exactly these pictures."""
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.label).strip(".")
        return PictureFolder(inside / f"{name or 'model'}-{digest(manifest)[:8]}", manifest)

    # --- drawing ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def ready(self) -> Iterator[Any]:
        """The pipeline as it draws: with the teacher's first steps where there are any."""
        pipeline = self.pipeline()
        with contextlib.ExitStack() as stack:
            if self.teacher is not None and self.teacher_steps is not None:
                student, pipeline.unet = pipeline.unet, self._load(self.teacher).unet
                stack.enter_context(split_sampling(pipeline, student, self.teacher_steps))
            yield pipeline

    @contextlib.contextmanager
    def painter(self) -> Iterator[Callable[[Sequence[int]], Drawn]]:
        """A function from picture numbers to pictures."""
        with self.ready() as pipeline:
            start_size = int(pipeline.vae_scale_factor * _sample_size(pipeline.unet))

            def paint(numbers: Sequence[int]) -> Drawn:
                prompts = [self.prompts[i % len(self.prompts)] for i in numbers]
                seeds = [self.settings.seed + i for i in numbers]
                start = self._starts(numbers, start_size)
                drawn = draw(pipeline, prompts, seeds, self.settings, start)
                return drawn if self.size is None else _reduced(drawn, self.size)

            yield paint

    def _starts(self, numbers: Sequence[int], size: int) -> torch.Tensor | None:
        if self.start is None:
            return None
        pictures = [self.start.image(i % len(self.start), size) for i in numbers]
        return torch.stack(pictures) / 2 + 0.5


def _sample_size(unet: Any) -> int:
    return int(unet.config.sample_size)


def _reduced(drawn: Drawn, size: int) -> Drawn:
    pictures = [fitted(Image.fromarray(picture), size) for picture in drawn.pictures]
    return Drawn(np.stack(pictures), drawn.troubles)


def groups_of(missing: Sequence[int], batch_size: int) -> list[list[int]]:
    """Whole batches that lack a picture: who is drawn together never depends on what is missing."""
    wanted = sorted({i // batch_size for i in missing})
    return [list(range(g * batch_size, (g + 1) * batch_size)) for g in wanted]


Part = tuple[Generation, PictureFolder, list[list[int]]]


def fill(
    generations: Sequence[tuple[Generation, PictureFolder]],
    n: int,
    n_workers: int = 1,
    progress: Progress = lambda done, total, what: None,
) -> None:
    """Draw what is missing of the first n pictures of every model.

    Under `accelerate launch` every process takes its share of the numbers; otherwise `n_workers`
    processes of this machine do, with one thread each where there is more than one.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    parts: list[Part] = []
    before = []
    for generation, folder in generations:
        missing = folder.missing(n)
        groups = groups_of(missing, generation.settings.batch_size)
        if world > 1:
            groups = [group for group in groups if (group[0] // len(group)) % world == rank]
        if groups:
            parts.append((generation, folder, groups))
            before.append(n - len(missing))

    def told(part: int, done: int) -> None:
        progress(min(before[part] + done, n), n, f"drawing {parts[part][0].label}")

    if n_workers == 1 or sum(len(groups) for _, _, groups in parts) < 2:
        for i, (generation, folder, groups) in enumerate(parts):
            for done in _draw_groups(generation, folder, groups, n):
                told(i, done)
    else:
        _in_workers(parts, n, n_workers, told)


def _draw_groups(
    generation: Generation, folder: PictureFolder, groups: Sequence[Sequence[int]], n: int
) -> Iterator[int]:
    """Yields how many pictures are written. Too large for the memory: half as many at a time."""
    done = 0
    if not groups:
        return
    with generation.painter() as paint:
        for group in groups:
            numbers = [i for i in group if i < n or not generation.settings.is_exact]
            wanted = [i for i in numbers if i < n and not folder.is_there(i)]
            if generation.settings.is_exact:
                numbers = wanted
            for i, picture, trouble in _painted(paint, numbers):
                if i in wanted:
                    folder.save(i, picture, trouble)
                    done += 1
            yield done


def _painted(paint: Callable[[Sequence[int]], Drawn], numbers: Sequence[int]) -> Iterator[Any]:
    try:
        drawn = paint(numbers)
    except torch.OutOfMemoryError:
        if len(numbers) == 1:
            raise ValueError("out of memory drawing one picture: try --dtype float16") from None
        torch.cuda.empty_cache()
        half = len(numbers) // 2
        yield from _painted(paint, numbers[:half])
        yield from _painted(paint, numbers[half:])
        return
    yield from zip(numbers, drawn.pictures, drawn.troubles, strict=True)


def _in_workers(
    parts: list[Part], n: int, n_workers: int, told: Callable[[int, int], None]
) -> None:
    """Every process takes every n-th group of each model, one model after the other."""
    context = multiprocessing.get_context("spawn")
    counters, troubles = context.Array("l", len(parts)), context.SimpleQueue()
    workers = [
        context.Process(
            target=_work,
            args=(
                [(made, folder, groups[k::n_workers]) for made, folder, groups in parts],
                n,
                counters,
                troubles,
                os.getpid(),
            ),
            daemon=True,
        )
        for k in range(n_workers)
    ]
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            time.sleep(0.2)
            for i, done in enumerate(counters[:]):
                if done:
                    told(i, done)
            if any(worker.exitcode for worker in workers):
                break
        if not troubles.empty():
            raise ValueError(troubles.get())
        bad = [worker.exitcode for worker in workers if worker.exitcode]
        if bad:
            raise ValueError(
                f"a drawing process ended with code {bad[0]}; the same command goes on"
            )
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
            worker.join()


def _work(parts: list[Part], n: int, counters: Any, troubles: Any, parent: int) -> None:
    """One process: its share of the groups, on one thread, until they are done or nobody waits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    torch.set_num_threads(1)
    try:
        for i, (generation, folder, groups) in enumerate(parts):
            before = 0
            for done in _draw_groups(generation, folder, groups, n):
                with counters.get_lock():
                    counters[i] += done - before
                before = done
                if os.getppid() != parent:
                    return
    except (ValueError, OSError, MemoryError) as error:
        troubles.put(str(error))
        raise SystemExit(1) from None
