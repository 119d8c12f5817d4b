"""Copy a trained checkpoint into the package, as one of the two bundled checkpoints.

    python scripts/pack_checkpoint.py smollm2 out/smollm2/decider       # of `tah run smollm2-word-problems`
    python scripts/pack_checkpoint.py follow out/follow/lookahead-mix-0 # of experiments/lookahead.py --save out/follow

| argument | target | content |
| --- | --- | --- |
| smollm2 | src/tah/assets/smollm2-tah | the adapter in bfloat16 |
| follow | src/tah/assets/follow-tah | the whole model, and 100 held-out problems |

The script does not write the model cards in these directories.
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
    """Copy the trained model, and write the held-out problems."""
    task = Task("follow", seed=0, steps=(1, 1, 2))
    rows = [question(problem) | {"arrows": problem.steps} for problem in task.take("test", PROBLEMS, distinct=True)]
    for path in filter(Path.is_file, trained.iterdir()):
        shutil.copy(path, FOLLOW / path.name)
    write_atomically(FOLLOW / "problems.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def main(which: str, trained: Path) -> None:
    """Pack a checkpoint and print the sizes of its files."""
    if which == "follow":
        pack_follow(trained)
    else:
        save_adapter(load_tah(str(trained)), TAH)
    for path in sorted((FOLLOW if which == "follow" else TAH).iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("smollm2", "follow"), help="bundled checkpoint to write")
    parser.add_argument("trained", type=Path, help="directory of the trained checkpoint")
    main(**vars(parser.parse_args()))
