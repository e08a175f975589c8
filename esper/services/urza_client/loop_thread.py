"""An event loop on a thread of its own, for code that is not async."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from esper.forking import reset_after_fork

__all__ = ["LoopThread"]

_Result = TypeVar("_Result")


class LoopThread:
    """Runs coroutines, from any thread. The thread starts with the first one; a forked child has one of its own."""

    def __init__(self) -> None:
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Forget the parent's thread; see `esper.forking`."""
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, work: Coroutine[Any, Any, _Result], seconds: float | None = None) -> _Result:
        """The result of `work`, or its exception; ``concurrent.futures.CancelledError`` if the thread was stopped.

        After `seconds` it is called off, and a `TimeoutError` is raised.
        """
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_run, args=(self._loop,), name="esper-urza-client", daemon=True)
                self._thread.start()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        except TimeoutError:
            future.cancel()
            raise

    def stop(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Call off what runs, run `last`, and end the thread, if there is one. Another :meth:`run` starts it anew."""
        with self._lock:  # until the end, so that nothing of the next loop is mixed up with this one
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
            if loop is None or thread is None:
                return
            ended = asyncio.run_coroutine_threadsafe(_end(last), loop)
            thread.join()
        ended.result()


async def _end(last: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await last()
    finally:
        asyncio.get_running_loop().stop()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
