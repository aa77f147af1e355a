"""--resume, Ctrl-C, SIGTERM and SIGHUP: work that another run of the same command goes on with."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quant.journal import Resume, StopRequest

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def catch(number: int, handler) -> None:
    """Handle a signal, unless whoever started us wants it ignored, as nohup does with SIGHUP."""
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, handler)


@contextlib.contextmanager
def resuming(mode: str, unit_name: str) -> Iterator["Resume"]:
    """What to resume by. The first signal asks to stop behind the unit ("tensor") in hand, and the
    second raises Stopped at once; with mode "never", where nothing is kept, they end the program.
    """
    from quant.cli.plan_table import print_note
    from quant.journal import Resume, StopRequest

    def say(note: str) -> None:
        print_note(note, err=True)

    stop = StopRequest()
    if mode == "never" or threading.current_thread() is not threading.main_thread():
        yield Resume(mode, say=say)
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    for number in ENDING:
        catch(number, _stopper(stop, unit_name))
    try:
        yield Resume(mode, say=say, stop=stop)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopper(stop: "StopRequest", unit_name: str):
    """The handler of a signal."""

    def handle(number, frame):
        stop.make()
        text = f"\nStopping when the {unit_name} in hand is finished; once more stops at once.\n"
        with contextlib.suppress(OSError):  # the terminal may be what went away
            os.write(2, text.encode())

    return handle
