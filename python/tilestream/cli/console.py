"""What the commands print beside their result. All of it goes to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@contextmanager
def loading_bar(what: str) -> Iterator[Progress | None]:
    """A progress bar on stderr while a model loads; None, and nothing printed, when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress as Bar, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"Loading {what}", total=None)

        def advance(done_bytes: int, total_bytes: int) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes)

        yield advance


def note(text: str) -> None:
    """One line on stderr, dimmed on a terminal."""
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


@contextmanager
def progress_bars(totals: dict[str, int]) -> Iterator[list[Callable[[], None]]]:
    """A bar on stderr for each name, and what moves it on by one; nothing is shown when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield [lambda: None for _ in totals]
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        yield [partial(bar.advance, bar.add_task(name, total=total)) for name, total in totals.items()]
