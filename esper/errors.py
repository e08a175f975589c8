"""The root of every error that Esper raises on purpose, and how a message shows a value.

Each part derives its own errors from :class:`EsperError` and, where a built-in fits (``ValueError``, ``KeyError``,
``TypeError``), from that too, so that callers may catch either. A message names the value and the remedy.
"""

from types import BuiltinFunctionType, FunctionType, MethodType

__all__ = ["EsperError", "kind_of", "shown"]

_LONGEST = 80


class EsperError(Exception):
    """Base class of Esper's errors."""

    def __str__(self) -> str:  # KeyError prints the repr of its argument, which hides line breaks and quotes
        return str(self.args[0]) if self.args else ""


def shown(value: object) -> str:
    """`value` within a sentence, such as `3`, `'adam'`, `a Sequential`: on one line, and never cut in the middle."""
    if isinstance(value, type):
        return f"the type {value.__name__}"
    if isinstance(value, FunctionType | BuiltinFunctionType | MethodType):
        return f"the function {value.__name__}"
    if isinstance(value, str):
        return repr(value) if len(value) <= _LONGEST else f"{value[:_LONGEST]!r}..."
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # whatever a repr of the user's raises must not hide what is to be told
        return kind_of(value)
    if len(text) <= _LONGEST and text.isprintable() and " at 0x" not in text:
        return text
    return kind_of(value)


def kind_of(value: object) -> str:
    """The class of `value` within a sentence: `a Sequential`, `an int`."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
