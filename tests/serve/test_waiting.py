"""Hard tokens that wait for the next step run in time for whoever relies on them, whatever happens in between."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

from checkpoints import tiny
from serving import agree, answer, prompts, reference, serve

NEW = 24
PROMPT = prompts(1, seed=5, longest=1, shared=95)[0]  # three blocks, the last token ends the third
LONGER = PROMPT + prompts(1, seed=6, longest=40)[0]
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
        done |= {out.request_id: answer(out) for out in served.engine.step() if out.finished}
    return done


def cached(served, llama, expected, prompt):
    """Whether a new request, which finds what others left in the prefix cache, has the right answer."""
    out = served.llm.generate([{"prompt_token_ids": prompt}], served.params(NEW), use_tqdm=False)[0]
    served.check_pool()
    assert out.num_cached_tokens >= 64
    return agree(llama, [prompt], [answer(out)], expected[len(prompt)], **RULE)


@pytest.mark.parametrize("other", [None, "a", "b"])
def test_aborted_in_between(served, llama, expected, other):
    """The one that is aborted, and another that is not, or is as well; both prompts begin alike."""
    begin(served, a=PROMPT, b=LONGER)
    assert len(served.model.waiting.by_request) == 2
    assert [len(one.positions) for one in served.model.waiting.by_request.values()] == [96, len(LONGER) - 96]
    for name in {"a", "b"} - {other}:
        served.engine.abort_request([name])
    done = finish(served)
    if other is not None:
        prompt = PROMPT if other == "a" else LONGER
        assert agree(llama, [prompt], [done[other]], expected[len(prompt)], **RULE)
    assert cached(served, llama, expected, LONGER) and cached(served, llama, expected, PROMPT)
    assert not served.model.waiting.by_request and not served.model.waiting.left


def test_control_without_those_that_were_left(served, llama, expected, monkeypatch):
    """What the test above would show if tokens of aborted requests did not run."""
    begin(served, a=PROMPT)
    monkeypatch.setattr(served.model.waiting, "leave", lambda request: served.model.waiting.by_request.pop(request, 0))
    served.engine.abort_request(["a"])
    assert not cached(served, llama, expected, LONGER)


def test_preempted_in_between(served, llama, expected):
    names = begin(served, a=PROMPT, b=LONGER)
    for name in names.values():
        request = served.scheduler.requests[name]
        served.scheduler.running.remove(request)
        served.scheduler._preempt_request(request, 0.0)
        served.scheduler.prev_step_scheduled_req_ids.discard(name)
    done = finish(served)
    for name, prompt in (("a", PROMPT), ("b", LONGER)):
        assert agree(llama, [prompt], [done[name]], expected[len(prompt)], **RULE)
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
        served.engine.step()
    done = finish(served)
    for name, prompt in (("a", PROMPT), ("b", LONGER)):
        assert agree(llama, [prompt], [done[name]], expected[len(prompt)], **RULE)


def test_a_prompts_probabilities_beside_others(llama):
    """Where somebody asks for them nobody's tokens wait in that step; answers are the same."""
    asked = prompts(12, seed=7, longest=60, shared=40)
    want = reference(llama, asked, NEW)
    with serve(llama, max_num_batched_tokens=64, additional_config={"batching": "mixed"}) as served:
        params = [served.params(NEW, prompt_logprobs=0 if at % 3 == 0 else None) for at in range(len(asked))]
        for _ in range(2):
            outs = served.llm.generate([{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False)
            served.check_pool()
            assert agree(llama, asked, [answer(out) for out in outs], want)


def test_answers_of_one_token(llama):
    """Requests that end while tokens of their prompts wait, whose cached prefixes the next ones find."""
    asked = prompts(16, seed=8, longest=60, shared=70)
    want = reference(llama, asked, 1)
    with serve(llama, max_num_batched_tokens=64, additional_config={"batching": "mixed"}) as served:
        for _ in range(2):
            assert agree(llama, asked, served.ask(asked, 1), want)
