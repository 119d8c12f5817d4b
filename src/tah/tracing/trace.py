"""`tah trace`: run every token of some texts at every depth, and record what each pass predicts.

Shapes: B texts of a batch, T tokens, N predictions of a batch (position t predicts token t + 1), V vocabulary,
M = max_depth, k = top_k.

Every token runs all depths, so `overthinking.py` can evaluate any policy from the trace. With attention "own" or
"blind" the output of a token does not depend on which other tokens iterate, so the outcome of a policy is exact. With
"duo" it does depend on them (method.md (7)), so a second forward follows the policy.
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
from ..names import MIXTURES
from ..policy import Oracle, Rule
from ..processes import Processes
from ..progress import SILENT, Reporter
from ..streaming import Pieces
from .recorder import Recorder
from .texts import Text, texts_of
from .trace_file import VERSION, Key, Parts, Trace, TracedText, TraceFile, load_trace, part_of

LONGEST = 2048  # default maximum number of tokens of a text


@dataclass(frozen=True)
class TraceRequest:
    """Settings of a trace.

    Args:
        rule: Rule whose depths and outputs the trace records as `own policy`; by default the policy of the model's
            config. `oracle` runs all passes where depth 1 is wrong. `max_depth` is M. `threshold` and `max_depth` are
            one number each, not one per row.
        run_policy: Whether to run a second forward that follows the policy. By default only with attention "duo". For
            other attention the first forward gives the same outcome.
        data: Name of the data in the header and in messages.
        model: Name of the model in the header; by default the path or id that it was loaded from.
        max_length: Maximum number of tokens of a text; by default the number of positions of the model, at most 2048.
        limit: Maximum number of texts. Each part of a long text counts as one.
        top_k: Number of most probable tokens to keep per pass.
        tokens_per_batch: Maximum number of tokens of a forward, padding included. A longer text runs alone.
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
    processes: Processes | None = None,
) -> Trace:
    """Return a trace of texts. The model reads the true tokens (teacher forcing).

        tah.trace(model, tokenizer, [{"text": "..."}], request=TraceRequest(Rule("confidence", 0.7)))

    Args:
        model: Model to trace.
        tokenizer: Its tokenizer.
        rows: Rows in one of the forms of `data.load_rows`. `texts.read_rows` reads them from a file.
        output: Path of the trace file. Each batch is appended to it. An unfinished file is continued.
        request: Settings; by default those of `TraceRequest()`.
        progress: Reporter of finished texts. Only the first process reports.
        processes: Processes that share the batches, as `Processes.started()` returns them; all of them make this call.
            They need `output`, a file that all of them can read. By default this process traces alone.

    Returns:
        The trace. In a process other than the first: the texts that this process has traced.

    Raises:
        ValueError: No row can be traced, a setting is out of range, `output` is another file or another trace, or
            several processes have no `output`. `OtherProcessFailed`: another process has raised an error.
    """
    processes = processes or Processes()
    with processes:
        return _trace(model, tokenizer, rows, output, request, processes, progress if processes.lead else SILENT)


def _trace(
    model: TaHForCausalLM,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    output: str | Path | None,
    request: TraceRequest | None,
    processes: Processes,
    progress: Reporter,
) -> Trace:
    if output is None and processes.world > 1:
        raise ValueError(f"{processes.world} processes join their texts in a file: give -o FILE (output)")
    request = request or TraceRequest()
    tracer = _Tracer(model, tokenizer, request)
    texts, left_out = texts_of(rows, tokenizer, tracer.max_length, request.data)
    texts = texts[: request.limit]
    check_ids((int(text.ids.max()) for text in texts), model, request.data, "it was made for another tokenizer")
    header, lead = tracer.header(texts, left_out), processes.lead
    file = TraceFile(output, header) if lead else None
    processes.agree("trace", header)
    if file is None:
        assert output is not None
        processes.see(Path(output).exists, f"{output} of the first process is not there")
        finished, file = load_trace(output).texts, TraceFile(part_of(output, processes.rank), header)
    else:
        finished = file.trace.texts
    parts, done = Parts(output, header), {text.key for text in finished}  # of earlier calls
    with evaluating(model), progress.work("tracing", len(texts), "texts", len(done)) as work:
        for number, batch in enumerate(batches([len(text.ids) - 1 for text in texts], request.tokens_per_batch)):
            its = [texts[at] for at in batch]
            missing = {text.key: text for text in its if text.key not in done}
            todo, traced = missing.keys() - parts.texts.keys(), dict[Key, TracedText]()
            if processes.owns(number) and todo:
                # Run the whole batch, so that a continued trace has the rounding of an uninterrupted one.
                traced = {text.key: text for text in tracer.trace(its) if text.key in todo}
            if lead and missing:
                if todo and not traced:
                    processes.wait_for(f"batch {number}")
                    processes.see(partial(parts.have, todo), f"{output} lacks texts of another process")
                traced |= {key: parts.texts.pop(key) for key in missing.keys() - traced.keys()}
            file.add([traced[key] for key in missing if key in traced], partial(strings_of, tokenizer))
            work.advance(len(missing), sum(len(text.ids) - 1 for text in missing.values()))
            if processes.owns(number):
                processes.tell(f"batch {number}")
    if lead:
        for number in range(1, processes.world):  # a process that starts late has to find its part as it was
            processes.wait_for(f"end of process {number}")
        parts.remove()
    else:
        processes.tell(f"end of process {processes.rank}")
    return file.finish()


class _Tracer:
    """Traces batches of texts. Checks the request against the model when it is made."""

    def __init__(self, model: TaHForCausalLM, tokenizer: Any, request: TraceRequest) -> None:
        config, rule = model.config, request.rule.completed(model.config)
        self.model, self.tokenizer, self.request = model, tokenizer, request
        self.rule = rule.bind(config, model.decider, 1)
        if isinstance(rule.threshold, Tensor) or isinstance(rule.max_depth, Tensor) or rule.max_depth is None:
            raise ValueError(f"threshold {rule.threshold} and max_depth {rule.max_depth} must be one number each")
        self.threshold, self.max_depth = rule.threshold, rule.max_depth
        if self.max_depth > config.max_depth:
            known = config.max_depth
            raise ValueError(f"max_depth={self.max_depth} must be at most {known}, the max_depth of the model")
        size = config.get_text_config(decoder=True).vocab_size
        if not 1 <= request.top_k <= size:
            raise ValueError(f"top_k={request.top_k} must be at least 1 and at most {size}, the size of the vocabulary")
        self.max_length = _max_length(model, request.max_length)
        self.policy = rule.policy if isinstance(rule.policy, str) else repr(rule.policy)
        self.decider = model.decider if "decider" in (config.policy, self.policy) and self.max_depth > 1 else None
        self.duo = config.attention == "duo" and self.max_depth > 1
        self.run_policy = self.duo if request.run_policy is None else request.run_policy

    def header(self, texts: Sequence[Text], left_out: Mapping[str, int]) -> dict[str, Any]:
        """Return the header of the trace: the first line of its file."""
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
            "threshold": None if self.rule.seed is not None else self.threshold,
            "confidence_measure": config.confidence_measure if self.policy == "confidence" else None,
            "decider": self.decider is not None,
            "decider_threshold": self.threshold if self.policy == "decider" else config.threshold,
            **({"output": config.output} if config.output in MIXTURES else {}),
            **({"decision": "sample", "seed": config.random_seed} if config.decision == "sample" else {}),
            "final": "run" if self.run_policy else "approximate" if self.duo else "exact",
        }

    @torch.no_grad()
    def trace(self, texts: Sequence[Text]) -> Iterator[TracedText]:
        """Yield the trace of each text of a batch. The batch is padded on the right."""
        M, k = self.max_depth, self.request.top_k
        lengths = [len(text.ids) - 1 for text in texts]  # the last token has no true next token
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
        depth = self.max_depth + 1  # a policy is called after every pass but the last; the recorder needs pass M too
        self.model(**on_device, policy=recorder, max_depth=depth, logits_to_keep=no_logits, use_cache=False)


def _pieces(tokenizer: Any, ids: np.ndarray) -> list[str]:
    """Return what each token adds to the text, `[T]`."""
    pieces = Pieces(partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    found = [pieces.add(int(token)) for token in ids]
    return [*found[:-1], found[-1] + pieces.flush()]


def strings_of(tokenizer: Any, ids: Sequence[int]) -> dict[int, str]:
    """Return the text of each token id by itself. Part of a character has the tokenizer's own name of the token."""

    def string(token: int) -> str:
        text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        broken = not text or "\ufffd" in text
        return str(tokenizer.convert_ids_to_tokens(token) or f"<{token}>") if broken else text

    return {token: string(token) for token in ids}


def _hash(*parts: bytes) -> str:
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def _max_length(model: TaHForCausalLM, requested: int | None) -> int:
    config = model.config.get_text_config(decoder=True)
    known = [getattr(config, "max_position_embeddings", None), stable_positions(config)]
    limit = min((value for value in known if value is not None), default=None)
    if requested is None:
        return LONGEST if limit is None else min(LONGEST, limit)
    if requested < 2 or (limit is not None and requested > limit):
        raise ValueError(f"max_length={requested} must be at least 2" + (f" and at most {limit}" if limit else ""))
    return requested
