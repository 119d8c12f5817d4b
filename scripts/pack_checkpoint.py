"""Put what was trained into the package: the two checkpoints in the box.

    python scripts/pack_checkpoint.py smollm2 out/smollm2/decider       # of `tah run smollm2-word-problems`
    python scripts/pack_checkpoint.py follow out/follow/lookahead-mix-0 # of experiments/lookahead.py --save out/follow

Writes src/tah/assets/smollm2-tah, the adapter in bfloat16, or src/tah/assets/follow-tah, the whole model and 100
problems that it has not seen. The model cards beside them are written by hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from tah import save_adapter
from tah.checkpoints.smollm2 import TAH
from tah.files import write_atomically
from tah.load import FOLLOW, load_tah

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

from tasks import Task, question  # noqa: E402

PROBLEMS = 100


def pack_follow(trained: Path) -> None:
    task = Task("follow", seed=0, steps=(1, 1, 2))
    rows = [question(problem) | {"arrows": problem.steps} for problem in task.take("test", PROBLEMS, distinct=True)]
    for path in filter(Path.is_file, trained.iterdir()):
        shutil.copy(path, FOLLOW / path.name)
    write_atomically(FOLLOW / "problems.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def main(which: str, trained: Path) -> None:
    if which == "follow":
        pack_follow(trained)
    else:
        save_adapter(load_tah(str(trained)), TAH)
    for path in sorted((FOLLOW if which == "follow" else TAH).iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("smollm2", "follow"))
    parser.add_argument("trained", type=Path)
    main(**vars(parser.parse_args()))
