"""TaH2 served as `TaHForCausalLM.generate` runs it: the network of the next input, the mixture, drawn decisions."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

import torch
from vllm.exceptions import VLLMValidationError

from helpers.checkpoints import TAH2, tiny
from helpers.interpreter import IS_V2
from helpers.serving import agree, answer, iterated, prompts, reference, serve
from helpers.waits import watch_steps
from tah import TaHForCausalLM

NEW = 12 if IS_V2 else 40
MIXED = prompts(6 if IS_V2 else 18, seed=1)
BATCHING = ["two_pass", "mixed"]
v1 = pytest.mark.skipif(IS_V2, reason="the same code with both model runners; the interpreter is slow")
ALL = {"threshold": 0.0}  # every token iterates, each with a weight of its own


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("serve") / "model", "llama", **TAH2)


@pytest.fixture(scope="module")
def plain(model):
    return TaHForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def expected(model):
    answers = reference(model, MIXED, NEW)
    assert 0.05 < iterated(answers) < 0.5 and len({tuple(one.tokens) for one in answers}) == len(answers)
    return answers


@pytest.fixture(params=BATCHING)
def batching(request):
    return {"batching": request.param}


LOADS = {
    "thirty-two": {"max_num_seqs": 32},
    "chunks of 16": {"max_num_batched_tokens": 16},
    "few blocks": {"num_gpu_blocks_override": 16, "max_num_batched_tokens": 48},
}


@pytest.mark.parametrize("name", ["few blocks"] if IS_V2 else LOADS)
def test_any_load(model, expected, name, batching):
    options = LOADS[name]
    with serve(model, additional_config=batching, **options) as served:
        for _ in range(2):  # the second time with whatever is cached by now
            assert agree(model, MIXED, served.ask(MIXED, NEW), expected)
        assert IS_V2 or (served.preempted > 0) == (name == "few blocks")


@v1
def test_few_deep_entries(model, batching):
    asked = MIXED[:8]
    want = reference(model, asked, NEW, **ALL)
    assert iterated(want) == 1
    options = {"max_model_len": 160, "num_gpu_blocks_override": 100}
    with serve(model, additional_config=batching | {"deep_kv_share": 0.01}, **options) as served:
        assert served.model.pool.capacity == 160
        assert agree(model, asked, served.ask(asked, NEW, [ALL] * len(asked)), want, **ALL)
        assert served.preempted > 0


RULES = [
    {},
    ALL,
    {"policy": "never"},
    {"threshold": 0.5},
    {"policy": "always"},
    {"policy": "confidence", "threshold": 0.4},
    {"max_depth": 1},
    {"policy": "random"},
]


def test_rules_side_by_side_share_a_prefix(model, batching):
    """Thresholds and policies per request; cached prefixes are shared among equals only."""
    asked = prompts(len(RULES) if IS_V2 else 2 * len(RULES), seed=3, longest=20, shared=70)
    rules = [RULES[at % len(RULES)] for at in range(len(asked))]
    want = [reference(model, [prompt], NEW, **rule)[0] for prompt, rule in zip(asked, rules, strict=True)]
    with serve(model, max_num_batched_tokens=64, additional_config=batching) as served:
        for _ in range(2):
            got = served.ask(asked, NEW, rules)
            for at, rule in enumerate(rules):
                assert agree(model, [asked[at]], [got[at]], [want[at]], **rule)


def test_a_cached_prefix_whose_last_token_is_hard(model, batching):
    """Its blocks are full. A longer prompt and the same one find them."""
    prompt = prompts(1, seed=5, longest=1, shared=95)[0]
    longer = prompt + prompts(1, seed=6, longest=1, shared=39)[0]
    want = {len(ids): reference(model, [ids], NEW, **ALL) for ids in (prompt, longer)}
    with serve(model, additional_config=batching, hf_overrides=ALL) as served:
        for ids, found in ((prompt, 0), (longer, 96), (prompt, 64)):
            out = served.llm.generate([{"prompt_token_ids": ids}], served.params(NEW), use_tqdm=False)[0]
            served.check_pool()
            assert agree(model, [ids], [answer(out)], want[len(ids)], **ALL)
            assert out.num_cached_tokens == found


@torch.no_grad()
def test_log_probabilities(model, plain, batching):
    """Of sampled tokens and of prompts in chunks, beside requests that read none; those of `never` are the base's."""
    prompt, rules = max(MIXED, key=len), [ALL, {}, {"policy": "never"}, {"policy": "always"}]
    given = {"prompt_logprob_token_ids": [[token] for token in prompt[1:]]}  # which runner V1 refuses
    with serve(model, max_num_batched_tokens=32, max_num_seqs=6, additional_config=batching) as served:
        options = {"temperature": 1.0, "seed": 5, "logprobs": 0}
        params = [served.params(NEW, rule, prompt_logprobs=0, **options) for rule in rules]
        params.append(served.params(NEW, {}, n=2, **options))
        params += [served.params(NEW, ALL, **options, **given)] * IS_V2
        outs = served.llm.generate([{"prompt_token_ids": prompt}] * len(params), params, use_tqdm=False)
        served.check_pool()
        hidden = torch.randn(300, 128)
        of_the_base = served.model.base.compute_logits(hidden)
        assert torch.allclose(served.model.compute_logits(hidden), of_the_base.log_softmax(-1), atol=1e-5)
    assert outs[4].outputs[0].token_ids != outs[4].outputs[1].token_ids
    for out, rule in zip(outs, [*rules, {}, ALL][: len(params)], strict=True):
        for one in out.outputs:
            text = torch.tensor([prompt + list(one.token_ids)])
            again = plain(text[:, :-1], **rule)
            logp = again.logits[0].gather(1, text[0, 1:, None]).squeeze(1)
            assert one.routed_experts.tolist() == again.depth_count[0].tolist()
            got = [entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs, strict=True)]
            assert torch.allclose(torch.tensor(got), logp[len(prompt) - 1 :], atol=1e-3)
        if out.prompt_logprobs is not None:
            got = [entry[token].logprob for token, entry in zip(prompt[1:], out.prompt_logprobs[1:], strict=True)]
            assert torch.allclose(torch.tensor(got), logp[: len(prompt) - 1], atol=1e-3)
            if rule == {"policy": "never"}:
                base = plain.base(text[:, :-1]).logits[0].log_softmax(-1).gather(1, text[0, 1:, None]).squeeze(1)
                assert torch.allclose(torch.tensor(got), base[: len(prompt) - 1], atol=1e-3)
        if out.prompt_token_id_logprobs is not None:
            got = torch.as_tensor(out.prompt_token_id_logprobs).squeeze(1)
            assert torch.allclose(got, logp[: len(prompt) - 1], atol=1e-3)
    assert (outs[-1].prompt_token_id_logprobs is not None) == IS_V2


def test_one_wait_per_step(model, batching, monkeypatch):
    """The mixture adds none, and none of its tensors lacks a device."""
    with serve(model, additional_config=batching, max_num_batched_tokens=64) as served:
        steps = watch_steps(monkeypatch, served.model)
        served.ask(MIXED[:4], 4, [{}, ALL, {"policy": "always"}, {"policy": "never"}])
    assert len(steps) > 4 and all(step.copies == step.iterates for step in steps)
    assert [step for step in steps if step.waits or step.bare] == []


SEAMS = {
    "even": {"output": "even"},
    "no norms": {"next_input_norms": [False, False], "next_input_width": 48},
    "LoRA beside it": {"lora_rank": 4, "attention": "own"},
    "a sum": {"output": "sum", "decider": {"kind": "tah2", "width": 64}},
    "the paper's next input": {"next_input": "topk"},
    "the authors' decider": {"decider": {"kind": "mlp", "layers": [0, 2, 3], "hidden_dims": [32, 16], "topk": 20}},
    "entropy": {"policy": "confidence", "confidence_measure": "entropy", "threshold": 0.9, "decider": None},
}


@v1
@pytest.mark.parametrize("name", SEAMS)
def test_what_a_checkpoint_may_be(tmp_path, name):
    """Heads of their own, and tied ones; both ways to batch, in turns."""
    turn = list(SEAMS).index(name)
    model = tiny(tmp_path / "model", ["qwen3", "llama"][turn % 2], **TAH2 | SEAMS[name])
    want = reference(model, MIXED, NEW)
    assert 0.05 < iterated(want) < 1
    batching = BATCHING[turn % 3 % len(BATCHING)]
    with serve(model, max_num_batched_tokens=64, additional_config={"batching": batching}) as served:
        assert agree(model, MIXED, served.ask(MIXED, NEW), want)


@pytest.mark.parametrize("seed", [5] if IS_V2 else [0, 5])
def test_drawn_decisions(tmp_path, seed):
    """By the hash of `generate`, whatever the batch; a threshold would have no effect, so it is refused."""
    model = tiny(tmp_path / "model", "llama", **TAH2, decision="sample", random_seed=seed)
    want = reference(model, MIXED, NEW)
    other = reference(model, MIXED, NEW, policy="always")
    assert 0.2 < iterated(want) < 0.8 and [one.tokens for one in want] != [one.tokens for one in other]
    with serve(model, max_num_batched_tokens=48, additional_config={"batching": BATCHING[-1]}) as served:
        assert agree(model, MIXED, served.ask(MIXED, NEW), want)
        rules = [{"policy": "always"}] * len(MIXED)
        assert agree(model, MIXED, served.ask(MIXED, NEW, rules), other, policy="always")
        with pytest.raises(VLLMValidationError, match="threshold=0.25 has no effect with decision='sample'"):
            served.ask(MIXED[:1], 1, [{"threshold": 0.25}])
    if seed:
        again = tiny(tmp_path / "other", "llama", **TAH2, decision="sample", random_seed=seed + 1)
        assert [one.depths for one in reference(again, MIXED, NEW)] != [one.depths for one in want]


@v1
@torch.no_grad()
def test_half_precision(model, plain):
    """On given text against float32: decisions flip near the threshold only, and until then probabilities differ as
    much as those of the base do."""
    rules, off, flips = [{"threshold": 0.5}, {"policy": "never"}], [[], []], 0
    with serve(model, dtype="bfloat16") as served:
        ask, params = (
            [{"prompt_token_ids": ids} for ids in MIXED],
            [served.params(1, r, prompt_logprobs=0) for r in rules],
        )
        outs = [served.llm.generate(ask, one, use_tqdm=False) for one in params]
    for at, ids in enumerate(MIXED):
        for number, rule in enumerate(rules):
            want, out, first = plain(torch.tensor([ids]), **rule), outs[number][at], len(ids) - 1
            flipped = torch.tensor(out.outputs[0].routed_experts) != want.depth_count[0]
            if flipped.any():
                assert (want.continue_prob[0, flipped, 0] - 0.5).abs().max() < 0.05
                first, flips = int(flipped.int().argmax()), flips + int(flipped.sum())
            logp = want.logits[0, :-1].float().log_softmax(-1).gather(1, torch.tensor(ids)[1:, None]).squeeze(1)
            got = [entry[token].logprob for token, entry in zip(ids[1:], out.prompt_logprobs[1:], strict=True)]
            off[number] += (torch.tensor(got) - logp)[:first].abs().tolist()
    mean, of_the_base = (sum(one) / len(one) for one in off)
    print(f"{flips} of {sum(map(len, MIXED))} decisions flipped; off by {mean:.4f}, with never {of_the_base:.4f}")
    assert flips < 0.05 * sum(map(len, MIXED)) and len(off[0]) > 100 and mean < 2 * of_the_base


@v1
def test_controls(model, expected):
    """What the comparisons would show with a sum instead of the mixture, or with equal weights."""
    for output in ("sum", "even"):
        with serve(model, hf_overrides={"output": output}) as served:
            got = served.ask(MIXED, NEW)
        assert sum(a.tokens != b.tokens for a, b in zip(got, expected, strict=True)) > len(MIXED) // 2
