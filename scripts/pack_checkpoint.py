"""Put what a run trained beside its frozen base into the package: the checkpoint in the box.

    python scripts/pack_checkpoint.py out/smollm2/decider out/word-problems

Writes src/tah/assets/smollm2-tah: the additions in bfloat16, and 100 held-out problems for `tah demo`, which are sums,
word problems of the kinds trained on, and of others. The model card beside them is written by hand.
"""

from __future__ import annotations

import json
import sys
from itertools import zip_longest
from pathlib import Path

from tah.additions import save_additions
from tah.files import write_atomically
from tah.load import load_tah
from tah.smollm2 import TAH

COUNTS = {"sums": 34, "test": 33, "new_kinds": 33}


def main(trained: Path, problems: Path) -> None:
    save_additions(load_tah(str(trained)), TAH)
    sets = []
    for name, count in COUNTS.items():
        rows = (problems / f"{name}.jsonl").read_text().splitlines()[:count]
        sets.append([json.dumps({"set": name} | json.loads(row)) for row in rows])
    lines = [line for group in zip_longest(*sets) for line in group if line is not None]  # alternating
    write_atomically(TAH / "problems.jsonl", "\n".join(lines) + "\n")
    for path in sorted(TAH.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
