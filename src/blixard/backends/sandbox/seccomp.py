"""Turns the table of refused calls into a seccomp filter, without any library of the host.

Our own assembler, since nothing else works with `pip install` alone: PyPI's bindings load the host's libseccomp, which slim
images lack. What libseccomp adds (dozens of architectures, merging of rules) we do not need; the program is checked against the
table by an interpreter (Hypothesis) and every refused call is made for real in the tests. bubblewrap takes the same bytes.
"""

from __future__ import annotations

import ctypes
import platform
import struct
from collections.abc import Iterable

from blixard.backends.sandbox import kernel
from blixard.backends.sandbox.syscalls import AUDIT_ARCH, NUMBERS, RULES, Comparison, Condition, Machine, Rule
from blixard.errors import NotSupportedHere

LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
JUMP_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
JUMP_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
RETURN = 0x06
ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
ERRNO = 0x00050000
NUMBER_OFFSET, ARCH_OFFSET, ARGUMENTS_OFFSET = 0, 4, 16
X32_BIT = 0x40000000
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, constant. Jumps count the instructions to skip."""


def this_machine() -> Machine:
    """Return the machine we run on. Raises ``NotSupportedHere`` for one whose table we do not have."""
    try:
        return Machine(platform.machine())
    except ValueError:
        raise NotSupportedHere(
            f"there is no seccomp filter for {platform.machine()}",
            hint=f"standard isolation works on {' and '.join(Machine)}",
        ) from None


def compile_filter(machine: Machine) -> bytes:
    """Return the filter as an array of ``struct sock_filter``, as the kernel and bubblewrap take it."""
    instructions = assemble(machine, RULES)
    if len(instructions) > MAX_INSTRUCTIONS:
        raise ValueError(f"the filter has {len(instructions)} instructions, {MAX_INSTRUCTIONS} are allowed")
    return b"".join(struct.pack("=HBBI", *one) for one in instructions)


def install(program: bytes) -> None:
    """Filter every later system call of this process and its children; it cannot be taken off. Needs no_new_privs.

    Raises ``OSError``.
    """
    buffer = ctypes.create_string_buffer(program, len(program))
    kernel.set_seccomp_filter(len(program) // 8, ctypes.addressof(buffer))


def assemble(machine: Machine, rules: Iterable[Rule]) -> list[Instruction]:
    numbers = NUMBERS[machine]
    program = _check_machine(machine)
    for rule in rules:
        if rule.name in numbers:
            program += _assemble_rule(numbers[rule.name], rule)
    return [*program, (RETURN, 0, 0, ALLOW)]


def _check_machine(machine: Machine) -> list[Instruction]:
    """Calls by another machine's numbers (32-bit, x32) would slip through a table of ours: the process is killed."""
    program: list[Instruction] = [
        (LOAD_WORD, 0, 0, ARCH_OFFSET),
        (JUMP_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD_WORD, 0, 0, NUMBER_OFFSET),
    ]
    if machine is Machine.X86_64:
        program += [(JUMP_AT_LEAST, 0, 1, X32_BIT), (RETURN, 0, 0, KILL_PROCESS)]
    return program


def _assemble_rule(number: int, rule: Rule) -> list[Instruction]:
    """The accumulator holds the call's number before and, if the rule is for another call, after it."""
    body: list[Instruction] = []
    for case in rule.cases or ((),):
        body += _assemble_case(case, rule.error)
    if rule.cases:
        body.append((RETURN, 0, 0, ALLOW))
    return [(JUMP_EQUAL, 0, len(body), number), *body]


def _assemble_case(case: tuple[Condition, ...], error: int) -> list[Instruction]:
    """Built from the end, so that every condition knows how far away the next case is."""
    body: list[Instruction] = [(RETURN, 0, 0, ERRNO | error)]
    for condition in reversed(case):
        body = _assemble_condition(condition, len(body)) + body
    return body


def _assemble_condition(condition: Condition, rest: int) -> list[Instruction]:
    """Fall through if the condition holds, else skip the ``rest`` instructions of the case."""
    load: Instruction = (LOAD_WORD, 0, 0, ARGUMENTS_OFFSET + 8 * condition.argument)
    values = condition.values
    match condition.test:
        case Comparison.ANY_BIT:
            return [load, (JUMP_ANY_BIT, 0, rest, values[0])]
        case Comparison.EQUALS:
            return [load, (JUMP_EQUAL, 0, rest, values[0])]
        case Comparison.NOT_IN:
            last = len(values) - 1
            return [load, *((JUMP_EQUAL, rest + last - i, 0, value) for i, value in enumerate(values))]
