"""Load a running server with many clients, some of which disconnect, and check its errors, memory and requests.

    tah serve my-tah --port 8000 &
    python benchmark/load_test.py http://127.0.0.1:8000 --pid $! --minutes 10

Each client sends one request after another. Prompts and answers have different lengths, answers are streams, and each
request has one of several rules. One client in five disconnects during its answer.

The test fails (exit code 1) in three cases: there is an error; requests still run at the end; or the peak memory of the
second half of the time is more than 5 % above that of the first half. With `--stock` the server has a model of vLLM,
for comparison: requests have no rules, and there is no pool. The script needs `openai`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import string
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

from openai import AsyncOpenAI, OpenAIError

RULES: tuple[dict[str, object], ...] = (
    {},
    {"threshold": 0.6},
    {"policy": "confidence"},
    {"policy": "never"},
    {"policy": "random"},
)
LEAVE = 0.2  # share of requests whose client disconnects
SAMPLE = 5.0  # seconds between two measurements of memory and metrics


@dataclass
class Seen:
    """Results so far."""

    errors: Counter[str] = field(default_factory=Counter)
    left: int = 0  # number of clients that disconnected
    tokens: int = 0
    first: list[float] = field(default_factory=list)  # seconds to the first token
    whole: list[float] = field(default_factory=list)  # seconds to the last token, of complete answers
    memory: list[dict[str, float]] = field(default_factory=list)  # MiB of the server process and its children
    pool: list[float] = field(default_factory=list)  # share of the deep entries in use


async def client(api: AsyncOpenAI, model: str, options: argparse.Namespace, seed: int, end: float, seen: Seen) -> None:
    """Send one request after another until `end`."""
    longest: int = options.longest
    draw = random.Random(seed)
    while time.monotonic() < end:
        prompt = "".join(draw.choices(string.ascii_lowercase + " ", k=draw.randint(1, longest // 2)))
        new = draw.randint(1, longest // 2 - 1)
        stay = new if draw.random() > LEAVE else draw.randint(0, new)
        start, got = time.monotonic(), 0
        extra = {"ignore_eos": True, "vllm_xargs": {} if options.stock else draw.choice(RULES)}
        try:
            stream = await api.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=new,
                stream=True,
                temperature=draw.choice((0, 1)),
                extra_body=extra,
            )
            async for _ in stream:
                got += 1
                if got == 1:
                    seen.first.append(time.monotonic() - start)
                if got > stay:
                    break
            await stream.close()
        except OpenAIError as error:
            seen.errors[f"{type(error).__name__}: {error}"[:200]] += 1
            continue
        seen.tokens += got
        if stay < new:
            seen.left += 1
        else:
            seen.whole.append(time.monotonic() - start)


def metrics(url: str) -> dict[str, float]:
    """Return the Prometheus metrics by name, without labels."""
    lines = urlopen(f"{url}/metrics", timeout=30).read().decode().splitlines()
    return {
        line.partition("{")[0].split()[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")
    }


def resident(pid: int, name: str = "server") -> dict[str, float]:
    """Return the resident MiB of a process and its children, by name."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = {name: next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024}
    for number, child in enumerate(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        found |= resident(int(child), f"{name}.{number}")
    return found


async def watch(options: argparse.Namespace, end: float, seen: Seen) -> None:
    """Measure memory and pool until `end`."""
    while time.monotonic() < end:
        await asyncio.sleep(SAMPLE)
        if not options.stock:
            seen.pool.append((await asyncio.to_thread(metrics, options.url))["vllm:tah_deep_kv_usage_perc"])
        if options.pid is not None:
            seen.memory.append(resident(options.pid))


def percentiles(values: list[float]) -> dict[str, float]:
    """Return the 50th, 90th and 99th percentile; 0 for fewer than two values."""
    cuts = statistics.quantiles(values, n=100) if len(values) > 1 else [0.0] * 99
    return {name: round(cuts[at - 1], 3) for name, at in (("p50", 50), ("p90", 90), ("p99", 99))}


async def load(options: argparse.Namespace) -> bool:
    """Run the test, print its result as JSON, and return whether it passed."""
    api = AsyncOpenAI(base_url=f"{options.url}/v1", api_key=options.api_key, max_retries=0, timeout=300)
    model = (await api.models.list()).data[0].id
    seen, start = Seen(), time.monotonic()
    end = start + 60 * options.minutes
    everyone = [client(api, model, options, seed, end, seen) for seed in range(options.clients)]
    await asyncio.gather(*everyone, watch(options, end, seen))
    seconds = time.monotonic() - start
    for _ in range(30):  # the server ends requests of disconnected clients a step or two later
        running = metrics(options.url)["vllm:num_requests_running"]
        if not running:
            break
        await asyncio.sleep(1)
    whole = [sum(one.values()) for one in seen.memory]
    half = len(whole) // 2
    growth = max(whole[half:]) / max(whole[:half]) if half else 1.0
    result = {
        "clients": options.clients,
        "seconds": round(seconds, 1),
        "answers": len(seen.whole),
        "left": seen.left,
        "errors": dict(seen.errors),
        "tokens_per_second": round(seen.tokens / seconds, 1),
        "first_token_seconds": percentiles(seen.first),
        "answer_seconds": percentiles(seen.whole),
        "memory_mib": [{name: round(value, 1) for name, value in one.items()} for one in seen.memory],
        "memory_growth": round(growth, 3),
        "pool": [round(value, 3) for value in seen.pool],
        "still_running": running,
    }
    print(json.dumps(result))
    return not seen.errors and not running and growth <= 1.05


def main() -> None:
    """Run the test; exit with code 0 if it passes, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url", help="address of the server, such as http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=64, help="number of clients [%(default)s]")
    parser.add_argument("--minutes", type=float, default=10, help="duration [%(default)s]")
    parser.add_argument(
        "--longest", type=int, default=200, help="maximum tokens of prompt and answer together [%(default)s]"
    )
    parser.add_argument("--pid", type=int, help="process id of the server on this machine, to measure its memory")
    parser.add_argument("--stock", action="store_true", help="test a server of a model that is not a TaH model")
    parser.add_argument("--api-key", default="none", help="API key of the server [%(default)s]")
    raise SystemExit(0 if asyncio.run(load(parser.parse_args())) else 1)


if __name__ == "__main__":
    main()
