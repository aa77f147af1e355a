"""A file of answers, one a line, that an interrupted run goes on with."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from quant.durable import translated_errors
from quant.evaluation.loops import Answer


class AnswerFile:
    """Answers in the order they are given; a torn last line is thrown away.

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
            for line in raw[: raw.rfind(b"\n") + 1].splitlines():
                self.answers.append(Answer(**json.loads(line)))
            self._nbytes = raw.rfind(b"\n") + 1
            os.ftruncate(self._descriptor, self._nbytes)

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *exc) -> None:
        os.close(self._descriptor)

    def append(self, answer: Answer) -> None:
        """Raises OutputFailed."""
        line = json.dumps(asdict(answer)).encode() + b"\n"
        with translated_errors(self._path):
            done = 0
            while done < len(line):
                done += os.pwrite(self._descriptor, line[done:], self._nbytes + done)
            os.fsync(self._descriptor)
        self._nbytes += len(line)
        self.answers.append(answer)
