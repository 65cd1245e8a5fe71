"""The provider of a script, in a process of its own: `python -m benchmarks.endpoint_chaos.server FOLDER PORT`.

Reads `script.json` of the folder, appends to `calls.jsonl` what arrived and what became of it, and ends with its
standard input. While `name-unknown` lies in the folder, `command_line.py` finds no address for any name.
"""

import asyncio
import json
import random
import ssl
import sys
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Self

from benchmarks.endpoint_chaos.certificates import Certificates
from benchmarks.endpoint_chaos.questions import find_answer, is_refused, row_of
from benchmarks.endpoint_chaos.script import MAX_TROUBLES_A_ROW, Phase, Script
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, as_events, error

LOG, SCRIPT, NAME_UNKNOWN = "calls.jsonl", "script.json", "name-unknown"

_SERVER_ERRORS = (500, 502, 503, 504)
_PAUSE_S = 0.03
"""Between the answer that begins a phase and the phase: the client has read the answer by then."""


class ScriptedProvider:
    """Answers by the row and the phase; everything happens in the endpoint's loop.

    Attributes:
        kinds_met: of the phases that began, in order.
    """

    def __init__(self, folder: Path, script: Script, port: int) -> None:
        self._folder, self._script = folder, script
        self._log = (folder / LOG).open("a", buffering=1)
        self._tls: ssl.SSLContext | None = None
        if script.is_tls:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificates_in(folder).valid)
        self.endpoint = FakeEndpoint(self.reply, port=port, tls=self._tls, on_end=self.end)
        self._phase: Phase | None = None
        self._is_phase_due = False
        self._next_phase = 0
        self._num_calls_left = 0
        self._num_answers = 0
        self._asked: Counter[int] = Counter()
        self._troubled: Counter[int] = Counter()
        self._outcomes: dict[int, str] = {}
        self._opening: asyncio.Task[None] | None = None
        self.kinds_met: list[str] = []

    def __enter__(self) -> Self:
        self.endpoint.__enter__()
        self.endpoint.schedule(self._be_ready)
        return self

    def __exit__(self, *unused: object) -> None:
        self.endpoint.__exit__()
        self._log.close()

    def reply(self, call: Call) -> Reply:
        """What a call gets; writes that it came."""
        row = row_of(call.last_user_text)
        self._asked[row] += 1
        self._write("call", number=call.number, row=row)
        outcome, reply = self._choose(call, row)
        self._outcomes[call.number] = outcome
        return reply

    def end(self, call: Call, reply: Reply, is_sent: bool) -> None:
        """Write what became of a call."""
        outcome = self._outcomes.pop(call.number, "unread")
        self._write("end", number=call.number, row=row_of(call.last_user_text), how=outcome if is_sent else "gone")
        if is_sent and outcome == "answered":
            self._num_answers += 1
            self.advance()

    def advance(self) -> None:
        """Begin the next phase if it is time."""
        phases = self._script.phases
        if self._is_phase_due or self._phase is not None or self._next_phase == len(phases):
            return
        if phases[self._next_phase].num_answers_before <= self._num_answers:
            self._is_phase_due = True
            self.endpoint.schedule(self._begin, _PAUSE_S)

    def _begin(self) -> None:
        phase = self._phase = self._script.phases[self._next_phase]
        self._is_phase_due, self._num_calls_left = False, phase.num_calls
        self._write("phase", index=self._next_phase, kind=phase.kind, is_on=True)
        self.kinds_met.append(phase.kind)
        if not phase.is_outage:
            return
        if phase.kind == "expired_certificate":
            self._load("expired")
        if phase.kind == "unknown_name":
            (self._folder / NAME_UNKNOWN).touch()
        if phase.kind in ("closed_port", "unknown_name"):
            self.endpoint.close_port()
        self.endpoint.schedule(self._finish, phase.lasts_s)

    def _finish(self) -> None:
        phase = self._phase
        assert phase is not None
        (self._folder / NAME_UNKNOWN).unlink(missing_ok=True)
        if phase.kind == "expired_certificate":
            self._load("valid")
        if phase.kind in ("closed_port", "unknown_name"):
            self._opening = asyncio.get_running_loop().create_task(self.endpoint.open_port())
        self._write("phase", index=self._next_phase, kind=phase.kind, is_on=False)
        self._phase = None
        self._next_phase += 1
        self.advance()

    def _load(self, which: str) -> None:
        assert self._tls is not None
        self._tls.load_cert_chain(getattr(certificates_in(self._folder), which))
        self.endpoint.cut_connections()

    def _choose(self, call: Call, row: int) -> tuple[str, Reply]:
        phase = self._phase
        if phase is not None and phase.is_outage and phase.kind != "expired_certificate":
            return _fail_everybody(phase, call.number)
        if self._script.has_refusals and is_refused(row):
            message = f"This model's maximum context length is 65536 tokens, you requested {70000 + row}"
            return "refused", error(400, message, code="context_length_exceeded")
        dice = random.Random(f"{self._script.seed} {row} {self._asked[row]}")
        answer: Any = find_answer(row, may_lack_usage=self._script.may_lack_usage)
        is_stream = bool(call.body.get("stream"))
        whole = Reply(
            None if is_stream else answer,
            events=as_events(answer) if is_stream else None,
            delay_s=self._script.answer_s * dice.uniform(0.5, 1.5),
        )
        if call.body.get("max_tokens") == 1:
            # The engine asks an answered request once more, to tell a row's trouble from the provider's.
            return "canary", whole
        if phase is None:
            return "answered", whole
        self._num_calls_left -= 1
        if self._num_calls_left == 0:
            self.endpoint.schedule(self._finish)
        if phase.kind == "slow":
            return "answered", Reply(whole.body, events=whole.events, delay_s=phase.lasts_s)
        if self._num_calls_left < 0 or self._troubled[row] >= MAX_TROUBLES_A_ROW or dice.random() >= phase.share:
            return "answered", whole
        self._troubled[row] += 1
        return _trouble(phase, whole, dice)

    def _write(self, what: str, **values: object) -> None:
        self._log.write(json.dumps({"at": time.monotonic(), "what": what, **values}) + "\n")

    def _be_ready(self) -> None:
        """Say that calls may come, and begin a phase that is there from the start."""
        self._write("ready")
        self.advance()


def certificates_in(folder: Path) -> Certificates:
    """Where a script's certificates lie."""
    return Certificates(folder / "authority.pem", folder / "valid.pem", folder / "expired.pem")


def _fail_everybody(phase: Phase, number: int) -> tuple[str, Reply]:
    status, reply = 429, error(429, "Rate limit reached", code="rate_limit_reached")
    if phase.kind == "overloaded_retry_after":
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=1), usegmt=True)
        reply = error(429, "Rate limit reached", retry_after="1" if number % 2 else date)
    elif phase.kind == "server_errors":
        status = _SERVER_ERRORS[number % len(_SERVER_ERRORS)]
        reply = error(status, "The server had an error")
    elif phase.kind == "bad_key":
        status, reply = 401, error(401, "Authentication Fails, Your api key is invalid", code="invalid_request_error")
    elif phase.kind == "no_credit":
        status, reply = 402, error(402, "Insufficient Balance", code="invalid_request_error")
    elif phase.kind == "no_such_model":
        status, reply = 400, error(400, "Model Not Exist", code="invalid_request_error")
    elif phase.kind == "no_such_path":
        status, reply = 404, error(404, "Not Found")
    return str(status), reply


def _trouble(phase: Phase, whole: Reply, dice: random.Random) -> tuple[str, Reply]:
    if phase.kind == "some_server_errors":
        status = dice.choice(_SERVER_ERRORS)
        return str(status), error(status, "The server had an error")
    if phase.kind == "silent":
        return "answered", Reply(whole.body, events=whole.events, delay_s=phase.lasts_s)
    half = None if whole.events is None else whole.events[: len(whole.events) // 2]
    if phase.kind == "resets":
        fault = dice.choice(("half_body", "disconnect"))
        return "cut", Reply(whole.body, events=half, delay_s=whole.delay_s, fault=fault)
    if half is not None:
        return "cut", Reply(events=half, delay_s=whole.delay_s)
    content = json.dumps(whole.body).encode()
    return "cut", Reply(content[: len(content) // 2], delay_s=whole.delay_s)


def main() -> None:
    """Serve until standard input ends."""
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    with ScriptedProvider(folder, Script.read(folder / SCRIPT), port):
        sys.stdin.read()


if __name__ == "__main__":
    main()
