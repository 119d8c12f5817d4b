"""`tah trace`: run every token of some texts at every depth, and record what each pass makes of the next token.

Shapes: B texts of a batch, T tokens, N predictions of a batch (position t predicts token t + 1), V vocabulary,
M = max_depth, k = top_k.

Everyone runs all depths, so that any policy can be judged afterwards (`overthinking.py`). With `attention="own"` or
"blind" nothing a token computes depends on who else iterates, and what a policy would give is read off exactly. With
"duo" it does depend, so a second forward follows the policy itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from .. import __version__
from ..checkpoints.contents import weights_fingerprint
from ..core.families import stable_positions
from ..core.inputs import check_ids
from ..data.scoring import batches, evaluating
from ..model import TaHForCausalLM
from ..policy import BoundRule, Oracle, Policy, Rule
from ..streaming import Pieces
from .recorder import Recorder
from .trace_file import VERSION, TraceFile
from .trace_texts import Text, texts_of
from .traced import Trace, TracedText

LONGEST = 2048  # tokens of a text, unless the model or the user says otherwise


# -- recording -------------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """Traces batches of texts."""

    model: TaHForCausalLM
    tokenizer: Any
    rule: BoundRule
    decider: Any
    max_depth: int
    top_k: int
    follow: bool  # a second forward that follows the rule

    @torch.no_grad()
    def trace(self, texts: Sequence[Text]) -> list[TracedText]:
        """Of one batch, padded on the right."""
        lengths = [len(text.ids) - 1 for text in texts]  # the last token predicts nothing that is known
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        ids = np.zeros(mask.shape, np.int64)
        ids[mask] = np.concatenate([text.ids[:-1] for text in texts])
        target = torch.from_numpy(np.concatenate([text.ids[1:] for text in texts])).to(self.model.device)
        given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask).long()}

        first = Recorder(self.rule, target, self.max_depth, self.top_k, self.decider)
        self._forward(first, given)
        found = torch.stack([noted for _, noted in first.passes])  # [M, N, 4 + 2k]
        depth = first.depth
        if isinstance(self.rule.policy, Oracle):
            depth = torch.where(found[0, :, 0] > 0, self.max_depth, 1)
        final = found[depth - 1, torch.arange(len(target), device=depth.device)]  # [N, 4 + 2k]
        if self.follow:
            labels = torch.ones(mask.shape, dtype=torch.int64)
            labels[given["attention_mask"] > 0] = torch.where(found[0, :, 0] > 0, self.max_depth, 1).cpu()
            second = Recorder(self.rule, target, self.max_depth, self.top_k, everyone=False)
            self._forward(second, given | {"depth_labels": labels})
            depth = second.depth
            for active, noted in second.passes:
                final[active] = noted
        said = torch.stack(first.said).cpu().numpy() if self.decider is not None and first.said else None
        columns = found.cpu().numpy(), final.cpu().numpy(), depth.cpu().numpy(), said
        stops = np.cumsum(lengths)
        return [
            self._text(text, slice(stop - n, stop), *columns)
            for text, n, stop in zip(texts, lengths, stops, strict=True)
        ]

    def _forward(self, recorder: Recorder, given: Mapping[str, Tensor]) -> None:
        inputs = {name: tensor.to(self.model.device) for name, tensor in given.items()}
        nothing = torch.empty(0, dtype=torch.int64, device=self.model.device)
        self.model(**inputs, policy=recorder, max_depth=self.max_depth + 1, logits_to_keep=nothing, use_cache=False)

    def _text(
        self, text: Text, at: slice, found: np.ndarray, final: np.ndarray, depth: np.ndarray, said: np.ndarray | None
    ) -> TracedText:
        rank, prob, entropy, max_prob = np.moveaxis(found[:, at, :4], 2, 0)
        return TracedText(
            row=text.row,
            part=text.part,
            ids=text.ids.astype(np.int32),
            pieces=_pieces(self.tokenizer, text.ids),
            supervised=text.supervised[1:],
            rank=rank.astype(np.int32),
            prob=prob,
            entropy=entropy,
            max_prob=max_prob,
            top_ids=found[:, at, 4 : 4 + self.top_k].astype(np.int32),
            top_probs=found[:, at, 4 + self.top_k :],
            decider=None if said is None else said[:, at],
            depth=depth[at],
            final_rank=final[at, 0].astype(np.int32),
            final_prob=final[at, 1],
            final_top=final[at, 4].astype(np.int32),
        )


def _pieces(tokenizer: Any, ids: np.ndarray) -> list[str]:
    """[T] what each token adds to the text."""
    pieces = Pieces(partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    found = [pieces.add(int(token)) for token in ids]
    return [*found[:-1], found[-1] + pieces.flush()]


def strings_of(tokenizer: Any, ids: Sequence[int]) -> dict[int, str]:
    """Text of each token by itself; the tokenizer's own name of one that is part of a character."""

    def string(token: int) -> str:
        text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        broken = not text or "\ufffd" in text
        return str(tokenizer.convert_ids_to_tokens(token) or f"<{token}>") if broken else text

    return {token: string(token) for token in ids}


# -- a trace ---------------------------------------------------------------------------------------------------------


def trace(
    model: TaHForCausalLM,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    output: str | Path | None = None,
    *,
    source: str = "the data",
    policy: str | Policy | None = None,
    threshold: float | None = None,
    max_depth: int | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    top_k: int = 5,
    tokens_per_batch: int = 4096,
    own_policy: bool | None = None,
    name: str | None = None,
    done: Callable[[int, int], None] = lambda texts, of: None,
) -> Trace:
    """Trace texts, teacher-forced.

    Args:
        rows: in one of the forms of `data.load_rows`; see `trace_texts.read_rows`.
        output: file that grows while tracing; one that is unfinished is continued.
        source: name of the data.
        policy: whose passes and outputs to record as the model's own; its configured one by default. `oracle` here
            runs all passes where depth 1 is wrong.
        threshold: of that policy.
        max_depth: M; the model's by default.
        max_length: most tokens of a text; as many as the model has positions, at most 2048, by default.
        limit: most texts, parts of a long one included.
        top_k: most probable tokens to keep for each pass.
        tokens_per_batch: most tokens of a forward, padding included; a longer text runs alone.
        own_policy: run a second forward that follows the policy. By default only with `attention="duo"`; elsewhere
            its results are known from the first.
        name: of the model, instead of where it was loaded from.
        done: told after every batch how many texts are done, and of how many.

    Raises:
        ValueError: nothing to trace, arguments out of range, or `output` holds something else.
    """
    M = model.config.max_depth if max_depth is None else max_depth
    if M > model.config.max_depth:
        raise ValueError(f"max_depth={M}: the model has max_depth={model.config.max_depth}; give at most that")
    rule = Rule(policy, threshold, M).bind(model.config, model.decider, 1)
    if isinstance(rule.threshold, Tensor):
        raise ValueError(f"threshold {threshold} must be one number")
    size = model.config.get_text_config(decoder=True).vocab_size
    if not 1 <= top_k <= size:
        raise ValueError(f"top_k={top_k} must be at least 1 and at most {size}, the size of the vocabulary")
    max_length = _max_length(model, max_length)
    texts, left_out = texts_of(rows, tokenizer, max_length, source)
    texts = texts[:limit]
    most = (int(text.ids.max()) for text in texts)
    check_ids(most, model, source, "it was made for another tokenizer")
    policy, duo = model.config.policy if policy is None else policy, model.config.attention == "duo" and M > 1
    follow = duo if own_policy is None else own_policy
    asked = model.decider if "decider" in (model.config.policy, policy) and M > 1 else None
    header = _facts(model, tokenizer, texts) | {
        "data": source,
        "left_out": dict(left_out),
        "max_depth": M,
        "max_length": max_length,
        "top_k": top_k,
        "policy": policy if isinstance(policy, str) else repr(policy),
        "threshold": rule.threshold,
        "confidence_measure": model.config.confidence_measure if policy == "confidence" else None,
        "decider": asked is not None,
        "decider_threshold": rule.threshold if policy == "decider" else model.config.threshold,
        "final": "run" if follow else "approximate" if duo else "exact",
    }
    if name is not None:
        header["model"] = name
    file, job = TraceFile(output, header), _Job(model, tokenizer, rule, asked, M, top_k, follow)
    finished, number = file.done, 0
    with evaluating(model):
        for batch in batches([len(text.ids) - 1 for text in texts], tokens_per_batch):
            todo = {texts[at].key for at in batch} - finished
            if todo:  # the whole batch, so that a continued trace rounds as an uninterrupted one
                traced = job.trace([texts[at] for at in batch])
                file.add([text for text in traced if text.key in todo], partial(strings_of, tokenizer))
            number += len(batch)
            done(number, len(texts))
    return file.finish()


def _facts(model: TaHForCausalLM, tokenizer: Any, texts: list[Text]) -> dict[str, Any]:
    return {
        "tah_trace": VERSION,
        "model": model.name_or_path or model.base.name_or_path or type(model.base).__name__,
        "texts": len(texts),
        "tokens": sum(len(text.ids) for text in texts),
        "contents": _hash(*(part.tobytes() for text in texts for part in (text.ids, text.supervised))),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "weights": weights_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config.attention,
        "versions": {"tah": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of which id stands for which token."""
    return _hash(json.dumps(sorted(tokenizer.get_vocab().items())).encode())


def _hash(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _max_length(model: TaHForCausalLM, asked: int | None) -> int:
    config = model.config.get_text_config(decoder=True)
    known = [getattr(config, "max_position_embeddings", None), stable_positions(config)]
    limit = min((value for value in known if value is not None), default=None)
    if asked is None:
        return LONGEST if limit is None else min(LONGEST, limit)
    if asked < 2 or (limit is not None and asked > limit):
        raise ValueError(f"max_length={asked} must be at least 2" + (f" and at most {limit}" if limit else ""))
    return asked
