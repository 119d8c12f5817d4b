"""The processes that torchrun or `accelerate launch` started for one command, and the messages between them.

Work is divided by number: unit n of the work belongs to process n modulo the number of processes. Results go through
files that all processes can read. The messages are small values in a store of torch, which tell a process that the
others have finished a unit, or that one of them has failed. A process that waits asks the store in intervals, so it has
no time limit, and it stops when another process fails.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from .files import differences

if TYPE_CHECKING:
    from torch.distributed import Store

POLL = 0.1  # seconds between questions to the store
CONNECTING = 600.0  # seconds until the store of the launcher must answer
FAILING = 10.0  # the same, in a process that has failed and has no store yet
GRACE = 1.0  # seconds in which the first process to fail prints its error, before the launcher ends all processes
VISIBLE = 60.0  # seconds until what one machine has written must be visible on another
FAILED = "failed"  # key of the number of processes that have failed in a piece of work

Answer = TypeVar("Answer")

_begun = 0  # pieces of work; all processes begin the same ones in the same order, so equal numbers name equal work
_store: Store | None = None  # of the launcher
_work: Store | None = None  # of the piece of work that this process has begun and not ended
_first: bool | None = None  # whether this process was the first to fail in this piece of work; None: it has not failed


class OtherProcessFailed(ValueError):
    """Another process of the same command has failed. That process reports why."""


class Processes:
    """The processes that share one piece of work: this process, and how it reaches the others.

    The object is a context manager for the whole work. If the block raises an error, the other processes stop this
    piece of work. A later piece of work, with an object of its own, is not affected. At the end of the block the first
    process waits until the others have read all messages.

        evaluate("DIR", ["gsm8k"], "runs/a", processes=Processes.started())

    Args:
        rank: Number of this process.
        world: Number of processes.
        store: Store of the messages of this piece of work; None if there is only one process.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: Store | None = None) -> None:
        self.rank, self.world, self._store = rank, world, store

    @classmethod
    def started(cls) -> Processes:
        """Return the processes that torchrun or `accelerate launch` started, or this process alone.

        Raises:
            ValueError: The launcher's store does not answer.
        """
        global _begun, _work, _first
        if count() == 1:
            return cls()
        try:
            store = _piece(_begun, CONNECTING)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"the {count()} processes of WORLD_SIZE cannot reach each other ({str(error).splitlines()[0]}); start "
                "them with torchrun or accelerate launch"
            ) from error
        _begun, _work, _first = _begun + 1, store, None
        return cls(rank(), count(), store)

    @property
    def lead(self) -> bool:
        """Whether this is the first process, which joins the results and prints."""
        return self.rank == 0

    def owns(self, number: int) -> bool:
        """Return whether unit `number` of the work belongs to this process."""
        return number % self.world == self.rank

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        global _work
        store = self._store
        if store is None:
            return
        if kind is None:
            self.add("left", 1)
            while self.lead and self.add("left", 0) < self.world:  # its machine may run the store
                time.sleep(POLL)
            _work = None
        elif not isinstance(error, OtherProcessFailed):
            _fail(lambda: store)

    # -- messages ----------------------------------------------------------------------------------------------------

    def tell(self, key: str, value: str = "") -> None:
        """Send a value to all processes. Every key is sent once.

        Raises:
            OtherProcessFailed: Another process has failed.
        """
        if self._store is not None:
            self._ask(lambda store: store.set(key, value))

    def wait_for(self, key: str, meanwhile: Callable[[], object] = lambda: None) -> str:
        """Return the value of a key when a process has sent it.

        Args:
            key: Key of `tell`.
            meanwhile: Function that is called in intervals while the process waits.

        Raises:
            OtherProcessFailed: Another process has failed.
        """
        while not self._ask(lambda store: store.check([key])):
            meanwhile()
            time.sleep(POLL)
        return self._ask(lambda store: store.get(key)).decode()

    def add(self, key: str, number: int) -> int:
        """Add to a count that all processes share, and return it.

        Raises:
            OtherProcessFailed: Another process has failed.
        """
        return self._ask(lambda store: store.add(key, number))

    def agree(self, what: str, settings: Mapping[str, Any], without: Sequence[str] = ()) -> None:
        """Send the settings of the first process, or compare those of another process with them.

        The first process calls this when it has prepared the output. Another process waits for it here.

        Args:
            what: Name of the settings in the message.
            settings: Settings of this process.
            without: Entries that may differ.

        Raises:
            ValueError: The settings differ, for example because a machine has another file under the same path.
        """
        if self.world == 1:
            return
        text = json.dumps(settings)
        if self.lead:
            self.tell("settings", text)
            return
        first = json.loads(self.wait_for("settings"))
        if differs := differences(first, json.loads(text), without, now="here"):
            raise ValueError(f"the {what} differs from that of the first process: {differs}")

    def see(self, reached: Callable[[], object], lack: str) -> None:
        """Wait until a file that another process has written can be read here.

        Network file systems show new contents with a delay.

        Args:
            reached: Function that returns whether the contents are there.
            lack: What is missing, for the message.

        Raises:
            ValueError: The contents do not appear within `VISIBLE` seconds.
            OtherProcessFailed: Another process has failed.
        """
        end = time.monotonic() + VISIBLE
        while not reached():
            self._ask(lambda store: None)
            if time.monotonic() > end:
                raise ValueError(f"{lack}; all processes must write to the same file system")
            time.sleep(POLL)

    def _ask(self, question: Callable[[Store], Answer]) -> Answer:
        """Return what the store answers, unless another process has failed."""
        assert self._store is not None
        try:
            if self._store.check([FAILED]):
                raise OtherProcessFailed("another process failed; its own message gives the reason")
            return question(self._store)
        except RuntimeError as error:  # the connection is closed: the process or machine of the store has ended
            raise OtherProcessFailed("the first process has ended; its own message gives the reason") from error


def count() -> int:
    """Return the number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Return the number of this process."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int | None:
    """Return the number of this process on its machine; None if it is the only one or no launcher started it."""
    number = os.environ.get("LOCAL_RANK")
    return int(number) if number is not None and count() > 1 else None


def first_to_fail() -> bool:
    """Return whether this process, which has failed, is the first one, so that only one of them reports an error.

    The other processes learn of the failure in the piece of work that this process has begun, or else in its next one.
    In a process that is not the first, the call takes `GRACE` seconds.
    """
    return _fail(lambda: _work or _piece(_begun, FAILING))


def _fail(store: Callable[[], Store]) -> bool:
    """Send the failure of this process to a piece of work, and return whether it is the first one there."""
    global _first
    if _first is None:
        _first = True
        if count() > 1:
            with suppress(RuntimeError, ValueError):  # without a store, each process reports its own error
                _first = store().add(FAILED, 1) == 1
        if not _first:
            time.sleep(GRACE)
    return _first


def _piece(number: int, seconds: float) -> Store:
    """Return the store of a piece of work.

    Raises:
        RuntimeError, ValueError: As `_connect`.
    """
    from torch.distributed import PrefixStore

    return PrefixStore(f"tah/{number}", _connect(seconds))


def _connect(seconds: float) -> Store:
    """Return the store of the launcher.

    Raises:
        RuntimeError, ValueError: It does not answer, or the environment does not name it.
    """
    global _store
    if _store is None:
        from torch.distributed import rendezvous

        _store = next(iter(rendezvous("env://", timeout=timedelta(seconds=seconds))))[0]
    return _store
