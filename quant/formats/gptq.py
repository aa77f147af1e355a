"""GPTQ's checkpoint format: 4- or 8-bit integers, a float16 scale and a zero point for each group.

    w ~ scale * (q - zero)      4 + (16 + 4) / 128 = 4.156 bits a weight, 8.188 with 8 bits

A linear (rows, columns) is stored transposed, as its kernels read it; k = 32 / bits codes share an
int32, the first in its lowest bits:

    qweight  int32 (columns / k, rows)     k neighbouring columns of a row in a word
    qzeros   int32 (n_groups, rows / k)    k neighbouring rows in a word
    scales   float16 (n_groups, rows)
    g_idx    int32 (columns,)              each column's group: here always column // group_size

In checkpoint format "gptq" qzeros holds zero - 1, an accident that all readers undo; so it cannot
say zero point 0, which an asymmetric group without negative weights has. Format "gptq_v2" holds
zero itself. Symmetric weights (zero = 2^(bits - 1) everywhere) are written as "gptq", which vLLM
takes; asymmetric ones as "gptq_v2", since GPTQModel (7.6.0 still) refuses them as "gptq" unless it
wrote them, and transformers loads either.
GPTQModel takes the ones from whole words and adds them so again; a zero point 0 then borrows from
its neighbour and pays back. AutoGPTQ spoils the neighbours of a 0 when it writes one.

# ref: AutoGPTQ 0.7.1, nn_modules/qlinear/qlinear_cuda_old.py, pack and forward;
# GPTQModel, models/loader.py and utils/model.py, convert_gptq_v1_to_v2_format
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from quant.formats.format import Encoded, Float16Overflow

BITS = (4, 8)
WHOLE_ROW = -1
"""As group size: one group a row."""


@dataclass(frozen=True)
class Gptq:
    """One way to store a linear layer's weight of shape (rows, columns)."""

    bits: int = 4
    group_size: int = 128  # or WHOLE_ROW
    symmetric: bool = True
    stored_as: str = ""  # "gptq" or "gptq_v2", of others' folders; "" is what we write

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"bits must be 4 or 8, not {self.bits}")
        if self.group_size < 1 and self.group_size != WHOLE_ROW:
            raise ValueError(f"group_size must be above 0 or {WHOLE_ROW}, not {self.group_size}")

    @property
    def checkpoint_format(self) -> str:
        return self.stored_as or ("gptq" if self.symmetric else "gptq_v2")

    @property
    def _offset(self) -> int:
        """What is subtracted from a zero point before it is stored."""
        return 1 if self.checkpoint_format == "gptq" else 0

    @property
    def per_word(self) -> int:
        """Codes in an int32."""
        return 32 // self.bits

    def columns_of_group(self, n_columns: int) -> int:
        return n_columns if self.group_size == WHOLE_ROW else self.group_size

    # --- sizes -----------------------------------------------------------------------------------

    def misfit(self, shape: tuple[int, int]) -> str:
        """Why a weight of this shape cannot be stored so; "" if it can."""
        rows, columns = shape
        group_size = self.columns_of_group(columns)
        if columns % group_size:
            return f"groups of {group_size} do not divide its rows of {columns} weights"
        if rows % self.per_word or columns % self.per_word:
            return f"{rows} x {columns} weights do not fill words of {self.per_word} codes"
        return ""

    def parts(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The parts of a weight of this shape: suffix -> (safetensors' dtype, shape).

        Raises ValueError for a shape that does not fit.
        """
        if why := self.misfit(shape):
            raise ValueError(why)
        rows, columns = shape
        n_groups = columns // self.columns_of_group(columns)
        return {
            "qweight": ("I32", (columns // self.per_word, rows)),
            "qzeros": ("I32", (n_groups, rows // self.per_word)),
            "scales": ("F16", (n_groups, rows)),
            "g_idx": ("I32", (columns,)),
        }

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of all parts."""
        return sum(
            prod(part) * {"I32": 4, "F16": 2}[dtype] for dtype, part in self.parts(shape).values()
        )

    # --- there and back --------------------------------------------------------------------------

    def encode(self, Q: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> Encoded:
        """Codes Q uint8 (rows, columns); scale and zero, whole numbers, float32 (n_groups, rows).

        Raises Float16Overflow for a scale beyond 65504.
        """
        columns = Q.shape[1]
        if scale.shape != self.parts(Q.shape)["scales"][1] or zero.shape != scale.shape:
            raise ValueError(f"scales of {scale.shape}, zeros of {zero.shape} for {Q.shape}")
        with np.errstate(over="ignore"):
            scales = scale.astype(np.float16)
        if not np.isfinite(scales).all():
            raise Float16Overflow("a group's scale is beyond float16's 65504")
        stored = zero.astype(np.int64) - self._offset
        if stored.min() < 0 or max(stored.max(), Q.max()) >= 1 << self.bits:
            raise ValueError(f"a code or zero point does not fit {self.bits} bits")
        return {
            "qweight": self._pack(Q.T),
            "qzeros": np.ascontiguousarray(self._pack(stored.T).T),
            "scales": scales,
            "g_idx": (np.arange(columns) // self.columns_of_group(columns)).astype(np.int32),
        }

    def decode(self, parts: Encoded, shape: tuple[int, int]) -> np.ndarray:
        """float32 (rows, columns). Raises ValueError for parts of another format or shape."""
        self._check_parts(parts, shape)
        group = parts["g_idx"]
        ones = 0xFFFFFFFF // ((1 << self.bits) - 1)  # 0x11111111: a one in each code of a word
        words = parts["qzeros"].view(np.uint32) + np.uint32(self._offset * ones)
        zero = self._unpack(words.T).T.astype(np.float32)
        w = self._unpack(parts["qweight"]).astype(np.float32)  # (columns, rows)
        w -= zero[group]
        w *= parts["scales"].astype(np.float32)[group]
        return np.ascontiguousarray(w.T)

    def _check_parts(self, parts: Encoded, shape: tuple[int, int]) -> None:
        dtypes = {"I32": np.int32, "F16": np.float16}
        for suffix, (dtype, expected) in self.parts(shape).items():
            part = parts.get(suffix)
            if part is None or part.dtype != dtypes[dtype] or part.shape != expected:
                found = "missing" if part is None else f"{part.dtype} {part.shape}"
                raise ValueError(f"{suffix} is {found}, not {dtypes[dtype].__name__} {expected}")
        n_groups = len(parts["scales"])
        if not ((parts["g_idx"] >= 0) & (parts["g_idx"] < n_groups)).all():
            raise ValueError(f"g_idx names groups beyond the {n_groups} that there are")

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        """(n, m) -> int32 (n / per_word, m)."""
        n, m = codes.shape
        words = np.zeros((n // self.per_word, m), np.uint32)
        for i in range(self.per_word):
            words |= codes[i :: self.per_word].astype(np.uint32) << np.uint32(self.bits * i)
        return words.view(np.int32)

    def _unpack(self, words: np.ndarray) -> np.ndarray:
        """int32 (n, m) -> uint8 (n * per_word, m)."""
        n, m = words.shape
        codes, words = np.empty((n * self.per_word, m), np.uint8), words.view(np.uint32)
        for i in range(self.per_word):
            part = words >> np.uint32(self.bits * i) & np.uint32((1 << self.bits) - 1)
            codes[i :: self.per_word] = part
        return codes
