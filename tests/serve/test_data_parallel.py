"""Engines side by side behind one API (`--data-parallel-size`), on one machine or started as on several."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

import openai

from helpers.checkpoints import tiny
from helpers.servers import TAH, free_port, running, started
from helpers.serving import Answer, agree, prompts, reference

pytestmark = pytest.mark.timeout(900)  # servers start, two engines each

NEW = 32
ASKED = prompts(24, seed=4)
CLUSTER = Path(__file__).parents[2] / "examples" / "serve" / "cluster.sh"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("serve") / "llama", "llama")


def ask(url: str) -> list[Answer]:
    """All prompts at once."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def one(prompt: list[int]) -> Answer:
        out = client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=NEW,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True, "vllm_xargs": {"depths": True}},
        )
        return Answer(out.choices[0].token_ids, out.choices[0].tah["depths"])

    with ThreadPoolExecutor(len(ASKED)) as clients:
        return list(clients.map(one, ASKED))


def tokens_by_engine(url: str) -> dict[str, float]:
    """That ran at depth 2, by the engine's number."""
    text = urlopen(f"{url}/metrics", timeout=5).read().decode()
    found = re.findall(r"^vllm:tah_tokens_total\{(.*)\} (\S+)$", text, re.M)
    return {re.search(r'engine="(\d+)"', labels)[1]: float(count) for labels, count in found if 'depth="2"' in labels}


@pytest.mark.slow
def test_one_machine(model, tmp_path):
    """Both engines answer, and as one does."""
    with running(model, tmp_path / "log.txt", max_model_len=256, max_num_seqs=8, data_parallel_size=2) as server:
        assert agree(model, ASKED, ask(server.url), reference(model, ASKED, NEW))
        told = tokens_by_engine(server.url)
    assert set(told) == {"0", "1"} and all(told.values())


@pytest.mark.slow
def test_the_cluster_script(model, tmp_path):
    """The two machines that it is for are this one twice: the first with the API, the second with an engine only."""
    both = {"NODES": "2", "HEAD": "127.0.0.1", "RPC_PORT": str(free_port()), "TAH": " ".join(TAH)}
    script, options = ["sh", str(CLUSTER)], {"max_model_len": 256, "max_num_seqs": 8}
    first, second = both | {"RANK": "0"}, both | {"RANK": "1"}
    with (
        started([*script, str(model)], tmp_path / "second.txt", second, **options) as engine,
        running(model, tmp_path / "first.txt", script, first, **options) as server,
    ):
        assert agree(model, ASKED, ask(server.url), reference(model, ASKED, NEW))
        told = tokens_by_engine(server.url)
        assert engine.poll() is None
    assert set(told) == {"0", "1"} and all(told.values())
