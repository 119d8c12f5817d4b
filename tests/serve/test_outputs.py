"""What answers bring besides tokens: log-probabilities, depths of each, however many there are and however they end."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

import torch
from vllm.sampling_params import StructuredOutputsParams

from helpers.checkpoints import tiny
from helpers.serving import prompts, serve
from tah import TaHForCausalLM

CHUNK = 32  # tokens per step; prompts are longer, which with a seed ends vLLM's own CPU engine
PROMPT = max(prompts(22, seed=1), key=len)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("serve") / "llama", "llama")


@pytest.fixture(scope="module")
def model(llama):
    return TaHForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["two_pass", "mixed"])
def served(request, llama):
    with serve(llama, max_num_batched_tokens=CHUNK, additional_config={"batching": request.param}) as served:
        yield served


def ask(served, prompt, new_tokens, rule=None, **options):
    params = served.params(new_tokens, rule, **options)
    return served.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]


@torch.no_grad()
def test_several_answers(served, model):
    """Depths and log-probabilities of sampled answers are the model's, for each of them."""
    out = ask(served, PROMPT, 40, temperature=1.0, n=4, seed=5, logprobs=0)
    assert len({tuple(one.token_ids) for one in out.outputs}) == 4
    assert len({tuple(one.routed_experts) for one in out.outputs}) > 1
    for one in out.outputs:
        said = torch.tensor(one.token_ids)
        again = model(torch.tensor([PROMPT + said.tolist()[:-1]]))
        want = again.logits[0, len(PROMPT) - 1 :].log_softmax(-1).gather(1, said[:, None]).squeeze(1)
        got = torch.tensor([entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs, strict=True)])
        assert (got - want).abs().max() < 1e-3
        assert one.routed_experts.tolist() == again.depth_count[0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, CHUNK + 1, len(PROMPT)])
def test_probabilities_of_the_prompt(served, model, length):
    """Also where the prompt's last token is alone in its step, and hard."""
    prompt, rule = PROMPT[:length], {"policy": "always"}
    out = ask(served, prompt, 3, rule, prompt_logprobs=0)
    want = model(torch.tensor([prompt]), policy="always").logits[0, :-1].log_softmax(-1)
    got = [entry[token].logprob for token, entry in zip(prompt[1:], out.prompt_logprobs[1:], strict=True)]
    assert torch.allclose(torch.tensor(got), want.gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1), atol=1e-3)
    assert out.outputs[0].routed_experts.tolist() == [2] * (length + 2)


@pytest.mark.parametrize("rule", [{}, {"policy": "always"}], ids=["decider", "always"])
def test_an_answer_of_one_token(served, model, rule):
    out = ask(served, PROMPT, 1, rule).outputs[0]
    again = model(torch.tensor([PROMPT]), **rule)
    assert list(out.token_ids) == [int(again.logits[0, -1].argmax())]
    assert out.routed_experts.tolist() == again.depth_count[0].tolist()


def test_a_stop_string(served):
    """It is found outside of the engine, which is then told to stop."""
    whole = ask(served, PROMPT, 40).outputs[0]
    at = next(at for at in range(8, 40) if whole.text[at] not in whole.text[:at])
    out = ask(served, PROMPT, 40, stop=[whole.text[at]]).outputs[0]
    assert out.finish_reason == "stop" and out.text == whole.text[:at] and len(out.token_ids) < 40
    assert out.routed_experts.tolist() == whole.routed_experts.tolist()[: len(PROMPT) + len(out.token_ids) - 1]
    served.check_pool()


def test_a_grammar(served):
    """It sees the tokens that are said, and none of those that wait."""
    grammar = StructuredOutputsParams(regex="[ab]{12}(yes|no)")
    for rule in ({}, {"policy": "always"}):
        out = ask(served, PROMPT, 30, rule, structured_outputs=grammar, ignore_eos=False).outputs[0]
        said = served.llm.get_tokenizer().decode(out.token_ids, skip_special_tokens=True)
        assert out.finish_reason == "stop" and re.fullmatch("[ab]{12}(yes|no)", said)
