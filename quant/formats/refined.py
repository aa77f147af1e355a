"""The same formats with less error: ggml's blocks as a start, then a search for better ones.

`--refine` is for those who prefer quality to the bytes that llama-quantize would write. A file made
with it is no larger, and any reader decodes it. Every block starts as ggml encodes it (without
importance: as it does when all columns weigh the same, which by itself lowers the error) and is
replaced only if the weighted squared error of what is decoded becomes smaller,

    sum(importance * (w - w_hat)**2)    importance = 1 if there is none,

so that no block is ever worse. What the searches do is in the modules of the table below; why they
do not stop at the least error, in `refined_search`: it would make every layer's output smaller.

How much it buys depends on the type: least where ggml's own search is long (Q4_K: 4 % of the KL
divergence on examples/tiny-qwq), most where it has none (Q4_1: 21 %), where it shrinks or swells
what it encodes (Q2_K: 26 %), or weighs the errors of large weights more without importance (IQ3_S:
39 %); only for IQ1_S is the gain lost in the noise. benchmarks/refine.csv has them all.

It takes three to seven times as long as without, and is still quicker than ggml without, but for:
IQ1_S and IQ1_M (16 to 19 times, half of ggml's speed), and Q4_0 to Q8_0 without importance, which
ggml only divides and rounds (23 to 43 times; 95 to 143 million weights a second of one core).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from quant.formats import refined_codebooks
from quant.formats.format import Encoded, Float16Overflow, Format

Refine = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]
"""(weights, importance, start, blocks), all flat; importance is empty if there is none. Improves
`blocks` in place, setting out from `start`; `blocks` has room for one more at its end."""


def _in_k_kernels(format: Format) -> Refine:
    from quant.formats import refined_kernels_k  # numba: 0.15 s, which --help need not pay

    return getattr(refined_kernels_k, f"refine_{format.name.lower()}")


def _in_kernels_32(format: Format) -> Refine:
    from quant.formats import refined_kernels_32

    return getattr(refined_kernels_32, f"refine_{format.name.lower()}")


def _in_codebooks(format: Format) -> Refine:
    return partial(refined_codebooks.refine, format)


REFINERS = {
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"), _in_k_kernels),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"), _in_kernels_32),
    **dict.fromkeys(
        ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), _in_codebooks
    ),
}
"""Not among them: dense types, which have nothing to choose; TQ1_0 and TQ2_0, whose models were
trained for the very rounding that they have."""

SEARCHED_FROM_SCRATCH = (_in_kernels_32,)
"""These need no start."""


def refined(format: Format) -> Format | None:
    """`format` with an encoder of lower error, or None where there is none.

    The new encoder's arguments and errors are those of `format.encode`.
    """
    if format.name not in REFINERS:
        return None

    def encode(w: np.ndarray, importance: np.ndarray | None = None) -> Encoded:
        rows = format.encode(w, importance)[""]
        start = _start(format, w, importance, rows)
        blocks = np.concatenate([rows.reshape(-1), np.zeros(format.block_nbytes, np.uint8)])
        if importance is None:
            importance = np.empty(0, np.float32)
        # A read-only array is another type to numba, and would be compiled for again.
        w, importance = (np.require(a, requirements="CAW") for a in (w, importance))
        if rows.size:
            refine = REFINERS[format.name](format)
            refine(w.reshape(-1), importance, start.reshape(-1), blocks)
        return {"": blocks[: rows.size].reshape(rows.shape)}

    return replace(format, encode=encode)


def _start(
    format: Format, w: np.ndarray, importance: np.ndarray | None, rows: np.ndarray
) -> np.ndarray:
    """Encoded rows to set out from: `rows`, or what ggml does when all columns weigh the same."""
    if importance is not None or REFINERS[format.name] in SEARCHED_FROM_SCRATCH:
        return rows
    ones = np.ones(w.shape[1], np.float32)
    try:
        return format.encode(w, ones)[""]
    except Float16Overflow:
        # Row by row, so that a row's bytes do not depend on the rows it was encoded with.
        return np.concatenate(
            [_start_of_row(format, w[i : i + 1], ones, rows[i : i + 1]) for i in range(len(w))]
        )


def _start_of_row(format: Format, w: np.ndarray, ones: np.ndarray, rows: np.ndarray) -> np.ndarray:
    try:
        return format.encode(w, ones)[""]
    except Float16Overflow:
        return rows
