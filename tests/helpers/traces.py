"""Traces for tests: of tiny models, and made of numbers; and what their commands print."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from helpers.families import VOCAB
from helpers.models import tah, token_ids
from tah import Rule, TraceRequest
from tah import trace as tah_trace
from tah.progress import SILENT
from tah.tracing.trace_file import Trace, TracedText
from tah_cli.app import run

LENGTHS = (7, 12, 5, 12, 2, 9)


def word_tokenizer(names=None):
    """A tokenizer of the tiny models' vocabulary, w0 to w96 or other names."""
    table = {name: token for token, name in enumerate(names or [f"w{token}" for token in range(VOCAB)])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(table, "w0")), eos_token="w2")


def rows(lengths=LENGTHS):
    """Tokens, all of them supervised but the first; of every third row only the second half."""
    found = []
    for number, length in enumerate(lengths):
        ids = token_ids(1, length, seed=number)[0].tolist()
        start = max(1, length // 2) if number % 3 == 0 else 1
        found.append({"input_ids": ids, "supervised": [at >= start for at in range(length)]})
    return found


def guided(model, lengths=LENGTHS):
    """The same, but every second token is the model's first choice: it is right sometimes."""
    found = rows(lengths)
    for row in found:
        ids = row["input_ids"]
        for at in range(1, len(ids), 2):
            ids[at] = int(model(torch.tensor([ids[:at]]), policy="never", use_cache=False).logits[0, -1].argmax())
    return found


def model_of(attention="duo", max_depth=3, **config):
    return tah(attention=attention, max_depth=max_depth, **{"policy": "decider", "threshold": 0.5, **config}).eval()


def trace(model, tokenizer, rows, output=None, progress=SILENT, **fields):
    """`tah.trace` with the fields of its request, and of the rule in it, as arguments."""
    rule = Rule(**{name: fields.pop(name, None) for name in ("policy", "threshold", "max_depth")})
    return tah_trace(model, tokenizer, rows, output, TraceRequest(rule, **fields), progress=progress)


def made(rank, prob, decider=None, depth=None, texts=None, threshold=0.5, attention="own", **header):
    """A trace from [M][N] ranks and probabilities; `texts` [N] says which token belongs to which text."""
    rank, prob = np.array(rank), np.array(prob, float)
    M, N = rank.shape
    texts = np.array([0] * N if texts is None else texts)
    depth = np.array([1] * N if depth is None else depth)
    decider = None if decider is None else np.array(decider, float).reshape(M - 1, N)
    found = []
    for number in np.unique(texts):
        at = texts == number
        n = int(at.sum())
        last = depth[at] - 1, np.flatnonzero(at)
        found.append(
            TracedText(
                row=int(number),
                part=0,
                ids=np.arange(n + 1) % 3,
                pieces=[f"t{token % 3}" for token in range(n + 1)],
                supervised=np.ones(n, bool),
                rank=rank[:, at],
                prob=prob[:, at],
                entropy=-np.log(prob[:, at]),
                max_prob=np.maximum(prob[:, at], 0.4),
                top_ids=np.zeros((M, n, 1), int),
                top_probs=prob[:, at, None],
                decider=None if decider is None else decider[:, at],
                depth=depth[at],
                final_rank=rank[last],
                final_prob=prob[last],
                final_top=np.zeros(n, int),
            )
        )
    about = {
        "model": "made",
        "data": "data",
        "tokenizer": "t",
        "texts": len(found),
        "max_depth": M,
        "policy": "decider",
    }
    about |= {"threshold": threshold, "decider_threshold": threshold, "attention": attention, "final": "exact"}
    return Trace(about | {"decider": decider is not None} | header, found, {0: "zero", 1: "one", 2: "t|o"})


def random_trace(M=3, N=60, K=6, seed=0, coarse=False):
    generator = np.random.default_rng(seed)
    said = generator.random((M - 1, N))
    said = said.round(1) if coarse else said
    prob = generator.uniform(0.05, 0.95, (M, N))
    depth = 1 + (np.minimum.accumulate(said) > 0.5).sum(0)
    return made(generator.integers(0, 3, (M, N)), prob, said, depth, np.sort(generator.integers(0, K, N)))


def works(capsys, *arguments):
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def fails(capsys, *arguments):
    """The one line of a command that fails with exit code 2 and writes nothing."""
    before = sorted(Path.cwd().rglob("*"))
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "is a base model" not in line and not line.startswith("tracing: ")]
    assert len(lines) == 1 and lines[0].startswith("tah: ") and out.strip() == "", err
    assert sorted(Path.cwd().rglob("*")) == before
    return lines[0]
