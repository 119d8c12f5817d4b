"""Hard tokens that wait for the next step run in time for whoever relies on them, whatever happens in between."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

from helpers.checkpoints import tiny
from helpers.interpreter import IS_V2
from helpers.serving import agree, answer, prompts, reference, serve
from tah import TaHForCausalLM

NEW = 8 if IS_V2 else 24
PROMPT = prompts(1, seed=5, longest=1, shared=95)[0]  # three blocks, the last token ends the third
LONGER = PROMPT + prompts(1, seed=6, longest=1, shared=39)[0]  # of its own 40 the first 32 end a block
RULE = {"policy": "always"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("serve") / "llama", "llama")


@pytest.fixture(scope="module")
def expected(llama):
    return {len(prompt): reference(llama, [prompt], NEW, **RULE) for prompt in (PROMPT, LONGER)}


@pytest.fixture
def served(llama):
    with serve(llama, additional_config={"batching": "mixed"}, hf_overrides=RULE) as served:
        yield served


def begin(served, **asked):
    """Requests that are added now, and what ran of them in one step; by name vLLM's own name."""
    params = served.params(NEW)
    names = {
        name: served.engine.add_request(name, {"prompt_token_ids": prompt}, params) for name, prompt in asked.items()
    }
    served.engine.step()
    return names


def finish(served):
    done = {}
    while served.engine.has_unfinished_requests():
        done |= {out.request_id: out for out in served.engine.step() if out.finished}
    return done


def watch_left(served, monkeypatch):
    """How many tokens each request that is gone had left, for every pass that runs them."""
    waiting, seen = served.model.waiting, []
    every = waiting.all

    def watched():
        if waiting.left:
            seen.append([len(one.places) for one in waiting.left])
        return every()

    monkeypatch.setattr(waiting, "all", watched)
    return seen


def cached(served, llama, expected, prompt):
    """Whether a new request, which finds what others left in the prefix cache, has the right answer."""
    out = served.llm.generate([{"prompt_token_ids": prompt}], served.params(NEW), use_tqdm=False)[0]
    served.check_pool()
    assert out.num_cached_tokens >= 64
    return agree(llama, [prompt], [answer(out)], expected[len(prompt)], **RULE)


@pytest.mark.parametrize(("other", "left"), [(None, [96, 32]), ("a", [32]), ("b", [96])])
def test_aborted_in_between(served, llama, expected, monkeypatch, other, left):
    """The one that is aborted, and another that is not, or is as well; both prompts begin alike."""
    seen = watch_left(served, monkeypatch)
    names, waiting = begin(served, a=PROMPT, b=LONGER), served.model.waiting.by_request
    assert len(waiting) == 2
    assert [len(waiting[names[name]].places) for name in "ab"] == [96, len(LONGER) - 96]
    for name in {"a", "b"} - {other}:
        served.engine.abort_request([name])
    done = finish(served)
    if other is not None:
        prompt = PROMPT if other == "a" else LONGER
        assert agree(llama, [prompt], [answer(done[other])], expected[len(prompt)], **RULE)
    assert cached(served, llama, expected, LONGER) and cached(served, llama, expected, PROMPT)
    assert not served.model.waiting.by_request and not served.model.waiting.left
    assert seen == [left]


def test_blocks_of_an_aborted_one_go_to_another_at_once(llama, monkeypatch):
    """Its tokens run before their entries are freed; whoever gets the blocks has keys of its own there."""
    other = prompts(1, seed=9, longest=1, shared=129)[0]
    want = {len(prompt): reference(llama, [prompt], NEW, **RULE) for prompt in (PROMPT, other)}
    options = {"num_gpu_blocks_override": 6, "max_model_len": 160}  # one is vLLM's own
    with serve(llama, additional_config={"batching": "mixed"}, hf_overrides=RULE, **options) as served:
        seen = watch_left(served, monkeypatch)
        begin(served, a=PROMPT)
        served.engine.abort_request(["a"])
        done = {}
        begin(served, other=other)
        done = finish(served)
        assert seen == [[96]]
        assert agree(llama, [other], [answer(done["other"])], want[len(other)], **RULE)
        assert agree(llama, [PROMPT], served.ask([PROMPT], NEW), want[len(PROMPT)], **RULE)


def test_control_without_those_that_were_left(served, llama, expected, monkeypatch):
    """What the test above would show if tokens of aborted requests did not run."""
    begin(served, a=PROMPT)
    monkeypatch.setattr(served.model.waiting, "leave", lambda request: served.model.waiting.by_request.pop(request, 0))
    served.engine.abort_request(["a"])
    assert not cached(served, llama, expected, LONGER)


def test_preempted_in_between(served, llama, expected, monkeypatch):
    seen = watch_left(served, monkeypatch)
    names = begin(served, a=PROMPT, b=LONGER)
    for name in names.values():
        request = served.scheduler.requests[name]
        served.scheduler.running.remove(request)
        served.scheduler._preempt_request(request, 0.0)
        served.scheduler.prev_step_scheduled_req_ids.discard(name)
    done = finish(served)
    for name, prompt in (("a", PROMPT), ("b", LONGER)):
        assert agree(llama, [prompt], [answer(done[name])], expected[len(prompt)], **RULE)
    assert seen == [[96, 32]]
    assert served.preempted == 2 and cached(served, llama, expected, LONGER)


def test_left_out_of_a_step(served, llama, expected, monkeypatch):
    """A request that waits has no part in the next steps, while others come to rely on its tokens."""
    names = begin(served, a=PROMPT)
    scheduler, schedule = served.scheduler, served.scheduler.schedule

    def without_a(*args, **kwargs):
        request = scheduler.requests[names["a"]]
        scheduler.running.remove(request)
        try:
            return schedule(*args, **kwargs)
        finally:
            scheduler.running.insert(0, request)

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "schedule", without_a)
        begin(served, b=LONGER)
        a = served.model.waiting.by_request[next(iter(served.model.waiting.by_request))]
        assert a.hidden is not None and a.places.tolist() == [95]  # all others have run
        served.engine.step()
    done = finish(served)
    for name, prompt in (("a", PROMPT), ("b", LONGER)):
        assert agree(llama, [prompt], [answer(done[name])], expected[len(prompt)], **RULE)
    assert done["b"].num_cached_tokens == 96
    served.check_pool()


@torch.no_grad()
def test_a_prompts_probabilities_beside_others(llama, monkeypatch):
    """Where somebody asks for them nobody's tokens wait in that step; answers are the same, and so are they."""
    asked = prompts(12, seed=7, longest=60, shared=40)
    want = reference(llama, asked, NEW)
    model = TaHForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with serve(llama, max_num_batched_tokens=64, additional_config={"batching": "mixed"}) as served:
        run_step, waited = served.model.run_step, set()

        def watched(*given, **more):
            hidden = run_step(*given, **more)
            if served.model.report.taken:  # hard tokens of this step
                waited.add(bool(served.model.waiting.by_request))
            return hidden

        monkeypatch.setattr(served.model, "run_step", watched)
        params = [served.params(NEW, prompt_logprobs=0 if at % 3 == 0 else None) for at in range(len(asked))]
        for _ in range(2):
            outs = served.llm.generate([{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False)
            served.check_pool()
            assert agree(llama, asked, [answer(out) for out in outs], want)
            for prompt, out in list(zip(asked, outs, strict=True))[::3]:
                probs = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
                got = [entry[token].logprob for token, entry in zip(prompt[1:], out.prompt_logprobs[1:], strict=True)]
                assert torch.allclose(
                    torch.tensor(got), probs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0], atol=1e-3
                )
        assert waited == {True, False}


def test_answers_of_one_token(llama):
    """Requests that end while tokens of their prompts wait, whose cached prefixes the next ones find."""
    asked = prompts(16, seed=8, longest=60, shared=70)
    want = reference(llama, asked, 1)
    with serve(llama, max_num_batched_tokens=64, additional_config={"batching": "mixed"}) as served:
        for _ in range(2):
            assert agree(llama, asked, served.ask(asked, 1), want)
