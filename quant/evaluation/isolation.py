"""One model in a process of its own.

llama.cpp ends the whole process over some bad files, a model that does not fit is killed by the
system, and torch gives memory back only when it ends. A model that fails so must not take the
others' results with it.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from quant import errors
from quant.display import printable
from quant.errors import BadInput, QwqQuantError, Unavailable

PATIENCE = 0.2
"""Seconds without a message before it is asked whether to go on waiting."""

Say = Callable[..., None]
"""How work reports: say("begin", label, total), say("advance", n), say("note", text)."""


def run_isolated(
    work: Callable, arguments: tuple, on_message: Callable, tick: Callable = lambda: None
) -> object:
    """work(*arguments, say) in a fresh process; what it returns, which must be plain data.

    on_message is called with what the work says, tick while it says nothing. Raises what the work
    raised if it is one of quant.errors, BadInput for any other failure or a death by a signal: with
    a ChildProcessError as its cause, for the next time that may go well.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, work, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            while not ours.poll(PATIENCE):
                tick()
            kind, *rest = ours.recv()
            if kind == "returned":
                return rest[0]
            if kind == "raised":
                raise _rebuilt(*rest)
            if kind == "failed":
                raise BadInput(*rest) from ChildProcessError()
            on_message(kind, *rest)
    except EOFError:
        process.join()
        raise _died(process.exitcode) from ChildProcessError(process.exitcode)
    finally:
        process.kill()  # no more is wanted of it; what it keeps on the disk is whole at any time
        process.join()
        ours.close()


def _run(connection: Connection, work: Callable, arguments: tuple) -> None:
    """In the new process."""
    _leave_signals_to_parent()
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    os.dup2(2, 1)  # stdout is the command's; libraries print there
    logging.disable(logging.WARNING)  # what they advise is not for our users
    try:
        answer = "returned", work(*arguments, lambda *message: connection.send(message))
    except QwqQuantError as error:
        number = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
        answer = "raised", type(error).__name__, error.what, error.why, error.next_step, number
    except MemoryError:
        what = "There is too little memory for this model."
        answer = "raised", Unavailable.__name__, what, "", ""
    except Exception as error:
        why = f"{type(error).__name__}: {printable(error)}"
        answer = "failed", "It failed in a way that nobody foresaw.", why
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
        connection.send(answer)


def _leave_signals_to_parent() -> None:
    """They come to all of a terminal's or a service's processes; the parent says when we end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    own = os.getpid()

    def hold_out(number, frame):
        if os.getpid() != own:  # a process that a library made of us, and wants to end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, hold_out)


def _end_with_parent(connection: Connection) -> None:
    """A parent that was killed cannot end us; without one, nobody waits for what we do."""
    with contextlib.suppress(EOFError, OSError):
        connection.recv()  # it never says anything: this returns when its end is closed
    os._exit(1)


def _rebuilt(
    kind: str, what: str, why: str, next_step: str, number: int | None = None
) -> QwqQuantError:
    """number: the system's, of the failure behind it."""
    error = getattr(errors, kind)(what, why, next_step)
    if number is not None:
        error.__cause__ = OSError(number, os.strerror(number))
    return error


def _died(exit_code: int) -> BadInput:
    name = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
    why = {
        "SIGKILL": "The system kills what takes more memory than there is.",
        "SIGABRT": "llama.cpp ends so over a file that it cannot make sense of.",
        "SIGSEGV": "A library read where it must not: the file is likely damaged.",
    }.get(name, "")
    return BadInput(f"Its process was ended by {name}.", why)
