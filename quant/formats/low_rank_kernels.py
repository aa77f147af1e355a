"""scaling * B @ A of a LoRA adapter in float32, to the bit what PyTorch gives on a CPU.

Each element is one chain of fused multiply-adds in the order of the ranks, rounded once a step:

    s = fma(b[i, k], a[k, j], s)    for k = 0 ... r - 1

That is what the microkernels of MKL (torch's matrix product) do for r up to 192; beyond that it
adds up blocks. numpy's product has another order. Here rows do not depend on which others are
computed with them, so that a matrix may be merged in pieces.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from quant.formats.compiled import kernel

F32 = np.float32


@intrinsic
def _fma(typing_context, x, y, z):
    """x * y + z, rounded once: one instruction on any processor of the last ten years."""
    f32 = ir.FloatType()

    def generate(context, builder, signature, arguments):
        signature = ir.FunctionType(f32, [f32, f32, f32])
        function = builder.module.declare_intrinsic("llvm.fma", [f32], signature)
        return builder.call(function, arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@kernel
def low_rank_product(b, a, scaling, out):
    """`b` float32 (n, r) times `a` (r, m), times `scaling`, into `out` (n, m)."""
    n, r = b.shape
    m = a.shape[1]
    for i in range(n):
        for j in range(m):
            out[i, j] = F32(0)
        for k in range(r):
            for j in range(m):
                out[i, j] = _fma(b[i, k], a[k, j], out[i, j])
        for j in range(m):
            out[i, j] *= F32(scaling)
