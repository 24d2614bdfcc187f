"""One evaluation from models to tables: pictures are drawn, judged, compared and shown.

Knows the order of the work, which networks are at hand, and the files that are left. Options are
`cli_evaluate.py`'s, numbers are `evaluate.py`'s.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from bkprune.terminal import notice, progress_bar

if TYPE_CHECKING:
    from bkprune.evaluate import Subject
    from bkprune.generation import Generation
    from bkprune.judges import Judges
    from bkprune.metrics import Measured
    from bkprune.models import Parts
    from bkprune.protocols import Prompts, Protocol
    from bkprune.sampling import SamplingSettings

N_ERRORS, N_ERRORS_DRAWN, ERROR_SEED, N_SHOWN = 320, 64, 5, 8
_KEYS = ("protocol", "task", "sampling", "model", "a", "b", "metric")


@dataclass(frozen=True)
class Asked:
    """What a user wants to know.

    Attributes:
        models: label and path of each.
        teacher: label and path of what they came from, or None.
        metrics: names in `protocols.CHOICES`; None is the protocol's own, as far as networks for
            them are given.
        teacher_steps: for split sampling; empty is none.
    """

    models: tuple[tuple[str, str], ...]
    teacher: tuple[str, str] | None
    out: Path
    protocol: Protocol
    sampling: SamplingSettings
    prompts: str | None
    n: int | None
    metrics: tuple[str, ...] | None
    reference: str | None
    inception: Path | None
    clip: Path | None
    lpips: Path | None
    parts: Parts
    teacher_steps: tuple[int, ...] = ()
    device: str = "cpu"
    dtype: str = "float32"
    workers: int = 1
    max_speed_s: float = 60.0

    @property
    def task(self) -> str:
        """As in the tables."""
        if self.teacher_steps:
            return "split sampling"
        if self.sampling.strength is not None:
            return f"image-to-image {self.sampling.strength:g}"
        return "text-to-image"


class Job:
    """Everything loaded that is needed to judge, before anything is drawn."""

    def __init__(self, asked: Asked, *, quiet: bool) -> None:
        from bkprune.judges import Nets, affordable, load_judges
        from bkprune.protocols import read

        self.asked, self.quiet = asked, quiet
        self.prompts: Prompts = read(asked.prompts, asked.protocol, asked.n)
        self.n = asked.n or asked.protocol.n or len(self.prompts.texts)
        if asked.sampling.strength is not None and self.prompts.pairs is None:
            raise ValueError(
                "image-to-image begins from pictures: give --prompts with captioned ones"
            )
        nets = Nets(asked.inception, asked.clip, asked.lpips, asked.reference, asked.device)
        self.metrics, left_out = affordable(
            asked.metrics, asked.protocol, nets, has_teacher=asked.teacher is not None
        )
        for name, need in left_out.items():
            if not quiet:
                notice(f"{name} is left out: it needs {need}")
        self.judges: Judges | None = None
        self.how: dict[str, str] = {}
        if _is_first():
            with progress_bar(quiet) as progress:
                self.judges, self.how = load_judges(
                    nets, self.metrics, asked.protocol, asked.out / "reference", progress
                )

    # --- the work --------------------------------------------------------------------------------

    def run(self) -> pd.DataFrame | None:
        """Draw, judge, write; None in all but the first process of `accelerate launch`."""
        if self.prompts.n_duplicates and not self.quiet:
            notice(
                f"{self.prompts.n_duplicates} of {len(self.prompts.texts)} prompts repeat earlier "
                "ones; their pictures differ by the seed"
            )
        generations = self._generations()
        subjects = self._draw(generations)
        if self.judges is None:
            return None
        found = self._judge(subjects)
        if "output_error" in self.metrics and not self.asked.teacher_steps:
            for label, measured in self._output_errors().items():
                found[label]["output_error"] = measured
        if "speed" in self.metrics:
            self._time(generations, found)
        return self._write(generations, subjects, found)

    def _generations(self) -> list[Generation]:
        from bkprune.generation import Generation

        asked = self.asked
        common: dict[str, Any] = {
            "prompts": tuple(self.prompts.texts),
            "settings": asked.sampling,
            "parts": asked.parts,
            "size": asked.protocol.size,
            "keeps_checker": asked.protocol.keeps_checker,
            "device": asked.device,
            "dtype": asked.dtype,
        }
        if asked.sampling.strength is not None:
            common["start"] = self.prompts.pairs
        out = [Generation(*asked.teacher, **common)] if asked.teacher else []
        for label, model in asked.models:
            made = Generation(label, model, **common)
            out += [
                replace(
                    made,
                    label=f"{label}, teacher {k}/{asked.sampling.steps}",
                    teacher=asked.teacher[1] if asked.teacher else None,
                    teacher_steps=k,
                )
                for k in asked.teacher_steps
            ] or [made]
        return out

    def _draw(self, generations: Sequence[Generation]) -> list[Subject]:
        from bkprune.evaluate import Subject
        from bkprune.generation import fill
        from bkprune.study import PICTURES

        into = self.asked.out / PICTURES
        folders = [made.folder(into, made.manifest()) for made in generations]
        with progress_bar(self.quiet) as progress:
            pairs = list(zip(generations, folders, strict=True))
            fill(pairs, self.n, self.asked.workers, progress)
        subjects = [Subject(made.label, folder) for made, folder in pairs]
        _wait_for_everyone()
        return subjects

    def _judge(self, subjects: Sequence[Subject]) -> dict[str, dict[str, Measured]]:
        from bkprune.evaluate import measure_pictures

        assert self.judges is not None
        teacher = subjects[0] if self.asked.teacher else None
        found = {}
        with warnings.catch_warnings(record=True) as caught, progress_bar(self.quiet) as progress:
            warnings.simplefilter("always")
            for subject in subjects:
                found[subject.label] = measure_pictures(
                    subject, teacher, self.prompts, self.n, self.judges, self.metrics, progress
                )
        for text in dict.fromkeys(str(w.message) for w in caught):
            notice(text)
        return found

    def _output_errors(self) -> dict[str, Measured]:
        from bkprune.calibration import calibrate
        from bkprune.evaluate import output_error
        from bkprune.measured import outputs
        from bkprune.models import load

        asked = self.asked
        assert asked.teacher is not None
        teacher = load(asked.teacher[1], asked.parts)
        source = self.prompts.pairs or self.prompts.texts
        n = N_ERRORS if self.prompts.pairs else N_ERRORS_DRAWN
        inputs = calibrate(
            teacher,
            source,
            n=n,
            n_bins=8,
            seed=ERROR_SEED,
            batch_size=asked.sampling.batch_size,
            sampling=asked.sampling,
        )
        where = "pictures" if self.prompts.pairs else "latents that the teacher drew"
        self.how["output_error"] = f"{n} noised {where}, 8 timestep bins, seed {ERROR_SEED}"
        size, scheduler, found = asked.sampling.batch_size, teacher.scheduler, {}
        with progress_bar(self.quiet) as progress:
            expected = outputs(teacher.unet, scheduler, inputs, size)
            for i, (label, model) in enumerate(asked.models):
                progress(i, len(asked.models), "output error")
                unet = load(model, asked.parts).unet
                found[label] = output_error(outputs(unet, scheduler, inputs, size), expected)
            progress(len(asked.models), len(asked.models), "output error")
        return found

    def _time(
        self, generations: Sequence[Generation], found: dict[str, dict[str, Measured]]
    ) -> None:
        from contextlib import ExitStack

        from bkprune.latency import TimingSettings
        from bkprune.speed import time_pictures
        from bkprune.study import Stamp, Study, Unfinished, digest

        timed = [replace(g, start=None) for g in generations]
        key = Stamp.of({"settings": asdict(self.asked.sampling)}, {"timed": digest([*found])})
        timing = TimingSettings(min_rounds=8, max_rounds=200, max_s=self.asked.max_speed_s)
        with ExitStack() as stack, progress_bar(self.quiet) as progress:
            pipelines = {g.label: stack.enter_context(g.ready()) for g in timed}
            unfinished = Unfinished(Study(self.asked.out), "speed", key)
            seconds, ratios = time_pictures(
                pipelines, self.prompts[0], self.asked.sampling, timing, unfinished, progress
            )
            unfinished.clear()
        for label, measured in seconds.items():
            found[label] |= measured
        self.how["s_per_image"] = "; ".join(
            f"{label} {ratio:.3f}x ({low:.3f} to {high:.3f}) of {generations[0].label}"
            for label, (ratio, low, high) in ratios.items()
            if label != generations[0].label
        )

    # --- what is left ----------------------------------------------------------------------------

    def _write(
        self,
        generations: Sequence[Generation],
        subjects: Sequence[Subject],
        found: dict[str, dict[str, Measured]],
    ) -> pd.DataFrame:
        from bkprune import machine, study
        from bkprune.drawing import png
        from bkprune.evaluate import difference_table, value_table
        from bkprune.plots_eval import quality

        s = self.asked.sampling
        scheduler = s.scheduler or "the model's scheduler"
        about = {
            "protocol": self.asked.protocol.name,
            "task": self.asked.task,
            "sampling": f"{scheduler}, {s.steps} steps, guidance {s.guidance_scale:g}, "
            f"seed {s.seed}",
        }
        values = value_table(found, about, self.how)
        apart = difference_table(found, about)
        out = self.asked.out
        for name, table in ((study.EVAL, values), (study.DIFFERENCES, apart)):
            merged = _appended(out / name, table)
            study.write_atomic(out / name, merged.to_csv(index=False, float_format="%.6g").encode())
        told = {
            "models": {g.label: _near(g.model, out) for g in generations},
            "pictures": {s.label: s.pictures.folder.name for s in subjects},
            "n": self.n,
            "prompts": {"from": self.prompts.words, "duplicates": self.prompts.n_duplicates},
            "sampling": asdict(s),
            "how": self.how,
            "machine": machine.describe(self.asked.device, _n_threads()),
        }
        text = json.dumps(told, indent=1, default=str) + "\n"
        study.write_atomic(out / study.EVALUATION, text.encode())
        slug = "".join(c if c.isalnum() else "-" for c in self.asked.task)
        study.write_atomic(out / f"grid-{slug}.png", self._grid(subjects))
        figure = png(quality(values))
        study.write_atomic(out / study.FIGURES / f"quality-{slug}.png", figure)
        return values

    def _grid(self, subjects: Sequence[Subject]) -> bytes:
        """One column a model, one row a prompt, the same seed along a row."""
        import torch

        from bkprune.grids import grid_png

        step = max(self.n // N_SHOWN, 1)
        rows = {}
        for i in range(0, step * min(N_SHOWN, self.n), step):
            pictures = [torch.from_numpy(s.pictures.load(i).copy()) for s in subjects]
            rows[f"{i}: {self.prompts[i]}"] = torch.stack(pictures).permute(0, 3, 1, 2) / 255
        side = next(iter(rows.values())).shape[-1]
        return grid_png(rows, [s.label for s in subjects], scale=max(1, 160 // side), left=150)


def _near(model: str, out: Path) -> str:
    """A model's path as seen from the folder above `out`, where it lies below that."""
    path, above = Path(model).resolve(), out.resolve().parent
    return str(path.relative_to(above)) if path.is_relative_to(above) else model


def _appended(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of earlier runs and this one's, which replace those of the same measurement."""
    if not path.exists() or not len(table):
        return table
    keys = [name for name in _KEYS if name in table]
    try:
        before = pd.read_csv(path)
        both = pd.concat([before, table], ignore_index=True)
        if list(both.columns) != list(table.columns):
            raise ValueError(f"columns {', '.join(before.columns)}")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a table of evaluations ({error}); move it away") from error
    except ValueError as error:
        raise ValueError(f"{path}: not this table of evaluations ({error}); move it away") from None
    return both.drop_duplicates(keys, keep="last", ignore_index=True)


def _is_first() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _n_threads() -> int:
    import torch

    return torch.get_num_threads()


def _wait_for_everyone() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
