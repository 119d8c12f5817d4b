"""`tah report`: the depth lens, one HTML page of one or two traces. It needs no server and loads nothing.

Shapes: K texts shown, T tokens of all of them, N = T - K predictions (the first token of a text is not predicted),
M = max_depth, k = top_k.

The page contains the numbers as columns: little-endian bytes in base64, in one JSON block that rules.js reads. Tables
and charts are of whole traces and are made here. Everything that depends on a threshold is computed in the page, from
the texts that it shows.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomically
from .charts import MARKS, page_charts
from .overthinking import compare, statistics
from .tables import about_weights, difference_table, different_weights, rule_of, tables_of
from .trace_file import Trace, TracedText, check_comparable, drawn, weights_of

ASSETS = Path(__file__).parents[1] / "assets"
SCRIPTS = ("rules.js", "text.js", "token.js")  # joined into one module, in this order
SHOWN = 50_000  # tokens; a larger page opens slowly and is too large for e-mail
INTEGERS = {"Uint8Array": "<u1", "Uint16Array": "<u2", "Uint32Array": "<u4"}  # JavaScript's types, smallest first

try:
    import jinja2
except ImportError as error:
    raise ImportError("tah report needs more packages: pip install 'tah[report]'") from error


def write_lens(
    traces: Sequence[Trace], output: str | Path, *, shown: int = SHOWN, every: bool = False
) -> list[dict[str, Any]]:
    """Write the page and return the statistics of each trace. The write is atomic.

    Args:
        traces: One trace, or two of the same texts.
        output: Path of the page. An existing file is replaced.
        shown: Maximum number of tokens to show. Tables and charts are of all tokens.
        every: Whether all tokens count, not only supervised ones.

    Raises:
        ValueError: The traces cannot be compared, or have no tokens.
        OSError: The file cannot be written.
    """
    if len(traces) == 2:
        check_comparable(*traces)
    stats = [statistics(trace, every=every) for trace in traces]
    difference = compare(*traces) if len(traces) == 2 and not every else None
    data = _data(traces, shown, every)
    css = ASSETS.joinpath("lens.css").read_text("utf-8")
    js = "".join(ASSETS.joinpath(name).read_text("utf-8") for name in SCRIPTS)
    named = list(zip(MARKS, stats, strict=False))
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True)
    page = environment.get_template("lens.html.j2").render(
        css=css,
        js=js,
        data=_as_json(data),
        policy=f"default-src 'none'; style-src {_allowed(css)}; script-src {_allowed(js)}; base-uri 'none'; "
        "form-action 'none'",
        named=named,
        shown=int(sum(data["lengths"])),
        shown_texts=len(data["lengths"]),
        all_tokens=int(traces[0].header["tokens"]),
        difference=difference,
        difference_table=None if difference is None else difference_table(difference),
        different=different_weights(*(its["weights"] for its in stats)) if len(stats) == 2 else "",
        rules=[rule_of(its["about"]) for its in stats],
        weights=[about_weights(its["weights"]) for its in stats],
        tables=[tables_of(its) for its in stats],
        charts=page_charts(named),
    )
    write_atomically(output, page.encode("utf-8", "replace"))  # UTF-8 has no encoding of a lone surrogate
    return stats


def _allowed(source: str) -> str:
    """Return the entry of a content security policy that allows this inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _as_json(value: Any) -> str:
    """Return JSON with `<`, `>` and `&` escaped, so that it can stand in a script element."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# -- its data --------------------------------------------------------------------------------------------------------


def _data(traces: Sequence[Trace], shown: int, every: bool) -> dict[str, Any]:
    """Return the data of the page: the texts that all traces have, up to `shown` tokens but at least one text.

    Texts and strings are the same for all traces. `traces[i]` has the columns [N], [M, N] or [M, N, k] of trace i.
    """
    common = set.intersection(*({text.key for text in trace.texts} for trace in traces))
    chosen = [[text for text in trace.texts if text.key in common] for trace in traces]
    reached = np.cumsum([len(text.ids) for text in chosen[0]])
    count = max(1, int(np.searchsorted(reached, shown, side="right")))
    chosen = [texts[:count] for texts in chosen]
    strings: dict[str, int] = {}  # index of each string
    texts = chosen[0]
    supervised = np.concatenate([text.supervised | every for text in texts])
    pieces = [strings.setdefault(piece, len(strings)) for text in texts for piece in text.pieces]
    return {
        "rows": [text.row + 1 for text in texts],
        "parts": [text.part + 1 for text in texts],
        "lengths": [len(text.ids) for text in texts],
        "ids": _packed(np.concatenate([text.ids for text in texts])),
        "pieces": _packed(np.array(pieces)),
        "supervised": _packed(supervised),
        "traces": [
            {"mark": mark} | _columns(trace, its, strings)
            for mark, trace, its in zip(MARKS, traces, chosen, strict=False)
        ],
        "strings": list(strings),
    }


def _columns(trace: Trace, texts: Sequence[TracedText], strings: dict[str, int]) -> dict[str, Any]:
    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(text, name) for text in texts], axis=min(1, getattr(texts[0], name).ndim - 1))

    def places(name: str) -> np.ndarray:
        """Return the index in `strings` of each token's text."""
        ids, inverse = np.unique(joined(name), return_inverse=True)
        found = [strings.setdefault(trace.string(token), len(strings)) for token in ids]
        return np.array(found)[inverse.ravel()]

    header = trace.header
    columns = {name: joined(name) for name in ("rank", "prob", "entropy", "max_prob", "depth")}
    columns |= {"top": places("top_ids"), "top_probs": np.rint(joined("top_probs") * 1e4).astype(int)}
    if header["decider"]:
        columns["decider"] = joined("decider")
    if header["final"] == "run":
        columns |= {
            "final_rank": joined("final_rank"),
            "final_prob": joined("final_prob"),
            "final": places("final_top"),
        }
    names = ("model", "max_depth", "top_k", "policy", "threshold", "decider_threshold")
    return {
        "score": _own_score(header),
        "rules": _rules(header),
        "drawn": drawn(header),
        **{name: header[name] for name in names},
        "output": header.get("output"),
        "exact": header["attention"] != "duo" or trace.max_depth < 2,
        "columns": {name: _packed(values) for name, values in columns.items()},
    }


def _own_score(header: Mapping[str, Any]) -> str:
    """Return the score of the trace's policy, or else the best available score to shade tokens by."""
    if header["policy"] == "confidence":
        return "entropy" if header["confidence_measure"] == "entropy" else "confidence"
    return "decider" if header["decider"] else "confidence"


def _rules(header: Mapping[str, Any]) -> list[str]:
    """Return the policies that can be chosen in the page: those whose outputs the trace has."""
    if header["max_depth"] < 2:
        return ["own"]
    weights, scores = weights_of(header), ["decider"] * bool(header["decider"]) + ["confidence", "entropy"]
    oracle = ["oracle"] if weights in (None, "certain") else []
    return ["own", *(score for score in scores if weights in (None, score)), *oracle]


def _packed(values: np.ndarray) -> list[str]:
    """Return the JavaScript type of a column, and its bytes in base64.

    Floats have 32 bits. Integers have the smallest size that can hold all values.
    """
    if values.dtype.kind == "f":
        kind, style = "Float32Array", "<f4"
    else:
        most = int(values.max(initial=0))
        kind, style = next(entry for entry in INTEGERS.items() if most <= np.iinfo(entry[1]).max)
    return [kind, base64.b64encode(np.ascontiguousarray(values, style).tobytes()).decode()]
