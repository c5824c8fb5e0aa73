"""Batches read ahead of the steps that take them, so that a step finds its own waiting."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")

_THREADS = 4


class Prefetch(Generic[T]):
    """Calls `read(step)` for the next `depth` steps in threads; a context manager, which ends them.

    What `take` returns, and what it raises, is what `read` of that step would have: only when it is read differs. As a
    batch is a function of its step, a jump to another step, back to a checkpoint say, just starts reading anew there.
    """

    def __init__(self, read: Callable[[int], T], *, first: int, depth: int) -> None:
        """Start with step `first`; a depth of 0 reads nothing ahead and starts no thread.

        Args:
            read: a function of the step alone, which threads may call at the same time.
        """
        self._read, self._depth = read, depth
        self._next = first
        self._ahead: deque[Future[T]] = deque()
        self._threads = ThreadPoolExecutor(min(depth, _THREADS), thread_name_prefix="read-ahead") if depth else None
        self._fill()

    def take(self, step: int) -> T:
        """What `read(step)` gives, waiting for it if need be; the steps after it are then on their way."""
        if self._threads is None:
            return self._read(step)
        if step != self._next - len(self._ahead):
            self._drop()
            self._next = step
            self._fill()
        taken = self._ahead.popleft()
        self._fill()
        return taken.result()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._drop()
        if self._threads is not None:
            self._threads.shutdown()

    def _fill(self) -> None:
        while self._threads is not None and len(self._ahead) < self._depth:
            self._ahead.append(self._threads.submit(self._read, self._next))
            self._next += 1

    def _drop(self) -> None:
        while self._ahead:
            self._ahead.pop().cancel()
