"""How kernels are compiled: for this processor, at the first call, then kept on disk.

numba's cache looks at one source file: edit a helper that a kernel imports, and the kernel's old
machine code is loaded again, wrong bytes and all. Here the whole folder's sources are the key.
"""

from contextlib import suppress

from numba import njit
from numba.core.caching import FunctionCache

from quant.formats.sources import sources_digest


class _FolderCache(FunctionCache):
    """numba's cache of one function, out of date as soon as any file of the folder has changed.

    What cannot be read back or kept costs compiling it once more, and nothing else.
    """

    def __init__(self, function):
        super().__init__(function)
        self._cache_file._source_stamp = sources_digest()

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # of a damaged file, whatever pickle meets in it
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig, data):
        with suppress(Exception):  # a full disk, a quota, a damaged index
            super().save_overload(sig, data)


def kernel(function):
    """A function that Python calls: releases the interpreter lock, float arithmetic as written.

    Where no cache folder can be written (neither __pycache__ nor the user's, nor
    NUMBA_CACHE_DIR), it is compiled anew in every process.
    """
    compiled = njit(nogil=True, fastmath=False, error_model="numpy")(function)
    with suppress(RuntimeError):  # "cannot cache function: no locator available"
        compiled._cache = _FolderCache(function)
    return compiled
