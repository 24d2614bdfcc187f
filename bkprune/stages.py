"""The stages of a study: which commands, in which order, which are up to date, and why not.

Knows what each stage reads and writes, and the record of finished stages in `run.json`. A stage is
done anew when its options, what it reads, or bkprune's version has changed, or something that it
wrote is gone. It does not know what the commands do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bkprune
from bkprune import study
from bkprune.study import digest, write_atomic
from bkprune.studyfile import StudyFile

RECORD, FORMAT = "run.json", 1
_CACHE = "cache.json"
_RUN, _STUDY = "{run}", "{study}"
MODEL = "model"  # stands for the files of the model among what a stage reads
# with more or other of it, what is there is gone on with
_GOES_ON = (
    *("--trials", "--timeout", "--finalists", "--kd", "--kd-steps", "--kd-data", "--kd-judge"),
    *("--kd-pictures", "--kd-guidance-scale", "--kd-sampling-steps"),
)
RACE = {"--objective", "distilled"}
RECIPE = (
    *("--lr", "--batch-size", "--accumulate", "--schedule", "--warmup", "--ema", "--optimiser"),
    *("--clip-norm", "--precision", "--task", "--output", "--feature", "--normalise-features"),
    "--snr-gamma",
)
_CAN_FORCE = ("analyze", "profile", "search", "prune")


@dataclass(frozen=True)
class Stage:
    """One command with all of its words.

    Attributes:
        name: for people, and in the record.
        command: of bkprune.
        words: its arguments, the run folder included.
        reads: files whose content decides whether it is up to date.
        writes: files that must be there; tables among them are removed before it is done anew.
        folder: put aside before it is done anew, or None.
    """

    name: str
    command: str
    words: tuple[str, ...]
    reads: tuple[Path, ...]
    writes: tuple[Path, ...]
    folder: Path | None = None


def stages_of(asked: StudyFile, run: Path) -> list[Stage]:
    """All stages of a study in their order; the report is the last."""
    model, options = asked.model, asked.options
    own = dict(options)
    out: list[Stage] = []

    def add(
        command: str,
        words: Sequence[str],
        reads: Sequence[Path],
        writes: Sequence[Path],
        about: str = "",
        folder: Path | None = None,
    ) -> None:
        name = f"{command} {about}".strip()
        given = (*words, *own.get(command, ()), *_parts(command, asked.parts))
        out.append(Stage(name, command, given, tuple(reads), tuple(writes), folder))

    in_run = ("--out", str(run))
    importance, cost = run / study.IMPORTANCE, run / study.COST
    winner, finalists = run / study.WINNER, run / study.FINALISTS
    if "analyze" in options:
        add("analyze", (model, *in_run), (), (importance,))
    if "profile" in options:
        add("profile", (model, *in_run), (), (cost,))
    masks = [("winner", str(winner), run)] if "search" in options else []
    masks += [(name, name, run / "compared" / name) for name in asked.compare]
    has_race = set(options.get("search", ())) >= RACE
    judged: list[str] = []
    seen: list[Path] = []
    cached = run / "cache" / _CACHE
    source, others = _split(options.get("distill", ()), ("--data", "--split"))
    is_cached = any((Path(word) / _CACHE).exists() for word in source)
    is_shared = len(masks) > 1 or has_race
    if "distill" in options and is_shared and not is_cached:  # encoded once for all students
        source = ("--data", str(cached.parent))
        own |= {"cache": _split(options["distill"], ("--data", "--split"))[0]}
        own |= {"distill": (*others, *source)}

    def add_cache() -> None:
        if "cache" in own:
            add("cache", (model, "--out", str(cached.parent)), (), (cached,), "", cached.parent)

    if has_race:
        add_cache()
    if "search" in options:
        reads = [importance, cost]
        if has_race and "distill" in options:  # ranked by the recipe that the winner will have
            own |= {"search": (*own["search"], *_recipe(own["search"], others, source))}
            reads += [cached] if "cache" in own else []
        add("search", (model, *in_run), reads, (winner, finalists))
    if not has_race:
        add_cache()
    for name, mask, folder in masks if "prune" in options else []:
        pruned, training = folder / "pruned", folder / "distillation"
        reads = [winner] if name == "winner" else []
        record = pruned / "mask.json"
        words = [model, "--mask", mask, "--out", str(pruned)]
        if "profile" in options:
            words += ["--cost", str(cost)]
            reads.append(cost)
        add("prune", words, reads, (record,), name)
        judged.append(f"{name} pruned={pruned}")
        seen.append(record)
        if "distill" in options:
            done = training / "distilled" / "mask.json"
            trained = (str(pruned), "--teacher", model, "--out", str(training))
            known = [record, cached] if "cache" in own else [record]
            add("distill", trained, known, (done, training / "distill.json"), name, training)
            judged.append(f"{name} distilled={training / 'distilled'}")
            seen.append(done)
    if "evaluate" in options:
        into = run / "evaluation"
        given = (*judged, "--teacher", f"teacher={model}", "--out", str(into))
        tables = (into / study.EVAL, into / study.DIFFERENCES)
        add("evaluate", given, seen, tables)
    every = dict.fromkeys(path for stage in out for path in stage.writes)
    out.append(Stage("report", "report", (str(run),), tuple(every), (run / "report.html",)))
    return out


def _recipe(search: Sequence[str], distill: Sequence[str], source: Sequence[str]) -> Iterator[str]:
    """Options of `distill` as the race of a search takes them, but for those it has of its own."""
    if "--kd" not in search:
        for name, values in options_of(distill).items():
            if name in RECIPE:
                yield from ("--kd", f"{name.removeprefix('--')}={values[0] if values else 'true'}")
    if "--kd-data" not in search and "--data" in source:
        yield from ("--kd-data", source[source.index("--data") + 1])


def _split(words: Sequence[str], names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Options of these names with their values, and the other words."""
    taken: list[str] = []
    left: list[str] = []
    rest = iter(words)
    for word in rest:
        (taken if word in names else left).append(word)
        if word in names:
            taken.append(next(rest))
    return tuple(taken), tuple(left)


def _parts(command: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    if command == "profile":  # shapes alone: it takes no tokenizer
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return tuple(w for k, v in pairs if k in ("--text-encoder", "--vae") for w in (k, v))
    return parts


class Record:
    """What has been done in a run folder: `run.json`.

    Raises:
        ValueError: not JSON, or written by a newer version.
    """

    def __init__(self, run: Path, asked: StudyFile) -> None:
        self._path, self._run, self._asked = run / RECORD, run, asked
        self._model = model_key(asked.model)
        self.stages: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            try:
                told = json.loads(self._path.read_text(encoding="utf-8"))
                self.stages = dict(told["stages"])
            except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{self._path}: not the record of a run ({error}); delete it to start afresh"
                ) from error
            if int(told.get("format", 0)) > FORMAT:
                raise ValueError(
                    f"{self._path}: written by a newer bkprune ({told.get('bkprune')}); this is "
                    f"{bkprune.__version__}: update it, or use another --out"
                )

    def _now(self, stage: Stage) -> dict[str, Any]:
        reads = {self._short(str(path)): _content(path) for path in stage.reads}
        return {
            "command": stage.command,
            "words": [self._short(word) for word in stage.words],
            "reads": {**reads, MODEL: self._model},
            "bkprune": bkprune.__version__,
        }

    def _short(self, text: str) -> str:
        """Without the places of the folders, so that a study may be moved."""
        text = text.replace(str(self._run), _RUN)
        return text.replace(str(self._asked.path.parent), _STUDY)

    def why(self, stage: Stage) -> str:
        """Why a stage has to be done; empty if it is up to date."""
        made = self.stages.get(stage.name)
        if made is None:
            return "not done yet"
        changed = self.change(stage)
        if changed:
            return changed
        if made["state"] != "done":
            return "was interrupted: goes on"
        gone = next((path for path in stage.writes if not path.exists()), None)
        return f"{self._short(str(gone))} is missing" if gone else ""

    def change(self, stage: Stage) -> str:
        """What is not as it was when the stage was last begun; empty if nothing, or never begun."""
        made = self.stages.get(stage.name)
        if made is None:
            return ""
        now = self._now(stage)
        before, after = options_of(made["words"]), options_of(now["words"])
        for name in dict.fromkeys((*before, *after)):
            if before.get(name) != after.get(name):
                pair = (before.get(name), after.get(name))
                was, is_now = (" ".join(words) if words else "not set" for words in pair)
                return f"{name} was {was}, now {is_now}"
        for name in dict.fromkeys((*made["reads"], *now["reads"])):
            if made["reads"].get(name) != now["reads"].get(name):
                return f"{name} has changed"
        if made["bkprune"] != now["bkprune"]:
            return f"was made by bkprune {made['bkprune']}"
        return ""

    def words(self, stage: Stage) -> list[str]:
        """The words to give: with `--force` where what is there was made otherwise."""
        words = [stage.command, *stage.words]
        change = self.change(stage)
        goes_on = change.split(" ")[0] in _GOES_ON
        needs_force = stage.command == "prune" or bool(change and not goes_on)
        return [*words, "--force"] if needs_force and stage.command in _CAN_FORCE else words

    def begin(self, stage: Stage) -> None:
        """Note what is being done, and put aside what was made otherwise."""
        if self.change(stage):
            if stage.folder is not None and stage.folder.exists():
                _aside(stage.folder)
            for path in stage.writes:
                if path.suffix == ".csv" and stage.command == "evaluate":
                    path.unlink(missing_ok=True)
        self.stages[stage.name] = {**self._now(stage), "state": "begun", "seconds": 0.0}
        self._save()

    def finish(self, stage: Stage, seconds: float) -> None:
        """Note that it is done."""
        self.stages[stage.name] |= {
            "state": "done",
            "seconds": round(seconds, 2),
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._save()

    def seconds(self, stage: Stage) -> float | None:
        """How long it took the last time that it ran to its end."""
        made = self.stages.get(stage.name)
        return None if made is None or made["state"] != "done" else float(made["seconds"])

    def _save(self) -> None:
        told = {"format": FORMAT, "bkprune": bkprune.__version__, "stages": self.stages}
        write_atomic(self._path, (json.dumps(told, indent=1) + "\n").encode())


def _aside(folder: Path) -> None:
    import shutil

    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)


def options_of(words: Sequence[str]) -> dict[str, list[str]]:
    """Options of a command's words with their values; arguments under `arguments`."""
    out: dict[str, list[str]] = {"arguments": []}
    name = "arguments"
    for word in words:
        if word.startswith("--"):
            name = word
            out.setdefault(name, [])
        else:
            out[name].append(word)
            name = "arguments"
    return out


def _content(path: Path) -> str:
    """A hash of a file; what a mask costs is no part of the student that it makes."""
    if not path.exists():
        return "missing"
    data = path.read_bytes()
    if path.name == "mask.json":
        told = json.loads(data)
        return digest({name: value for name, value in told.items() if name != "cost"})
    return digest(data.hex())


def model_key(model: str) -> str:
    """Changes when the files of a local model do: names, sizes and times."""
    path = Path(model)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and ".cache" not in p.parts)
    else:
        return model
    return digest([[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files])


def table(stages: Sequence[Stage], record: Record) -> list[dict[str, str]]:
    """What would be done, for people. What follows from an earlier stage is done if that is."""
    rows, fresh = [], set[Path]()
    for stage in stages:
        why = record.why(stage)
        stale = [path for path in stage.reads if path in fresh]
        if not why and stale:
            why = f"may change: reads {stale[0].name}"
        if why:
            fresh.update(stage.writes)
        rows.append({"stage": stage.name, "": why or "up to date"})
    return rows
