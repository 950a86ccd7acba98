"""Chat templates that do not end or fill the memory are errors of the record; all others are what they were."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from litgpt_akl.models import template_budget
from litgpt_akl.models.chat_template import ChatTemplate
from litgpt_akl.models.template_budget import BudgetedEnvironment, OverBudget, within_budget

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "World"}]
DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x OP ns.x %}{% endfor %}{{ ns.x }}"
TIME, SPACE = "does not end within 1 s", "takes more than 0.25 GiB of memory"
NUMBER = "computes with a number of more than 65,536 bits"
HOSTILE = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
    "{% endfor %}": TIME,
    "{% for a in range(99999) %}{% for m in messages %}{{ range(99999)|list|length }}{% endfor %}{% endfor %}": TIME,
    "{% for a in range(9999) %}{{ range(99999)|sum }}{% endfor %}": TIME,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}": TIME,
    "{{ 'a' * 3000000000 }}": SPACE,
    "{{ messages[0].content * 3000000000 }}": SPACE,
    "{{ [0] * 3000000000 }}": SPACE,
    "{{ 'a'|center(3000000000) }}": SPACE,
    "{{ messages[0].content|center(3000000000) }}": SPACE,
    "{{ messages[0].content.ljust(3000000000) }}": SPACE,
    "{{ '%3000000000d' % 1 }}": SPACE,
    "{{ '%3000000000d'|format(1) }}": SPACE,
    "{{ '{:3000000000}'.format(1) }}": SPACE,
    "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}": SPACE,
    "{{ ('a' * 99999).replace('a', 'b' * 99999) }}": SPACE,
    "{{ (['a' * 99999] * 99999)|join }}": SPACE,
    "{{ [1]|batch(3000000000, 0)|list }}": SPACE,
    "{{ [messages]|tojson(indent=3000000000) }}": SPACE,
    "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}": SPACE,
    "{% set ns = namespace(x=[]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x }}": f"{TIME}|{SPACE}",
    DOUBLING.replace("OP", "+"): SPACE,
    DOUBLING.replace("OP", "~"): SPACE,
    "{{ 10 ** (10 ** 9) }}": NUMBER,
    "{% set ns = namespace(x=7) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}": NUMBER,
    "{{ messages|length|round(10 ** 9, 'ceil') }}": NUMBER,
}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(template_budget, "SECONDS", 1.0)
    monkeypatch.setattr(template_budget, "MEMORY", 2**28)


@pytest.mark.parametrize("source", HOSTILE)
def test_what_does_not_end_or_fills_the_memory_is_an_error_of_the_record(small, source):
    begin = time.monotonic()
    with pytest.raises((ValueError, OverBudget), match=HOSTILE[source]):
        ChatTemplate(source, {}).render(MESSAGES)
    assert time.monotonic() - begin < 8
    # what is limited for a template is not limited for what comes next
    assert len(bytearray(2**29)) == 2**29
    assert ChatTemplate("{{ messages[0].content }}", {})._render(MESSAGES, {}) == "Hello"


def test_the_end_of_the_time_is_told_also_where_its_exception_is_lost(small):
    # as CPython does now and then where a signal comes within code in C
    def lose() -> None:
        try:
            while True:
                pass
        except OverBudget:
            raise SystemError("error return without exception set") from None

    def fail() -> None:
        raise SystemError("of another kind")

    with pytest.raises(OverBudget, match=TIME):
        within_budget(lose)
    with pytest.raises(SystemError, match="of another kind"):
        within_budget(fail)


def test_the_template_of_a_checkpoint_has_a_budget(small, tmp_path: Path):
    (tmp_path / "chat_template.jinja").write_text("{{ 'a'|center(3000000000) }}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="the chat template takes more than"):
        ChatTemplate.find(tmp_path).render(MESSAGES)


ORDINARY = {
    "{{ 6 * 7 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 1.5 * 2 }} {{ 2.0 ** 0.5 }}": "42 1024 0.5 3.0 1.4142135623730951",
    "{{ 'ab' * 3 }} {{ [1] * 2 }} {{ true * 2 }} {{ 'a'|center(5) }}|": "ababab [1, 1] 2   a  |",
    "{{ 2.567|round(1) }} {{ 42|round }} {{ 2.1|round(method='ceil') }} {{ 1234|round(-2) }}": "2.6 42 3.0 1200",
    "{% for m in messages %}{{ m.role ~ ': ' ~ m.content + '\n' }}{% endfor %}": "user: Hello\nassistant: World\n",
    "{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.revindex0 }}{{ loop.length }} "
    "{{ (loop.nextitem or m).role }} {% endfor %}": "1TrueFalse12 assistant 2FalseTrue02 assistant ",
    "{{ messages[0].items()|list|length }} {{ messages[0].get('role') }} {{ messages[0].other }}|": "2 user |",
    "{{ messages[0].clear is defined }} {{ messages[0].__class__ is defined }} {{ {'a': 1}.a }}": "False False 1",
    "{{ {'items': 1}.items()|list }} {{ {'first': 1}.first }}": "[('items', 1)] 1",
}


@pytest.mark.parametrize("source", ORDINARY)
def test_ordinary_templates_are_what_they_were(source):
    plain = ImmutableSandboxedEnvironment().from_string(source).render(messages=MESSAGES)
    assert BudgetedEnvironment().from_string(source).render(messages=MESSAGES) == plain == ORDINARY[source]


def test_another_timer_goes_on():
    fired: list[float] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: fired.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        begin = time.monotonic()
        assert within_budget(lambda: time.sleep(0.2) or 5) == 5
        while not fired and time.monotonic() - begin < 5:
            time.sleep(0.01)
        assert fired and 0.45 < fired[0] - begin < 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_errors_of_a_template_stay_its_errors():
    with pytest.raises(jinja2.UndefinedError):
        within_budget(lambda: BudgetedEnvironment().from_string("{{ a.b.c }}").render())


GROWN = """
import ctypes
from litgpt_akl.models.template_budget import MEMORY, within_budget

class Large(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 2**21)]

assert within_budget(lambda: "Hello") == "Hello"
function, argument = ctypes.CDLL(None).getpid, Large()
room = bytearray(2 * MEMORY)
# the argument is copied onto the stack, which grows by so much
within_budget(lambda: function(argument))
print(len(within_budget(lambda: bytearray(MEMORY // 2))))
"""


def test_a_process_that_has_grown_has_the_room_that_a_small_one_has():
    # as after the models were read: a stack that may not grow ends the process by SIGSEGV
    ended = subprocess.run([sys.executable, "-c", GROWN], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, f"{template_budget.MEMORY // 2}\n"), ended.stderr


def test_a_forked_process_is_measured_itself(small):
    within_budget(list)
    process = os.fork()
    if process == 0:
        # by its parent's memory this one has no room left
        room = bytearray(2**29)
        with suppress(BaseException):
            os._exit(len(within_budget(lambda: bytearray(2**27))) + len(room) != 2**27 + 2**29)
        os._exit(2)
    assert os.waitpid(process, 0)[1] == 0
