"""The output file: every answer is appended once, and a job that was killed goes on where the file ends."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from tilestream.batch.lines import BatchFileError, Line

# An answer is in the kernel's hands when append() returns, so a killed job loses none. A machine that goes
# down loses at most those of the last second, and the next run gives them again.
_SYNC_S = 1.0


class Journal:
    """Appends whole lines to a file that nobody else may write meanwhile.

    Args:
        path: made if it is not there.
    Raises:
        BatchFileError: another job writes to it.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise BatchFileError(f"{path}: another batch job writes to this file") from None
        self._synced_s = time.monotonic()
        _sync_directory(path.parent)

    def resume(self, lines: Sequence[Line], model_name: str | None = None) -> set[str]:
        """Drop a half-written end, and check that what is there answers these lines.

        Args:
            model_name: of the model that answers now; None: not known.
        Returns:
            The ids of the lines that are answered.
        Raises:
            BatchFileError: an entry that answers none of these lines, or is of another model.
        """
        ids = {line.id for line in lines}
        custom_ids = {line.custom_id for line in lines}
        done: set[str] = set()
        whole_bytes = 0
        with open(os.dup(self._fd), "rb") as file:
            file.seek(0)
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    break
                whole_bytes += len(raw)
                answer_id, custom_id, model = _read_entry(raw, f"{self.path}, line {number}")
                if answer_id not in ids:
                    what = "was asked something else" if custom_id in custom_ids else "is not in the input"
                    raise BatchFileError(
                        f"{self.path}, line {number}: custom_id {custom_id!r} {what}; give another output file"
                    )
                if None not in (model, model_name) and model != model_name:
                    raise BatchFileError(
                        f"{self.path}, line {number}: answered by {model!r}, and this is {model_name!r}; "
                        "give another output file"
                    )
                done.add(answer_id)
        os.ftruncate(self._fd, whole_bytes)
        return done

    def append(self, entry: dict) -> None:
        """Write one answer, in ASCII: some readers would split lines at other characters of Unicode's too."""
        left = memoryview(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        while left:
            left = left[os.write(self._fd, left) :]
        if time.monotonic() - self._synced_s >= _SYNC_S:
            self._sync()

    def close(self) -> None:
        self._sync()
        os.close(self._fd)

    def _sync(self) -> None:
        os.fsync(self._fd)
        self._synced_s = time.monotonic()


def _read_entry(raw: bytes, where: str) -> tuple[str, str | None, str | None]:
    """An answer's id, custom_id and model (None if it is an error)."""
    try:
        entry = json.loads(raw)
        body = (entry["response"] or {}).get("body") or {}
        return entry["id"], entry["custom_id"], body.get("model")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BatchFileError(f"{where}: this is no answer of a batch; give another output file") from None


def _sync_directory(path: Path) -> None:
    """A new file is there after a power failure only once its directory is written."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
