"""The HTTP server that `tah serve` starts, through the real `openai` client."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

import openai
import torch
from checkpoints import tiny
from servers import running

from tah import TaHForCausalLM

HELLO = [{"role": "user", "content": "hello"}]
LONGEST = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("serve") / "llama", "llama")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.txt"
    with running(model, log, max_model_len=LONGEST, max_num_seqs=8, api_key="secret") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)


def chat(client, **options):
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 24, "temperature": 0, **options}
    return client.chat.completions.create(**options)


def test_depths_in_the_response(client, model):
    out = chat(client, logprobs=True, extra_body={"return_token_ids": True, "vllm_xargs": {"depths": True}})
    ids = out.prompt_token_ids + out.choices[0].token_ids
    again = TaHForCausalLM.from_pretrained(model, dtype=torch.float32).eval()(torch.tensor([ids[:-1]]))
    told = out.kv_transfer_params["tah"]
    depths = again.depth_count[0].tolist()
    assert (
        told["depths"] == depths and again.logits[0, len(out.prompt_token_ids) - 1 :].argmax(-1).tolist() == ids[-24:]
    )
    assert told["iterated_tokens"] == sum(depth > 1 for depth in depths[-24:])
    assert told["mean_depth"] == pytest.approx(sum(depths[-24:]) / 24)
    assert "depths" not in chat(client).kv_transfer_params["tah"]


def test_streaming_says_the_same(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = chat(client)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


BAD = {"threshold": (2, "high"), "policy": ("alway",), "max_depth": (3, 0), "depths": ("x",), "treshold": (0.5,)}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_bad_fields_of_ours_are_named(client, field, value):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, extra_body={"vllm_xargs": {field: value}})
    assert refused.value.status_code == 400 and refused.value.body["param"] == f"vllm_xargs.{field}"


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
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    out = chat(client, response_format=wanted, max_tokens=60)
    assert out.choices[0].finish_reason == "length" or json.loads(out.choices[0].message.content)["a"] in "xy"
    assert client.completions.create(model="tiny", prompt="hello", max_tokens=4, logprobs=2).choices[0].logprobs.tokens


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
    told = chat(
        client, messages=[{"role": "user", "content": "something new"}], extra_body={"vllm_xargs": {"depths": True}}
    )
    depths = told.kv_transfer_params["tah"]["depths"]
    assert 0 < depths.count(2) < len(depths)
    after = server.metrics()
    for depth in (1, 2):
        name = f'vllm:tah_tokens_total{{depth="{depth}"}}'
        assert after[name] - before[name] == depths.count(depth)
    assert 0 <= after["vllm:tah_iterating_tokens"] <= 1 and 0 < after["vllm:tah_deep_kv_usage_perc"] < 1
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 24
