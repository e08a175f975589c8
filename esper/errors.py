"""The root of every error that Esper raises on purpose.

Each part derives its own errors from :class:`EsperError` and, where a built-in fits (``ValueError``, ``KeyError``,
``TypeError``), from that too, so that callers may catch either. A message names the value and the remedy.
"""


class EsperError(Exception):
    """Base class of Esper's errors."""

    def __str__(self) -> str:  # KeyError prints the repr of its argument, which hides line breaks and quotes
        return str(self.args[0]) if self.args else ""
