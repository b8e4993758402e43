"""A pickle is a program. Here its opcodes are interpreted by a machine that runs nothing.

It knows dicts, lists, tuples and plain values, and what a `Vocabulary` gives for the names that a pickle may ask for:
no import, no call, no attribute of anything else can be reached, and what a pickle makes is bounded by its own size.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lit_gpt.errors import DataError

MAX_STEPS = 1 << 19  # opcodes, each of which may make an object of 64 bytes; those of a 7B model are some 70,000
SPARE_ENTRIES = 1 << 12  # what calls may make, for files so small that nothing is bounded by their size


@dataclass(frozen=True)
class Vocabulary:
    """What a kind of pickle may ask for, and what it gets."""

    names: Mapping[tuple[str, str], Any]
    """(module, name) -> a function that checks its arguments, or a value; neither need be what Python means by it."""
    states: Mapping[type, Callable[[Any, Any], None]]
    """Type of an object -> a function of it and the state that a pickle gives it, which checks both."""
    way_out: str
    """What to do about a file that cannot be read, for messages."""
    persistent: Callable[[Any], Any] | None = None
    """Reference to what lies outside the pickle -> what is meant; None: there are none."""
    keys: tuple[type, ...] = ()
    """Further types of keys in dicts; hashing one must take no longer than making it."""


def interpret(content: bytes, vocabulary: Vocabulary, where: object, max_steps: int = MAX_STEPS) -> Any:
    """What a pickle describes.

    Args:
        where: its file, for messages.
        max_steps: opcodes that it may have.

    Raises:
        DataError: it is damaged, or asks for anything that the vocabulary lacks. Nothing is run.
    """
    try:
        return _Machine(content, vocabulary, where, max_steps).run()
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"{where} is damaged ({type(error).__name__}: {error}); {vocabulary.way_out}") from error


UNREADABLE = (ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, OverflowError, NotImplementedError)


_MARK = object()
_SIZED = (str, bytes, tuple, list, dict)
_PLAIN_KEYS = (str, int, type(None))
_MAX_NUMBER = 1 << 64  # larger ones are slow to hash, and many of them hash alike
_MEMO = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")


class _Machine:
    """Interprets the opcodes of one pickle."""

    def __init__(self, content: bytes, vocabulary: Vocabulary, where: object, max_steps: int) -> None:
        self._content, self._vocabulary, self._where, self._max_steps = content, vocabulary, where, max_steps
        self._callable = {id(value) for value in vocabulary.names.values() if callable(value)}
        self._keys = (*_PLAIN_KEYS, *vocabulary.keys)
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._entries_left = SPARE_ENTRIES + len(content)

    def run(self) -> Any:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(self._content)):
            if step == self._max_steps:
                raise ValueError(f"more than {self._max_steps:,} steps")
            if opcode.name == "STOP":
                return self._stack.pop()
            if opcode.name not in _STEPS:
                raise DataError(f"{self._where} uses {opcode.name}, which a checkpoint never needs (refused, not run)")
            _STEPS[opcode.name](self, argument)
        raise ValueError("no end")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def push_number(self, value: int) -> None:
        if not -_MAX_NUMBER < value < _MAX_NUMBER:
            raise ValueError(f"a number of {value.bit_length():,} bits")
        self._stack.append(value)

    def nothing(self, _: Any) -> None:
        """Protocol numbers and frames."""

    def pop(self, _: Any) -> None:
        self._stack.pop()

    def _above_mark(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                found = self._stack[index + 1 :]
                del self._stack[index:]
                return found
        raise ValueError("no mark")

    def tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise ValueError("a tuple of more than there is")
        parts = self._stack[-count:]
        del self._stack[-count:]
        self._stack.append(tuple(parts))

    def marked_tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._above_mark()))

    def marked_list(self, _: Any) -> None:
        self._stack.append(self._above_mark())

    def append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def appends(self, _: Any) -> None:
        self._extend(self._above_mark())

    def _extend(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("appending to what is no list")
        self._stack[-1].extend(values)

    def set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set(key, value)

    def _set(self, key: Any, value: Any) -> None:
        if type(self._stack[-1]) is not dict or not isinstance(key, self._keys):  # a deep tuple takes for ever to hash
            raise ValueError(f"an entry of a {type(self._stack[-1]).__name__} under a {type(key).__name__}")
        self._stack[-1][key] = value

    def set_items(self, _: Any) -> None:
        flat = self._above_mark()
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            self._set(key, value)

    def put(self, number: Any) -> None:
        self._memo[len(self._memo) if number is None else number] = self._stack[-1]

    def get(self, number: int) -> None:
        self._stack.append(self._memo[number])

    def named(self, argument: str) -> None:
        self._push_known(*argument.split(" ", 1))

    def named_on_stack(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._push_known(module, name)

    def _push_known(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError(f"a name made of a {type(module).__name__} and a {type(name).__name__}")
        if (module, name) not in self._vocabulary.names:
            raise DataError(
                f"{self._where} asks for {module}.{name}, which a checkpoint never needs (refused, not run); "
                f"{self._vocabulary.way_out}"
            )
        self._stack.append(self._vocabulary.names[module, name])

    def call(self, _: Any) -> None:
        """Only what the vocabulary has."""
        arguments, target = self._stack.pop(), self._stack.pop()
        if id(target) not in self._callable or type(arguments) is not tuple:
            raise ValueError(f"a call of {type(target).__name__}")
        # a few bytes call again with what lies in the memo: what all calls together make is bounded by the file
        self._entries_left -= len(arguments) + sum(len(each) for each in arguments if isinstance(each, _SIZED))
        if self._entries_left < 0:
            raise ValueError("calls that make more than the file has")
        self._stack.append(target(*arguments))

    def build(self, _: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) not in self._vocabulary.states:
            raise ValueError(f"state of a {type(target).__name__}")
        self._vocabulary.states[type(target)](target, state)

    def persistent(self, _: Any) -> None:
        if self._vocabulary.persistent is None:
            raise ValueError("a reference to what lies outside")
        self._stack.append(self._vocabulary.persistent(self._stack.pop()))


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(
        """BININT BININT1 BININT2 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
        STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8""".split(),
        _Machine.push,
    ),
    **dict.fromkeys(("LONG1", "LONG4", "LONG", "INT"), _Machine.push_number),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "MARK": lambda machine, _: machine.push(_MARK),
    "PROTO": _Machine.nothing,
    "FRAME": _Machine.nothing,
    "POP": _Machine.pop,
    "TUPLE": _Machine.marked_tuple,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": _Machine.marked_list,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    **dict.fromkeys(_MEMO, _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.named_on_stack,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
