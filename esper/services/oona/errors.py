"""Errors of the transports. A message names the server, without its password, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from esper.services.errors import ServiceError

if TYPE_CHECKING:
    from esper.contracts.messages import OonaMessage

__all__ = ["BusAddressError", "BusAuthenticationError", "BusError", "BusRefusedError", "BusUnavailableError"]


class BusError(ServiceError):
    """A transport could not do what was asked."""


class BusAddressError(BusError, ValueError):
    """The address of a server that cannot be one."""


class BusUnavailableError(BusError, ConnectionError):
    """The server cannot be reached, does not answer in time, or is not ready. Trying again may help."""

    unsent: Sequence[OonaMessage] = ()
    """The messages that the server has not confirmed; it may have some of them all the same."""


class BusAuthenticationError(BusUnavailableError):
    """The server does not accept the user name or the password."""


class BusRefusedError(BusError):
    """The server answers, and refuses some of the messages. Those in `refused` are not sent, the others are."""

    def __init__(self, message: str, refused: Sequence[OonaMessage] = ()) -> None:
        super().__init__(message)
        self.refused = refused
