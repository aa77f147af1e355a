"""The command line: parse, call the library, print. No numerics and no format knowledge here.

Commands are imported only when they are used or listed, and import the library only when they
run, so that help answers at once.
"""

import contextlib
import errno
import importlib
import os
import signal
import sys
import threading
from typing import NoReturn

import click

from quant import __version__
from quant.cli.resuming import ENDING, catch
from quant.display import printable
from quant.errors import InputMissing, QwqQuantError

COMMANDS = {
    "to-gguf": "quant.cli.to_gguf",
    "dynamic-4bit": "quant.cli.dynamic_4bit",
    "gptq": "quant.cli.gptq",
    "evaluate": "quant.cli.evaluate",
    "verify": "quant.cli.verify",
    "inspect": "quant.cli.inspect",
    "doctor": "quant.cli.doctor",
    "fix": "quant.cli.fix",
    "runtime": "quant.cli.runtime",
    "chat": "quant.cli.chat",
    "recipes": "quant.cli.recipes",
    "imatrix": "quant.cli.imatrix",
    "kv-calibrate": "quant.cli.kv_calibrate",
    "profile": "quant.cli.profile",
    "measure": "quant.cli.measure",
    "plot": "quant.cli.plot",
}

EPILOG = """Exit codes: 0 done, 2 wrong usage, 65 bad input, 66 input missing, 69 library, hub or
memory unavailable, 70 internal error, 73 output cannot be created, 74 disk full or I/O error,
75 stopped by Ctrl-C, SIGTERM or SIGHUP and resumable: the same command goes on, 77 no permission,
78 bad recipe or override, 130, 143, 129 ended by these signals where nothing can be resumed."""


SAFELY_STOPPED = 75
"""EX_TEMPFAIL: no failure; the user has what is needed to go on."""


class _OutputClosed(Exception):
    """`| head` closed our output. Not a BrokenPipeError, with which click would end with 1."""


class _Commands(click.Group):
    """The commands of COMMANDS, each imported when it is first asked for."""

    def main(self, *args, standalone_mode=True, **kwargs):
        """Run a command; every failure becomes a message on stderr and an exit code."""
        _replace_closed_streams()
        _catch_ending_signals()
        try:
            run = super().main
            code = _exit_code(lambda: run(*args, standalone_mode=False, **kwargs))
        except (BrokenPipeError, _OutputClosed):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        sys.exit(code)

    def invoke(self, ctx):
        _require_working_folder()
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _OutputClosed from error

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        if name not in COMMANDS:
            return None
        return importlib.import_module(COMMANDS[name]).command

    def resolve_command(self, ctx, args):
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = _nearest(args[0], COMMANDS)
            if near:
                error.message += f" Did you mean {near!r}?"
            raise


def _require_working_folder() -> None:
    """Raises InputMissing where it was removed: no path has a meaning then, and torch aborts."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputMissing(
            "The folder you are in was removed.", "", "Go to one that is there first: cd FOLDER"
        ) from None


def _nearest(word: str, words) -> str | None:
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, words, 1)), None)


def _replace_closed_streams() -> None:
    """Python has None for a stream that was closed (`>&-`, some daemons): print to nowhere then."""
    nowhere = open(os.devnull, "w")  # noqa: SIM115, for as long as the program runs
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere


class _Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP: cleaned up after like Ctrl-C."""


def _catch_ending_signals() -> None:
    def end(number, frame):
        raise _Ended(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            catch(number, end)


def _exit_code(run) -> int:
    """Call `run`; its exit code. Errors are printed, or raised again under --debug.

    Where stderr cannot be written either, the code still says what it was.
    """
    try:
        result = run()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as request:
        return request.exit_code
    except click.ClickException as error:
        with contextlib.suppress(OSError):
            error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        click.echo("Interrupted. Nothing was left half-written.", err=True)
        ended = error.__cause__ or error
        return 128 + ended.args[0] if isinstance(ended, _Ended) else 130
    except (BrokenPipeError, _OutputClosed):
        raise
    except Exception as error:
        if "--debug" in sys.argv[1:]:
            raise
        message, code = _explain(error)
        with contextlib.suppress(OSError):
            click.echo(message if code == SAFELY_STOPPED else f"Error: {message}", err=True)
        return code


def _explain(error: Exception) -> tuple[str, int]:
    if isinstance(error, QwqQuantError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.filename is None and error.errno == errno.ENOSPC:
        return "What was to be printed could not be written: no space is left.", 74
    if isinstance(error, MemoryError):
        return "The machine has not enough memory for this.", 69
    return (
        f"Something went wrong inside qwq-quant ({type(error).__name__}: {printable(error)}).\n"
        "This is a fault of the program, not yours.\n"
        "Run the command again with --debug and report what it prints."
    ), QwqQuantError.exit_code


@click.command(
    cls=_Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="qwq-quant")
def cli():
    """Turn an open-weight model into something smaller, and know what was lost.

    MODEL is a folder with a Hugging Face checkpoint, a repository on the hub (org/name or
    org/name@revision), or a .gguf file.

    \b
    Example:
      qwq-quant to-gguf examples/tiny-qwq -o tiny-qwq-Q8_0.gguf --type Q8_0
    """


def main() -> None:
    """The console script."""
    try:
        cli.main()
    except SystemExit as ending:
        _leave(ending.code or 0)


def _leave(code: int) -> NoReturn:
    """End at once: all is done and said. To free a vocabulary and a compiler piece by piece takes a
    quarter of a second, in which a signal could still make a failure of it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
