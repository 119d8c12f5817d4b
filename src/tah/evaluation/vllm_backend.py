"""`tah eval --backend vllm`: the harness's model with its answers from vLLM, through our plugin (`tah/vllm`).

Prompts, stop strings, seeds, logs and counts are those of [`TaHLM`]; only who computes an answer is another. All
questions of a task go to the engine at once, which batches them as it sees fit, and each answer is logged when it is
finished.
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

ROOMY = ("always", "random")  # policies whose depth-2 keys may need more room than the plugin plans for a decider's
# Entries of generation_config.json that change the answers of greedy `generate` and that vLLM does not get, unless they
# have these values, which change nothing.
NOT_HANDED_OVER: dict[str, Any] = {
    "bad_words_ids": None, "begin_suppress_tokens": None, "constraints": None, "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "exponential_decay_length_penalty": None,
    "force_words_ids": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "guidance_scale": 1.0,
    "max_time": None, "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "num_beams": 1,
    "penalty_alpha": 0.0, "sequence_bias": None, "stop_strings": None, "suppress_tokens": None, "token_healing": False,
    "watermarking_config": None,
}  # fmt: skip


class ServedLM(TaHLM):
    """A TaH checkpoint on vLLM, as lm-eval's model. The engine starts with the first answer that is not logged.

    Args:
        session: of a checkpoint. Its weights are dropped when the engine starts, which loads its own.
        rules: that will be asked for; their policies decide how much room depth 2 gets.
        batch_size: most answers at a time; vLLM's own choice by default.
        engine: more options of `vllm.LLM`.
        options: of `TaHLM`.

    Raises:
        ValueError: the session is of a plain base model, or of one whose generation_config.json vLLM would not follow.
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
            raise ValueError(f"{session.source} is a plain base model; --backend vllm needs a TaH checkpoint")
        for name, neutral in NOT_HANDED_OVER.items():
            value = getattr(session.model.generation_config, name, None)
            if value not in (None, neutral):
                raise ValueError(
                    f"generation_config.json of {session.source} has {name}={value!r}, which vLLM is not told; "
                    "leave it out, or use --backend transformers"
                )
        super().__init__(session, batch_size=1, **options)
        self.engine_options: dict[str, Any] = {
            "model": find(session.source)[0],
            "dtype": str(session.model.dtype).removeprefix("torch."),
            "max_model_len": -1,  # as many as the memory for the cache holds
            "disable_log_stats": True,
        }
        if batch_size is not None:
            self.engine_options["max_num_seqs"] = batch_size
        if any(rule.policy in ROOMY for rule in rules):
            self.engine_options["additional_config"] = {"deep_kv_share": 1.0}
        self.engine_options |= engine or {}

    @functools.cached_property
    def llm(self) -> Any:
        """The engine, `vllm.LLM`.

        Raises:
            ValueError: it does not take such a checkpoint.
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
        except ValidationError as error:  # a ValueError of the plugin's, in a page of pydantic's
            raise ValueError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value

    def close(self) -> None:
        """Give back the engine's memory."""
        if self.__dict__.pop("llm", None) is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()

    def _batches(self, asked: list[Asked]) -> Iterator[list[Asked]]:
        """All at once: the engine makes its own."""
        yield asked

    def answer_batch(self, batch: Sequence[Asked]) -> list[Generated]:
        """From the log, or from the engine and logged as they come."""
        answers = [self.log.find(asked) if self.log else None for asked in batch]
        missing = [at for at, answer in enumerate(answers) if answer is None]
        for finished in self._finished([batch[at] for at in missing]) if missing else ():
            if self.log:
                self.log.add([(batch[missing[at]], answer) for at, answer in finished])
            for at, answer in finished:
                answers[missing[at]] = answer
        return [answer for answer in answers if answer]

    def _finished(self, batch: Sequence[Asked]) -> Iterator[list[tuple[int, Generated]]]:
        """Answers by index, as they are finished; together they took the time that is shared out among them."""
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
                    ids, depths = list(answer.token_ids), answer.routed_experts.tolist()  # of prompt and answer
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
        """Hand the engine a request with the running policy; it comes back under the number `at`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # Stop strings may be special tokens; the text is not used.
        shown = {"output_kind": RequestOutputKind.FINAL_ONLY, "skip_special_tokens": False}
        options = {"temperature": 0.0, **shown, **options}
        params = SamplingParams(extra_args=self.rule.arguments(), **options)
        self.llm.llm_engine.add_request(str(at), {"prompt_token_ids": prompt}, params)

    def _drawing(self, asked: Asked, warping: Mapping[str, Any] | None) -> dict[str, Any]:
        """How a token is chosen, and where an answer ends, as options of vLLM."""
        penalty = self.model.generation_config.repetition_penalty  # which `generate` follows too
        options = {"stop_token_ids": self._end_tokens(), "repetition_penalty": penalty or 1.0}
        return options if warping is None else options | {"seed": self._seed(asked)} | dict(warping)

    def _check_room(self, tokens: int) -> None:
        room = self.llm.llm_engine.model_config.max_model_len
        if tokens > room:
            raise ValueError(
                f"vLLM's cache has room for {room} tokens, and a question with its answer may have {tokens}: give it "
                "more (VLLM_CPU_KVCACHE_SPACE=8 for 8 GiB) or lower --max-new-tokens"
            )
