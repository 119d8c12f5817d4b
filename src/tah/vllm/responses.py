"""What HTTP responses tell of depths: middleware for vLLM's server (`--middleware`), which `tah serve` adds.

vLLM carries one array per token from the engine to each answer, `CompletionOutput.routed_experts`; of a TaH model it
holds the depths [T] of prompt and answer, once the answer has ended. The server's responses have no field for them, so
here each choice gets `tah` beside its text, and the request's usage gets the sums, in streams too. On other paths the
array is dropped: what the server says in that field there is not experts.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm import SamplingParams
from vllm.outputs import RequestOutput

PATHS = ("/v1/chat/completions", "/v1/completions")


@dataclass
class AnswerDepths:
    """One answer that has ended. Its tokens are counted by the token that ran to predict them."""

    prompt: np.ndarray  # depths of the prompt's tokens but the last
    said: np.ndarray  # depths that predicted the answer's tokens

    def told(self, in_full: bool) -> dict[str, Any]:
        """For its choice in the response; `in_full`: with the depth of every token, the prompt's first."""
        found: dict[str, Any] = counts([self.said])
        return found | {"depths": [*self.prompt.tolist(), *self.said.tolist()]} if in_full else found


def counts(said: list[np.ndarray]) -> dict[str, Any]:
    """Of the depths that predicted the tokens of some answers."""
    depths = np.concatenate(said)
    return {"iterated_tokens": int((depths > 1).sum()), "mean_depth": float(depths.mean())}


@dataclass
class Answers:
    """Those of one HTTP request, by the number of the choice in its response."""

    prompts: int = 0  # handed to the engine so far
    each: int = 1  # answers to each prompt
    in_full: bool = False
    ended: dict[int, AnswerDepths] = field(default_factory=dict)

    def listen(self, outputs: AsyncGenerator[RequestOutput], params: SamplingParams) -> AsyncGenerator[RequestOutput]:
        """What the engine says to the next prompt, as it comes; the depths of answers that end are kept."""
        self.each, self.in_full = params.n, bool((params.extra_args or {}).get("depths"))
        first, self.prompts = self.prompts * self.each, self.prompts + 1

        async def listening() -> AsyncGenerator[RequestOutput]:
            async with aclosing(outputs):
                async for output in outputs:
                    for one in output.outputs:
                        if one.routed_experts is not None:
                            start = len(output.prompt_token_ids or ()) - 1
                            self.ended[first + one.index] = AnswerDepths(*np.split(one.routed_experts, [start]))
                            one.routed_experts = None  # which the server would give out in its own way
                    yield output

        return listening()

    def tell(self, response: dict[str, Any]) -> None:
        """Add what is known to a response, or to a chunk of a streamed one."""
        for choice in response["choices"]:
            if choice.get("finish_reason") and choice["index"] in self.ended:
                choice["tah"] = self.ended[choice["index"]].told(self.in_full)
        if response.get("usage") and self.ended:
            prompts = [answer.prompt for number, answer in self.ended.items() if number % self.each == 0]
            found = counts([answer.said for answer in self.ended.values()])
            found["prompt_iterated_tokens"] = sum(int((prompt > 1).sum()) for prompt in prompts)
            response["usage"]["tah"] = found


RUNNING: ContextVar[Answers] = ContextVar("answers of the HTTP request that this context belongs to")


class TellDepths:
    """ASGI middleware that adds `tah` to the responses of `PATHS`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if (engine := getattr(scope["app"].state, "engine_client", None)) is not None:
            listen(engine)
        answers = Answers()
        RUNNING.set(answers)
        telling = scope["path"].endswith(PATHS)
        return await self.app(scope, receive, Telling(send, answers) if telling else send)


def listen(engine: Any) -> None:
    """Have the server's client of the engine keep the depths of what it says. Once is enough."""
    if "generate" in vars(engine):
        return
    stock = engine.generate

    def generate(prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any) -> Any:
        outputs = stock(prompt, sampling_params, request_id, **options)
        answers = RUNNING.get(None)
        beam = "-beam-" in request_id  # a step of a beam search: a prompt of the server's own
        return outputs if answers is None or beam else answers.listen(outputs, sampling_params)

    engine.generate = generate


class Telling:
    """What the server sends, with `tah` in it: event by event of a stream, or a whole response at its end."""

    def __init__(self, send: Send, answers: Answers) -> None:
        self.send, self.answers = send, answers
        self.start: Message | None = None  # held back: the length of what follows is not known yet
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if not MutableHeaders(raw=message["headers"]).get("content-type", "").startswith("application/json"):
                return await self.send(message)
            self.start = message
        elif self.start is None:
            events = message.get("body", b"").split(b"\n\n")
            return await self.send(message | {"body": b"\n\n".join(map(self._event, events))})
        elif message.get("more_body"):
            self.body += message.get("body", b"")
        else:
            body = self._told(self.body + message.get("body", b""))
            MutableHeaders(raw=self.start["headers"])["content-length"] = str(len(body))
            await self.send(self.start)
            await self.send(message | {"body": body})
        return None

    def _event(self, event: bytes) -> bytes:
        """An event of a stream; those in the middle of an answer pass as they are."""
        if b'"finish_reason":"' in event or b'"choices":[],' in event:
            return b"data: " + self._told(event.removeprefix(b"data: "))
        return event

    def _told(self, body: bytes) -> bytes:
        response = json.loads(body)
        if "choices" not in response:  # an error
            return body
        self.answers.tell(response)
        return json.dumps(response, ensure_ascii=False, separators=(",", ":")).encode()
