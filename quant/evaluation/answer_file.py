"""A file of answers, one a line, that an interrupted run goes on with."""

import json
import os
from pathlib import Path

from quant.durable import translated_errors


class AnswerFile:
    """Answers in the order they are given, as JSON; a torn last line is thrown away.

    `append` returns when the answer is on the disk: a thought of 16,000 tokens takes an hour. Use
    as a context manager; the folder's owner sees to it that one process at a time writes.
    """

    def __init__(self, path: Path):
        """Opens or begins the file. Raises CannotCreate or OutputFailed."""
        self._path, self.answers = path, []
        with translated_errors(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            self._descriptor = os.open(path, flags, 0o666)
            raw = path.read_bytes()
            self._nbytes = 0
            for line in raw[: raw.rfind(b"\n") + 1].splitlines(keepends=True):
                try:
                    self.answers.append(json.loads(line))
                except ValueError:  # the power failed, and zeros are left of it and those behind it
                    break
                self._nbytes += len(line)
            os.ftruncate(self._descriptor, self._nbytes)

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *exc) -> None:
        os.close(self._descriptor)

    def append(self, answer: object) -> None:
        """Raises OutputFailed."""
        line = json.dumps(answer).encode() + b"\n"
        with translated_errors(self._path):
            done = 0
            while done < len(line):
                done += os.pwrite(self._descriptor, line[done:], self._nbytes + done)
            os.fsync(self._descriptor)
        self._nbytes += len(line)
        self.answers.append(answer)
