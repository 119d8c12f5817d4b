"""Put what a run trained beside its frozen base into the package: the checkpoint in the box.

    python scripts/pack_checkpoint.py out/smollm2/decider out/word-problems

Writes src/tah/assets/smollm2-tah: the additions in bfloat16, and 100 held-out problems for `tah demo`, which are sums,
word problems of the kinds trained on, and of others. The model card beside them is written by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tah.additions import save_additions
from tah.load import load_tah
from tah.smollm2 import TAH

COUNTS = {"sums": 34, "test": 33, "new_kinds": 33}


def main(trained: Path, problems: Path) -> None:
    save_additions(load_tah(str(trained)), TAH)
    lines = []
    for name, count in COUNTS.items():
        lines += [json.dumps({"set": name} | json.loads(line)) for line in open(problems / f"{name}.jsonl")][:count]
    (TAH / "problems.jsonl").write_text("\n".join(lines) + "\n")
    for path in sorted(TAH.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
