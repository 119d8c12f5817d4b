"""`tah eval --backend vllm`: lm-eval's model with answers from vLLM and the plugin of this package (`tah/vllm`).

Prompts, stop strings, seeds, logs and counts are those of `TaHLM`; only the computation of an answer differs. The
engine gets all questions of a task at once and makes its own batches. Each answer is logged when it is finished.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError

from ..load import find
from ..policy import Rule
from ..session import Session
from ..vllm.launch import IN_PROCESS
from .eval_files import Asked, Generated
from .harness import TaHLM

ROOMY = ("always", "random")  # policies whose depth-2 keys may need more memory than the plugin reserves by default
# Entries of generation_config.json that change the answers of greedy `generate` but are not passed to vLLM. With the
# value given here an entry has no effect.
NOT_HANDED_OVER: dict[str, Any] = {
    "bad_words_ids": None, "begin_suppress_tokens": None, "constraints": None, "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "exponential_decay_length_penalty": None,
    "force_words_ids": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "guidance_scale": 1.0,
    "max_time": None, "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "num_beams": 1,
    "penalty_alpha": 0.0, "sequence_bias": None, "stop_strings": None, "suppress_tokens": None, "token_healing": False,
    "watermarking_config": None,
}  # fmt: skip


class ServedLM(TaHLM):
    """A TaH checkpoint on vLLM, as lm-eval's model. The engine starts at the first answer that is not in the log.

    Args:
        session: Session of a checkpoint. Its weights are freed when the engine starts, because vLLM loads its own.
        rules: Rules of the evaluation. Their policies determine the memory for depth 2.
        batch_size: Maximum number of answers computed together; by default vLLM's choice.
        engine: More options of `vllm.LLM`.
        options: Options of `TaHLM`.

    Raises:
        ValueError: The session is of a base model, or `generation_config.json` has an entry that vLLM would not apply.
    """

    def __init__(
        self,
        session: Session,
        *,
        rules: Sequence[Rule] = (),
        batch_size: int | None = None,
        engine: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if session.wrapped:
            raise ValueError(f"{session.source} is a base model; --backend vllm needs a TaH checkpoint")
        for name, neutral in NOT_HANDED_OVER.items():
            value = getattr(session.model.generation_config, name, None)
            if value not in (None, neutral):
                raise ValueError(
                    f"generation_config.json of {session.source} has {name}={value!r}, which is not passed to vLLM; "
                    "remove the entry, or use --backend transformers"
                )
        super().__init__(session, batch_size=1, **options)
        self.engine_options: dict[str, Any] = {
            "model": find(session.source)[0],
            "dtype": str(session.model.dtype).removeprefix("torch."),
            "max_model_len": -1,  # the longest sequence that fits into the memory of the cache
            "disable_log_stats": True,
        }
        if batch_size is not None:
            self.engine_options["max_num_seqs"] = batch_size
        if any(rule.policy in ROOMY for rule in rules):
            self.engine_options["additional_config"] = {"deep_kv_share": 1.0}
        self.engine_options |= engine or {}

    @functools.cached_property
    def llm(self) -> Any:
        """The engine, a `vllm.LLM`.

        Raises:
            ValueError: The plugin does not support this checkpoint.
        """
        from ..vllm.requests import DEPTHS_SERVED

        depth = self.rule.max_depth
        assert isinstance(depth, int)
        if depth > DEPTHS_SERVED:
            raise ValueError(
                f"max_depth={depth}: vLLM serves at most {DEPTHS_SERVED}; give --max-depth {DEPTHS_SERVED}"
            )
        before = {name: os.environ.get(name) for name in IN_PROCESS}
        os.environ.update(IN_PROCESS)
        try:
            from vllm import LLM

            self.session.model.to("meta")
            return LLM(**self.engine_options, hf_overrides={"max_depth": depth})
        except ValidationError as error:  # pydantic wraps a ValueError of the plugin in a long text
            raise ValueError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value

    def close(self) -> None:
        """Free the memory of the engine."""
        if self.__dict__.pop("llm", None) is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()

    def _batches(self, asked: list[Asked]) -> Iterator[list[Asked]]:
        """Yield all requests as one batch: the engine makes its own batches."""
        yield asked

    def answer_batch(self, batch: Sequence[Asked]) -> list[Generated]:
        """Return the answers of a batch, from the log or from the engine. New answers are logged as they finish."""
        answers = [self.log.find(asked) if self.log else None for asked in batch]
        missing = [at for at, answer in enumerate(answers) if answer is None]
        for finished in self._finished([batch[at] for at in missing]) if missing else ():
            if self.log:
                self.log.add([(batch[missing[at]], answer) for at, answer in finished])
            for at, answer in finished:
                answers[missing[at]] = answer
        return [answer for answer in answers if answer]

    def _finished(self, batch: Sequence[Asked]) -> Iterator[list[tuple[int, Generated]]]:
        """Yield answers with their index as they finish. Answers that finish together share the time since the last."""
        stop, limit, warping = self._wishes(batch[0].options)
        prompts = [self.tok_batch_encode([asked.prompt])[0][0].tolist() for asked in batch]
        self._check_room(max(map(len, prompts)) + limit)
        engine = self.llm.llm_engine
        try:
            for at, asked in enumerate(batch):
                self._ask(at, prompts[at], max_tokens=limit, stop=stop, **self._drawing(asked, warping))
            start = time.perf_counter()
            while engine.has_unfinished_requests():
                done: list[tuple[int, Generated]] = []
                for out in engine.step():
                    at, answer = int(out.request_id), out.outputs[0]
                    ids, depths = (
                        list(answer.token_ids),
                        answer.routed_experts.tolist(),
                    )  # of prompt and answer together
                    if len(depths) != len(prompts[at]) + len(ids) - 1:
                        raise RuntimeError(f"vLLM gave {len(depths)} depths for {len(prompts[at])} + {len(ids)} tokens")
                    mask = torch.ones(len(prompts[at]), dtype=torch.bool)
                    length = len(ids) if answer.finish_reason == "stop" else 0
                    done.append((at, self._generated(batch[at], ids, torch.tensor(depths), mask, length, limit, 0.0)))
                if done:
                    now = time.perf_counter()
                    seconds, start = (now - start) / len(done), now
                    yield [(at, replace(answer, seconds=seconds)) for at, answer in done]
        finally:
            engine.abort_request([str(at) for at in range(len(batch))])

    def _ask(self, at: int, prompt: list[int], **options: Any) -> None:
        """Pass a request with the current rule to the engine. The output has `at` as its id."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # Special tokens are kept, because a stop string may be one. The text itself is not used.
        shown = {"output_kind": RequestOutputKind.FINAL_ONLY, "skip_special_tokens": False}
        options = {"temperature": 0.0, **shown, **options}
        params = SamplingParams(extra_args=self.rule.arguments(), **options)
        self.llm.llm_engine.add_request(str(at), {"prompt_token_ids": prompt}, params)

    def _drawing(self, asked: Asked, warping: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the sampling options and end tokens of an answer, as options of vLLM."""
        penalty = self.model.generation_config.repetition_penalty  # `generate` applies it too
        options = {"stop_token_ids": self._end_tokens(), "repetition_penalty": penalty or 1.0}
        return options if warping is None else options | {"seed": self._seed(asked)} | dict(warping)

    def _check_room(self, tokens: int) -> None:
        room = self.llm.llm_engine.model_config.max_model_len
        if tokens > room:
            raise ValueError(
                f"vLLM's cache has room for {room} tokens, but a question with its answer may have {tokens}: give it "
                "more memory (VLLM_CPU_KVCACHE_SPACE=8 for 8 GiB) or lower --max-new-tokens"
            )
