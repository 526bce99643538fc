"""One progress bar for all that the demo does, and one for what it is doing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")


class Track(Protocol):
    """Goes through `items` and shows how far it is."""

    def __call__(self, items: Sequence[T], description: str) -> Iterator[T]:
        """Yield the items; the job counts as done also when the caller stops early."""


@contextmanager
def tracking(console: Console, jobs: int) -> Iterator[Track]:
    """Show progress over `jobs` calls of the function that this gives."""
    with Progress(console=console, transient=True) as progress:
        total = progress.add_task("demo", total=jobs)

        def track(items: Sequence[T], description: str) -> Iterator[T]:
            job = progress.add_task(description, total=len(items))
            try:
                for item in items:
                    yield item
                    progress.advance(job)
            finally:  # early stopping leaves in the middle
                progress.remove_task(job)
                progress.advance(total)

        yield track
