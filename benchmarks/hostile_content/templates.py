"""Hostile templates: escapes from the sandbox, and little programs that take hours or all memory.

Each takes effect for one row of several. Half of them stand in the job, the others in a checkpoint.
"""

import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.hostile_content.case import HostileCase, small_job
from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH

_LOOPS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"


def _sixty_times(start: str, step: str) -> str:
    loop = f"{{% for i in range(60) %}}{{% set s.t = {step} %}}{{% endfor %}}"
    return f"{{% set s = namespace(t={start}) %}}{loop}{{{{ s.t }}}}"


_OF_THE_JOB = {
    "attribute of a class by map": "{{ ['x']|map(attribute='__class__.__base__')|list }}",
    "attribute of a class by a format string": "{{ '{0.__class__.__base__}'.format(text) }}",
    "format string by reference": "{% set f = 'x {0.__init__.__globals__}'.format %}{{ f(namespace) }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__call__.__func__.__globals__ }}",
    "frame of a generator": "{% set g = [1, 2]|reject('odd') %}{{ g.gi_frame.f_back.f_builtins }}",
    "file by include": "{% include '/proc/self/environ' %}",
    "file by import": "{% from '/etc/hostname' import x %}",
    "change of a list of the row": "{{ parts.append('more') }}",
    "loops in loops": _LOOPS,
    "loop without a step of its own": "{{ range(10**10)|select('divisibleby', 10**9)|list }}",
    "sum over an endless range": "{{ range(10**11)|sum }}",
    "macro that calls itself twice": "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([[x]]) }}{% endfor %}",
    "text that doubles": _sixty_times("'x'", "s.t ~ s.t"),
    "list that doubles": _sixty_times("[1]", "s.t + s.t"),
    "number that squares itself": _sixty_times("9", "s.t * s.t"),
    "power of powers": "{{ (9 ** (9 ** 9)) % 10 }}",
    "shifted number as text": "{{ (2**20000000)|string|length }}",
    "text multiplied": "{{ ('x' * (10**10))|length }}",
    "width from an argument": "{{ '%*s' % (3000000000, 'x') }}",
    "width of a centred text": "{{ text|center(5000000000) }}",
    "replacement that grows": "{{ ('a' * 20000)|replace('a', 'b' * 20000)|replace('b', 'c' * 20000)|length }}",
    "indent of a billion": "{{ 'a\\nb'|indent(4000000000) }}",
    "JSON with an indent of a billion": "{{ [[1]]|tojson(indent=4000000000) }}",
    "links in brackets": "{{ (('http://' * 60000) ~ ('(' * 60000))|urlize }}",
    "tags that never end": "{{ ('<!--' * 400000)|striptags }}",
    "batches of nothing": "{{ [1]|batch(2000000000, 'x')|list|length }}",
    "slices of nothing": "{{ [1]|slice(2000000000)|list|length }}",
    "shadow of the budget": "{% set _moebeam_budget = namespace(step=text.upper) %}" + _LOOPS,
}
_OF_A_CHECKPOINT = {
    "subclasses of object": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "loops in loops": _LOOPS,
    "endless range": "{{ range(10**11)|list|length }}",
    "text that doubles": _sixty_times("'x'", "s.t ~ s.t"),
    "number that squares itself": _sixty_times("9", "s.t * s.t"),
    "macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "prompt of two gigabytes": "{{ ('word ' * 400000000) }}",
    "change of the messages": "{{ messages.pop() }}",
    "error of its own": "{{ raise_exception('not these messages') }}",
    "years by strftime_now": "{{ strftime_now('%Y' * 100000000)|length }}",
}


def _in_job(payload: str, folder: Path) -> AbstractContextManager[Path]:
    # A loop and no condition: what a template sets in a branch is held for a column.
    template = "{{ text }}{% for _ in times %}" + payload + "{% endfor %}"
    rows = [
        {"id": f"row {row}", "text": f"ticket {row}", "times": ["once"] if row == 2 else [], "parts": ["a", "b"]}
        for row in range(5)
    ]
    return small_job(folder, rows, prompt={"template": template})


def _in_checkpoint(payload: str, folder: Path) -> AbstractContextManager[Path]:
    checkpoint = folder / "checkpoint"
    shutil.copytree(CHECKPOINT_PATH, checkpoint)
    (checkpoint / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.content }}{% endfor %}"
        "{% if 'hostile' in messages[-1].content %}" + payload + "{% endif %}"
    )
    rows = [{"id": f"row {row}", "text": "hostile" if row == 2 else f"ticket {row}"} for row in range(5)]
    model = {"path": str(checkpoint), "encoding": "chat_template"}
    return small_job(folder, rows, model=model)


_OTHERS = frozenset(f"row {row}" for row in range(5)) - {"row 2"}

_HARMLESS = frozenset({"globals of a function"})
"""Templates of checkpoints may ask for what is not there, which is empty text."""

CASES: tuple[HostileCase, ...] = (
    *(
        HostileCase(f"in the job: {name}", lambda folder, payload=payload: _in_job(payload, folder), _OTHERS)
        for name, payload in _OF_THE_JOB.items()
    ),
    *(
        HostileCase(
            f"of a checkpoint: {name}",
            lambda folder, payload=payload: _in_checkpoint(payload, folder),
            _OTHERS,
            is_harmless=name in _HARMLESS,
        )
        for name, payload in _OF_A_CHECKPOINT.items()
    ),
)
