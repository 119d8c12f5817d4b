"""An engine that dies is an error for its clients and the end of the server, never a hang."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

import openai

from helpers.checkpoints import tiny
from helpers.servers import running


@pytest.mark.timeout(900)  # engines start one after another, minutes each on a busy machine
def test_an_engine_that_is_killed(tmp_path):
    model = tiny(tmp_path / "llama", "llama")
    with running(model, tmp_path / "log.txt") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)

        def ask(**options):
            return client.completions.create(
                model="tiny", prompt="hello", max_tokens=480, extra_body={"ignore_eos": True}, **options
            )

        stream = ask(stream=True)
        next(iter(stream))
        errors: list[Exception] = []

        def whole() -> None:
            try:
                ask()
            except openai.OpenAIError as error:
                errors.append(error)

        waiting = threading.Thread(target=whole)
        waiting.start()
        time.sleep(0.2)
        assert server.health() == 200
        os.kill(server.engine(), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(openai.OpenAIError):
            for _ in stream:
                pass
            raise AssertionError("the stream ended as if it were complete")
        waiting.join(30)
        assert errors and not waiting.is_alive()
        server.process.wait(30)  # what a supervisor waits for
        assert server.process.returncode is not None and server.health() is None
        assert time.monotonic() - began < 40
