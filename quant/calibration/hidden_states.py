"""The residual stream of all calibration tokens between two layers, in memory or in a file."""

import os
import tempfile
from pathlib import Path

import torch

from quant.durable import translated_errors
from quant.preflight import available_memory

SHARE_OF_MEMORY = 0.25
"""Larger hidden states go to a file: a layer, its activations and the system need the rest."""


class HiddenStates:
    """(n_sequences, seq_len, hidden) in the compute type, on the CPU.

    64k tokens of QwQ-32B in float32 are 1.3 GB. Past a quarter of the free memory they are mapped
    from a temporary file in `folder` instead, which the system writes out when it needs the memory.
    Raises OutputFailed if the disk has no room for it.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, folder: Path | None = None):
        n = shape[0] * shape[1] * shape[2]
        self._file = None
        if n * dtype.itemsize <= SHARE_OF_MEMORY * available_memory():
            self.tensor = torch.empty(shape, dtype=dtype)
        else:
            folder = Path(folder or tempfile.gettempdir())
            with translated_errors(folder / "hidden states"):
                self._file = tempfile.NamedTemporaryFile(dir=folder)  # noqa: SIM115, closed with us
                # Without its blocks on the disk, a full disk would kill us at a store to the map.
                os.posix_fallocate(self._file.fileno(), 0, n * dtype.itemsize)
            mapped = torch.from_file(self._file.name, shared=True, size=n, dtype=dtype)
            self.tensor = mapped.view(shape)

    @property
    def in_file(self) -> bool:
        return self._file is not None

    def like(self) -> "HiddenStates":
        """Another one of the same shape, its values undefined."""
        folder = Path(self._file.name).parent if self._file else None
        return HiddenStates(tuple(self.tensor.shape), self.tensor.dtype, folder)
