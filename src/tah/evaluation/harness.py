"""A TaH model for lm-evaluation-harness: `--model tah`, and what `tah eval` hands to its evaluator.

Shapes: B rows of a batch, P tokens of the padded prompts, S = P + produced tokens, T tokens of a forward, V vocabulary.

lm-eval has no plug-ins, so from its own command line this module must be imported first:

    python -c "import tah.evaluation.harness, lm_eval.__main__ as m; m.cli_evaluate()" run --model tah \\
        --model_args pretrained=DIR,policy=decider --tasks hellaswag

Our tasks are found there with `--include_path` and the directory `tasks` beside this file, under names that begin with
`tah_`.
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
from ..session import Session
from .eval_files import Asked, Generated, Samples

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise ImportError("evaluation needs more packages: pip install 'tah[eval]'") from error


# What a prompt may end with that belongs to the answer: the thoughts that a chat template opens, the block of code that
# a protocol opens. Without it an answer could not be read.
OPENINGS = ("<think>", "```python\n")


@register_model("tah")
class TaHLM(HFLM):
    """A TaH checkpoint, or a base wrapped on the fly, as lm-eval's model.

    An answer depends on the question, the number of the sample and the seed, and not on the batch it was computed in or
    on what was asked before (to rounding: a batch of another size rounds otherwise).

    Args:
        pretrained: directory, hub id, `smollm2`, or an open session.
        policy: who iterates; the model's by default. `oracle` needs a reference.
        threshold: iterate above this probability; the model's by default.
        max_depth: most passes a token may take; the model's by default.
        seed: of the sampling.
        reference: for `oracle`: the model whose first choice counts as right.
        batch_size: questions at a time.
        log: keeps the answers; what it holds is not generated again.
        options: of lm-eval's `HFLM`.

    Raises:
        ValueError: the model cannot be loaded or does not fit its reference.
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
        **options: Any,
    ) -> None:
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size {batch_size!r} must be a positive integer")
        place: dict[str, Any] = {"dtype": dtype, "device": device or "auto"}
        session = Session.open(pretrained, **place) if isinstance(pretrained, str) else pretrained
        template = session.tokenizer.chat_template
        thinking = {"enable_thinking": True} if "enable_thinking" in str(template or "") else {}
        positions = getattr(session.model.config.get_text_config(), "max_position_embeddings", None)
        # lm-eval looks for it at the top of the config only, and otherwise takes 2048
        options.setdefault("max_length", positions)
        super().__init__(
            pretrained=session.model,
            tokenizer=session.tokenizer,
            backend="causal",
            batch_size=int(batch_size),
            chat_template_args=thinking | (options.pop("chat_template_args", None) or {}),
            **options,
        )
        self.session, self.seed, self.log = session, int(seed), log
        self.reference = Session.open(reference, **place) if isinstance(reference, str) else reference
        self.use(Rule(policy, threshold, max_depth))

    def use(self, rule: Rule) -> None:
        """Answer with this rule from now on.

        Raises:
            ValueError: more passes than the checkpoint has; `oracle` without a reference, or one with another
                tokenizer; `decider` without a trained one.
        """
        session, self.oracle = self.session, None
        rule, most = session.rule(rule), session.model.config.max_depth
        if int(rule.max_depth or most) > most and not session.wrapped:
            raise ValueError(f"max_depth={rule.max_depth} must be at most {most}, the max_depth of {session.source}")
        if rule.policy == "oracle":
            if self.reference is None:
                raise ValueError("policy oracle needs a model that knows better: give --reference MODEL")
            check_reference(self.reference.model, session.tokenizer, self.reference.tokenizer, 1)
            self.oracle = ReferenceOracle(self.reference)
        self.rule = replace(rule, policy=self.oracle or rule.policy)
        if rule.policy == "decider" and (session.wrapped or session.model.decider is None):
            raise ValueError(f"{session.source} has no trained decider; give another policy, such as confidence")

    def close(self) -> None:
        """Give back what was taken for answering: nothing here, an engine's memory in `vllm_backend.py`."""

    # -- what lm-eval asks for ---------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to lm-eval's requests, in their order; a request with `repeats` comes that many times.

        Batches are the same whatever the log holds: a batch of which some answers are missing runs whole, so that a
        resumed run rounds as an uninterrupted one.

        Raises:
            ValueError: a prompt leaves too few of the model's positions for the answer.
        """
        seen: Counter[tuple[str, int]] = Counter()
        wanted = []
        for request in requests:
            prompt, options = request.args[:2]
            key = (request.task_name, request.doc_id)
            wanted.append(Asked(*key, seen[key], prompt, options))
            seen[key] += 1
        self._check_lengths(wanted)
        found: list[str] = []
        for _, group in itertools.groupby(wanted, key=lambda asked: asked.options):
            for batch in self._batches(list(group)):
                found += map(self.cut_text, batch, self.answer_batch(batch))
        return found

    def _batches(self, asked: list[Asked]) -> Iterator[list[Asked]]:
        """Answers that are wanted in the same way, some at a time."""
        for start in range(0, len(asked), self.batch_size):
            yield asked[start : start + self.batch_size]

    def answer_batch(self, batch: Sequence[Asked]) -> list[Generated]:
        """From the log, or generated and logged."""
        logged = [self.log.find(asked) if self.log else None for asked in batch]
        if all(logged):
            return [answer for answer in logged if answer]
        answers = self.generate_batch(batch)
        if self.log:
            self.log.add([(batch[at], answers[at]) for at, old in enumerate(logged) if old is None])
        return [old or new for old, new in zip(logged, answers, strict=True)]

    def cut_text(self, asked: Asked, answer: Generated) -> str:
        """What lm-eval's filters get: up to the first stop string, without thoughts if there is a `think_end_token`."""
        think = self.think_end_token if isinstance(self.think_end_token, str) else None
        stop = normalize_gen_kwargs(asked.options, self.max_gen_toks)["until"]
        return postprocess_generated_text(answer.text, stop, think)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A question as the model's chat template writes it.

        Raises:
            ValueError: it cannot.
        """
        try:
            return str(super().apply_chat_template(chat_history, add_generation_prompt))
        except Exception as error:  # whatever a template of others runs into
            raise ValueError(
                f"the chat template of {self.session.source} cannot write a question ({first_line(error)[:200]}); "
                "--raw asks without one"
            ) from error

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, T, V], for lm-eval's tasks that compare likelihoods."""
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
        """Stop strings, most tokens, and how to sample: temperature, top_p and top_k, or None for the most probable.

        Raises:
            ValueError: an option of lm-eval's that is not supported.
        """
        options = normalize_gen_kwargs(dict(asked), self.max_gen_toks)  # leaves out `use_cache` and the like
        stop, limit = [text for text in options.pop("until") if text], options.pop("max_gen_toks")
        sampled = options.pop("do_sample")
        warping = {"temperature": options.pop("temperature", 1.0), "top_p": options.pop("top_p", 1.0)}
        warping["top_k"] = options.pop("top_k", 0)
        if options:
            raise ValueError(f"generation option {', '.join(options)}: only temperature, top_p and top_k are known")
        return stop, limit, warping if sampled else None

    def _generated(
        self, asked: Asked, ids: list[int], depth_count: Tensor, mask: Tensor, length: int, limit: int, seconds: float
    ) -> Generated:
        """One row: produced tokens [S - P], passes [S] by input token, mask of the prompt [P]."""
        P, tokens = len(mask), length or limit
        depths = depth_count[P - 1 : P - 1 + tokens]  # passes of the token before are what predicting one took
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
        """A new batch, with prompts where `mask` [B, P] is set."""
        if self.oracle is not None:
            self.oracle.begin(mask)

    def _checked(self, ids: Tensor) -> Tensor:
        """The same, where the model has an embedding for every token."""
        why = f"{self.session.source} comes with another model's tokenizer"
        check_ids([int(ids.max())], self.model, "a question", why)
        return ids

    def _pad(self) -> int:
        """A token to fill rows with: the tokenizer's, or any other where that was added without an embedding."""
        size = self.model.get_input_embeddings().weight.shape[0]
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None and pad < size else 0

    def _seed(self, asked: Asked) -> int:
        text = f"{self.seed} {asked.task} {asked.sample} {asked.prompt}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1  # torch takes 63 bits

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
                    f"question {asked.number} of {asked.task} has {length} tokens, the model only {positions} "
                    "positions; leave it out of the data"
                )
            if length + limit > positions:
                raise ValueError(
                    f"question {asked.number} of {asked.task} has {length} tokens, and its answer may have {limit}: "
                    f"more than the model's {positions} positions; lower --max-new-tokens"
                )


class ReferenceOracle(Policy):
    """Iterates on the hard tokens: those where the model's first choice is not the reference's on the same text.

    Hard tokens take all passes. The reference reads along with its own cache, so `begin` is called before each batch.
    """

    def __init__(self, reference: Session) -> None:
        self.reference = reference.model
        self.rule = Rule("never" if reference.wrapped else None)  # a wrapped base is itself

    def begin(self, mask: Tensor) -> None:
        """A new batch whose prompts are where `mask` [B, P] is set."""
        self.cache, self.mask, self.fresh = DuoCache(), mask.bool(), True

    def __call__(self, state: DepthState) -> Tensor:
        if state.depth > 1:
            return torch.ones_like(state.positions, dtype=torch.bool)
        ours = state.map_logits(lambda logits: logits.argmax(-1))
        return ours != self._choices(state).to(ours.device)

    @torch.no_grad()
    def _choices(self, state: DepthState) -> Tensor:
        """[N] the reference's most probable next tokens, for the tokens of this forward."""
        assert state.input_ids is not None
        new = self.mask if self.fresh else self.mask.new_ones(len(self.mask), 1)  # [B, T]
        if not self.fresh:
            self.mask = torch.cat([self.mask, new], dim=1)
        self.fresh = False
        ids = torch.zeros(new.shape, dtype=torch.long, device=new.device).masked_scatter(new, state.input_ids)
        ids, start, found = ids.to(self.reference.device), self.mask.shape[1] - new.shape[1], []
        for part in ids.split(CHUNK, dim=1):  # of a long prompt, so that no [B, P, V] exists
            start += part.shape[1]
            given = {"attention_mask": self.mask[:, :start].long(), CACHE: self.cache, "use_cache": True}
            found.append(self.reference(part, **given, **self.rule.arguments()).logits.argmax(-1))
        return torch.cat(found, dim=1)[new]


# -- the rows of a batch do not disturb each other: own random numbers, own ends ------------------------------------


class SampleByRow(LogitsProcessor):
    """Draws the next token of each row with that row's own random numbers: its neighbours do not matter.

    It leaves a single token possible, and `generate` takes that.

    Args:
        seeds: [B].
        prompt: tokens of the padded prompts.
        steps: most tokens to draw.
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
        last = (mass < whole).sum(1, keepdim=True)  # the last token with any probability: rounding leads no further
        chosen = torch.searchsorted(mass, draw, right=True).minimum(last)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


class RowEnds(StoppingCriteria):
    """Ends each row at an end token or a stop string, and remembers how long it was.

    Attributes:
        lengths: [B] tokens produced, the end included; 0 while a row goes on.
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
