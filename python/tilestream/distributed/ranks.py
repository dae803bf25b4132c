"""Rank 0's hold on the other ranks: it tells them, hears from them, and ends them all when one has died."""

from __future__ import annotations

import atexit
import logging
import pickle
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from tilestream.distributed.control import Link, Stop
from tilestream.engine.errors import RankDiedError

logger = logging.getLogger("tilestream.distributed")

# The death of one rank is heard of through others, too, whose collectives break off: so long for its own last word.
_LAST_WORD_S = 0.3
_STOP_S = 5  # what a rank gets to end by itself when it is told to


@dataclass(frozen=True, slots=True)
class Failed:
    """A rank's last word: what went wrong there."""

    text: str


@dataclass(slots=True)
class Worker:
    """Another rank.

    Args:
        link: the way to it.
        process: None if somebody else has started it.
    """

    link: Link
    process: subprocess.Popen | None

    def end_in_words(self) -> str:
        """How it has ended, without a last word."""
        if self.process is None:
            return "has broken off without a word: its process was killed, or its machine is gone"
        try:
            code = self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            return "has closed its connection"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has ended with exit code {code}"


class Ranks:
    """All other ranks, which have come.

    Args:
        workers: in order of their ranks, from 1 on.
        at_close: called when close() is through.
    Attributes:
        world_size: how many ranks there are, this one included.
        failure: None while all live; once it is there, the others are gone.
    """

    def __init__(self, workers: list[Worker], at_close: Callable[[], None] = lambda: None) -> None:
        self._workers, self._at_close = workers, at_close
        self.world_size = len(workers) + 1
        self.failure: RankDiedError | None = None
        self._told: list[Callable[[RankDiedError], None]] = []
        self._answers: dict[int, Any] = {}
        self._changed = threading.Condition()  # guards failure, the answers and who is told
        self._stopping = self._ending = False
        self._watcher = threading.Thread(target=self._watch, name="tilestream-ranks", daemon=True)
        self._watcher.start()
        atexit.register(self.close)

    def tell(self, message: Any) -> None:
        """Send every rank a message.

        Raises:
            RankDiedError: one has died.
        """
        self.send(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def send(self, message: bytes) -> None:
        """The same, of one that is pickled already."""
        if self.failure is not None:
            raise self.failure
        try:
            for worker in self._workers:
                worker.link.orders.send_bytes(message)
        except OSError as error:
            raise self.fail(error) from None

    def answers(self) -> list[Any]:
        """One answer of every rank, in their order, however long that takes.

        Raises:
            RankDiedError: one has died.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or len(self._answers) == len(self._workers))
            if self.failure is not None:
                raise self.failure
            answers = [self._answers[worker.link.rank] for worker in self._workers]
            self._answers.clear()
            return answers

    def unless_one_dies(self, wait: Callable[[], None]) -> None:
        """Do what waits for the other ranks, on a thread of its own, which is left alone when one of them dies.

        Raises:
            RankDiedError: one has died.
        """
        outcome: list[BaseException | None] = []

        def run() -> None:
            try:
                wait()
                outcome.append(None)
            except BaseException as error:
                outcome.append(error)
            with self._changed:
                self._changed.notify_all()

        threading.Thread(target=run, name="tilestream-ranks-wait", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or outcome)
        if not outcome:
            raise self.failure
        if outcome[0] is not None:
            raise self.fail(outcome[0])

    def fail(self, error: BaseException) -> RankDiedError:
        """What to raise for an error in this rank: the others are in the middle of a step, so it ends all.

        Args:
            error: the error of another rank's death, perhaps, or of what was called after close(); that is told then.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None, 3 * _LAST_WORD_S)
        self._end(reason_of(error, self.world_size))
        return self.failure

    def on_failure(self, told: Callable[[RankDiedError], None]) -> None:
        """Have somebody told when a rank has died: once, on the thread that finds out."""
        with self._changed:
            self._told.append(told)
            failure = self.failure
        if failure is not None:
            told(failure)

    def close(self) -> None:
        """End the other ranks, and torch.distributed here. The second call does nothing: others may have it by then."""
        import torch.distributed as dist

        if self._stopping:
            return
        self._stopping = True
        atexit.unregister(self.close)
        if self.failure is None:
            with suppress(RankDiedError):
                self.tell(Stop())
            self._watcher.join(_STOP_S)
        closed = "the ranks have ended, for this model was closed"
        self._kill(closed)
        with self._changed:
            self.failure = self.failure or RankDiedError(closed)
        if dist.is_initialized():
            dist.destroy_process_group()
        self._at_close()

    def _end(self, text: str) -> None:
        """Nothing goes on: end the others, and say why. Only the first call counts, and none after close()."""
        with self._changed:
            if self._ending or self.failure is not None:
                self._changed.wait_for(lambda: self.failure is not None)
                return
            self._ending = True
        self._kill(text)
        with self._changed:
            self.failure = RankDiedError(f"{text}; all ranks end")
            self._changed.notify_all()
        for told in self._told:
            told(self.failure)
        _abort_nccl()  # last, for it may hang itself

    def _kill(self, reason: str) -> None:
        for worker in self._workers:
            if worker.process is not None:
                worker.process.kill()
            worker.link.hang_up(reason)  # enough for those that somebody else has started
        for worker in self._workers:
            if worker.process is not None:
                with suppress(subprocess.TimeoutExpired):
                    worker.process.wait(_STOP_S)

    # From here on: the watcher's thread.

    def _watch(self) -> None:
        living = {worker.link.life: worker for worker in self._workers}
        words: list[tuple[Worker, Failed]] = []  # in the order of their coming
        silent: list[Worker] = []
        while living and not words and not silent:
            self._hear(living, words, silent, None)
        end_s = time.monotonic() + _LAST_WORD_S
        while living and not silent and (left_s := end_s - time.monotonic()) > 0:
            self._hear(living, words, silent, left_s)
        if self._stopping:
            self._hear_the_end(living)
            return
        # Who died without a word was the first; the others only tell of what that did to them.
        if silent:
            worker, how = silent[0], silent[0].end_in_words()
        else:
            worker, how = words[0][0], f"has failed: {words[0][1].text}"
        where = f"process {worker.link.pid}" + (f" on {worker.link.host}" if worker.process is None else "")
        self._end(f"rank {worker.link.rank} of {self.world_size} ({where}) {how}")

    def _hear(
        self, living: dict[Connection, Worker], words: list, silent: list[Worker], timeout_s: float | None
    ) -> None:
        for connection in wait(list(living), timeout_s):
            worker = living[connection]
            try:
                answer = connection.recv()
            except (EOFError, OSError):  # also a time-out, where keep-alive finds nobody
                del living[connection]
                if all(worker is not other for other, _ in words):
                    silent.append(worker)
                continue
            except Exception as error:
                answer = Failed(f"its answer cannot be read: {in_words(error)}")
            if isinstance(answer, Failed):
                words.append((worker, answer))
            else:
                with self._changed:
                    self._answers[worker.link.rank] = answer
                    self._changed.notify_all()

    def _hear_the_end(self, living: dict[Connection, Worker]) -> None:
        while living:
            self._hear(living, [], [], None)


def _abort_nccl() -> None:
    """Collectives that wait for ranks that are gone return now. (Those of gloo see it themselves.)"""
    import torch.distributed as dist

    if dist.is_initialized() and "nccl" in dist.get_backend_config():
        dist.distributed_c10d._abort_process_group()


def in_words(error: BaseException) -> str:
    """One line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def reason_of(error: BaseException, world_size: int) -> str:
    """Why all ranks end, where rank 0 has met this error."""
    return str(error) if isinstance(error, RankDiedError) else f"rank 0 of {world_size} has failed: {in_words(error)}"
