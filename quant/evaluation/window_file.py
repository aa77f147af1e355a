"""A file of equal records, one for each window of text, that an interrupted run can go on with."""

import os
from pathlib import Path

from quant.durable import translated_errors


class WindowFile:
    """A header, then records of one size. A torn record or another header is thrown away.

    `append` returns when the record is on the disk, so that hours of computing outlive a power cut.
    Use as a context manager; the folder's owner sees to it that one process at a time writes.
    """

    def __init__(self, path: Path, header: bytes, record_nbytes: int):
        """Opens or begins the file. Raises CannotCreate or OutputFailed."""
        self.path, self._header_nbytes, self._record_nbytes = path, len(header), record_nbytes
        with translated_errors(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            self._descriptor = os.open(path, flags, 0o666)
            if os.pread(self._descriptor, len(header), 0) != header:
                os.ftruncate(self._descriptor, 0)
                self._write(header, 0)
            data = os.fstat(self._descriptor).st_size - len(header)
        self.cut(data // record_nbytes)

    def __enter__(self) -> "WindowFile":
        return self

    def __exit__(self, *exc) -> None:
        os.close(self._descriptor)

    def cut(self, n_records: int) -> None:
        """Keep the first n records."""
        self.n_records = n_records
        with translated_errors(self.path):
            os.ftruncate(self._descriptor, self._place(n_records))

    def append(self, record: bytes) -> None:
        """Raises OutputFailed, and then leaves the records before it."""
        if len(record) != self._record_nbytes:
            raise ValueError(f"a record of {len(record)} bytes instead of {self._record_nbytes}")
        with translated_errors(self.path):
            self._write(record, self._place(self.n_records))
            os.fsync(self._descriptor)
        self.n_records += 1

    def read(self, index: int) -> bytes:
        with translated_errors(self.path):
            return os.pread(self._descriptor, self._record_nbytes, self._place(index))

    def _place(self, index: int) -> int:
        return self._header_nbytes + index * self._record_nbytes

    def _write(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            n = os.pwrite(self._descriptor, view, offset)
            view, offset = view[n:], offset + n
