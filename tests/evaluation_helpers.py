"""Models for the evaluation tests, as users make them, and work for other processes.

The work is here because a fresh process imports it by name: of the tests, it finds only what lies
in this folder.
"""

import errno
import os
import signal
import time
from pathlib import Path

from quant.errors import BadInput, OutputFailed
from quant.source import open_source
from quant.to_gguf import Wishes, plan_gguf
from quant.write_gguf import write_gguf


def to_gguf(folder: Path, type_name: str, output: Path) -> Path:
    """`folder` as a GGUF file of that type."""
    write_gguf(plan_gguf(open_source(str(folder)), Wishes(type_name)), output)
    return output


# --- work for a process of its own ------------------------------------------------------------


def raise_ours(say):
    raise BadInput("what", "why", "next")


def raise_other(say):
    raise ZeroDivisionError("odd")


def fill_disk(say):
    raise OutputFailed("The disk became full.") from OSError(errno.ENOSPC, "No space left")


def kill_itself(say):
    say("note", "now")
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_long(pid_file, say):
    pid_file.write_text(str(os.getpid()))
    time.sleep(60)


def talk(a, say):
    print("this is not for stdout")
    say("advance", 2)
    return {"a": a}
