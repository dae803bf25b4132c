"""What the commands print beside their result. All of it goes to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Stage = Callable[[int, int, str], None]  # steps done, steps in all, what is being done


@contextmanager
def loading_bar(what: str) -> Iterator[Progress | None]:
    """A progress bar while a model loads; None where none is shown."""
    with _bars("DownloadColumn", "TimeElapsedColumn") as bars:
        if bars is None:
            yield None
            return
        task = bars.add_task(f"Loading {what}", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def stage_bar(what: str) -> Iterator[Stage | None]:
    """A progress bar of a job in stages; None where none is shown."""
    with _bars("MofNCompleteColumn", "TimeElapsedColumn") as bars:
        if bars is None:
            yield None
            return
        task = bars.add_task(what, total=None)
        yield lambda done, total, stage: bars.update(task, completed=done, total=total, description=f"{stage} of {what}")


@contextmanager
def progress_bars(totals: dict[str, int]) -> Iterator[list[Callable[[], None]]]:
    """A bar for each name, and what moves it on by one."""
    with _bars("MofNCompleteColumn", "TimeRemainingColumn") as bars:
        if bars is None:
            yield [lambda: None for _ in totals]
            return
        yield [partial(bars.advance, bars.add_task(name, total=total)) for name, total in totals.items()]


def note(text: str) -> None:
    """One line on stderr, dimmed on a terminal."""
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


@contextmanager
def _bars(*columns: str) -> Iterator[Bars | None]:
    """rich's progress bars on stderr, with these columns behind name and bar; None when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.console import Console

    shown = [progress.TextColumn("{task.description}"), progress.BarColumn(), *(getattr(progress, name)() for name in columns)]
    with progress.Progress(*shown, console=Console(stderr=True), transient=True) as bars:
        yield bars
