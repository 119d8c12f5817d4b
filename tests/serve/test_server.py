"""The HTTP server that `tah serve` starts, through the real `openai` client."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

import openai
import torch

from helpers.checkpoints import tiny
from helpers.servers import running
from tah import TaHForCausalLM

pytestmark = pytest.mark.timeout(900)  # a start of the server is part of a test's time

HELLO = [{"role": "user", "content": "hello"}]
LONGEST = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("serve") / "llama", "llama")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.txt"
    with running(model, log, max_model_len=LONGEST, max_num_seqs=8, api_key="secret", enable_scale_out=True) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)


def chat(client, **options):
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 24, "temperature": 0, **options}
    return client.chat.completions.create(**options)


def depths_again(model, prompt, said):
    """Depths of the tokens that ran for an answer, and the answer, by our own model."""
    again = TaHForCausalLM.from_pretrained(model, dtype=torch.float32).eval()(torch.tensor([prompt + said[:-1]]))
    return again.depth_count[0].tolist(), again.logits[0, len(prompt) - 1 :].argmax(-1).tolist()


def test_depths_in_the_response(client, model):
    out = chat(client, logprobs=True, extra_body={"return_token_ids": True, "vllm_xargs": {"depths": True}})
    prompt, said = out.prompt_token_ids, out.choices[0].token_ids
    told, depths = out.choices[0].tah, depths_again(model, prompt, said)
    assert (told["depths"], said) == depths
    answer = told["depths"][len(prompt) - 1 :]
    assert told["iterated_tokens"] == answer.count(2) and told["mean_depth"] == pytest.approx(sum(answer) / 24)
    before = told["depths"][: len(prompt) - 1].count(2)
    assert out.usage.tah == {name: told[name] for name in told if name != "depths"} | {"prompt_iterated_tokens": before}
    plain = chat(client)
    assert plain.usage.tah == out.usage.tah and "depths" not in plain.choices[0].tah
    assert plain.choices[0].routed_experts is None


@pytest.mark.parametrize("stream", [False, True])
def test_depths_of_every_choice(client, model, stream):
    """Two prompts with three sampled answers each."""
    asked = client.completions.create(
        model="tiny",
        prompt=["hello", "good morning"],
        n=3,
        temperature=1,
        seed=3,
        max_tokens=16,
        stream=stream,
        extra_body={"return_token_ids": True, "ignore_eos": True, "vllm_xargs": {"depths": True}},
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )
    parts = list(asked) if stream else [asked]
    prompts, said, told = {}, {}, {}
    for part in parts:
        for choice in part.choices:
            if choice.prompt_token_ids:
                prompts[choice.index] = choice.prompt_token_ids
            said[choice.index] = said.get(choice.index, []) + choice.token_ids
            assert hasattr(choice, "tah") == (choice.finish_reason is not None)
            if choice.finish_reason:
                told[choice.index] = choice.tah
    assert sorted(told) == list(range(6)) and len({tuple(ids) for ids in said.values()}) == 6
    for index, one in told.items():
        assert one["depths"] == depths_again(model, prompts[index], said[index])[0]
    assert parts[-1].usage.tah["iterated_tokens"] == sum(one["iterated_tokens"] for one in told.values())
    before = [told[at]["depths"][: len(prompts[at]) - 1].count(2) for at in (0, 3)]
    assert parts[-1].usage.tah["prompt_iterated_tokens"] == sum(before)


def test_streaming_says_the_same(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = chat(client)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage.tah == whole.usage.tah and chunks[-2].choices[0].tah == whole.choices[0].tah
    assert [hasattr(chunk.choices[0], "tah") for chunk in chunks[:-2]] == [False] * (len(chunks) - 2)


BAD = {"threshold": (2, "high"), "policy": ("alway",), "max_depth": (3, 0), "depths": ("x",), "treshold": (0.5,)}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_bad_fields_of_ours_are_named(client, field, value):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, extra_body={"vllm_xargs": {field: value}})
    assert refused.value.status_code == 400 and refused.value.body["param"] == f"vllm_xargs.{field}"
    with pytest.raises(openai.BadRequestError, match=field):  # not in a stream that has begun with status 200
        chat(client, extra_body={"vllm_xargs": {field: value}}, stream=True)


def test_other_mistakes(client):
    with pytest.raises(openai.BadRequestError):
        chat(client, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="256"):
        chat(client, messages=[{"role": "user", "content": "long" * LONGEST}])
    with pytest.raises(openai.NotFoundError):
        chat(client, model="another")
    with pytest.raises(openai.AuthenticationError):
        chat(client.with_options(api_key="wrong"))


def test_what_vllm_does_for_any_model(client):
    assert len(chat(client, n=3, temperature=1, seed=1).choices) == 3
    one, two = (chat(client, temperature=1, seed=7).choices[0].message.content for _ in range(2))
    assert one == two
    text = chat(client).choices[0].message.content
    stopped = chat(client, stop=text[8])
    assert stopped.choices[0].finish_reason == "stop" and text[8] not in stopped.choices[0].message.content
    assert stopped.usage.completion_tokens < 24 and stopped.choices[0].tah["mean_depth"] >= 1
    schema = {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 2, "maxItems": 2}
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    out = chat(client, response_format=wanted, max_tokens=200).choices[0]
    assert out.finish_reason == "stop" and set(json.loads(out.message.content)) <= {"x", "y"}
    assert client.completions.create(model="tiny", prompt="hello", max_tokens=4, logprobs=2).choices[0].logprobs.tokens


def test_beam_search_and_other_paths_work_untold(client, server):
    """Its steps are requests of the server's own; other paths than the two have vLLM's responses."""
    beams = chat(client, n=2, extra_body={"use_beam_search": True})
    assert len(beams.choices) == 2 and not hasattr(beams.choices[0], "tah") and not hasattr(beams.usage, "tah")
    assert client.responses.create(model="tiny", input="hello", max_output_tokens=8).output
    ask = {"token_ids": [72, 80, 90], "sampling_params": {"max_tokens": 4, "ignore_eos": True}}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
    asked = Request(f"{server.url}/inference/v1/generate", json.dumps(ask).encode(), headers)
    said = json.load(urlopen(asked))["choices"][0]
    assert len(said["token_ids"]) == 4 and said["routed_experts"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(client, server, stream):
    before = server.metrics()
    options = {"max_tokens": 200, "extra_body": {"ignore_eos": True}, "n": 4, "temperature": 1, "stream": stream}
    if stream:
        chunks = chat(client, **options)
        next(iter(chunks))
        chunks.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            chat(client.with_options(timeout=0.2), **options)
    deadline = time.monotonic() + 20
    while server.metrics()["vllm:num_requests_running"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.metrics()["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] < 4 * 200


def test_many_clients_some_of_whom_leave(client):
    """Each answer is that of the same request alone; a stream that is dropped disturbs nobody."""
    asked = [[{"role": "user", "content": "hello " * (at % 7 + 1)}] for at in range(24)]
    alone = [chat(client, messages=messages).choices[0].message.content for messages in asked[:7]]

    def ask(at: int) -> str | None:
        if at % 3 == 2:
            stream = chat(client, messages=asked[at], stream=True)
            next(iter(stream))
            stream.close()
            return None
        return chat(client, messages=asked[at]).choices[0].message.content

    with ThreadPoolExecutor(12) as clients:
        got = list(clients.map(ask, range(24)))
    assert all(text == alone[at % 7] for at, text in enumerate(got) if text is not None)


def test_metrics(server, client, model):
    """What Prometheus is told of one more request is what its response tells."""
    before = server.metrics()
    assert before["vllm:tah_threshold"] == json.loads((model / "config.json").read_text())["threshold"]
    new = [{"role": "user", "content": "something new"}]
    depths = chat(client, messages=new, extra_body={"vllm_xargs": {"depths": True}}).choices[0].tah["depths"]
    assert 0 < depths.count(2) < len(depths)
    after = server.metrics()
    for depth in (1, 2):
        name = f'vllm:tah_tokens_total{{depth="{depth}"}}'
        assert after[name] - before[name] == depths.count(depth)
    assert 0 <= after["vllm:tah_iterating_tokens"] <= 1 and 0 < after["vllm:tah_deep_kv_usage_perc"] < 1
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 24
