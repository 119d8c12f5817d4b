"""A TaH model for lm-evaluation-harness: `--model tah`, and the model that `tah eval` passes to its evaluator.

Shapes: B rows of a batch, P tokens of the padded prompts, S = P + produced tokens, T tokens of a forward, V vocabulary.

lm-eval has no plug-ins. To use the model from lm-eval's command line, import this module first:

    python -c "import tah.evaluation.harness, lm_eval.__main__ as m; m.cli_evaluate()" run --model tah \\
        --model_args pretrained=DIR,policy=decider --tasks hellaswag

With `--include_path` and the path of the directory `tasks` next to this file, lm-eval also finds our tasks. Their names
begin with `tah_`.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import StopStringCriteria, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..core.cache import DuoCache
from ..core.compat import CACHE
from ..core.inputs import check_ids
from ..core.logits import CHUNK
from ..data.scoring import check_reference
from ..errors import first_line
from ..generation import RefuseNaN
from ..policy import DepthState, Policy, Rule
from ..processes import Processes, count
from ..session import Session
from .eval_files import Asked, Generated, Samples

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise ImportError("evaluation needs more packages: pip install 'tah[eval]'") from error


# Ends of a prompt that belong to the answer: a chat template opens the thoughts, and a protocol opens a code block.
# Without its opening, an answer could not be parsed.
OPENINGS = ("<think>", "```python\n")


class ShareDone(Exception):
    """A process other than the first has answered its share. It ends lm-eval's evaluator before the grading."""


@register_model("tah")
class TaHLM(HFLM):
    """A TaH checkpoint, or a base model wrapped when it is loaded, as lm-eval's model.

    An answer depends on the question, the sample number and the seed. It does not depend on the other answers of its
    batch or on earlier batches, except for rounding: a batch of another size is rounded differently.

    Args:
        pretrained: Path of a checkpoint directory, Hub id, name of a bundled model, or open session.
        policy: Name of a policy; by default that of the checkpoint. `oracle` needs a reference.
        threshold: Threshold of the policy; by default that of the checkpoint.
        max_depth: Maximum number of passes per token; by default that of the checkpoint.
        seed: Random seed of the sampling.
        reference: Reference model of `oracle`. Its first choice counts as right.
        dtype: Precision; `auto` as in `Request`.
        device: Device; by default `auto` as in `Request`.
        batch_size: Number of questions computed together.
        log: File of the answers. An answer that it has is not generated again.
        processes: Processes that share the batches; they need a log. By default this process answers alone.
        options: Options of lm-eval's `HFLM`.

    Raises:
        ValueError: The model cannot be loaded, does not have the tokenizer of its reference, or lm-eval's own command
            runs in several processes.
    """

    def __init__(
        self,
        pretrained: str | Session,
        *,
        policy: str | None = None,
        threshold: float | None = None,
        max_depth: int | None = None,
        seed: int = 0,
        reference: str | Session | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        log: Samples | None = None,
        processes: Processes | None = None,
        **options: Any,
    ) -> None:
        if isinstance(pretrained, str) and count() > 1:  # all processes would answer all questions
            raise ValueError(
                f"the model tah of lm-eval runs in one process, not in {count()}; several processes need tah eval "
                "--tasks lm_eval:NAME"
            )
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size {batch_size!r} must be a positive integer")
        place: dict[str, Any] = {"dtype": dtype, "device": device or "auto"}
        session = Session.open(pretrained, **place) if isinstance(pretrained, str) else pretrained
        template = session.tokenizer.chat_template
        thinking = {"enable_thinking": True} if "enable_thinking" in str(template or "") else {}
        positions = getattr(session.model.config.get_text_config(), "max_position_embeddings", None)
        # lm-eval reads this only at the top level of a config, and otherwise assumes 2048
        options.setdefault("max_length", positions)
        super().__init__(
            pretrained=session.model,
            tokenizer=session.tokenizer,
            backend="causal",
            batch_size=int(batch_size),
            chat_template_args=thinking | (options.pop("chat_template_args", None) or {}),
            **options,
        )
        self.session, self.seed, self.log, self.processes = session, int(seed), log, processes or Processes()
        self.reference = Session.open(reference, **place) if isinstance(reference, str) else reference
        self.use(Rule(policy, threshold, max_depth))

    def use(self, rule: Rule) -> None:
        """Set the rule of the following answers.

        Raises:
            ValueError: `max_depth` is larger than that of the checkpoint; `oracle` has no reference, or one with
                another tokenizer; or the checkpoint has no trained decider for `decider`.
        """
        session, self.oracle = self.session, None
        rule, most = session.rule(rule), session.model.config.max_depth
        if int(rule.max_depth or most) > most and not session.wrapped:
            raise ValueError(f"max_depth={rule.max_depth} must be at most {most}, the max_depth of {session.source}")
        if rule.policy == "oracle":
            if self.reference is None:
                raise ValueError("policy oracle needs a reference model: give --reference MODEL")
            check_reference(self.reference.model, session.tokenizer, self.reference.tokenizer, 1)
            self.oracle = ReferenceOracle(self.reference)
        self.rule = replace(rule, policy=self.oracle or rule.policy)
        if rule.policy == "decider" and (session.wrapped or session.model.decider is None):
            raise ValueError(f"{session.source} has no trained decider; give another policy, such as confidence")

    def close(self) -> None:
        """Free resources. There are none here; in `vllm_backend.py` the memory of the engine."""

    # -- methods that lm-eval calls ----------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answers to lm-eval's requests, in order. A task with `repeats` has several requests per question.

        Batches do not depend on the log: if one answer of a batch is missing, the whole batch runs. A resumed run
        therefore has the rounding of an uninterrupted one. Several processes share these same batches.

        Raises:
            ValueError: A prompt leaves too few positions of the model for the answer.
            ShareDone: This process has answered its share, and another one joins and grades the answers.
        """
        seen: Counter[tuple[str, int]] = Counter()
        wanted = []
        for request in requests:
            prompt, options = request.args[:2]
            key = (request.task_name, request.doc_id)
            wanted.append(Asked(*key, seen[key], prompt, options))
            seen[key] += 1
        self._check_lengths(wanted)
        groups = itertools.groupby(wanted, key=lambda asked: asked.options)
        batches = [batch for _, group in groups for batch in self._batches(list(group))]
        mine = {at: self.answer_batch(batch) for at, batch in enumerate(batches) if self.processes.owns(at)}
        if self.processes.world > 1:
            assert self.log is not None
            self.log.join()
            if not self.processes.lead:
                raise ShareDone
        found: list[str] = []
        for at, batch in enumerate(batches):
            found += map(self.cut_text, batch, mine[at] if at in mine else self.answer_batch(batch))
        return found

    def _batches(self, asked: list[Asked]) -> Iterator[list[Asked]]:
        """Yield batches of answers that have the same options."""
        for start in range(0, len(asked), self.batch_size):
            yield asked[start : start + self.batch_size]

    def answer_batch(self, batch: Sequence[Asked]) -> list[Generated]:
        """Return the answers of a batch. They are read from the log, or generated and added to it."""
        logged = [self.log.find(asked) if self.log else None for asked in batch]
        if all(logged):
            return [answer for answer in logged if answer]
        answers = self.generate_batch(batch)
        if self.log:
            self.log.add([(batch[at], answers[at]) for at, old in enumerate(logged) if old is None])
        return [old or new for old, new in zip(logged, answers, strict=True)]

    def cut_text(self, asked: Asked, answer: Generated) -> str:
        """Return the text for lm-eval's filters, up to the first stop string.

        If there is a `think_end_token`, the text has no thoughts.
        """
        think = self.think_end_token if isinstance(self.think_end_token, str) else None
        stop = normalize_gen_kwargs(asked.options, self.max_gen_toks)["until"]
        return postprocess_generated_text(answer.text, stop, think)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a question formatted by the model's chat template.

        Raises:
            ValueError: The template raises an error.
        """
        try:
            return str(super().apply_chat_template(chat_history, add_generation_prompt))
        except Exception as error:  # a template is code of others and can raise anything
            raise ValueError(
                f"the chat template of {self.session.source} cannot format a question ({first_line(error)[:200]}); "
                "give --raw to evaluate without a template"
            ) from error

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return the logits `[B, T, V]`, for tasks of lm-eval that compare likelihoods."""
        self._checked(inps)
        self._begin(torch.ones_like(inps) if attn_mask is None else attn_mask)
        with torch.no_grad():
            return self.model(inps, attention_mask=attn_mask, use_cache=False, **self.rule.arguments()).logits

    # -- a batch -----------------------------------------------------------------------------------------------------

    def generate_batch(self, batch: Sequence[Asked]) -> list[Generated]:
        stop, limit, warping = self._wishes(batch[0].options)
        prompt, mask = self.tok_batch_encode([asked.prompt for asked in batch])
        prompt, mask, pad = prompt.to(self.device), mask.to(self.device), self._pad()
        prompt = self._checked(torch.where(mask.bool(), prompt, pad))
        B, P = prompt.shape
        processors: list[LogitsProcessor] = [RefuseNaN()]
        if warping is not None:
            processors.append(SampleByRow([self._seed(asked) for asked in batch], P, limit, **warping))
        ends = RowEnds(B, P, self._end_tokens(), StopStringCriteria(self.tokenizer, stop) if stop else None)
        self._begin(mask)
        start = time.perf_counter()
        out = self.model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=limit,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([ends]),
            pad_token_id=pad,
            return_dict_in_generate=True,
            **{"do_sample": False, "temperature": None, "top_p": None, "top_k": None} | self.rule.arguments(),
        )
        seconds = (time.perf_counter() - start) / B
        counts, lengths = out.depth_count.cpu(), ends.lengths.tolist()
        rows = zip(batch, out.sequences[:, P:].tolist(), counts, mask.bool().cpu(), lengths, strict=True)
        return [self._generated(*row, limit, seconds) for row in rows]

    def _wishes(self, asked: Mapping[str, Any]) -> tuple[list[str], int, dict[str, Any] | None]:
        """Return the stop strings, the maximum number of tokens, and the sampling options of a request.

        The sampling options are temperature, top_p and top_k, or None for greedy decoding.

        Raises:
            ValueError: An option of lm-eval is not supported.
        """
        options = normalize_gen_kwargs(dict(asked), self.max_gen_toks)  # drops `use_cache` and similar options
        stop, limit = [text for text in options.pop("until") if text], options.pop("max_gen_toks")
        sampled = options.pop("do_sample")
        warping = {"temperature": options.pop("temperature", 1.0), "top_p": options.pop("top_p", 1.0)}
        warping["top_k"] = options.pop("top_k", 0)
        if options:
            raise ValueError(f"generation option {', '.join(options)}: only temperature, top_p and top_k are supported")
        return stop, limit, warping if sampled else None

    def _generated(
        self, asked: Asked, ids: list[int], depth_count: Tensor, mask: Tensor, length: int, limit: int, seconds: float
    ) -> Generated:
        """Return the answer of one row of a batch.

        Args:
            asked: Request of the answer.
            ids: Generated tokens, `[S - P]`.
            depth_count: Passes of each input token, `[S]`.
            mask: Mask of the prompt, `[P]`.
            length: Number of generated tokens, or 0 if the answer reached the limit.
            limit: Maximum number of tokens.
            seconds: Share of the time of the batch.
        """
        P, tokens = len(mask), length or limit
        depths = depth_count[P - 1 : P - 1 + tokens]  # a token is predicted by the passes of the token before it
        prompt = asked.prompt.rstrip()
        opened = next((words for words in OPENINGS if prompt.endswith(words.rstrip())), "")
        return Generated(
            text=opened + self.tokenizer.decode(ids[:tokens], skip_special_tokens=True),
            prompt_tokens=int(mask.sum()),
            tokens=tokens,
            finished=length > 0,
            depths=int(depths.sum()),
            iterated=int((depths > 1).sum()),
            passes=int(depth_count[:P][mask].sum() + depth_count[P : P + tokens - 1].sum()),
            seconds=seconds,
        )

    def _begin(self, mask: Tensor) -> None:
        """Begin a batch with prompts where `mask` [B, P] is set."""
        if self.oracle is not None:
            self.oracle.begin(mask)

    def _checked(self, ids: Tensor) -> Tensor:
        """Return `ids`, after a check that the model has an embedding for every token."""
        why = f"the tokenizer of {self.session.source} belongs to another model"
        check_ids([int(ids.max())], self.model, "a question", why)
        return ids

    def _pad(self) -> int:
        """Return the padding token: the tokenizer's, or 0 if the model has no embedding for it."""
        size = self.model.get_input_embeddings().weight.shape[0]
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None and pad < size else 0

    def _seed(self, asked: Asked) -> int:
        text = f"{self.seed} {asked.task} {asked.sample} {asked.prompt}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1  # a seed of torch has 63 bits

    def _end_tokens(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        return sorted({*ends, self.eot_token_id})

    def _check_lengths(self, wanted: Sequence[Asked]) -> None:
        models = [self.model, *([self.oracle.reference] if self.oracle else [])]
        limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
        positions = min((limit for limit in limits if limit is not None), default=None)
        for asked in wanted if positions is not None else ():
            limit = normalize_gen_kwargs(asked.options, self.max_gen_toks)["max_gen_toks"]
            length = self.tok_batch_encode([asked.prompt])[0].shape[1]
            if length >= positions:
                raise ValueError(
                    f"question {asked.number} of {asked.task} has {length} tokens, but the model has only {positions} "
                    "positions; leave the question out of the data"
                )
            if length + limit > positions:
                raise ValueError(
                    f"question {asked.number} of {asked.task} has {length} tokens and its answer may have {limit}, but "
                    f"the model has only {positions} positions; lower --max-new-tokens"
                )


class ReferenceOracle(Policy):
    """Iterates on hard tokens: those where the model's first choice after depth 1 differs from the reference model's.

    Hard tokens take all passes. The reference model reads the same text with its own cache, so call `begin` before each
    batch.
    """

    def __init__(self, reference: Session) -> None:
        self.reference = reference.model
        self.rule = Rule("never" if reference.wrapped else None)  # a wrapped base runs as the base model

    def begin(self, mask: Tensor) -> None:
        """Begin a batch with prompts where `mask` [B, P] is set."""
        self.cache, self.mask, self.fresh = DuoCache(), mask.bool(), True

    def __call__(self, state: DepthState) -> Tensor:
        if state.depth > 1:
            return torch.ones_like(state.positions, dtype=torch.bool)
        ours = state.map_logits(lambda logits: logits.argmax(-1))
        return ours != self._choices(state).to(ours.device)

    @torch.no_grad()
    def _choices(self, state: DepthState) -> Tensor:
        """Return the reference's most probable next token for each token of this forward, `[N]`."""
        assert state.input_ids is not None
        new = self.mask if self.fresh else self.mask.new_ones(len(self.mask), 1)  # [B, T]
        if not self.fresh:
            self.mask = torch.cat([self.mask, new], dim=1)
        self.fresh = False
        ids = torch.zeros(new.shape, dtype=torch.long, device=new.device).masked_scatter(new, state.input_ids)
        ids, start, found = ids.to(self.reference.device), self.mask.shape[1] - new.shape[1], []
        for part in ids.split(CHUNK, dim=1):  # a long prompt in chunks, so that logits [B, P, V] never exist
            start += part.shape[1]
            given = {"attention_mask": self.mask[:, :start].long(), CACHE: self.cache, "use_cache": True}
            found.append(self.reference(part, **given, **self.rule.arguments()).logits.argmax(-1))
        return torch.cat(found, dim=1)[new]


# -- each row of a batch has its own random numbers and its own end ---------------------------------------------------


class SampleByRow(LogitsProcessor):
    """Samples the next token of each row with random numbers of that row, so other rows have no influence.

    All tokens but the sampled one get the score -inf, so `generate` takes that token.

    Args:
        seeds: Random seed of each row, `[B]`.
        prompt: Number of tokens of the padded prompts.
        steps: Maximum number of tokens to sample.
        temperature: Temperature.
        top_p: Cumulative probability of the candidates; 1 keeps all.
        top_k: Number of candidates; 0 keeps all.
    """

    def __init__(
        self, seeds: Sequence[int], prompt: int, steps: int, *, temperature: float, top_p: float, top_k: int
    ) -> None:
        self.prompt = prompt
        rows = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.draws = torch.stack([torch.rand(steps, generator=row) for row in rows])  # [B, steps]
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mass = self.warpers(input_ids, scores).float().softmax(-1).cumsum(-1)  # [B, V]
        whole = mass[:, -1:].clone()
        draw = self.draws[:, input_ids.shape[1] - self.prompt, None].to(mass.device) * whole
        last = (mass < whole).sum(
            1, keepdim=True
        )  # last token with a probability > 0: rounding must not select a later one
        chosen = torch.searchsorted(mass, draw, right=True).minimum(last)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


class RowEnds(StoppingCriteria):
    """Ends each row at an end token or a stop string, and records its length.

    Attributes:
        lengths: Number of generated tokens of each row with its end token, `[B]`; 0 while the row is unfinished.
    """

    def __init__(self, rows: int, prompt: int, ends: Sequence[int], stop: StopStringCriteria | None) -> None:
        self.prompt, self.ends, self.stop = prompt, torch.tensor(ends), stop
        self.lengths = torch.zeros(rows, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        produced = input_ids[:, self.prompt :]
        over = torch.isin(produced[:, -1], self.ends.to(produced.device))
        if self.stop is not None:
            over |= self.stop(produced, scores)
        self.lengths[(over.cpu()) & (self.lengths == 0)] = produced.shape[1]
        return (self.lengths > 0).to(produced.device)
