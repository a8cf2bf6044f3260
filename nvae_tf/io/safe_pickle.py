"""Reads the data in a pickle without running anything that the pickle asks for.

Python's own unpickler calls whatever a file names. This one only parses (with `pickletools`, which
executes nothing) and builds plain data; every class or function that a file names must be on the
caller's list, which says what plain data to put in its place. Anything else is refused by name.

Memory and time are in proportion to the size of the pickle: copies of existing objects are counted, and
keys are plain scalars (Python would hash deeply nested tuples for ever, or crash).
"""

import pickletools
from collections.abc import Callable
from typing import IO, Any

from nvae_tf.io.errors import UserError, short_message, short_repr

Factories = dict[str, Callable[..., Any]]


class UnsafePickle(UserError):
    """A pickle is damaged or asks for more than plain data; the text says what it holds."""


class Object:
    """Stands for an instance whose state the pickle sets after a factory has created it.

    Subclasses implement `set_state`.
    """

    def set_state(self, state: Any) -> None:
        """Takes the state that the pickle holds."""
        raise NotImplementedError


class Namespace(dict, Object):
    """Stands for an `argparse.Namespace`: a dictionary of its attributes."""

    def set_state(self, state):
        """Takes the attributes."""
        if not isinstance(state, dict):
            raise UnsafePickle("a namespace without attributes")
        self.update(state)


class OrderedDict(dict, Object):
    """Stands for a `collections.OrderedDict`, whose extra attributes (``_metadata``) are dropped."""

    def __init__(self, items=()):
        pairs = [(key, value) for key, value in items]
        _check_keys(key for key, _ in pairs)
        super().__init__(pairs)

    def set_state(self, state):
        """Drops the attributes."""


def load(
    file: IO[bytes], factories: Factories, persistent_load: Callable[[Any], Any] | None = None
) -> Any:
    """Reads one pickle.

    Args:
        file: A binary file at the pickle's first byte; afterwards it is after the last one.
        factories: What to call instead of each class or function that is allowed, by ``"module name"``.
        persistent_load: Turns a persistent id into the object that it refers to.

    Returns:
        The object that the pickle holds.

    Raises:
        UnsafePickle: The pickle is damaged, or names something that is not in `factories`.
    """
    machine = _Machine(factories, persistent_load)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count > _MAX_OPERATIONS:
                raise UnsafePickle(f"a pickle of more than {_MAX_OPERATIONS} operations")
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.run(opcode.name, argument)
    except UnsafePickle:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged pickle fails in any way
        raise UnsafePickle(f"a damaged pickle ({short_message(error, 100)})") from None
    raise UnsafePickle("a pickle without an end")


class Global:
    """A class or function that the pickle names."""

    def __init__(self, name: str, factory: Callable[..., Any]):
        self.name, self.factory = name, factory


_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set}
_FIXED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# These take some seconds; the largest official checkpoints have 300,000.
_MAX_OPERATIONS = 2_000_000
# Totals over all collections and texts that calls receive; CIFAR-10's texts have 30 million characters.
_MAX_COPIED = {"entries": 1_000_000, "characters": 2**27}
_SCALARS = (str, bytes, int, float, bool, type(None))


def _check_keys(keys) -> None:
    if not all(isinstance(key, _SCALARS) for key in keys):
        raise UnsafePickle("a key that is neither text nor a number")


class _Machine:
    """The stack machine that a pickle is a program for; its methods are the operations."""

    def __init__(self, factories: Factories, persistent_load):
        self.factories, self.persistent_load = factories, persistent_load
        self.stack: list[Any] = []
        self.marks: list[int] = []  # lengths of the stack where a mark was set
        self.memo: dict[int, Any] = {}
        self.copied = dict.fromkeys(_MAX_COPIED, 0)

    def run(self, name: str, argument: Any) -> None:
        """Executes one operation."""
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _FIXED_TUPLES:
            count = _FIXED_TUPLES[name]
            if len(stack) < count:
                raise UnsafePickle("a tuple of nothing")
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        else:
            operation = getattr(self, f"_{name.lower()}", None)
            if operation is None:
                raise UnsafePickle(f"the pickle operation {name}")
            operation(argument)

    def _since_mark(self) -> list:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _pairs(self) -> list[tuple]:
        items = self._since_mark()
        _check_keys(items[::2])
        return list(zip(items[::2], items[1::2], strict=True))

    def _count(self, value) -> None:
        """Counts what a call or a state will copy."""
        for kind, types in (("entries", (list, tuple, dict, set)), ("characters", (str, bytes))):
            self.copied[kind] += len(value) if isinstance(value, types) else 0
            if self.copied[kind] > _MAX_COPIED[kind]:
                raise UnsafePickle("a pickle that would unfold to much more than it is")

    def _tuple(self, _):
        self.stack.append(tuple(self._since_mark()))

    def _list(self, _):
        self.stack.append(self._since_mark())

    def _dict(self, _):
        self.stack.append(dict(self._pairs()))

    def _append(self, _):
        item = self.stack.pop()
        self.stack[-1].append(item)

    def _appends(self, _):
        items = self._since_mark()
        self.stack[-1].extend(items)

    def _setitem(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        _check_keys([key])
        self.stack[-1][key] = value

    def _setitems(self, _):
        pairs = self._pairs()
        self.stack[-1].update(pairs)

    def _additems(self, _):
        items = self._since_mark()
        _check_keys(items)
        self.stack[-1].update(items)

    def _pop(self, _):
        self.stack.pop()

    def _global(self, argument):
        self._find(argument)

    def _stack_global(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise UnsafePickle("a class or function without a name")
        self._find(f"{module} {name}")

    def _find(self, name: str):
        if name not in self.factories:
            shown_name = short_repr(name.replace(" ", ".")).strip("'")
            raise UnsafePickle(f"the file asks for {shown_name}, which is not data")
        self.stack.append(Global(name, self.factories[name]))

    def _call(self):
        arguments, target = self.stack.pop(), self.stack.pop()
        if not isinstance(target, Global):
            raise UnsafePickle("a call of something that is not a class or function")
        for argument in arguments:
            self._count(argument)
        self.stack.append(target.factory(*arguments))

    def _reduce(self, _):
        self._call()

    def _newobj(self, _):
        self._call()

    def _build(self, _):
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Object):
            raise UnsafePickle("a state for something that has none")
        self._count(state)
        self.stack[-1].set_state(state)

    def _persid(self, argument):
        self.stack.append(argument)
        self._binpersid(None)

    def _binpersid(self, _):
        if self.persistent_load is None:
            raise UnsafePickle("a reference to data outside the pickle")
        self.stack.append(self.persistent_load(self.stack.pop()))
