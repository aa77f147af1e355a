"""How far a long run is, on stderr: a bar on a terminal, now and then a line elsewhere."""

import sys
import time

import click

from quant.display import human_bytes

QUIET_SECONDS = 2.0
"""Runs shorter than this show nothing."""
LINE_SECONDS = 15.0


class Progress:
    """Steps done and time left. Use as a context manager; `advance` from one thread.

    What an interrupted run had done comes first, in one call, which is not one step: the time left
    is reckoned from what was done after it.
    """

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done = label, total, 0
        self._start, self._done_before, self._began = time.monotonic(), 0, False
        self._next = self._start + QUIET_SECONDS
        self._tty = sys.stderr.isatty()
        self._shown = False

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self._shown and self._tty:
            click.echo("\r\x1b[K", nl=False, err=True)

    def advance(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        if not self._began and n != 1:
            self._start, self._done_before = now, n
        self._began = True
        if now >= self._next:
            self._show(now)
            self._next = now + (0.2 if self._tty else LINE_SECONDS)

    def begin(self, text: str) -> None:
        """Say on a terminal what takes its time before the first step."""
        if self._tty:
            self._shown = True
            self.message(text)

    def message(self, text: str) -> None:
        """Say what is going on now, if anything was said before."""
        if self._shown:
            click.echo(f"\r\x1b[K{text}" if self._tty else text, nl=not self._tty, err=True)

    def _show(self, now: float) -> None:
        self._shown = True
        rate = (self.done - self._done_before) / max(now - self._start, 1e-9)
        left = f", {_duration((self.total - self.done) / rate)} left" if rate else ""
        line = f"{self.label}: {self._amount(rate)}{left}"
        click.echo(f"\r\x1b[K{line}" if self._tty else line, nl=not self._tty, err=True)

    def _amount(self, rate: float) -> str:
        return f"{self.done} of {self.total}"


class BytesProgress(Progress):
    """Bytes done, their share, and the rate."""

    def _amount(self, rate: float) -> str:
        return (
            f"{human_bytes(self.done)} of {human_bytes(self.total)} "
            f"({100 * self.done / self.total:.0f} %), {human_bytes(rate)}/s"
        )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
