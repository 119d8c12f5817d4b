"""Answers stay the same when memory is short, requests come and go, and each has a rule of its own."""

from __future__ import annotations

import json
import random

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

from helpers.checkpoints import tiny
from helpers.serving import agree, answer, iterated, prompts, reference, serve
from tah.vllm.requests import RequestOptions

NEW = 48
MIXED = prompts(22, seed=1)  # 1,056 tokens
RULES = [
    {},
    {"policy": "confidence", "threshold": 0.4},
    {"max_depth": 1},
    {"threshold": 0.6},
    {"policy": "always"},
    {"policy": "random"},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("serve") / "llama", "llama")


@pytest.fixture(params=["two_pass", "mixed"])
def batching(request):
    return {"batching": request.param}


@pytest.fixture(scope="module")
def expected(llama):
    return reference(llama, MIXED, NEW)


def test_few_blocks(llama, expected, batching):
    """Requests are preempted and run again, in part from cached blocks."""
    with serve(llama, num_gpu_blocks_override=16, max_num_batched_tokens=48, additional_config=batching) as served:
        assert agree(llama, MIXED, served.ask(MIXED, NEW), expected)
        assert served.preempted > 3
        assert agree(llama, MIXED, served.ask(MIXED, NEW), expected)


def test_few_deep_entries(llama, batching):
    """Ample room at depth 1 and little at depth 2: requests wait or are preempted, no decision changes."""
    asked, rules = MIXED[:12], [{"threshold": 0.5}] * 12
    want = reference(llama, asked, NEW, threshold=0.5)
    assert iterated(want) > 0.4
    with serve(
        llama, max_model_len=160, num_gpu_blocks_override=100, additional_config=batching | {"deep_kv_share": 0.01}
    ) as served:
        assert served.model.pool.capacity == 160  # the longest request alone
        assert agree(llama, asked, served.ask(asked, NEW, rules), want, threshold=0.5)
        assert served.preempted > 3


def test_giving_up_entries_costs_no_walk_over_free_blocks(llama, monkeypatch):
    """Blocks are looked at once after each request that leaves them, however many blocks were never used."""
    monkeypatch.setattr("vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue.get_all_free_blocks", None)
    looked, left, given_up = 0, 0, 0

    class Counted(list):
        def __getitem__(self, at):
            nonlocal looked
            looked += 1
            return super().__getitem__(at)

    asked, rules = MIXED[:12], [{"threshold": 0.5}] * 12
    want = reference(llama, asked, NEW, threshold=0.5)
    with serve(
        llama, max_model_len=160, num_gpu_blocks_override=4000, additional_config={"deep_kv_share": 0.001}
    ) as served:
        scheduler, pool = served.scheduler, served.scheduler.kv_cache_manager.block_pool
        give_up, free = scheduler._give_up, scheduler._free_request_blocks

        def counted(wanted):
            nonlocal given_up
            stock, pool.blocks = pool.blocks, Counted(pool.blocks)
            blocks = give_up(wanted)
            pool.blocks, given_up = stock, given_up + len(blocks)
            return blocks

        def note(request):
            nonlocal left
            left += len(scheduler.kv_cache_manager.get_block_ids(request.request_id)[0])
            free(request)

        scheduler._give_up, scheduler._free_request_blocks = counted, note
        assert agree(llama, asked, served.ask(asked, NEW, rules), want, threshold=0.5)
    assert 10 < given_up < looked <= left + given_up < 400  # vLLM looks at each of those given up once more


@pytest.mark.parametrize("share", [0.01, 0.1, 0.9])
def test_memory_for_both_depths_is_what_was_given(llama, share, monkeypatch):
    """The pool has room for the longest request at least, which may be most of the cache."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    given = 4 * 2**20
    with serve(llama, kv_cache_memory_bytes=given, additional_config={"deep_kv_share": share}) as served:
        cache = sum(layer.stock.kv_cache.nbytes for layer in served.model.deep_attention)
        pool = served.model.pool
        assert 0.9 * given < cache + pool.keys.nbytes + pool.values.nbytes <= given
        assert pool.capacity >= 256 and served.ask(MIXED[:2], NEW)


def test_the_least_urgent_request_makes_room(llama):
    """With priorities, as vLLM has it: not the newest request is preempted for want of deep entries."""
    asked, rule = MIXED[:12], {"threshold": 0.5}
    want, chosen = reference(llama, asked, NEW, threshold=0.5), []
    options = {"max_model_len": 160, "num_gpu_blocks_override": 100, "additional_config": {"deep_kv_share": 0.01}}
    with serve(llama, scheduling_policy="priority", **options) as served:
        scheduler, preempt = served.scheduler, served.scheduler._preempt_request

        def note(request, *args, **options):
            chosen.append((request.priority, [other.priority for other in scheduler.running]))
            preempt(request, *args, **options)

        scheduler._preempt_request = note
        params, order = served.params(NEW, rule), list(range(12, 0, -1))  # the newest is the most urgent
        ask = [{"prompt_token_ids": prompt} for prompt in asked]
        outs = served.llm.generate(ask, params, use_tqdm=False, priority=order)
        assert agree(llama, asked, [answer(out) for out in outs], want, **rule)
    assert len(chosen) > 3 and all(priority > max(others) for priority, others in chosen)


def test_a_salt_of_another_rule_shares_nothing(llama, batching):
    """A client may send any salt, also the one that the scheduler makes of another rule."""
    asked, rules = prompts(2, seed=3, longest=10, shared=70), ({}, {"policy": "always"})
    want = [reference(llama, asked, 4, **rule) for rule in rules]
    with serve(llama, additional_config=batching) as served:
        key = str(RequestOptions.of(served.model.config, {"policy": "always"}).key)
        for salt in (None, key, json.dumps([None, key])):
            for rule, answers in zip(reversed(rules), reversed(want), strict=True):
                salted = {} if salt is None or rule else {"cache_salt": salt}
                given = [{"prompt_token_ids": ids} | salted for ids in asked]
                outs = served.llm.generate(given, served.params(4, rule), use_tqdm=False)
                assert agree(llama, asked, [answer(out) for out in outs], answers, **rule)


def test_rules_side_by_side_share_a_prefix(llama, batching):
    """Each request has its own rule, and all start alike: cached prefixes are shared among equals only."""
    asked = prompts(24, seed=3, longest=20, shared=70)
    rules = [RULES[at % len(RULES)] for at in range(len(asked))]
    want = [reference(llama, [prompt], NEW, **rule)[0] for prompt, rule in zip(asked, rules, strict=True)]
    with serve(llama, max_num_batched_tokens=64, additional_config=batching) as served:
        for _ in range(2):
            got = served.ask(asked, NEW, rules)
            for at, rule in enumerate(rules):
                assert agree(llama, [asked[at]], [got[at]], [want[at]], **rule)
        outs = served.llm.generate([{"prompt_token_ids": asked[0]}], served.params(1), use_tqdm=False)
        assert outs[0].num_cached_tokens >= 64  # the control: there was something to share


def test_requests_come_and_go_every_step(llama, expected, batching):
    """A new request or none at each step; some are aborted on the way and asked again."""
    draw, waiting, running, done = random.Random(0), list(range(len(MIXED))), {}, {}
    aborted, number = 0, 0
    with serve(
        llama, max_num_seqs=6, max_num_batched_tokens=40, num_gpu_blocks_override=24, additional_config=batching
    ) as served:
        while len(done) < len(MIXED):
            if waiting and draw.random() < 0.6:
                name, number = f"{waiting[0]}-{number}", number + 1
                internal = served.engine.add_request(name, {"prompt_token_ids": MIXED[waiting[0]]}, served.params(NEW))
                running[name] = (waiting.pop(0), internal)
            if running and aborted < 30 and draw.random() < 0.15:
                name = draw.choice(sorted(running))
                served.engine.abort_request([name])
                waiting.append(running.pop(name)[0])
                aborted += 1
            for out in served.engine.step():
                if out.finished and out.request_id in running:
                    done[running.pop(out.request_id)[0]] = answer(out)
        served.check_pool()
        assert not served.scheduler.logs
    assert aborted == 30 and agree(llama, MIXED, [done[at] for at in range(len(MIXED))], expected)


def test_every_token_is_counted_once(llama, batching):
    """What the metrics are told of the steps adds up to the depths of the answers."""
    told = []
    with serve(llama, enable_prefix_caching=False, additional_config=batching) as served:
        update = served.scheduler.update_from_output

        def listen(*args):
            out = update(*args)
            told.append(served.scheduler.numbers)
            served.scheduler.numbers = None
            return out

        served.scheduler.update_from_output = listen
        depths = [depth for one in served.ask(MIXED, NEW) for depth in one.depths]
    told = [step for step in told if step is not None]
    assert sum(step.deep for step in told) == depths.count(2) > 50
    assert sum(step.shallow for step in told) == depths.count(1)
