"""What a remote request costs this side: `python -m benchmarks.remote`.

CPU a request of the `openai` engine, without a budget and with one that is never reached, beside the bare `openai`
client (`AsyncOpenAI().chat.completions.create` under a semaphore), in turns, each in a process of its own, against one
endpoint in another; then the engine's throughput at an endpoint that refuses more than a number of requests in flight,
as a share of what that endpoint could do.
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import openai

from moebeam.model_runner.openai_engine.runner import load_openai_runner
from moebeam.model_runner.protocol import ModelRunner
from moebeam.schemas.records import Message, Request, Sampling
from moebeam.transforms.answer.budget import BudgetedRunner, ShardBudget, SpendingLimits
from moebeam.transforms.answer.expectation import Ceiling
from moebeam.transforms.money.account import Accounting
from moebeam.transforms.money.price_book import PriceBook
from tests.support.engines.engine_configs import engine_config

MODEL = "deepseek-v4-flash"
KEY_VARIABLE = "MOEBEAM_BENCHMARK_KEY"
CHAT = (Message("system", "s" * 2000), Message("user", "q" * 400))
NUM_PREFIX_TOKENS = 500
GOAL = 1.3
PRICES = f"""\
provider,model,effective_from_utc,effective_to_utc,window_utc,currency,cache_hit_per_mtok,cache_miss_per_mtok,\
output_per_mtok,evidence,note
deepseek,{MODEL},2020-01-01T00:00:00Z,,,USD,0.028,0.14,0.28,the mission's reference prices,
""".encode()


@contextlib.contextmanager
def endpoint(*args: str) -> Iterator[str]:
    """The address of a fake endpoint in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "tests.support.servers.fake_endpoint", "--port", str(port), *args]
    with subprocess.Popen(command) as served:
        try:
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            served.kill()


def requests(num: int) -> Iterator[Request]:
    """Requests that share a prefix, so that the gate for leaders is part of what is measured."""
    prefix = np.arange(NUM_PREFIX_TOKENS, dtype=np.int32)
    for i in range(num):
        yield Request(f"r{i}", np.append(prefix, np.int32(i)).astype(np.int32), CHAT, Sampling(100))


def measure_engine(base_url: str, num: int, concurrency: int, *, is_budgeted: bool = False) -> dict[str, float]:
    """CPU and wall clock of the engine, after a first tenth that is not counted.

    Args:
        is_budgeted: whether each request is held against a limit of money.
    """
    config = engine_config(
        "openai",
        "",
        MODEL,
        "r",
        provider="deepseek",
        base_url=base_url,
        api_key_variable=KEY_VARIABLE,
        max_concurrency=concurrency,
    )
    runner = load_openai_runner(config)
    asking: ModelRunner = runner
    if is_budgeted:
        ceiling = Ceiling.from_engine(Accounting("run", PriceBook.parse(PRICES, "prices.csv")), config)
        asking = BudgetedRunner(runner, ShardBudget(SpendingLimits(max_cost=Decimal(10**6)), ceiling=ceiling))
    before, started, requests_s = _cpu_s(), time.perf_counter(), 0.0
    num_ahead = num // 10
    for num_done, completion in enumerate(asking.generate(requests(num + num_ahead)), 1):
        assert completion.error is None, completion.error
        if num_done == num_ahead:
            before, started = _cpu_s(), time.perf_counter()
        elif num_done == num:
            # The last tenth empties the places, which says nothing about the rate.
            requests_s = (num - num_ahead) / (time.perf_counter() - started)
    counters = runner.counters()
    return {
        "cpu_ms": (_cpu_s() - before) / num * 1000,
        "requests_s": requests_s,
        "peak_in_flight": counters["peak_in_flight"],
        "num_calls": counters["num_calls"],
    }


def measure_bare(base_url: str, num: int, concurrency: int) -> dict[str, float]:
    """The same with nothing but the client."""

    async def run() -> dict[str, float]:
        client = openai.AsyncOpenAI(api_key="none", base_url=base_url, max_retries=0)
        places = asyncio.Semaphore(concurrency)
        messages: Any = [{"role": message.role, "content": message.content} for message in CHAT]

        async def ask() -> None:
            async with places:
                await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=100, temperature=0)

        await asyncio.gather(*(ask() for _ in range(num // 10)))
        before, started = _cpu_s(), time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(num)))
        found = {"cpu_ms": (_cpu_s() - before) / num * 1000, "requests_s": num / (time.perf_counter() - started)}
        await client.close()
        return found

    return asyncio.run(run())


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _measured(who: str, base_url: str, num: int, concurrency: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.remote", "--who", who, "--base_url", base_url]
    command += ["--num", str(num), "--concurrency", str(concurrency)]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, KEY_VARIABLE: "none", "TMPDIR": folder}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def compare(num: int, concurrency: int, turns: int) -> dict[str, float]:
    """Medians of both, and their ratio."""
    found: dict[str, list[float]] = {"bare": [], "engine": [], "budgeted": []}
    with endpoint("--delay_s", "0.3") as base_url:
        for _ in range(turns):
            for who, values in found.items():
                values.append(_measured(who, base_url, num, concurrency)["cpu_ms"])
    bare, engine, budgeted = (statistics.median(values) for values in found.values())
    return {
        "concurrency": concurrency,
        "bare_cpu_ms": bare,
        "engine_cpu_ms": engine,
        "budgeted_cpu_ms": budgeted,
        "ratio": engine / bare,
        "budgeted_ratio": budgeted / bare,
    }


def at_limit(num: int, limit: int, who: str) -> dict[str, Any]:
    """Throughput at an endpoint that takes `limit` requests at a time and a second for each."""
    with endpoint("--delay_s", "1.0", "--max_in_flight", str(limit)) as base_url:
        found = _measured(who, base_url, num, limit * 5)
    return {"who": who, "limit": limit, "share_of_limit": found["requests_s"] / limit, **found}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure; exits with 1 where the goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.remote")
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--who", choices=["bare", "engine", "budgeted"], help=argparse.SUPPRESS)
    parser.add_argument("--base_url", help=argparse.SUPPRESS)
    parser.add_argument("--concurrency", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.who is not None:
        if args.who == "bare":
            found = measure_bare(args.base_url, args.num, args.concurrency)
        else:
            is_budgeted = args.who == "budgeted"
            found = measure_engine(args.base_url, args.num, args.concurrency, is_budgeted=is_budgeted)
        print(json.dumps(found))
        return
    rows: list[dict[str, Any]] = [compare(args.num, concurrency, args.turns) for concurrency in (100, 1000)]
    rows += [at_limit(args.num * 2, 100, who) for who in ("engine", "budgeted")]
    for row in rows:
        print(json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}))
    if any(row.get(name, 0.0) > GOAL for row in rows for name in ("ratio", "budgeted_ratio")):
        sys.exit(1)


if __name__ == "__main__":
    main()
