"""What the IQ2 and IQ3 encoders share: rounding 4 or 8 weights at a time to points of a codebook.

One lane a trial scale. A group of weights is first rounded weight by weight, at all scales at
once; where the row of levels is no codebook point, the nearest of the points listed for it is
found by the weighted squared error. Neighbouring trials mostly round to the same row and share
its list: the search runs once per distinct row, for all lanes, and its errors are sums of a few
terms w (scale q - x)^2, one for each weight and level, computed once per group.

Most listed points can be left out where each weight has its nearest level (see Grid.spans). It
has, unless rounding errors blur a weight halfway between two levels (about 1 group in 100), or
numbers are so uneven or small that nearest_int overflows or 1 / x is inexact. Those take the
whole lists.

A `shape` is a block's (weights, weights of a group, bits of a level in a code, levels): a plain
tuple of constants, from which the compiler unrolls loops; in a named one it would not see them.
"""

from typing import NamedTuple

import numpy as np

from quant.formats.iq_grids import OFF_GRID, UNROLL, Grid
from quant.formats.iq_kernels_lanes import (
    bitmask,
    inlined,
    item,
    lowest_bit,
    new_rows,
    previous,
)
from quant.formats.lanes import LANES, bits, fabs, load, select, splat, store, to_float

SUPER_BLOCK = 256
ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
TOO_LARGE = np.float32(2.0**57)
"""Mean squares beyond this are of weights that no scale can hold, and would overflow in sums."""
FARTHEST = np.finfo(np.float32).max
ROUNDER = np.float32(12582912)  # 1.5 * 2**23: adding it rounds to an integer, half to even
ALMOST_HALF = np.float32(0.5 - 2**-12)

# Which groups are rounded again at the scale found
THOSE_OFF_GRID, ALL_IF_ANY_OFF_GRID, ALL = 0, 1, 2


class Trials(NamedTuple):
    """The scales tried for a block: its reach over each divisor."""

    n: int
    divisors: np.ndarray  # float32, the last one repeated to fill whole lanes


def trials(top: int, step: float, n_steps: int) -> Trials:
    """top + i * step for i in -n_steps ... n_steps."""
    steps = np.arange(-n_steps, n_steps + 1).astype(np.float32) * np.float32(step)
    return Trials(len(steps), np.pad(np.float32(top) + steps, (0, -len(steps) % LANES), "edge"))


class Workspace(NamedTuple):
    """Arrays that a kernel works in. Flat, and float32 where nothing else is said."""

    # Of one or more super-blocks, n weights, and some room to read beyond:
    x: np.ndarray  # (n,): weights without the signs stored apart
    weight: np.ndarray  # (n,): how much each squared error counts
    root: np.ndarray  # (n,): its square root, which decides between points
    signs: np.ndarray  # int64 (n / 8,): a bit each
    top: np.ndarray  # (n / block,): the greatest x of each block
    bottom: np.ndarray  # (n / block,): the least, negative if a sign was flipped
    reach: np.ndarray  # (n / block,): what trial divisors divide
    scale: np.ndarray  # (n / block,): holds if no trial helps
    rows: np.ndarray  # uint8 (n_points * group,): LANES * level, for every point of the codebook
    # Of one super-block:
    scales: np.ndarray  # (LANES,): what its blocks' scales come to
    # Of one block:
    codes: np.ndarray  # int32 (n_groups,)
    levels: np.ndarray  # int32 (block,)
    trial_codes: np.ndarray  # int32 (n_groups, LANES)
    terms: np.ndarray  # (group, n_levels, LANES), or (block / LANES, n_levels, LANES)
    sumqx: np.ndarray  # (block or LANES,)
    sumq2: np.ndarray  # (block or LANES,)


def new_workspace(n_super_blocks: int, shape: tuple[int, int, int, int], grid: Grid) -> Workspace:
    block, group, _, n_levels = shape
    n = n_super_blocks * SUPER_BLOCK
    n_vectors = -(-block // LANES)
    return Workspace(
        x=new_rows(n // LANES + 1).reshape(-1),
        weight=new_rows(n // LANES + 1).reshape(-1),
        root=new_rows(n // LANES + 1).reshape(-1),
        signs=np.zeros(n // 8, np.int64),
        top=np.zeros(n // block, np.float32),
        bottom=np.zeros(n // block, np.float32),
        reach=np.zeros(n // block, np.float32),
        scale=np.zeros(n // block, np.float32),
        rows=grid.levels * np.uint8(LANES),
        scales=np.zeros(LANES, np.float32),
        codes=np.zeros(block // group, np.int32),
        levels=np.zeros(n_vectors * LANES, np.int32),
        trial_codes=new_rows(block // group, np.int32),
        terms=new_rows(max(group, n_vectors) * n_levels).reshape(-1),
        sumqx=np.zeros(n_vectors * LANES, np.float32),
        sumq2=np.zeros(n_vectors * LANES, np.float32),
    )


# --- rounding weights ----------------------------------------------------------------------------


@inlined
def nearest_int(x):
    """Round half to even, for |x| < 2**22; beyond, whatever ggml's nearest_int gives."""
    return (bits(x + ROUNDER) & 0x7FFFFF) - 0x400000


@inlined
def odd_level(x, n_levels):
    """The level l in 0 ... n_levels - 1 for which 2 l + 1 is nearest to x."""
    level = nearest_int(HALF * (x - ONE))
    level = select(level < 0, 0, level)
    return select(level > n_levels - 1, n_levels - 1, level)


@inlined
def distance_to_odd(x):
    """How far x is from an odd number, in steps of 2: about 0.5 is a tie."""
    steps = HALF * (x - ONE)
    return fabs(steps - ((steps + ROUNDER) - ROUNDER))


@inlined
def greater(a, b):
    return select(a > b, a, b)


@inlined
def is_extreme(scale, top, bottom):
    """Whether a weight in bottom ... top may not round to its nearest multiple of `scale`."""
    limit = np.float32(1000) * scale
    return top > limit or bottom < -limit or scale < np.float32(1e-30)


# --- weights and signs of a super-block ----------------------------------------------------------


@inlined
def mean_square(w, start):
    """The mean of 256 squares, added in order."""
    total = ZERO
    for i in range(start, start + SUPER_BLOCK):
        total = total + item(w, i) * item(w, i)
    return total / np.float32(SUPER_BLOCK)


@inlined
def split_signs(w, start, at, work):
    """x[at : at + 256] = |w[start : start + 256]|; signs: bit i of item k is weight 8 k + i."""
    for i in range(0, SUPER_BLOCK, LANES):
        value = load(w, start + i)
        is_positive = value >= ZERO
        store(work.x, at + i, select(is_positive, value, -value))
        negative = bitmask(~is_positive)
        for k in range(LANES // 8):
            work.signs[(at + i) // 8 + k] = negative >> 8 * k & 255


@inlined
def make_signs_even(at, work):
    """Give each 8 weights an even number of minus signs, so that 7 bits tell all 8.

    Where it is odd, the weight that matters least changes sign, and its x becomes negative.
    """
    x, weight, signs = work.x, work.weight, work.signs
    for k in range(at // 8, (at + SUPER_BLOCK) // 8):
        parity = signs[k] ^ signs[k] >> 4
        parity ^= parity >> 2
        if (parity ^ parity >> 1) & 1:
            least = 8 * k
            least_error = weight[least] * x[least] * x[least]
            for i in range(8 * k + 1, 8 * k + 8):
                error = weight[i] * x[i] * x[i]
                if error < least_error:
                    least, least_error = i, error
            x[least] = -x[least]
            signs[k] ^= 1 << (least & 7)
        signs[k] &= 127


@inlined
def find_extremes(at, shape, work):
    """top and bottom of the blocks of the super-block at `at`."""
    block = shape[0]
    for start in range(at, at + SUPER_BLOCK, block):
        top = bottom = work.x[start]
        for i in range(start + 1, start + block):
            top = work.x[i] if work.x[i] > top else top
            bottom = work.x[i] if work.x[i] < bottom else bottom
        work.top[start // block] = top
        work.bottom[start // block] = bottom


@inlined
def reach_to_top(top_level, shape, work):
    """Let the scales of the first super-block's blocks be about top / top_level."""
    for b in range(SUPER_BLOCK // shape[0]):
        work.reach[b] = work.top[b]
        work.scale[b] = work.top[b] / top_level


# --- trials: one lane a scale --------------------------------------------------------------------


@inlined
def round_all(inverse, start, shape, work):
    """trial_codes[g, k]: the levels of group g at the scale of lane k. Returns blurred groups."""
    block, group, n_bits, n_levels = shape
    blurred = 0
    for g in range(block // group):
        code = splat(0)
        doubt = splat(ZERO)
        for i in range(group):
            x = inverse * work.x[start + g * group + i]
            code = code | odd_level(x, n_levels) << n_bits * i
            doubt = greater(doubt, distance_to_odd(x))
        store(work.trial_codes, g, code)
        if bitmask(doubt > ALMOST_HALF):
            blurred |= 1 << g
    return blurred


@inlined
def fill_terms(scale, start, shape, work):
    """terms[i, l] = root (scale (2 l + 1) - x)^2 of weight start + i, in all lanes."""
    _, group, _, n_levels = shape
    for level in range(n_levels):
        value = scale * np.float32(2 * level + 1)
        for i in range(group):
            difference = value - work.x[start + i]
            term = work.root[start + i] * difference * difference
            store(work.terms, LANES * (i * n_levels + level), term)


@inlined
def move_to_points(scale, start, g, first_span, shape, grid, work):
    """Replace the trial codes of group g that are no points by those of their nearest points.

    # ref: ggml-quants.c, iq2_find_best_neighbour and iq3_find_best_neighbour
    """
    _, group, _, n_levels = shape
    rounded = load(work.trial_codes, g)
    result = rounded
    terms_are_filled = False
    # Bit k: lane k has another code than lane k - 1.
    starts = bitmask(rounded != previous(rounded)) | 1
    while starts:
        code = item(work.trial_codes, LANES * g + lowest_bit(starts))
        starts &= starts - 1
        span = item(grid.spans, first_span + code)
        if span == 0:
            continue
        if not terms_are_filled:
            fill_terms(scale, start + g * group, shape, work)
            terms_are_filled = True
        best = rounded
        best_error = splat(FARTHEST)
        j = UNROLL * (span >> 8)
        end = j + UNROLL * (span & 255)
        while j < end:
            for n in range(UNROLL):
                point = np.int64(item(grid.near, j + n))
                error = load(work.terms, item(work.rows, group * point))
                for i in range(1, group):
                    row = item(work.rows, group * point + i)
                    error = error + load(work.terms, LANES * i * n_levels + row)
                is_nearer = error < best_error
                best_error = select(is_nearer, error, best_error)
                best = select(is_nearer, item(grid.codes, point), best)
            j += UNROLL
        result = select(rounded == code, best, result)
    store(work.trial_codes, g, result)


@inlined
def sum_products(start, shape, work):
    """sum w x q and sum w q q over the block, q = 2 level + 1, of the trial codes of each lane."""
    block, group, n_bits, _ = shape
    sumqx = splat(ZERO)
    sumq2 = splat(ZERO)
    for g in range(block // group):
        code = load(work.trial_codes, g)
        for i in range(group):
            level = code >> n_bits * i & (1 << n_bits) - 1
            q = to_float(level + level + 1)
            at = start + g * group + i
            sumqx = sumqx + (work.weight[at] * work.x[at]) * q
            sumq2 = sumq2 + (work.weight[at] * q) * q
    return sumqx, sumq2


@inlined
def best_trial(trials, start, reach, scale, is_hard, shape, grid, work):
    """Round a block at scales reach / divisor; keep the one of least weighted error.

    Leaves its codes in work.codes and returns its scale, refitted; if no trial helps, codes and
    scale stay as they are.
    """
    block, group, n_bits, _ = shape
    n_groups = block // group
    best = ZERO
    for first in range(0, trials.n, LANES):
        inverse = load(trials.divisors, first) / reach
        blurred = round_all(inverse, start, shape, work)
        for g in range(n_groups):
            first_span = 0 if is_hard or blurred >> g & 1 else 1 << n_bits * group
            move_to_points(ONE / inverse, start, g, first_span, shape, grid, work)
        sumqx, sumq2 = sum_products(start, shape, work)
        store(work.sumqx, 0, sumqx)
        store(work.sumq2, 0, sumq2)
        winner = -1
        for k in range(min(LANES, trials.n - first)):
            qx, q2 = work.sumqx[k], work.sumq2[k]
            if q2 > ZERO and qx * qx > best * q2:
                scale = qx / q2
                best = scale * qx
                winner = k
        if winner >= 0:
            for g in range(n_groups):
                work.codes[g] = work.trial_codes[g, winner]
    return scale


# --- one scale: one lane a weight ----------------------------------------------------------------


@inlined
def nearest_point(first, first_span, shape, grid, work):
    """The code of the point nearest to the group that begins at weight `first` of the block.

    work.levels holds the rounded levels, work.terms the errors (block / LANES, n_levels, LANES).
    """
    _, group, n_bits, n_levels = shape
    code = np.int32(0)
    for i in range(group):
        code |= work.levels[first + i] << np.int32(n_bits * i)
    span = item(grid.spans, first_span + code)
    at = first // LANES * LANES * n_levels + first % LANES
    best_error = FARTHEST
    j = UNROLL * (span >> 8)
    end = j + UNROLL * (span & 255)
    while j < end:
        for n in range(UNROLL):
            point = np.int64(item(grid.near, j + n))
            error = item(work.terms, at + item(work.rows, group * point))
            for i in range(1, group):
                row = item(work.rows, group * point + i)
                error = error + item(work.terms, at + i + row)
            if error < best_error:
                best_error = error
                code = item(grid.codes, point)
        j += UNROLL
    return code


@inlined
def set_levels(shape, work):
    """work.levels from work.codes."""
    block, group, n_bits, _ = shape
    for g in range(block // group):
        for i in range(group):
            level = work.codes[g] >> np.int32(n_bits * i)
            work.levels[g * group + i] = level & np.int32((1 << n_bits) - 1)


@inlined
def add_up(a, b, n):
    """Sums of the first n items of a and of b, each in order."""
    total_a = total_b = ZERO
    for i in range(n):
        total_a = total_a + a[i]
        total_b = total_b + b[i]
    return total_a, total_b


@inlined
def refit(scale, start, every_group, is_hard, shape, grid, work):
    """Round groups off the grid, or all, again at the final scale; returns the scale refitted."""
    block, group, n_bits, n_levels = shape
    inverse = ONE / scale
    doubt = splat(ZERO)
    for c in range(0, block, LANES):
        x, root = load(work.x, start + c), load(work.root, start + c)
        store(work.levels, c, odd_level(inverse * x, n_levels))
        doubt = greater(doubt, distance_to_odd(inverse * x))
        for level in range(n_levels):
            difference = scale * np.float32(2 * level + 1) - x
            store(work.terms, c * n_levels + LANES * level, root * difference * difference)
    is_blurred = is_hard or bitmask(doubt > ALMOST_HALF) != 0
    first_span = 0 if is_blurred else 1 << n_bits * group
    for g in range(block // group):
        if every_group or work.codes[g] & OFF_GRID:
            work.codes[g] = nearest_point(g * group, first_span, shape, grid, work)
    set_levels(shape, work)
    for c in range(0, block, LANES):
        level = load(work.levels, c)
        q = to_float(level + level + 1)
        weight = load(work.weight, start + c)
        store(work.sumqx, c, weight * load(work.x, start + c) * q)
        store(work.sumq2, c, weight * q * q)
    sumqx, sumq2 = add_up(work.sumqx, work.sumq2, block)
    return sumqx / sumq2 if sumq2 > ZERO else scale


# --- a block and a super-block -------------------------------------------------------------------


@inlined
def encode_block(b, trials, code, again, all_signs, shape, grid, work):
    """Codes of the workspace's block b into work.codes; returns its scale, never negative.

    work.scale and `code` (of every group) hold if no trial beats zeros. Then the groups that
    `again` tells are rounded once more at the best trial's scale.
    """
    block, group, _, _ = shape
    start, reach, top, bottom = b * block, work.reach[b], work.top[b], work.bottom[b]
    for g in range(block // group):
        work.codes[g] = code
    is_hard = is_extreme(reach, top, bottom)
    scale = best_trial(trials, start, reach, work.scale[b], is_hard, shape, grid, work)
    off_grid = np.int32(0)
    for g in range(block // group):
        off_grid |= work.codes[g] & OFF_GRID
    if scale > ZERO and (off_grid or again == ALL):
        is_hard = is_extreme(scale, top, bottom)
        scale = refit(scale, start, again != THOSE_OFF_GRID, is_hard, shape, grid, work)
    if scale < ZERO:
        scale = -scale
        for k in range(start // 8, (start + block) // 8):
            work.signs[k] = ~work.signs[k] & all_signs
    return scale


@inlined
def put_points(b, place, points, shape, grid, work):
    """The low bytes of block b's points to points[place], the rest to points[b].

    Returns False if a group came to no point, which only happens where sums overflow.
    """
    block, group, n_bits, _ = shape
    are_found = True
    for g in range(block // group):
        point = item(grid.point_of, work.codes[g] & np.int32((1 << n_bits * group) - 1))
        are_found &= point >= 0
        points[place, g] |= point & 255
        points[b, g] |= point & 0xFF00
    return are_found


@inlined
def put_scale_codes(n_levels, d, scale_codes, work):
    """The codes l < n_levels for which d (2 l + 1) is nearest to work.scales. Replaces these."""
    store(work.scales, 0, to_float(odd_level((ONE / d) * load(work.scales, 0), n_levels)))
    for b in range(len(scale_codes)):
        scale_codes[b] = np.uint8(work.scales[b])


@inlined
def encode_super_block(
    s, trials, tiny, code, again, all_signs, shape, grid, work, points, signs, scale_codes
):
    """Encode the workspace's super-block s; returns d and whether all numbers were finite.

    Blocks without an x of `tiny` or more are zero. After one, IQ3_S, which is known by `again`,
    puts the low bytes of points and the signs one place too early, for that is what ggml does.
    """
    n_blocks, n_signs = SUPER_BLOCK // shape[0], shape[0] // 8
    max_scale = ZERO
    is_finite = True
    place = 0
    for i in range(n_blocks):
        b = s * n_blocks + i
        work.scales[i] = ZERO
        if again != ALL_IF_ANY_OFF_GRID:
            place = i
        if work.top[b] < tiny or work.reach[b] <= ZERO:
            continue
        scale = encode_block(b, trials, code, again, all_signs, shape, grid, work)
        is_finite &= scale >= ZERO
        is_finite &= put_points(i, place, points, shape, grid, work)
        for k in range(n_signs):
            signs[place, k] = work.signs[b * n_signs + k]
        place += 1
        work.scales[i] = scale
        max_scale = max(max_scale, scale)
    d = max_scale / np.float32(31)
    if max_scale > ZERO:
        put_scale_codes(16, d, scale_codes, work)
    return d, is_finite
