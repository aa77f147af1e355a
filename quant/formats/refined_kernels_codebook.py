"""IQ1 to IQ3 with less error: all points of the codebook, at the scales that will be decoded.

ggml tries the points near a rounded row of weights, and rounds the scale to 3 or 4 bits after that.
Here every point is tried, for the stored scale and its neighbours. A point's error is a sum over 4
or 8 weights, each at one of a few levels; the errors of half a row, at all levels that it could
have (64 or 81 rows), are summed once, so that a point costs two loads and one addition, for
thirty-two blocks side by side.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from quant.formats.compiled import kernel
from quant.formats.k_blocks import BLOCK, Places, begin_group, new_places
from quant.formats.k_search import ZERO, F
from quant.formats.lanes import LANES, load, select, splat, store
from quant.formats.refined_search import round_float16, weigh_errors

RADII = (2, 1)
"""How far from a scale's code the rounds search."""


class Codebook(NamedTuple):
    """w ~ d * (offset + step * code) * sign * (value[level] + shift)."""

    levels: np.ndarray  # uint8 (n_points, n_dims)
    halves: np.ndarray  # int32 (n_points, 2): levels of either half as one number
    values: np.ndarray  # float32 (n_levels,)
    offset: float
    step: float
    n_codes: int
    n_blocks: int  # of a super-block, each with a code
    even_signs: bool  # the minus signs of 8 weights are even in number
    shift: float  # 0, or +-shift for every n_shifted points; weights have no signs then
    n_shifted: int


class Work(NamedTuple):
    """LANES super-blocks, one a lane."""

    places: Places
    x: np.ndarray  # (256, LANES) weights, without signs where these are stored
    weights: np.ndarray  # (256, LANES) how much an error counts
    y: np.ndarray  # (256, LANES) value[level] + shift
    first: np.ndarray  # (81, LANES) errors of the first half of a row of weights
    second: np.ndarray  # (81, LANES) of the second
    points: np.ndarray  # int32 (64, LANES)
    shifts: np.ndarray  # int32 (64, LANES): 1 where minus
    tried: np.ndarray  # int32 (2 * 64, LANES): points, and shifts below them
    codes: np.ndarray  # (16, LANES)
    signs: np.ndarray  # uint8 (32, LANES): eight signs each


def new_work() -> Work:
    return Work(
        new_places(),
        np.empty((BLOCK, LANES), np.float32),
        np.empty((BLOCK, LANES), np.float32),
        np.empty((BLOCK, LANES), np.float32),
        np.empty((81, LANES), np.float32),
        np.empty((81, LANES), np.float32),
        np.zeros((64, LANES), np.int32),
        np.zeros((64, LANES), np.int32),
        np.zeros((128, LANES), np.int32),
        np.zeros((16, LANES), np.float32),
        np.zeros((32, LANES), np.uint8),
    )


@njit
def take_signs(work, even):
    """x loses its signs to `signs`. If `even`, an odd minus goes to or from the weight that matters
    least: that x is then negative."""
    x, weights = work.x, work.weights
    for g in range(32):
        for k in range(LANES):
            bits, least, odd_one = 0, F(np.inf), 0
            for i in range(8):
                v = x[8 * g + i, k]
                if v < 0:
                    bits |= 1 << i
                x[8 * g + i, k] = abs(v)
                cost = weights[8 * g + i, k] * v * v
                if cost < least:
                    least, odd_one = cost, i
            n_minus = 0
            for i in range(8):
                n_minus += bits >> i & 1
            if even and n_minus & 1:
                bits ^= 1 << odd_one
                x[8 * g + odd_one, k] = -x[8 * g + odd_one, k]
            work.signs[g, k] = bits


@njit
def fill_table(work, table, first, n_dims, values, scale, shift):
    """table[r] = error of x[first : first + n_dims] at the levels that r's digits are."""
    store(table, 0, splat(ZERO))
    size = 1
    for i in range(first, first + n_dims):
        v, w = load(work.x, i), load(work.weights, i)
        for level in range(len(values) - 1, -1, -1):  # level 0 writes over what others read
            diff = scale * (values[level] + shift) - v
            error = w * (diff * diff)
            for r in range(size):
                store(table, level * size + r, load(table, r) + error)
        size *= len(values)


@njit
def nearest_point(work, book, group, scale, shift):
    """The point of least error for one row of weights; returns the error and the point."""
    n_half = book.levels.shape[1] // 2
    start = 2 * n_half * group
    fill_table(work, work.first, start, n_half, book.values, scale, shift)
    fill_table(work, work.second, start + n_half, n_half, book.values, scale, shift)
    least, point = splat(F(np.inf)), splat(0)
    for p in range(len(book.halves)):
        error = load(work.first, book.halves[p, 0]) + load(work.second, book.halves[p, 1])
        better = error < least
        least, point = select(better, error, least), select(better, p, point)
    return least, point


@njit
def nearest_points(work, book, j, scale):
    """Points and shifts of block j into `tried`; returns their error."""
    n_groups = BLOCK // book.levels.shape[1] // book.n_blocks
    total = splat(ZERO)
    for start in range(j * n_groups, (j + 1) * n_groups, book.n_shifted):
        error = splat(ZERO)
        for g in range(start, start + book.n_shifted):
            least, point = nearest_point(work, book, g, scale, book.shift)
            error = error + least
            store(work.tried, g, point)
            store(work.tried, 64 + g, splat(0))
        if book.shift != ZERO:
            other_error = splat(ZERO)
            for g in range(start, start + book.n_shifted):
                least, point = nearest_point(work, book, g, scale, -book.shift)
                other_error = other_error + least
                store(work.tried, 64 + g, point)  # until it is clear which of them stays
            minus = other_error < error
            error = select(minus, other_error, error)
            for g in range(start, start + book.n_shifted):
                point, other = load(work.tried, g), load(work.tried, 64 + g)
                store(work.tried, g, select(minus, other, point))
                store(work.tried, 64 + g, select(minus, 1, splat(0)))
        total = total + error
    return total


@njit
def search_code(work, book, j, d, radius):
    """The best scale code of block j near its own, with its points and shifts."""
    n_groups = BLOCK // book.levels.shape[1] // book.n_blocks
    code = load(work.codes, j)
    best, least = code, splat(F(np.inf))
    for a in range(-radius, radius + 1):
        this = code + F(a)
        this = select(this > ZERO, this, ZERO)
        this = select(this < F(book.n_codes - 1), this, F(book.n_codes - 1))
        error = nearest_points(work, book, j, d * (book.offset + book.step * this))
        better = error < least
        least, best = select(better, error, least), select(better, this, best)
        for g in range(j * n_groups, (j + 1) * n_groups):
            store(work.points, g, select(better, load(work.tried, g), load(work.points, g)))
            shift = select(better, load(work.tried, 64 + g), load(work.shifts, g))
            store(work.shifts, g, shift)
    store(work.codes, j, best)


@njit
def fit_d(work, book, d):
    """d by least squares, as float16, the points being what they are; `d` if there are none."""
    n_dims = book.levels.shape[1]
    for g in range(BLOCK // n_dims):
        for k in range(LANES):
            shift = -book.shift if work.shifts[g, k] else book.shift
            for i in range(n_dims):
                level = book.levels[work.points[g, k], i]
                work.y[n_dims * g + i, k] = book.values[level] + shift
    xy, yy = splat(ZERO), splat(ZERO)
    n = BLOCK // book.n_blocks
    for j in range(book.n_blocks):
        scale = book.offset + book.step * load(work.codes, j)
        for i in range(n * j, n * j + n):
            y, w = scale * load(work.y, i), load(work.weights, i)
            xy = xy + w * y * load(work.x, i)
            yy = yy + w * y * y
    fitted = round_float16(xy / yy)
    return select(fitted > ZERO, fitted, d)


@kernel
def search(w, importance, book, work, d, codes, points, signs, shifts):
    """Improve codes uint8 (n, n_blocks) for d float32 (n,), and find what goes with them.

    Fills points uint16 (n, n_groups), signs uint8 (n, 32), shifts uint8 (n, n_groups).
    """
    for first_block in range(0, len(d), LANES):
        begin_group(w, first_block, 0, importance.size, work.places, work.x)
        weigh_errors(importance, work.places.columns, work.weights, BLOCK)
        if book.shift == ZERO:
            take_signs(work, book.even_signs)
        for k in range(LANES):
            block = work.places.sources[k] // BLOCK
            work.y[0, k] = d[block]
            for j in range(book.n_blocks):
                work.codes[j, k] = F(codes[block, j])
        this_d = load(work.y, 0)
        for radius in RADII:
            for j in range(book.n_blocks):
                search_code(work, book, j, this_d, radius)
            if radius > 1:
                this_d = fit_d(work, book, this_d)
        for k in range(min(LANES, len(d) - first_block)):
            block = first_block + k
            for j in range(book.n_blocks):
                codes[block, j] = np.uint8(work.codes[j, k])
            for g in range(points.shape[1]):
                points[block, g] = work.points[g, k]
                shifts[block, g] = work.shifts[g, k]
            for g in range(32):
                signs[block, g] = work.signs[g, k]
