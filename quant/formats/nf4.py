"""NF4 and FP4 as bitsandbytes stores them: 64 weights in 32 bytes of codes and one absmax.

    w ~ quant_map[code] * absmax                                  4 + 32 / 64 = 4.5   bits a weight
    absmax ~ nested_quant_map[code] * nested_absmax + offset      4 + 8 / 64 + 32 / 16384 = 4.127

NF4's sixteen levels are quantiles of a Gaussian, which trained weights nearly are; FP4's are those
of a float with two exponent bits and one mantissa bit. The second line is double quantization:
each absmax less their mean (the offset) in 8 bits, 256 of them sharing a float32.
What is smaller than here (an absmax in 6 bits, as Q4_K has) cannot be loaded by transformers.

A weight is a dict of arrays, whose keys are appended to its name:

    ""                               uint8 (ceil(n / 2), 1)      even weights in the upper 4 bits
    .absmax                          uint8 or float32 (n_blocks,)
    .quant_map                       float32 (16,)
    .nested_absmax                   float32 (ceil(n_blocks / 256),)      double quantization only
    .nested_quant_map                float32 (256,)                       double quantization only
    .quant_state.bitsandbytes__nf4   uint8: JSON with shape, dtype, block sizes, offset

Blocks run along the flattened weight and may cross rows; the last one may be short. The bytes are
those of bitsandbytes 0.50.2 on an x86-64 processor with one thread (see nf4_kernels.mean on why
threads matter, in the last bit of the offset of a weight with more than two million values).
# ref: QLoRA, https://arxiv.org/abs/2305.14314; bitsandbytes, functional.py, QuantState.as_dict
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod

import numpy as np

from quant.formats.format import Encoded, check_arguments

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes allows; 32 only since 2026, and not on every device."""

NESTED_BLOCKSIZE = 256
DTYPES = ("bfloat16", "float16", "float32")
WEIGHTS_AT_ONCE = 2**20

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)  # in twelfths
QUANT_MAPS = {
    "nf4": np.array(NF4, np.float32),
    "fp4": np.array(FP4, np.float32) / np.float32(12),
}
ASCENDING = {
    "nf4": np.arange(16, dtype=np.uint8),
    "fp4": np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8),
}
"""Codes in the order of their levels. FP4 has two zeros: 0 is what a zero becomes, 8 a weight just
above it."""

ReadRows = Callable[[int, int], np.ndarray]
"""read_rows(start, stop): rows [start, stop) of a weight, float32 (stop - start, columns)."""


@dataclass(frozen=True)
class Bnb4bit:
    """One way to store a linear layer's weight of shape (rows, columns) in about 4 bits each.

    search_scales: instead of each block's largest magnitude, store the scale with the least
    squared error, by importance if that is given, then give every weight its nearest level under
    the scale as it will be decoded. Same format, same size, but not bitsandbytes' bytes.
    Squared error against plain NF4, double quantization included: -14.9 % for the linear layers of
    examples/tiny-qwq, -15.0 % for Gaussian weights, -11.1 % for Student's t of 5 degrees of
    freedom; the best possible scales gain 0.1 % more. Time: eleven times plain NF4's.
    (Nearest levels under the decoded scale are worth 0.1 % to 0.3 % of that, and would gain plain
    NF4 no more; there bitsandbytes' bytes are worth more.)
    """

    quant_type: str = "nf4"  # or "fp4"
    double_quant: bool = True
    blocksize: int = 64
    search_scales: bool = False

    def __post_init__(self):
        if self.quant_type not in QUANT_MAPS:
            raise ValueError(f"quant_type must be nf4 or fp4, not {self.quant_type}")
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {BLOCKSIZES}, not {self.blocksize}")

    # --- sizes -----------------------------------------------------------------------------------

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The parts of a weight of this shape: suffix -> (safetensors' dtype, shape).

        The last, the JSON, is an upper bound: its offset may take 20 bytes less.
        """
        n_blocks = -(-prod(shape) // self.blocksize)
        absmax = "U8" if self.double_quant else "F32"
        parts = {
            "": ("U8", (-(-prod(shape) // 2), 1)),
            "absmax": (absmax, (n_blocks,)),
            "quant_map": ("F32", (16,)),
        }
        if self.double_quant:
            parts["nested_absmax"] = ("F32", (-(-n_blocks // NESTED_BLOCKSIZE),))
            parts["nested_quant_map"] = ("F32", (256,))
        longest = len(self._state(shape, "bfloat16", LONGEST_OFFSET))
        parts[self._state_name] = ("U8", (longest,))
        return parts

    def parts_nbytes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Bytes of each part, that of the JSON an upper bound."""
        return {
            suffix: prod(part) * {"U8": 1, "F32": 4}[dtype]
            for suffix, (dtype, part) in self.parts(shape).items()
        }

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of all parts: an upper bound, see `parts`."""
        return sum(self.parts_nbytes(shape).values())

    # --- there and back --------------------------------------------------------------------------

    def encode(self, w: np.ndarray, dtype: str, importance: np.ndarray | None = None) -> Encoded:
        """`w` float32 (rows, columns), finite, whose values were stored as `dtype` (one of DTYPES).

        importance: float32 (columns,), mean squares of each column's inputs; used by the search
        of scales only. Safe to call from several threads at once.
        """
        check_arguments(w, importance)
        return self.encode_rows(lambda start, stop: w[start:stop], w.shape, dtype, importance)

    def encode_rows(
        self,
        read_rows: ReadRows,
        shape: tuple[int, int],
        dtype: str,
        importance: np.ndarray | None = None,
        map: Callable = map,
    ) -> Encoded:
        """The same parts from rows as they are read, about a million weights at a time.

        Memory is that of the result and of the rows being read. With `map` an executor's map,
        ranges of rows are read and encoded in its threads; the bytes are the same. The search of
        scales reads every row twice: all scales are found before any can be stored.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, not {dtype}")
        work = _Work(self, read_rows, shape, importance)
        work.run(map, work.search if self.search_scales else work.encode)
        parts = self._encode_absmax(work.absmax, shape, dtype)
        if self.search_scales:
            work.absmax = self.decode_scales(parts)
            work.run(map, work.assign)
        return {"": work.packed.reshape(-1, 1), **parts}

    def decode(self, parts: Encoded, shape: tuple[int, ...]) -> np.ndarray:
        """What these parts stand for, in the dtype they name, as float32 of `shape`.

        Equal to what bitsandbytes dequantizes to, but for two faults of its AVX-512 code: bfloat16
        values below 1.2e-38 become zero there, and rows of a multiple of 16 columns that is no
        multiple of the blocksize are decoded with the wrong scales.
        Raises ValueError if the parts are not of this format and shape.
        """
        self._check_parts(parts, shape)
        w = np.empty(prod(shape), np.float32)
        packed, quant_map = parts[""].reshape(-1), parts["quant_map"]
        _kernels().decode_blocks(packed, self.blocksize, quant_map, self.decode_scales(parts), w)
        return _rounded(w, self._read_state(parts)["dtype"]).reshape(shape)

    def with_levels(self, parts: Encoded, levels: np.ndarray) -> Encoded:
        """The same scales with other codes. levels: uint8 (rows, columns), 0 for the lowest."""
        codes = ASCENDING[self.quant_type][levels.reshape(-1)]
        if codes.size % 2:
            codes = np.append(codes, parts[""].reshape(-1)[-1] & 15)
        packed = codes[::2] << 4 | codes[1::2]
        if packed.size != parts[""].size:
            raise ValueError(f"{levels.shape} levels for {parts[''].size} bytes of codes")
        return {**parts, "": packed.reshape(-1, 1)}

    def _check_parts(self, parts: Encoded, shape: tuple[int, ...]) -> None:
        """Kernels check no bounds. The JSON alone may differ in length from the bound."""
        expected = self.parts_nbytes(shape)
        found = {name: part.nbytes for name, part in parts.items()}
        state = self._state_name
        if {**found, state: 0} != {**expected, state: 0} or state not in parts:
            raise ValueError(f"parts of {found} bytes where {expected} were expected")

    # --- the scales ------------------------------------------------------------------------------

    def _encode_absmax(self, absmax: np.ndarray, shape: tuple[int, ...], dtype: str) -> Encoded:
        """All parts but the codes."""
        parts, offset = {"absmax": absmax, "quant_map": QUANT_MAPS[self.quant_type].copy()}, None
        if self.double_quant:
            offset = np.float32(_kernels().mean(absmax))
            codes = np.empty(absmax.size, np.uint8)
            nested_absmax = np.empty(-(-absmax.size // NESTED_BLOCKSIZE), np.float32)
            _kernels().encode_nested(
                absmax - offset, NESTED_BLOCKSIZE, nested_codes(), nested_absmax, codes
            )
            parts["absmax"] = codes
            parts["nested_absmax"] = nested_absmax
            parts["nested_quant_map"] = nested_quant_map().copy()
        state = self._state(shape, dtype, None if offset is None else float(offset))
        parts[self._state_name] = np.frombuffer(state, np.uint8).copy()
        return parts

    def decode_scales(self, parts: Encoded) -> np.ndarray:
        """float32 (n_blocks,), as decoded: nested_quant_map[code] * nested_absmax + offset, rounded
        twice."""
        if not self.double_quant:
            return parts["absmax"]
        absmax = parts["nested_quant_map"][parts["absmax"]]
        absmax *= np.repeat(parts["nested_absmax"], NESTED_BLOCKSIZE)[: absmax.size]
        absmax += np.float32(self._read_state(parts)["nested_offset"])
        return absmax

    # --- what the tensors do not say -------------------------------------------------------------

    @property
    def _state_name(self) -> str:
        return f"quant_state.bitsandbytes__{self.quant_type}"

    def _state(self, shape: tuple[int, ...], dtype: str, offset: float | None) -> bytes:
        """The JSON, in the order and spelling of bitsandbytes."""
        state = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": dtype,
            "shape": [int(n) for n in shape],
        }
        if self.double_quant:
            state |= {
                "nested_blocksize": NESTED_BLOCKSIZE,
                "nested_dtype": "float32",
                "nested_offset": offset,
            }
        return json.dumps(state).encode()

    def _read_state(self, parts: Encoded) -> dict:
        return json.loads(parts[self._state_name].tobytes())


LONGEST_OFFSET = 1.1754943508222875e-38
"""No float32 is longer in JSON: 22 characters."""


def _kernels():
    """The compiled part. Importing numba takes 0.15 s, which --help need not pay."""
    from quant.formats import nf4_kernels

    return nf4_kernels


def _rounded(w: np.ndarray, dtype: str) -> np.ndarray:
    """float32 (n,) to the nearest values of `dtype`, in place where that can be."""
    from quant.formats.dense_kernels import encode_bfloat16

    if dtype == "bfloat16":
        halves = np.empty(w.shape, np.uint16)
        encode_bfloat16(w, halves)
        bits = w.view(np.uint32)
        bits[:] = halves
        bits <<= 16
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return w.astype(np.float16).astype(np.float32)
    return w


class _Work:
    """One weight being encoded: ranges of rows fill their own places in `absmax` and `packed`."""

    def __init__(
        self,
        format: Bnb4bit,
        read_rows: ReadRows,
        shape: tuple[int, int],
        importance: np.ndarray | None,
    ):
        self.blocksize, self.read_rows, self.shape = format.blocksize, read_rows, shape
        self.packed = np.empty(-(-prod(shape) // 2), np.uint8)
        self.absmax = np.empty(-(-prod(shape) // self.blocksize), np.float32)
        self.codes = ASCENDING[format.quant_type]
        self.levels = QUANT_MAPS[format.quant_type][self.codes]
        self.bounds = (self.levels[:-1] + self.levels[1:]) / np.float32(2)
        self.importance = np.empty(0, np.float32)
        if importance is not None:
            check_arguments(np.empty((0, shape[1]), np.float32), importance)
            self.importance = np.resize(importance, shape[1] + self.blocksize)

    def run(self, map: Callable, step: Callable[[int, int], None]) -> None:
        """step(start, stop) for ranges of rows; every range but the last is whole blocks."""
        n_rows, n_columns = self.shape
        whole = self.blocksize // gcd(n_columns, self.blocksize)
        length = max(1, WEIGHTS_AT_ONCE // (whole * n_columns)) * whole
        starts = range(0, n_rows, length)
        for _ in map(step, starts, (min(start + length, n_rows) for start in starts)):
            pass  # an error in a thread is raised here

    def _blocks(self, start: int, stop: int) -> slice:
        """The places of these rows in absmax."""
        n_columns = self.shape[1]
        return slice(start * n_columns // self.blocksize, -(-stop * n_columns // self.blocksize))

    def _bytes(self, start: int, stop: int) -> slice:
        """The places of these rows in packed."""
        return slice(start * self.shape[1] // 2, -(-stop * self.shape[1] // 2))

    def _read(self, start: int, stop: int) -> np.ndarray:
        """float32 (n,). Raises ValueError for rows of another type or shape."""
        w = self.read_rows(start, stop)
        if w.dtype != np.float32 or w.shape != (stop - start, self.shape[1]):
            raise ValueError(f"rows {start}:{stop} of {self.shape} are {w.dtype} {w.shape}")
        return np.require(w, requirements="CAW").reshape(-1)

    def encode(self, start: int, stop: int) -> None:
        """Scales by the largest magnitude, and the codes that belong to them."""
        _kernels().encode_blocks(
            self._read(start, stop), self.blocksize, self.bounds, self.codes,
            self.absmax[self._blocks(start, stop)], self.packed[self._bytes(start, stop)],
        )  # fmt: skip

    def search(self, start: int, stop: int) -> None:
        """The best scales. A short block is filled up with zeros, which cost nothing."""
        w = self._read(start, stop)
        if w.size % self.blocksize:
            w = np.pad(w, (0, self.blocksize - w.size % self.blocksize))
        _kernels().search_scales(
            w, self.blocksize, self.bounds, self.levels, self.importance, self.shape[1],
            self.absmax[self._blocks(start, stop)],
        )  # fmt: skip

    def assign(self, start: int, stop: int) -> None:
        """The nearest levels under `absmax`."""
        _kernels().encode_with_scales(
            self._read(start, stop), self.blocksize, self.bounds, self.codes,
            self.absmax[self._blocks(start, stop)], self.packed[self._bytes(start, stop)],
        )  # fmt: skip


@lru_cache(maxsize=1)
def nested_quant_map() -> np.ndarray:
    """float32 (256,): bitsandbytes' signed dynamic map, in which small values keep precision.

    Seven decades, 10^-6 to 1; decade i has 2^i values of either sign, midway between equal steps
    from 0.1 to 1. And 0 and 1.
    # ref: 8-bit Optimizers via Block-wise Quantization, https://arxiv.org/abs/2110.02861
    """
    low, high = np.float32(0.1), np.float32(1)
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for i in range(7):
        n = 2**i
        k, step = np.arange(n + 1), np.float64((high - low) / np.float32(n))
        # torch.linspace goes from both ends to the middle, each step a fused multiply-add.
        ends = np.where(2 * k < n, low + k * step, high - (n - k) * step).astype(np.float32)
        middles = (ends[:-1] + ends[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        values += [middles, -middles]
    return np.sort(np.concatenate(values))


@lru_cache(maxsize=1)
def nested_codes() -> np.ndarray:
    """uint8 (65536,): the 8-bit code of each step from -1 to 1, see nf4_kernels.encode_nested."""
    values = nested_quant_map()
    middles = (values[:-1] + values[1:]) * np.float32(0.5)
    steps = np.arange(65536, dtype=np.float32)
    return np.searchsorted(middles, (steps + steps) / np.float32(65535) - np.float32(1)).astype(
        np.uint8
    )
