"""What a function's bytecode says about whether it may be traced.

A trace sees what code does with values; it cannot see a test for None, an identity comparison, a caught exception or an
assignment to an attribute. These are read off the bytecode of each function that a traced forward calls.
"""

from __future__ import annotations

import dis
from dataclasses import dataclass
from types import CodeType
from weakref import WeakKeyDictionary

__all__ = ["CodeFacts", "facts_of"]

_FORBIDDEN = {
    "STORE_GLOBAL": "it sets the global variable {0!r}",
    "DELETE_GLOBAL": "it deletes the global variable {0!r}",
    "DELETE_ATTR": "it deletes the attribute {0!r}",
    "PUSH_EXC_INFO": "it has a `try` or `with` block",
    "BEFORE_WITH": "it has a `with` block",
    "BEFORE_ASYNC_WITH": "it has a `with` block",
    "LOAD_SPECIAL": "it has a `with` block",
    "MATCH_SEQUENCE": "it has a `match` statement",
    "MATCH_MAPPING": "it has a `match` statement",
    "MATCH_CLASS": "it has a `match` statement",
}
_CONSTRUCTORS = frozenset({"__init__", "__post_init__", "__new__"})
_FILLERS = frozenset({"CACHE", "EXTENDED_ARG", "PRECALL", "NOP", "RESUME", "NOT_TAKEN"})
_LOCALS = frozenset(
    {
        "LOAD_FAST",
        "LOAD_FAST_CHECK",
        "LOAD_FAST_BORROW",
        "LOAD_DEREF",
        "LOAD_FAST_LOAD_FAST",
        "STORE_FAST_LOAD_FAST",
        "LOAD_FAST_BORROW_LOAD_FAST_BORROW",
    }
)
_HIDDEN_NAMES = frozenset({"node", "tracer"})  # attributes of a traced value itself


@dataclass(frozen=True)
class CodeFacts:
    """What to know of one function.

    - `refusal`: why it cannot be traced, or None.
    - `tested`: the variables that it compares with None and never sets: its arguments and what it closes over.
    - `tests_rebound`: whether it compares with None some variable that it also sets.
    """

    refusal: str | None
    tested: frozenset[str] = frozenset()
    tests_rebound: bool = False


_known: WeakKeyDictionary[CodeType, CodeFacts] = WeakKeyDictionary()


def facts_of(code: CodeType) -> CodeFacts:
    """The facts about `code`."""
    facts = _known.get(code)
    if facts is None:
        facts = _known[code] = _read(code)
    return facts


def _read(code: CodeType) -> CodeFacts:
    instructions = [each for each in dis.get_instructions(code) if each.opname not in _FILLERS]
    tested: set[str] = set()
    rebound: set[str] = set()
    for index, each in enumerate(instructions):
        name, argument = each.opname, each.argval
        if name in _FORBIDDEN:
            return CodeFacts(_FORBIDDEN[name].format(argument))
        if name == "STORE_ATTR" and code.co_name not in _CONSTRUCTORS:
            return CodeFacts(f"it sets the attribute {argument!r}")
        if name == "STORE_DEREF" and argument in code.co_freevars:
            return CodeFacts(f"it sets the variable {argument!r} of an enclosing function")
        if name in ("LOAD_ATTR", "LOAD_METHOD") and argument in _HIDDEN_NAMES:
            return CodeFacts(f"it reads an attribute called {argument!r}, which a trace uses itself")
        if name in ("LOAD_GLOBAL", "LOAD_NAME") and argument == "type":
            return CodeFacts("it asks for the type() of something")
        if "STORE_FAST" in name or name == "STORE_DEREF":
            rebound.update(argument if isinstance(argument, tuple) else (argument,))
        before = index
        if name == "IS_OP":
            before -= 1
            if not _is_none(instructions[before]):
                return CodeFacts("it compares identities (`is`)")
        elif not name.endswith(("_IF_NONE", "_IF_NOT_NONE")):
            continue
        operand = _operand(code, instructions[:before])
        if operand is None:
            return CodeFacts("it compares a computed value with None")
        tested.add(operand)
    tested.discard("")
    return CodeFacts(None, frozenset(tested - rebound), bool(tested & rebound))


def _is_none(instruction: dis.Instruction) -> bool:
    return instruction.opname in ("LOAD_CONST", "RETURN_CONST") and instruction.argval is None


def _operand(code: CodeType, before: list[dis.Instruction]) -> str | None:
    """The variable on top of the stack; "" for an attribute of `self` or of a global; None for anything else."""
    position = len(before) - 1
    attributes = 0
    while position >= 0 and before[position].opname == "LOAD_ATTR":
        position -= 1
        attributes += 1
    if position < 0:
        return None
    source = before[position]
    if source.opname in ("LOAD_GLOBAL", "LOAD_CONST"):
        return ""
    if source.opname not in _LOCALS:
        return None
    variable = source.argval[-1] if isinstance(source.argval, tuple) else source.argval
    if code.co_argcount > 0 and variable == code.co_varnames[0] == "self":
        return ""
    return None if attributes else str(variable)
