"""Put what a run trained beside its frozen base into the package: the checkpoint in the box.

    python scripts/pack_checkpoint.py out/smollm2/decider out/word-problems

Writes src/tah/assets/smollm2-tah: the additions in bfloat16, the recipe as it was run, and 100 held-out problems for
`tah demo` (half of them of kinds that were not trained on). The model card beside them is written by hand.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from tah.additions import save_additions
from tah.load import load_tah
from tah.smollm2 import TAH

HALF = 50


def main(trained: Path, problems: Path) -> None:
    save_additions(load_tah(str(trained)), TAH)
    shutil.copyfile(trained / "run.json", TAH / "run.json")
    rows = []
    for name in ("test", "new_kinds"):
        for line in (problems / f"{name}.jsonl").read_text().splitlines()[:HALF]:
            row = json.loads(line)
            rows.append({"kind": name, "question": row["messages"][0]["content"], "answer": row["answer"]})
    (TAH / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in sorted(TAH.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
