"""Copy what a run of this study leaves, without weights and pictures, to where it is published.

bkprune run studies/emoji --out demo && python studies/emoji/sample.py demo
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from bkprune.report import build

OUT = Path(__file__).parents[2] / "reports" / "emoji"
KEPT = (
    *("*.csv", "*.json", "study.toml", "figures/*.png"),
    *("pruned/README.md", "pruned/mask.json", "pruned/unet.png"),
    *("distillation/train.jsonl", "distillation/distill.json", "distillation/previews/*.png"),
    *("compared/*/pruned/mask.json", "compared/*/pruned/README.md"),
    *("compared/*/distillation/train.jsonl", "compared/*/distillation/previews/*.png"),
    *("evaluation/*.csv", "evaluation/*.json", "evaluation/*.png", "evaluation/figures/*.png"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    shutil.rmtree(OUT, ignore_errors=True)
    for pattern in KEPT:
        for path in run.glob(pattern):
            to = OUT / path.relative_to(run)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
    print(build(OUT))


if __name__ == "__main__":
    main()
