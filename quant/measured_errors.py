"""Errors that were measured for a target size, kept for the run that goes on.

A plan with a target size encodes a sample of every tensor in every format: minutes for a large
model. What is known lies in a journal of its own, `.NAME.measured.journal` beside the output, until
that is written: a run that was ended while it measured, or later while it wrote, measures only the
rest.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from quant.durable import journal_path
from quant.fingerprint import fingerprint
from quant.journal import Journal, Resume

CODE = ("formats", "assembly.py", "finite.py", "lora.py", "target_size.py", "tensors.py")
"""What errors are made by."""


class MeasuredErrors:
    """Of one output, a file or the folder that it will be in."""

    def __init__(self, output: Path, resume: Resume, model: str = ""):
        """model: as it was typed; it tells outputs apart that have no name yet."""
        name = f"{Path(model).name or 'model'}-target-size" if output.is_dir() else output.name
        folder = output if output.is_dir() else output.parent
        self._place, self._resume = folder / f"{name}.measured", resume
        self.went_on = False
        """Whether an interrupted run had measured some."""

    def each(
        self, wanted: Sequence[tuple], measure: Callable[[int], Iterator[dict]]
    ) -> Iterator[dict]:
        """What is measured of all that is wanted, in order: (assignment, its formats) each.

        measure(n): measures those behind the first n. Raises Stopped, CannotCreate or OutputFailed.
        """
        decides = fingerprint(code=CODE, hashed={"tensors": list(wanted)})
        with Journal(self._place, decides, self._resume, "tensors", len(wanted)) as journal:
            done = journal.units[: len(wanted)]
            journal.begin(len(done))
            self.went_on = bool(done)
            yield from done
            for found in measure(len(done)):
                journal.append(found)
                yield found
            journal.leave()

    def forget(self) -> None:
        """The output is written: nobody needs them any more."""
        with suppress(OSError):
            os.unlink(journal_path(self._place))
