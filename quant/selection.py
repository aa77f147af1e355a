"""Which level each part gets, so that the predicted damage is least and the bytes fit: a knapsack.

    minimise  sum_i damage[i][level_i]   subject to   sum_i nbytes[i][level_i] <= budget

A level is anything that has a damage and a size: 4 or 16 bits, or a rung of a ladder of types.
Damages are taken to add up. (The error that this makes is measured elsewhere, on held-out text.)

Greedy choice by damage saved per byte is nearly right, and its gap is reported; what is returned
is the optimum. The linear relaxation gives a price per byte. At that price most parts have one
level that is clearly best; a few do not, and of those all combinations are tried that can still
win, the least decided first, keeping only those that nothing beats in bytes and damage at once.

# ref: Pisinger, A minimal algorithm for the multiple-choice knapsack problem, EJOR 83 (1995)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import fsum, inf

import numpy as np

MAX_STATES = 100_000
"""Combinations kept at once. Real models need some hundreds. Where more could still win (sizes that
are all different, and all of the same worth per byte), the most promising are kept, and `exact` is
False: the solution fits and is good, and `bound` says how far from the optimum it may be."""

TOLERANCE = 1e-12
"""Of the sum of the largest damages: two solutions nearer to each other than this are equal, since
the sums of float64 that tell them apart are not more exact than that."""

MAX_DAMAGE = 1e300
MAX_NBYTES = 2**61


@dataclass(frozen=True)
class Solution:
    """The chosen level of each part, and how good the choice is."""

    levels: tuple[int, ...]
    damage: float
    nbytes: int
    bound: float  # no choice whatsoever has less damage: the optimum of the linear relaxation
    greedy_damage: float  # of the choice by damage saved per byte
    exact: bool  # nothing is better than `damage`


@dataclass(frozen=True)
class _Part:
    """The levels of one part that are worth having: more bytes, less damage, from first to last."""

    levels: np.ndarray  # their numbers in the caller's order
    damage: np.ndarray  # float64, as shares of the largest; falls
    nbytes: np.ndarray  # int64, over the smallest; rises from 0


@dataclass(frozen=True)
class _Step:
    """From one rung of a part's convex hull to the next."""

    part: int
    start: int
    stop: int
    nbytes: int
    damage: float  # saved
    price: float  # damage saved per byte


@dataclass(frozen=True)
class _Relaxed:
    """The optimum of the linear relaxation: whole steps, and a piece of the next."""

    rungs: list[int]  # of each part, after the whole steps
    damage: float  # after the whole steps
    left: int  # bytes that they leave
    bound: float
    price: float  # of the step that no longer fits


@dataclass(frozen=True)
class _Moves:
    """The other rungs of one part that may be in the optimum, relative to its relaxed rung."""

    part: int
    rungs: np.ndarray
    nbytes: np.ndarray  # int64, more or fewer
    damage: np.ndarray
    rate: np.ndarray  # what a byte of the move costs above the price; at least 0


def solve(
    damage: Sequence[Sequence[float]], nbytes: Sequence[Sequence[int]], budget: int
) -> Solution:
    """The levels with the least total damage whose bytes fit into `budget`.

    damage[i], nbytes[i]: (n_levels_i,), in any order, neither need be monotone. Of equal levels
    the smaller is taken, of equals in both the first. Equal input gives an equal answer.
    Raises ValueError if even the smallest levels do not fit, and for damages that are NaN,
    infinite or beyond 1e300, or sizes that are negative or add up to 2^61.
    """
    damage = [np.asarray(values, np.float64).reshape(-1) for values in damage]
    nbytes = [np.asarray(values, np.int64).reshape(-1) for values in nbytes]
    _check(damage, nbytes)
    least = sum(int(sizes.min()) for sizes in nbytes)
    if least > budget:
        raise ValueError(f"{least} bytes are the least that is possible, {budget} are allowed")
    scale = max((float(np.abs(values).max()) for values in damage), default=0) or 1.0
    parts = [_useful(d / scale, n) for d, n in zip(damage, nbytes, strict=True)]
    steps = sorted(
        (step for i, part in enumerate(parts) for step in _hull(i, part)),
        key=lambda step: -step.price,
    )
    relaxed = _relax(parts, steps, budget - least)
    greedy = _greedy(parts, steps, budget - least)
    rungs, exact = _search(parts, relaxed, greedy)

    def total(rungs: list[int]) -> float:
        return fsum(d[p.levels[r]] for d, p, r in zip(damage, parts, rungs, strict=True))

    levels = tuple(int(part.levels[rung]) for part, rung in zip(parts, rungs, strict=True))
    return Solution(
        levels,
        total(rungs),
        sum(int(sizes[level]) for sizes, level in zip(nbytes, levels, strict=True)),
        min(relaxed.bound * scale, total(rungs)),
        max(total(greedy), total(rungs)),
        exact,
    )


def pareto_curve(
    damage: Sequence[Sequence[float]], nbytes: Sequence[Sequence[int]], budgets: Iterable[int]
) -> list[tuple[int, float]]:
    """(bytes, damage) of the best choice within each budget. Raises ValueError as `solve` does."""
    solutions = (solve(damage, nbytes, budget) for budget in budgets)
    return [(solution.nbytes, solution.damage) for solution in solutions]


def _check(damage: list[np.ndarray], nbytes: list[np.ndarray]) -> None:
    if [len(d) for d in damage] != [len(n) for n in nbytes] or not all(map(len, damage)):
        raise ValueError("each part needs a damage and a size for each of its levels")
    for i, values in enumerate(damage):
        if not (np.abs(values) <= MAX_DAMAGE).all():  # false for NaN too
            raise ValueError(f"part {i} has a damage that is no number of reasonable size")
    if any(sizes.min() < 0 for sizes in nbytes):
        raise ValueError("a size is negative")
    if sum(int(sizes.max()) for sizes in nbytes) > MAX_NBYTES:
        raise ValueError("the sizes add up to too much")


# --- the linear relaxation --------------------------------------------------------------------


def _useful(damage: np.ndarray, nbytes: np.ndarray) -> _Part:
    """The levels that no other level beats or equals in both bytes and damage."""
    order = np.lexsort((damage, nbytes))
    kept = _undominated(damage[order])
    levels = order[kept]
    return _Part(levels, damage[levels], nbytes[levels] - nbytes[levels[0]])


def _undominated(damage: np.ndarray) -> np.ndarray:
    """Where, in order of bytes, the damage is less than everywhere before."""
    before = np.minimum.accumulate(np.concatenate([[inf], damage[:-1]]))
    return np.flatnonzero(damage < before)


def _hull(i: int, part: _Part) -> list[_Step]:
    """The steps along the lower convex hull of part i; prices strictly fall."""
    steps: list[_Step] = []
    for rung in range(1, len(part.levels)):
        step = _step(i, part, 0, rung)
        while steps:
            step = _step(i, part, steps[-1].stop, rung)
            if step.price < steps[-1].price:
                break
            step = _step(i, part, steps.pop().start, rung)
        steps.append(step)
    return steps


def _step(i: int, part: _Part, start: int, stop: int) -> _Step:
    more = int(part.nbytes[stop] - part.nbytes[start])
    saved = float(part.damage[start] - part.damage[stop])
    return _Step(i, start, stop, more, saved, saved / more)


def _relax(parts: list[_Part], steps: list[_Step], room: int) -> _Relaxed:
    """Steps by price as long as they fit; of the first that does not, as much as fits."""
    rungs = [0] * len(parts)
    damage, left = fsum(part.damage[0] for part in parts), room
    for step in steps:
        if step.nbytes > left:
            return _Relaxed(rungs, damage, left, damage - step.price * left, step.price)
        rungs[step.part] = step.stop
        damage, left = damage - step.damage, left - step.nbytes
    return _Relaxed(rungs, damage, left, damage, 0.0)


def _greedy(parts: list[_Part], steps: list[_Step], room: int) -> list[int]:
    """The rung of each part: steps by price, leaving out those that do not fit."""
    rungs = [0] * len(parts)
    for step in steps:
        if step.nbytes <= room and rungs[step.part] == step.start:
            rungs[step.part] = step.stop
            room -= step.nbytes
    return rungs


# --- the search -------------------------------------------------------------------------------


def _search(parts: list[_Part], relaxed: _Relaxed, greedy: list[int]) -> tuple[list[int], bool]:
    """The rungs of the optimum, and whether they certainly are.

    A state is a complete solution: the relaxed rungs but for the parts looked at so far. It may be
    too large, as long as later parts could make up for that.
    """
    tolerance = TOLERANCE * fsum(np.abs(part.damage).max() for part in parts)
    # The relaxed solution plus the reach of a move bounds every solution with that move.
    best = fsum(part.damage[rung] for part, rung in zip(parts, greedy, strict=True))
    winner, exact = None, True
    moves = _moves(parts, relaxed, best - tolerance)
    up, down, most = _reach(moves)
    nbytes, damage = np.zeros(1, np.int64), np.full(1, relaxed.damage)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for t, move in enumerate(moves):
        nbytes, damage, parent, rung = _expand(move, relaxed.rungs[move.part], nbytes, damage)
        slack = relaxed.left - nbytes
        fits = np.flatnonzero(slack >= 0)
        if len(fits) and damage[fits].min() < best:
            i = fits[damage[fits].argmin()]
            best, winner = float(damage[i]), (t, int(parent[i]), int(rung[i]))
        # What a state costs above the price, and what filling or emptying the rest must cost.
        rate = np.where(slack >= 0, min(relaxed.price, up[t + 1]), down[t + 1])
        bound = damage - relaxed.price * slack + rate * np.abs(slack)
        alive = np.flatnonzero((bound < best - tolerance) & (slack + most[t + 1] >= 0))
        if len(alive) > MAX_STATES:
            alive = np.sort(alive[np.argpartition(bound[alive], MAX_STATES)[:MAX_STATES]])
            exact = False
        nbytes, damage = nbytes[alive], damage[alive]
        history.append((parent[alive], rung[alive]))
        if not len(alive):
            break
    return (greedy if winner is None else _trace(relaxed, moves, history, *winner)), exact


def _moves(parts: list[_Part], relaxed: _Relaxed, limit: float) -> list[_Moves]:
    """The moves that can be part of a solution below `limit`, cheapest per byte first."""
    found = []
    for i, (part, at) in enumerate(zip(parts, relaxed.rungs, strict=True)):
        nbytes = part.nbytes - part.nbytes[at]
        damage = part.damage - part.damage[at]
        cost = np.maximum(damage + relaxed.price * nbytes, 0)  # above the price; of `at` 0
        rungs = np.flatnonzero((nbytes != 0) & (relaxed.bound + cost < limit))
        if len(rungs):
            rate = cost[rungs] / np.abs(nbytes[rungs])
            found.append(_Moves(i, rungs, nbytes[rungs], damage[rungs], rate))
    return sorted(found, key=lambda move: float(move.rate.min()))


def _reach(moves: list[_Moves]) -> tuple[list[float], list[float], list[int]]:
    """Of moves[t:], for t = 0 ... len: cheapest byte more, cheapest byte less, most bytes less."""
    up, down, most = [inf], [inf], [0]
    for move in reversed(moves):
        up.append(min(up[-1], move.rate[move.nbytes > 0].min(initial=inf)))
        down.append(min(down[-1], move.rate[move.nbytes < 0].min(initial=inf)))
        most.append(most[-1] - int(move.nbytes.min(initial=0)))
    return up[::-1], down[::-1], most[::-1]


def _expand(
    move: _Moves, stay: int, nbytes: np.ndarray, damage: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every state with every rung of one more part, without those that another beats in both.

    Returns bytes (n,), rising; damage (n,), falling; which state each came from; its new rung.
    """
    rungs = np.concatenate([[stay], move.rungs])
    all_nbytes = np.add.outer(np.concatenate([[0], move.nbytes]), nbytes).reshape(-1)
    all_damage = np.add.outer(np.concatenate([[0.0], move.damage]), damage).reshape(-1)
    order = np.lexsort((all_damage, all_nbytes))
    order = order[_undominated(all_damage[order])]
    return (
        all_nbytes[order],
        all_damage[order],
        order % len(nbytes),
        rungs[order // len(nbytes)],
    )


def _trace(
    relaxed: _Relaxed, moves: list[_Moves], history: list, t: int, parent: int, rung: int
) -> list[int]:
    """The rungs of the state that came from `parent` by the t-th part's `rung`."""
    rungs = list(relaxed.rungs)
    rungs[moves[t].part] = rung
    for earlier in range(t - 1, -1, -1):
        parents, chosen = history[earlier]
        rungs[moves[earlier].part] = int(chosen[parent])
        parent = int(parents[parent])
    return rungs
