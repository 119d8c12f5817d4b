"""Write docs/reference/families.md from the tables in tests/helpers/families.py.

python scripts/families.py            write the page
python scripts/families.py --check    fail if the page is out of date, and write nothing
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from helpers.families import FAMILIES, REFUSED, config_of  # noqa: E402

DOCUMENT = ROOT / "docs" / "reference" / "families.md"
KINDS = {"full_attention": "full", "sliding_attention": "sliding", "chunked_attention": "chunked"}
INTRODUCTION = """# Supported families

`python scripts/families.py` generates this page from `tests/helpers/families.py`. Do not edit it.
[Support a family of bases](../contributing/family.md) has the steps for adding one.

* **Exact**: `tests/core/test_families.py` wraps a tiny random model of the family. The logits of a left-padded batch,
  in one forward and in several, equal those of a slow reference. The reference runs the stock model one token and one
  depth at a time, with up to three depths. With `policy="never"` the logits equal those of the stock model bit for bit.
* **Refused**: `TaHForCausalLM.from_base` raises `UnsupportedBase`, a `ValueError`, with the reason.

A family that is not listed has no test. The same checks run when it is wrapped, and it is refused if it fails them.

The column "layers" has the attention patterns that are tested. Windows and chunks are shorter than the sequences of
the tests.
"""


def layer_types(family: str) -> str:
    """Return the attention patterns of a family's tiny configuration, such as `sliding + full`."""
    config = config_of(family).get_text_config(decoder=True)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
    return " + ".join(KINDS[kind] for kind in dict.fromkeys(types))


def document() -> str:
    """Return the text of docs/reference/families.md."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    exact = [f"| `{f}` | `{names[f]}` | {layer_types(f)} |" for f in sorted(FAMILIES)]
    refused = [f"| `{f}` | `{names[f]}` | {REFUSED[f][1].text} |" for f in sorted(REFUSED)]
    return "\n".join(
        [
            INTRODUCTION,
            f"## Exact ({len(exact)})\n",
            "| family | class | layers |",
            "| --- | --- | --- |",
            *exact,
            f"\n## Refused ({len(refused)})\n",
            "| family | class | reason |",
            "| --- | --- | --- |",
            *refused,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/reference/families.md from tests/helpers/families.py.")
    parser.add_argument("--check", action="store_true", help="fail if the file is out of date, and write nothing")
    check = parser.parse_args().check
    text = document()
    if not check:
        DOCUMENT.write_text(text)
        return 0
    if not DOCUMENT.exists() or DOCUMENT.read_text() != text:
        print(f"{DOCUMENT.relative_to(ROOT)} is out of date; run: python scripts/families.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
