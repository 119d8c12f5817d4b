"""Middleware of vLLM's server (`--middleware`) that adds depths to HTTP responses; `tah serve` enables it.

vLLM's engine returns one array with each output, `CompletionOutput.routed_experts`. For a TaH model this array is the
depths [T] of prompt and answer, complete when the answer has ended. The server's responses have no field for depths. So
the middleware adds `tah` to each choice and the sums to the request's usage, also in streams. On other paths it removes
the array, which the server would return as routed experts.
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

from .requests import DepthParameters

PATHS = ("/v1/chat/completions", "/v1/completions")


@dataclass
class AnswerDepths:
    """The depths of an ended answer. The depth of an answer's token is that of the token that predicts it."""

    prompt: np.ndarray  # depths of the prompt's tokens except the last
    answer: np.ndarray  # depths of the tokens that predict the answer's tokens

    def as_field(self, in_full: bool) -> dict[str, Any]:
        """Return the field `tah` of a choice; with `in_full`, including the depth of every token, the prompt first."""
        found: dict[str, Any] = counts([self.answer])
        return found | {"depths": [*self.prompt.tolist(), *self.answer.tolist()]} if in_full else found


def counts(answers: list[np.ndarray]) -> dict[str, Any]:
    """Return the number of iterated tokens and the mean depth of answers, given their depths."""
    depths = np.concatenate(answers)
    return {"iterated_tokens": int((depths > 1).sum()), "mean_depth": float(depths.mean())}


@dataclass
class Answers:
    """The answers of one HTTP request."""

    prompts: int = 0  # number of prompts that the engine has got
    each: int = 1  # answers per prompt
    in_full: bool = False  # whether the response has the depth of every token
    ended: dict[int, AnswerDepths] = field(default_factory=dict)  # by index of the choice in the response

    def listen(self, outputs: AsyncGenerator[RequestOutput], params: SamplingParams) -> AsyncGenerator[RequestOutput]:
        """Pass the engine's outputs of the next prompt on, and keep the depths of ended answers."""
        self.each, self.in_full = params.n, bool((params.extra_args or {}).get("depths"))
        first, self.prompts = self.prompts * self.each, self.prompts + 1

        async def listening() -> AsyncGenerator[RequestOutput]:
            async with aclosing(outputs):
                async for output in outputs:
                    for one in output.outputs:
                        if one.routed_experts is not None:
                            start = len(output.prompt_token_ids or ()) - 1
                            self.ended[first + one.index] = AnswerDepths(*np.split(one.routed_experts, [start]))
                            one.routed_experts = None  # the server would return it as routed experts
                    yield output

        return listening()

    def add_to(self, response: dict[str, Any]) -> None:
        """Add `tah` to the ended choices and to the usage of a response, or of a chunk of a stream."""
        for choice in response["choices"]:
            if choice.get("finish_reason") and choice["index"] in self.ended:
                choice["tah"] = self.ended[choice["index"]].as_field(self.in_full)
        if response.get("usage") and self.ended:
            prompts = [answer.prompt for number, answer in self.ended.items() if number % self.each == 0]
            found = counts([ended.answer for ended in self.ended.values()])
            found["prompt_iterated_tokens"] = sum(int((prompt > 1).sum()) for prompt in prompts)
            response["usage"]["tah"] = found


RUNNING: ContextVar[Answers] = ContextVar("answers of the HTTP request of this context")


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
        adds_depths = scope["path"].endswith(PATHS)
        return await self.app(scope, receive, ResponseSender(send, answers) if adds_depths else send)


def listen(engine: Any) -> None:
    """Wrap `engine.generate`, so that the running HTTP request keeps the depths of its outputs; done at most once."""
    if "generate" in vars(engine):
        return
    stock = engine.generate

    def generate(prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any) -> Any:
        DepthParameters.validate_params(sampling_params)  # before a stream has begun with status 200
        outputs = stock(prompt, sampling_params, request_id, **options)
        answers = RUNNING.get(None)
        beam = "-beam-" in request_id  # a step of a beam search, whose prompt is made by the server
        return outputs if answers is None or beam else answers.listen(outputs, sampling_params)

    engine.generate = generate


class ResponseSender:
    """Sender of a response that adds `tah`: to each event of a stream, or to a whole response at its end."""

    def __init__(self, send: Send, answers: Answers) -> None:
        self.send, self.answers = send, answers
        self.start: Message | None = None  # sent with the body, since it has the length of the body
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
            body = self._with_depths(self.body + message.get("body", b""))
            MutableHeaders(raw=self.start["headers"])["content-length"] = str(len(body))
            await self.send(self.start)
            await self.send(message | {"body": body})
        return None

    def _event(self, event: bytes) -> bytes:
        """Return an event of a stream, with `tah` if it ends a choice or has the usage."""
        if b'"finish_reason":"' in event or b'"choices":[],' in event:
            return b"data: " + self._with_depths(event.removeprefix(b"data: "))
        return event

    def _with_depths(self, body: bytes) -> bytes:
        response = json.loads(body)
        if "choices" not in response:  # an error
            return body
        self.answers.add_to(response)
        return json.dumps(response, ensure_ascii=False, separators=(",", ":")).encode()
