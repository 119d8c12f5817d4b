# ruff: noqa: E402  # vLLM reads the environment when it is imported
"""Random requests to random engines, against `generate`: `python tests/serve/fuzz.py 0 1 2` (seeds).

A round is one engine with settings of its seed: how both depths share steps, few or many blocks, little or much room
for depth 2, tokens per step, requests per step, priorities. Its requests begin and are aborted between steps, and the
cache is reset while others run. Each has its own rule, length, stop tokens, number of answers and log-probabilities.
Many begin with the same tokens, up to the end of a block, whose last token iterates. Tokens and depths have to be
those of `generate`, and log-probabilities those of the model. With `--runner V2`, vLLM's other model runner runs in
Triton's interpreter.

It prints a line per round. A difference is printed with what reproduces it, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
V2 = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
ANSWERS = 50  # per round
NEW = 24  # most tokens of an answer
BLOCK = 32
RULES: list[dict[str, Any]] = [
    {},
    {},
    {"threshold": 0.5},
    {"policy": "confidence", "threshold": 0.4},
    {"max_depth": 1},
    {"policy": "always"},
    {"policy": "random"},
    {"policy": "never"},
]

if __name__ == "__main__":  # before anything imports vLLM
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="+", type=int, help="one round each")
    parser.add_argument("--answers", type=int, default=ANSWERS, help="answers of a round (default: %(default)s)")
    parser.add_argument("--runner", choices=("V1", "V2"), default="V1", help="vLLM's model runner")
    arguments = parser.parse_args()
    if arguments.runner == "V2" and any(os.environ.get(name) != value for name, value in V2.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | V2)
    sys.path.append(str(TESTS))
    import conftest  # noqa: F401  # tests/serve/conftest.py: settings of vLLM

import torch
from vllm.sampling_params import RequestOutputKind

from helpers.checkpoints import VOCAB, tiny
from helpers.interpreter import IS_V2
from helpers.serving import Answer, Served, agree, reference, serve
from tah import TaHForCausalLM

CHECKPOINTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention": "own"}),
    ("qwen3", {"decider": {"kind": "mlp", "layers": [0, 2, 3], "hidden_dims": [32, 16], "topk": 20}}),
    ("qwen2", {"next_input": "hidden"}),
]


@dataclass
class Asked:
    """A request."""

    prompt: list[int]
    rule: dict[str, Any]
    options: dict[str, Any]  # of vLLM's sampling
    want: Answer
    priority: int = 0
    got: list[Answer] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)

    @property
    def answers(self) -> int:
        return self.options.get("n", 1)


@dataclass
class Result:
    """What a round saw."""

    line: str
    answers: int
    differences: list[str]


@cache
def checkpoint(number: int) -> tuple[Path, TaHForCausalLM]:
    family, config = CHECKPOINTS[number]
    directory = tiny(Path(tempfile.mkdtemp(prefix="tah-fuzz-")) / family, family, **config)
    return directory, TaHForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def settings(draw: random.Random) -> dict[str, Any]:
    """Options of an engine."""
    additional = {"batching": draw.choice(["two_pass", "mixed"])}
    options: dict[str, Any] = {
        "additional_config": additional,
        "max_model_len": 192,
        "block_size": BLOCK,
        "max_num_seqs": draw.choice([1, 2, 4, 8, 12]),
        "max_num_batched_tokens": draw.choice([16, 24, 48, 100, 256]),
        "enable_prefix_caching": draw.random() < 0.9,
        "scheduling_policy": draw.choice(["fcfs", "priority"]),
    }
    match draw.choice(["few blocks", "few entries", "room"]):
        case "few blocks":
            options["num_gpu_blocks_override"] = draw.choice([8, 10, 14])
        case "few entries":
            options["num_gpu_blocks_override"] = 100
            additional["deep_kv_share"] = 0.01  # the longest request alone
    return options


@torch.no_grad()
def prefixes(draw: random.Random, model: TaHForCausalLM) -> list[list[int]]:
    """Beginnings of one or two whole blocks, whose last token iterates by the rule of the checkpoint."""
    found: list[list[int]] = []
    while len(found) < 3:
        ids = [draw.randrange(3, VOCAB) for _ in range(BLOCK * draw.choice([1, 2]) - 1)]
        last = draw.sample(range(3, VOCAB), 40)
        depth = model(torch.tensor([[*ids, token] for token in last])).depth_count[:, -1].tolist()
        found += [[*ids, token] for token, passes in zip(last, depth, strict=True) if passes > 1][:1]
    return found


def requests(draw: random.Random, number: int, answers: int) -> list[Asked]:
    """Requests for `answers` answers, with what `generate` answers."""
    directory, model = checkpoint(number)
    begin, asked = prefixes(draw, model), []
    while sum(one.answers for one in asked) < answers:
        start = draw.choice(begin) if draw.random() < 0.6 else []
        more = draw.choice([0, 1, draw.randrange(2, 60)]) if start else draw.randrange(1, 80)
        prompt = start + [draw.randrange(3, VOCAB) for _ in range(more)]
        options: dict[str, Any] = {"max_tokens": draw.choice([1, 2, draw.randrange(3, NEW + 1)])}
        if draw.random() < 0.2 and not IS_V2:  # top-k does not run in Triton's interpreter
            seed = {"seed": draw.randrange(1000)} if draw.random() < 0.5 else {}
            options |= {"n": min(draw.choice([1, 2, 3]), answers), "temperature": 1.0, "top_k": 1, **seed}
        if draw.random() < 0.3:
            options["logprobs"] = draw.choice([0, 1, 3])
        if draw.random() < 0.15:
            options["prompt_logprobs"] = draw.choice([0, 2])
        asked.append(Asked(prompt, draw.choice(RULES), options, Answer([], []), draw.randrange(3)))
    for rule in {json.dumps(one.rule) for one in asked}:
        same = [one for one in asked if json.dumps(one.rule) == rule]
        for one, want in zip(
            same, reference(directory, [one.prompt for one in same], NEW, **json.loads(rule)), strict=True
        ):
            stop = draw.randrange(one.options["max_tokens"]) if draw.random() < 0.3 else None
            if stop is not None:  # a token of the answer, which may come before
                one.options["stop_token_ids"] = [want.tokens[stop]]
                stop = want.tokens.index(want.tokens[stop])
            length = min(one.options["max_tokens"], NEW if stop is None else stop + 1)
            one.want = Answer(want.tokens[:length], want.depths[: len(one.prompt) + length - 1])
    return asked


def run(served: Served, draw: random.Random, asked: list[Asked]) -> dict[str, int]:
    """Ask everything, with requests that come and go; return how often what happened."""
    waiting, running, number = list(range(len(asked))), {}, 0
    counts = {"aborted": 0, "reset": 0}
    while waiting or running:
        while waiting and draw.random() < 0.6:
            at = waiting.pop(0)
            name, number = f"{at}-{number}", number + 1
            params = served.params(1, asked[at].rule, output_kind=RequestOutputKind.FINAL_ONLY, **asked[at].options)
            prompt = {"prompt_token_ids": asked[at].prompt}
            served.engine.add_request(name, prompt, params, priority=asked[at].priority)
            running[name] = at
        if running and counts["aborted"] < len(asked) // 2 and draw.random() < 0.08:
            name = draw.choice(sorted(running))
            served.engine.abort_request([name])
            waiting.append(running.pop(name))
            counts["aborted"] += 1
        if draw.random() < 0.03:
            counts["reset"] += bool(served.engine.reset_prefix_cache(reset_running_requests=True))
        for out in served.engine.step():
            if out.finished and out.request_id in running:
                one = asked[running.pop(out.request_id)]
                for part in out.outputs:
                    one.got.append(Answer(list(part.token_ids), part.routed_experts.tolist()))
                    one.logprobs.append(part.logprobs)
    served.check_pool()
    assert not served.scheduler.logs and not served.model.waiting.by_request
    return counts | {"preempted": served.preempted}


def differs(directory: Path, one: Asked, got: Answer) -> bool:
    """Whether an answer is not that of `generate`, and float64 knows better than either."""
    if got == one.want:
        return False
    length = min(len(got.tokens), len(one.want.tokens))
    pair = [Answer(x.tokens[:length], x.depths[: len(one.prompt) + length - 1]) for x in (got, one.want)]
    return pair[0] == pair[1] or not agree(directory, [one.prompt], [pair[0]], [pair[1]], **one.rule)


@torch.no_grad()
def wrong_logprobs(model: TaHForCausalLM, one: Asked, found: Any) -> float:
    """Largest difference of the log-probabilities of an answer's tokens to those of the model."""
    ids = torch.tensor([one.prompt + one.want.tokens])
    logits = model(ids[:, :-1], **one.rule).logits[0, len(one.prompt) - 1 :]
    want = logits.log_softmax(-1).gather(1, ids[0, len(one.prompt) :, None])[:, 0].tolist()
    return max(abs(have[token].logprob - x) for have, token, x in zip(found, one.want.tokens, want, strict=True))


def play(seed: int, answers: int = ANSWERS) -> Result:
    """Run the round of a seed."""
    began, draw = time.monotonic(), random.Random(seed)
    number = seed % len(CHECKPOINTS)
    directory, model = checkpoint(number)
    options, asked = settings(draw), requests(draw, number, answers)
    with serve(directory, **options) as served:
        counts = run(served, draw, asked)
    differences, ties, iterated, total = [], 0, 0, 0
    for at, one in enumerate(asked):
        for got, found in zip(one.got, one.logprobs, strict=True):
            total, iterated = total + 1, iterated + (2 in got.depths)
            case = {"request": at, "prompt": one.prompt, "rule": one.rule, "sampling": one.options}
            if differs(directory, one, got):
                case |= {"tokens": got.tokens, "depths": got.depths, "want": vars(one.want)}
                differences.append(json.dumps(case))
            elif got != one.want:
                ties += 1
            elif found is not None and (off := wrong_logprobs(model, one, found)) > 2e-3:
                differences.append(json.dumps(case | {"log-probabilities off by": off}))
        if len(one.got) != one.answers:
            differences.append(json.dumps({"request": at, "answers": len(one.got), "want": one.answers}))
    happened = ", ".join(f"{count} {what}" for what, count in counts.items())
    engine = json.dumps({key: value for key, value in options.items() if key not in ("max_model_len", "block_size")})
    line = (
        f"seed {seed}: {CHECKPOINTS[number]} {engine}: {total} answers, {iterated} with depth 2, {happened}, "
        f"{ties} undecided in float64, {len(differences)} different, {time.monotonic() - began:.0f} s"
    )
    return Result(line, total, differences)


def main(seeds: list[int], answers: int, runner: str) -> int:
    total = 0
    for seed in seeds:
        result = play(seed, answers)
        total += result.answers
        print(result.line, flush=True)
        if result.differences:
            print("\n".join(result.differences))
            print(f"again: python tests/serve/fuzz.py {seed} --answers {answers} --runner {runner}")
            return 1
    print(f"{total} answers, 0 different")
    return 0


if __name__ == "__main__":
    sys.exit(main(arguments.seeds, arguments.answers, arguments.runner))
