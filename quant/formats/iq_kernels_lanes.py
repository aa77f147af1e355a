"""More of lanes: which of them are set, and memory that a search goes through item by item.

The codebook searches look at single lanes: where a code changes from one lane to the next they
look up a list, for all lanes that share it.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from quant.formats.lanes import INTS, LANES, MASK

inlined = njit(
    forceinline=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
)
"""A function that becomes part of the compiled function that calls it, so that constants among
its arguments are constants there. x / 0 is infinite. Python itself cannot call it: making that
possible takes a third of the compiler's time."""


@intrinsic
def bitmask(typing_context, mask):
    """The mask as an int64: bit k is lane k."""

    def build(context, builder, sig, args):
        return builder.zext(builder.bitcast(args[0], ir.IntType(LANES)), ir.IntType(64))

    return types.int64(MASK), build


@intrinsic
def lowest_bit(typing_context, x):
    """The place of the lowest set bit of an int64 that is not 0."""

    def build(context, builder, sig, args):
        return builder.cttz(args[0], ir.IntType(1)(1))

    return types.int64(types.int64), build


@intrinsic
def previous(typing_context, x):
    """Lane k of the result is lane k - 1 of `x`, lane 0 its lane 0."""

    def build(context, builder, sig, args):
        places = [max(k - 1, 0) for k in range(LANES)]
        order = ir.Constant(ir.VectorType(ir.IntType(32), LANES), places)
        return builder.shuffle_vector(args[0], args[0], order)

    return INTS(INTS), build


@intrinsic
def item(typing_context, array, i):
    """Item i of a contiguous array as if it were flat. No bounds check, no negative i."""

    def build(context, builder, sig, args):
        data = context.make_array(array)(context, builder, args[0]).data
        return builder.load(builder.gep(data, [args[1]]))

    return array.dtype(array, types.intp), build


def new_rows(n: int, dtype: type = np.float32) -> np.ndarray:
    """Zeros (n, LANES) of a type of 4 bytes, rows on cache lines of their own: a tenth faster."""
    room = np.zeros((n + 1) * LANES, dtype)
    first = -room.ctypes.data % 64 // 4
    return room[first : first + n * LANES].reshape(n, LANES)
