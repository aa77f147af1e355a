"""Blocks of 256 weights: into lanes, and their fields out again as bytes.

A group is LANES consecutive blocks, one a lane; past the last block of a tensor, lanes repeat it
and write its bytes again. A block's fields are put together as 32-bit words, word i of all the
group's blocks in row i of `words`, and scattered to the blocks at the end.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from quant.formats.lanes import (
    LANES,
    any_of,
    gather16,
    load,
    scatter16,
    splat,
    store,
    to_int,
)

BLOCK = 256


class Places(NamedTuple):
    """Where the block of each lane begins, all int64 (LANES,)."""

    sources: np.ndarray  # in w
    columns: np.ndarray  # in importance
    targets: np.ndarray  # in out


@njit
def new_places():
    return Places(np.empty(LANES, np.int64), np.empty(LANES, np.int64), np.empty(LANES, np.int64))


@njit
def begin_group(w, first_block, block_nbytes, n_columns, places, x):
    """Load the group at `first_block` into x (256, LANES); note where each block belongs."""
    last = w.size // BLOCK - 1
    for k in range(LANES):
        block = min(first_block + k, last)
        places.sources[k] = block * BLOCK
        places.columns[k] = block * BLOCK % n_columns if n_columns else 0
        places.targets[k] = block * block_nbytes
    gather(w, places.sources, 0, x, BLOCK)


@njit
def gather(flat, starts, offset, rows, n):
    """rows[i, k] = flat[starts[k] + offset + i] for i < n, a multiple of 16."""
    for i in range(0, n, 16):
        gather16(flat[offset + i :], starts, rows, i)


@njit
def pack(values, first, n_bytes, stride, count, width, shift, words, at):
    """words[at:] get n_bytes bytes: byte i holds `width` bits of each of `count` whole numbers.

    They are bits `shift`.. of values[first + i], values[first + i + stride], ..., first lowest.
    """
    mask = (1 << width) - 1
    for start in range(0, n_bytes, 4):
        total = splat(0)
        for b in range(4):
            for m in range(count):
                value = to_int(load(values, first + start + b + m * stride))
                total = total | ((value >> shift) & mask) << (8 * b + width * m)
        store(words, at + start // 4, total)


@njit
def scatter(words, n, out, targets):
    """Words 0..n - 1 of every block to the start of its bytes; n is at least 16."""
    for i in range(0, n - 15, 16):
        scatter16(words, i, out, targets, 4 * i)
    scatter16(words, n - 16, out, targets, 4 * (n - 16))


@njit
def is_finite(half):
    """Whether no lane's float16 bits are an infinity or NaN."""
    return not any_of((half & 0x7C00) == 0x7C00)
