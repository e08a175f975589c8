"""Pages of a list that others add to meanwhile: each begins behind the last item of the one before."""

from __future__ import annotations

import base64
import binascii
import json
import math
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, and_, or_
from sqlalchemy.orm import InstrumentedAttribute

from esper.services.errors import InvalidRequestError
from esper.services.ids import is_full_id

__all__ = ["Cursor", "Page"]

_Item = TypeVar("_Item")
_MAX_CURSOR = 200


@dataclass(frozen=True, slots=True)
class Page(Generic[_Item]):
    """Some items, and where the next page begins; None after the last."""

    items: tuple[_Item, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last item of a page of rows sorted by time and id, the latest first."""

    seconds: float
    id: str

    def encode(self) -> str:
        """Text for a URL; :meth:`decode` reads it back."""
        return base64.urlsafe_b64encode(json.dumps([self.seconds, self.id]).encode()).decode("ascii").rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Cursor:
        """Raises :class:`InvalidRequestError` if `text` is not a cursor."""
        try:
            if len(text) > _MAX_CURSOR:
                raise ValueError("it is too long")
            match json.loads(base64.b64decode(text + "=" * (-len(text) % 4), altchars="-_", validate=True)):
                case [float(seconds), str(row_id)] if math.isfinite(seconds) and is_full_id(row_id):
                    return cls(seconds, row_id)
            raise ValueError("it is not a time and an id")
        except (ValueError, binascii.Error, RecursionError) as cause:
            raise InvalidRequestError("the cursor is not one that a page came with; begin without one") from cause

    def behind(self, time: InstrumentedAttribute[float], row_id: InstrumentedAttribute[str]) -> ColumnElement[bool]:
        """The condition on rows that come after this one, where later times and larger ids come first."""
        # the first condition is implied by the second, and is one that an index answers
        condition: Any = and_(time <= self.seconds, or_(time < self.seconds, row_id < self.id))
        return condition  # type: ignore[no-any-return]  # a union that SQLAlchemy types loosely
