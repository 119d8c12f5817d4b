"""`tah trace`: run every token of some texts at every depth, and capture what each pass predicts.

Shapes: B texts of a batch, T tokens, N predictions of a batch (position t predicts token t + 1), V vocabulary,
M = max_depth, k = top_k.

Every token runs all depths, so that any policy can be evaluated afterwards (`overthinking.py`). With attention "own" or
"blind" nothing a token computes depends on which other tokens iterate, and the outcome of a policy can be derived
exactly. With "duo" it does depend on them, so a second forward follows the policy itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
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
from ..policy import Oracle, Rule
from ..progress import SILENT, Reporter
from ..streaming import Pieces
from .recorder import Recorder
from .texts import Text, texts_of
from .trace_file import VERSION, Trace, TracedText, TraceFile

LONGEST = 2048  # tokens of a text, unless the model or the user sets another limit


@dataclass(frozen=True)
class TraceRequest:
    """What to trace, and how.

    Args:
        rule: whose passes and outputs are captured as the model's own; the configured policy by default. `oracle` here
            runs all passes where depth 1 is wrong. `max_depth` is M; threshold and max_depth are one number each.
        run_policy: run a second forward that follows the policy. By default only with attention "duo"; elsewhere its
            outcome can be derived from the first forward.
        data: name of the data, for the header and for messages.
        model: name of the model; by default where it was loaded from.
        max_length: most tokens of a text; as many as the model has positions, at most 2048, by default.
        limit: most texts, parts of a long one included.
        top_k: most probable tokens to keep for each pass.
        tokens_per_batch: most tokens of a forward, padding included; a longer text runs alone.
    """

    rule: Rule = Rule()
    run_policy: bool | None = None
    data: str = "the data"
    model: str | None = None
    max_length: int | None = None
    limit: int | None = None
    top_k: int = 5
    tokens_per_batch: int = 4096


def trace(
    model: TaHForCausalLM,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    output: str | Path | None = None,
    request: TraceRequest | None = None,
    *,
    progress: Reporter = SILENT,
) -> Trace:
    """Trace texts, teacher-forced.

        tah.trace(model, tokenizer, [{"text": "..."}], request=TraceRequest(Rule("confidence", 0.7)))

    Args:
        rows: in one of the forms of `data.load_rows`; `texts.read_rows` reads them from a file.
        output: file that grows while tracing; an unfinished one is continued.
        request: settings; the defaults of [`TraceRequest`] where there is none.
        progress: where to report the texts that are done.

    Raises:
        ValueError: nothing to trace, settings out of range, or `output` holds something else.
    """
    request = request or TraceRequest()
    tracer = _Tracer(model, tokenizer, request)
    texts, left_out = texts_of(rows, tokenizer, tracer.max_length, request.data)
    texts = texts[: request.limit]
    check_ids((int(text.ids.max()) for text in texts), model, request.data, "it was made for another tokenizer")
    file = TraceFile(output, tracer.header(texts, left_out))
    finished = {text.key for text in file.trace.texts}
    with evaluating(model), progress.work("tracing", len(texts), "texts", len(finished)) as work:
        for batch in batches([len(text.ids) - 1 for text in texts], request.tokens_per_batch):
            todo = {texts[at].key for at in batch} - finished
            if todo:  # the whole batch, so that a continued trace rounds as an uninterrupted one
                traced = [text for text in tracer.trace([texts[at] for at in batch]) if text.key in todo]
                file.add(traced, partial(strings_of, tokenizer))
                work.advance(len(traced), sum(len(text.ids) - 1 for text in traced))
    return file.finish()


class _Tracer:
    """A request checked against a model; traces batches of texts."""

    def __init__(self, model: TaHForCausalLM, tokenizer: Any, request: TraceRequest) -> None:
        config, rule = model.config, request.rule.completed(model.config)
        self.model, self.tokenizer, self.request = model, tokenizer, request
        self.rule = rule.bind(config, model.decider, 1)
        if isinstance(rule.threshold, Tensor) or isinstance(rule.max_depth, Tensor) or rule.max_depth is None:
            raise ValueError(f"threshold {rule.threshold} and max_depth {rule.max_depth} must be one number each")
        self.threshold, self.max_depth = rule.threshold, rule.max_depth
        if self.max_depth > config.max_depth:
            known = config.max_depth
            raise ValueError(f"max_depth={self.max_depth}: the model has max_depth={known}; give at most that")
        size = config.get_text_config(decoder=True).vocab_size
        if not 1 <= request.top_k <= size:
            raise ValueError(f"top_k={request.top_k} must be at least 1 and at most {size}, the size of the vocabulary")
        self.max_length = _max_length(model, request.max_length)
        self.policy = rule.policy if isinstance(rule.policy, str) else repr(rule.policy)
        self.decider = model.decider if "decider" in (config.policy, self.policy) and self.max_depth > 1 else None
        self.duo = config.attention == "duo" and self.max_depth > 1
        self.run_policy = self.duo if request.run_policy is None else request.run_policy

    def header(self, texts: Sequence[Text], left_out: Mapping[str, int]) -> dict[str, Any]:
        """What is traced, as the first line of the file has it."""
        model, config = self.model, self.model.config
        return {
            "tah_trace": VERSION,
            "model": self.request.model or (model.name_or_path or model.base.name_or_path or type(model.base).__name__),
            "texts": len(texts),
            "tokens": sum(len(text.ids) for text in texts),
            "contents": _hash(*(part.tobytes() for text in texts for part in (text.ids, text.supervised))),
            "tokenizer": _hash(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()),
            "weights": weights_fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": config.attention,
            "versions": {"tah": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
            "data": self.request.data,
            "left_out": dict(left_out),
            "max_depth": self.max_depth,
            "max_length": self.max_length,
            "top_k": self.request.top_k,
            "policy": self.policy,
            "threshold": self.threshold,
            "confidence_measure": config.confidence_measure if self.policy == "confidence" else None,
            "decider": self.decider is not None,
            "decider_threshold": self.threshold if self.policy == "decider" else config.threshold,
            "final": "run" if self.run_policy else "approximate" if self.duo else "exact",
        }

    @torch.no_grad()
    def trace(self, texts: Sequence[Text]) -> Iterator[TracedText]:
        """One batch of texts, padded on the right."""
        M, k = self.max_depth, self.request.top_k
        lengths = [len(text.ids) - 1 for text in texts]  # nothing known follows the last token
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # [B, T]
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        ids[mask] = torch.from_numpy(np.concatenate([text.ids[:-1] for text in texts]))
        target = torch.from_numpy(np.concatenate([text.ids[1:] for text in texts])).to(self.model.device)
        inputs = {"input_ids": ids, "attention_mask": mask.long()}

        first = Recorder(self.rule, target, M, k, self.decider)
        self._forward(first, inputs)
        passes = torch.stack([captured for _, captured in first.passes])  # [M, N, 3 + 2k]
        oracle = torch.where(passes[0, :, 0] > 0, M, 1)  # [N] all passes where depth 1 is wrong
        depth = oracle if isinstance(self.rule.policy, Oracle) else first.depth
        final = passes[depth - 1, torch.arange(len(target), device=depth.device)]  # [N, 3 + 2k]
        if self.run_policy:
            labels = torch.ones(mask.shape, dtype=torch.int64)
            labels[mask] = oracle.cpu()
            second = Recorder(self.rule, target, M, k, follow=True)
            self._forward(second, inputs | {"depth_labels": labels})
            depth = second.depth
            for active, captured in second.passes:
                final[active] = captured

        every, last = passes.cpu().numpy(), final.cpu().numpy()
        columns = {
            "rank": every[..., 0].astype(np.int32),
            "prob": every[..., 1],
            "entropy": every[..., 2],
            "max_prob": every[..., 3 + k],
            "top_ids": every[..., 3 : 3 + k].astype(np.int32),
            "top_probs": every[..., 3 + k :],
            "depth": depth.cpu().numpy(),
            "final_rank": last[:, 0].astype(np.int32),
            "final_prob": last[:, 1],
            "final_top": last[:, 3].astype(np.int32),
        }
        if first.go_prob:
            columns["decider"] = torch.stack(first.go_prob).cpu().numpy()
        for text, n, stop in zip(texts, lengths, np.cumsum(lengths), strict=True):
            at = slice(stop - n, stop)
            yield TracedText(
                row=text.row,
                part=text.part,
                ids=text.ids.astype(np.int32),
                pieces=_pieces(self.tokenizer, text.ids),
                supervised=text.supervised[1:],
                **{name: values[at] if values.ndim == 1 else values[:, at] for name, values in columns.items()},
            )

    def _forward(self, recorder: Recorder, inputs: Mapping[str, Tensor]) -> None:
        device = self.model.device
        on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
        no_logits = torch.empty(0, dtype=torch.int64, device=device)
        depth = self.max_depth + 1  # so that the recorder is asked after pass M, too
        self.model(**on_device, policy=recorder, max_depth=depth, logits_to_keep=no_logits, use_cache=False)


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


def _hash(*parts: bytes) -> str:
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def _max_length(model: TaHForCausalLM, asked: int | None) -> int:
    config = model.config.get_text_config(decoder=True)
    known = [getattr(config, "max_position_embeddings", None), stable_positions(config)]
    limit = min((value for value in known if value is not None), default=None)
    if asked is None:
        return LONGEST if limit is None else min(LONGEST, limit)
    if asked < 2 or (limit is not None and asked > limit):
        raise ValueError(f"max_length={asked} must be at least 2" + (f" and at most {limit}" if limit else ""))
    return asked
