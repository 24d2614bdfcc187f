"""Runs every command of the README and the docs, one after the other: `make docs`.

    python -m tests.run_docs [FOLDER]

The built-in model stands for a user's own, a few of its pictures for the data, made-up Inception
weights for the real ones, a script that counts bytes for trtexec; words are added that make a
command small (the last word wins). It takes about a quarter of an hour, so it is no test; that it
knows every command is one (`test_docs.py`).
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from bkprune import load
from bkprune.data import read_pairs
from bkprune.inception import Inception
from bkprune.models import BUILT_IN
from tests.test_metrics import made_up

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(
    r"^ {4,6}((?:accelerate launch .*-m bkprune\.cli|bkprune) (?:.*\\\n)*.*)$", re.M
)
INLINE = re.compile(r"`(bkprune [a-z]+(?: [^`]*)?)`")

_LOOK = "--samples 8 --bins 2"
_TIME = "--max-seconds 2"
_FIND = "--trials 8 --samples 16 --judged 16 --finalists 3"
_RACE = f"{_FIND} --kd-steps 4 --kd-pictures 2 --kd-sampling-steps 2 --kd batch-size=2"
_DRAW = "--n 4 --steps 2 --max-seconds 2"
_LEARN = "--steps 2 --batch-size 2 --preview-every 0"

# In the order of running. What is added to a command, and by a name what stands for a word of it.
TABLE: dict[str, str] = {
    "bkprune blocks MODEL": "",
    "bkprune analyze MODEL --data PAIRS --out STUDY": _LOOK,
    "bkprune analyze MODEL --data prompts.txt --grain pair": f"{_LOOK} --steps 2",
    "bkprune analyze MODEL --data PAIRS --criterion output,task,clip --clip CLIP --weighting x0": (
        f"{_LOOK} --grain stage --steps 2 --prompts 2 --out clip"
    ),
    "bkprune profile MODEL --out STUDY": _TIME,
    "bkprune profile MODEL --device cuda --dtype float16 --validate 20 --mask bk-sdm-base": (
        f"{_TIME} --device cpu --dtype float32 --validate 2 --out validated"
    ),
    "bkprune profile sd_v1 --no-latency": "--out counted",
    "bkprune profile unet/config.json --out here": _TIME,
    "bkprune profile MODEL --backend onnxruntime": f"{_TIME} --out onnx",
    "bkprune profile MODEL --latency-cmd 'trtexec --onnx={onnx}' "
    "--latency-pattern 'median = ([0-9.]+) ms'": "--out asked",
    "bkprune profile MODEL --out there": _TIME,
    "bkprune search MODEL --out STUDY --budget 'latency<=0.6x' --budget 'params<=500M'": _FIND,
    "bkprune search MODEL --cost there/cost.csv --budget 'latency<=0.6x'": (
        f"{_FIND} --out STUDY --force"
    ),
    "bkprune search MODEL --out STUDY --budget 'macs<=0.65x' --objective distilled "
    "--kd-data PAIRS": f"{_RACE} --force",
    "bkprune search emoji --out study --budget 'macs<=0.65x' --objective distilled --finalists 8 "
    "--kd-steps 100 --kd lr=5e-4 --kd batch-size=8 --kd output=30 --kd feature=0": (
        f"{_RACE} --kd-data PAIRS --out STUDY --force"
    ),
    "bkprune prune MODEL --mask STUDY/winner.json --out SMALL": "",
    "bkprune prune --check DIR": "",
    "bkprune prune MODEL --mask bk-sdm-base --out DIR --single-file": "--out single",
    "bkprune diff MODEL STUDENT": "",
    "bkprune distill SMALL --teacher MODEL --data PAIRS --out RUN": _LEARN,
    "bkprune evaluate SMALL RUN/distilled --teacher MODEL --out QUALITY": _DRAW,
    "bkprune report STUDY": "",
    "bkprune prune emoji --mask bk-sdm-base --out small": "",
    "bkprune distill small --teacher emoji --steps 400 --batch-size 32 --lr 1e-3 "
    "--schedule cosine": f"{_LEARN} --data PAIRS --out cosine",
    "bkprune distill ./sd15-base --teacher ./sd15 --data 'shards/{000..099}.tar' --dry-run": (
        "--batch-size 2"
    ),
    "bkprune cache ./sd15 --data 'shards/{000..049}.tar' --out latents/a": "",
    "bkprune cache ./sd15 --data 'shards/{050..099}.tar' --out latents/b": "",
    "bkprune distill ./student --teacher ./sd15 --data latents": f"{_LEARN} --out one",
    "accelerate launch --num_processes 4 -m bkprune.cli distill ./student --teacher ./sd15 "
    "--data latents": f"{_LEARN} --out four",
    "bkprune evaluate pruned=small distilled=RUN/distilled --teacher emoji --out quality": _DRAW,
    "bkprune stats ./val2014 --size 256 --inception weights.pth --out val2014.npz": "",
    "bkprune stats ./val2014 --clip CLIP --features --out val2014-clip.npz": "",
    "accelerate launch -m bkprune.cli evaluate distilled=RUN/distilled --teacher MODEL "
    "--protocol coco30k --prompts metadata.csv --reference val2014.npz --inception weights.pth "
    "--clip CLIP": _DRAW,
    "bkprune evaluate small --teacher emoji --strength 0.6 --out quality": _DRAW,
    "bkprune evaluate small --teacher emoji --teacher-steps 0,5,10,25 --out quality": (
        f"{_DRAW} --teacher-steps 0,1,2"
    ),
    "bkprune init mine --model ./sd15 --data ./pairs": "",
    "bkprune run mine --dry-run": "",
    "bkprune run mine": "",
    "bkprune report mine": "",
    "bkprune run STUDY": "",
}
ELSEWHERE = {
    "bkprune search MODEL --out STUDY --budget 'macs<=0.7x' --storage postgresql://HOST/DB": (
        "tests/test_postgres.py"
    ),
}
NAMES = {
    "MODEL": "emoji",
    "PAIRS": "pairs",
    "CLIP": str(BUILT_IN["emoji"] / "clip"),
    "STUDENT": "SMALL",
    "DIR": "SMALL",
}
_SMALL_STUDY = (
    ('["latency<=0.6x"]', '["macs<=0.7x"]'),  # two seconds of timing promise nothing
    ("samples = 256", "samples = 8\nbins = 2"),
    ("validate = 10 ", "validate = 1 "),
    ("max-seconds = 20", "max-seconds = 2"),
    ("trials = 100", "trials = 8\nsamples = 16\njudged = 16"),
    ("steps = 1000", "steps = 2\npreview-every = 0"),
    ("batch-size = 32", "batch-size = 2"),
    ("[evaluate]", "[evaluate]\nn = 4\nsteps = 2\nmax-seconds = 2"),
)


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found += [(page.name, line.replace("\\\n", " ")) for line in COMMAND.findall(text)]
        inline = [" ".join(line.split()) for line in INLINE.findall(text)]
        found += [(page.name, line) for line in inline if " --" in line]
    return found


def whole(line: str) -> bool:
    """Neither cut short by an ellipsis, nor about any command, nor a call for help."""
    words = shlex.split(line, comments=True)
    return not {"...", "COMMAND", "--help", "--install-completion"} & set(words)


_TRTEXEC = """\
#!/bin/sh
echo "[I] GPU latency: median = $(wc -c < "${1#--onnx=}") ms"
"""


def words_of(line: str) -> tuple[str, ...]:
    """A command's words, without its comment."""
    return tuple(shlex.split(line, comments=True))


def documented() -> list[str]:
    """Every whole command; decisions.md tells what was once run."""
    return [line for page, line in commands() if page != "decisions.md" and whole(line)]


def furnish(folder: Path) -> None:
    """What the commands are given."""
    pairs = read_pairs(BUILT_IN["emoji"] / "pairs.zip").split("train")
    for place in ("pairs", "val2014", "shards", "unet", "bin"):
        (folder / place).mkdir(parents=True)
    rows = []
    for i, caption in enumerate(pairs.captions[:100]):
        data = io.BytesIO()
        Image.fromarray(pairs.picture(i)).save(data, "PNG")
        with tarfile.open(folder / "shards" / f"{i:03d}.tar", "w") as shard:
            for name, content in ((f"{i}.png", data.getvalue()), (f"{i}.txt", caption.encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))
        if i < 24:
            (folder / "pairs" / f"{i}.png").write_bytes(data.getvalue())
            (folder / "val2014" / f"{i}.png").write_bytes(data.getvalue())
            rows.append({"file_name": f"{i}.png", "text": caption})
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "pairs" / "metadata.jsonl").write_text(f"{lines}\n")
    captions = [str(row["text"]) for row in rows]
    (folder / "prompts.txt").write_text("\n".join(captions[:8]) + "\n")
    quoted = "\n".join(json.dumps(caption) for caption in captions)
    (folder / "metadata.csv").write_text(f"text\n{quoted}\n")
    torch.save(made_up(Inception().state_dict()), folder / "weights.pth")
    pipeline = load("emoji")
    pipeline.save_pretrained(folder / "sd15")
    pipeline.unet.save_config(folder / "unet")
    trtexec = folder / "bin" / "trtexec"
    trtexec.write_text(_TRTEXEC)
    trtexec.chmod(0o755)


def prepare(line: str, folder: Path) -> None:
    """What a page tells a user to do by hand before a command."""
    if line == "bkprune run mine --dry-run":
        path = folder / "mine" / "study.toml"
        text = path.read_text()
        for old, new in _SMALL_STUDY:
            assert old in text, old
            text = text.replace(old, new)
        path.write_text(text)
    if line == "bkprune run STUDY":
        (folder / "STUDY" / "study.toml").write_text(
            '[study]\nmodel = "emoji"\n[analyze]\nsamples = 16\n[profile]\nlatency = false\n'
        )
    for student in ("sd15-base", "student"):
        if student in line and not (folder / student).exists():
            (folder / student).symlink_to("small")


def run(line: str, more: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = [NAMES.get(word, word) for word in (*words_of(line), *shlex.split(more))]
    if "--num_processes" in words:  # accelerate shares out CPUs through MPI alone
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        words = [sys.executable, *launch, *words[words.index("-m") :]]
    elif words[0] == "accelerate":
        words = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *words[2:]]
    else:
        words = [sys.executable, "-m", "bkprune.cli", *words[1:]]
    return subprocess.run(
        words,
        cwd=folder,
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        check=False,
    )


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="bkprune-docs-"))
    furnish(folder)
    failed = 0
    for line, more in TABLE.items():
        prepare(line, folder)
        start = time.perf_counter()
        done = run(line, more, folder)
        is_good = done.returncode == 0
        failed += not is_good
        took = time.perf_counter() - start
        print(f"{'ok  ' if is_good else 'FAIL'} {took:6.1f} s  {line}", flush=True)
        if not is_good:
            print(done.stderr[-2000:], flush=True)
    print(f"{len(TABLE) - failed} of {len(TABLE)} commands ended well, in {folder}")
    for line, place in ELSEWHERE.items():
        print(f"by {place}: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
