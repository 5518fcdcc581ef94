"""The filter against its table: by an interpreter of our own, and by making every refused call for real."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blixard.backends.sandbox import seccomp
from blixard.backends.sandbox.seccomp import ALLOW, ERRNO, KILL_PROCESS, assemble, compile_filter, this_machine
from blixard.backends.sandbox.syscalls import (
    AUDIT_ARCH,
    DENIED,
    NUMBERS,
    RULES,
    UNREADABLE,
    Comparison,
    Condition,
    Machine,
    Rule,
)

INTERESTING = st.sampled_from(
    [
        0,
        1,
        2,
        10,
        16,
        17,
        0x80,
        0o4755,
        0o755,
        0o100,
        0x5412,
        0x541C,
        0x10000000,
        0x10000011,
        0xFFFFFFFF,
        2**32 + 0x5412,
        2**63 + 17,
    ]
)
ARGUMENTS = st.lists(INTERESTING | st.integers(0, 2**64 - 1), min_size=6, max_size=6)


def execute(program: list[seccomp.Instruction], data: bytes) -> int:
    """Run a filter as the kernel does (https://docs.kernel.org/userspace-api/seccomp_filter.html)."""
    accumulator = 0
    at = 0
    while True:
        code, if_true, if_false, constant = program[at]
        at += 1
        if code == seccomp.RETURN:
            return constant
        if code == seccomp.LOAD_WORD:
            accumulator = struct.unpack_from("=I", data, constant)[0]
            continue
        holds = {
            seccomp.JUMP_EQUAL: accumulator == constant,
            seccomp.JUMP_AT_LEAST: accumulator >= constant,
            seccomp.JUMP_ANY_BIT: bool(accumulator & constant),
        }[code]
        at += if_true if holds else if_false


def request(number: int, arguments: list[int], arch: int) -> bytes:
    return struct.pack("=IIQ6Q", number, arch, 0, *arguments)


def holds(condition: Condition, arguments: list[int]) -> bool:
    value = arguments[condition.argument] & 0xFFFFFFFF
    match condition.test:
        case Comparison.ANY_BIT:
            return bool(value & condition.values[0])
        case Comparison.EQUALS:
            return value == condition.values[0]
        case Comparison.NOT_IN:
            return value not in condition.values


def verdict(machine: Machine, number: int, arguments: list[int]) -> int:
    """What the table says."""
    for rule in RULES:
        if NUMBERS[machine].get(rule.name) == number:
            cases = rule.cases or ((),)
            if any(all(holds(condition, arguments) for condition in case) for case in cases):
                return ERRNO | rule.error
    return ALLOW


@given(machine=st.sampled_from(Machine), data=st.data(), arguments=ARGUMENTS)
def test_the_filter_says_what_the_table_says(machine: Machine, data: st.DataObject, arguments: list[int]) -> None:
    known = st.sampled_from(sorted(NUMBERS[machine].values()))
    number = data.draw(known | st.integers(0, 600))
    program = assemble(machine, RULES)
    assert execute(program, request(number, arguments, AUDIT_ARCH[machine])) == verdict(machine, number, arguments)


@given(machine=st.sampled_from(Machine), number=st.integers(0, 600), arch=st.integers(0, 2**32 - 1))
def test_calls_of_another_machine_end_the_process(machine: Machine, number: int, arch: int) -> None:
    if arch != AUDIT_ARCH[machine]:
        assert execute(assemble(machine, RULES), request(number, [0] * 6, arch)) == KILL_PROCESS


@given(number=st.integers(0x40000000, 0xFFFFFFFF))
def test_x32_calls_end_the_process(number: int) -> None:
    data = request(number, [0] * 6, AUDIT_ARCH[Machine.X86_64])
    assert execute(assemble(Machine.X86_64, RULES), data) == KILL_PROCESS


@pytest.mark.parametrize("machine", Machine)
def test_a_filter_fits_into_the_kernel_s_limit(machine: Machine) -> None:
    assert len(compile_filter(machine)) // 8 <= seccomp.MAX_INSTRUCTIONS


def test_every_rule_has_a_number_on_some_machine() -> None:
    numbers = [set(table) for table in NUMBERS.values()]
    assert {rule.name for rule in RULES} == set.union(*numbers)
    assert len({rule.name for rule in RULES}) == len(RULES)


TRY_ALL = """
import ctypes, json, os, sys
from blixard.backends.sandbox import kernel, seccomp
libc = ctypes.CDLL(None, use_errno=True)
kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
seccomp.install(seccomp.compile_filter(seccomp.this_machine()))
said = {}
for name, number, arguments in json.load(sys.stdin):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in arguments])
    said[name] = ctypes.get_errno() if result < 0 else 0
print(json.dumps(said))
"""


def arguments_for(rule: Rule) -> list[int]:
    """Arguments that fulfil the first case of the rule, and are harmless nonsense else."""
    arguments = [-1] * 6 if not rule.cases else [0] * 6
    for condition in rule.cases[0] if rule.cases else ():
        arguments[condition.argument] = 17 if condition.test is Comparison.NOT_IN else condition.values[0]
    return arguments


def test_every_refused_call_is_refused_for_real() -> None:
    """By a root process if the tests run as root: nothing but the filter refuses it."""
    numbers = NUMBERS[this_machine()]
    rules = [rule for rule in RULES if rule.name in numbers]
    calls = [(rule.name, numbers[rule.name], arguments_for(rule)) for rule in rules]
    done = subprocess.run(
        [sys.executable, "-c", TRY_ALL], input=json.dumps(calls), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {rule.name: rule.error for rule in rules}
    assert len(rules) >= len(DENIED) + len(UNREADABLE) - 10


def test_ordinary_work_goes_on_under_the_filter() -> None:
    source = """
import os, socket, subprocess, sys, tempfile, threading
from blixard.backends.sandbox import kernel, seccomp
kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
seccomp.install(seccomp.compile_filter(seccomp.this_machine()))
t = threading.Thread(target=print, args=("thread",)); t.start(); t.join()
subprocess.run(["sh", "-c", "echo process"], check=True)
a, b = socket.socketpair(); a.send(b"x")
with tempfile.NamedTemporaryFile() as file: os.chmod(file.name, 0o700)
socket.create_server(("127.0.0.1", 0)).close()
print("done")
"""
    done = subprocess.run([sys.executable, "-u", "-c", source], capture_output=True, text=True, check=False)
    assert done.stdout == "thread\nprocess\ndone\n", done.stderr
