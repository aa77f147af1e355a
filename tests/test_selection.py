"""The knapsack against brute force, against its own bound, and at the sizes of real models."""

from itertools import product
from math import inf, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import selection
from quant.selection import pareto_curve, solve


def brute_force(damage, nbytes, budget):
    """The least damage of all combinations that fit, or None."""
    choices = product(*(range(len(levels)) for levels in damage))
    fitting = (
        sum(d[i] for d, i in zip(damage, levels, strict=True))
        for levels in choices
        if sum(n[i] for n, i in zip(nbytes, levels, strict=True)) <= budget
    )
    return min(fitting, default=None)


def check(damage, nbytes, budget, solution):
    """What must hold of every solution, whatever the input."""
    assert len(solution.levels) == len(damage)
    chosen = [float(d[i]) for d, i in zip(damage, solution.levels, strict=True)]
    assert solution.damage == pytest.approx(sum(chosen), rel=1e-12, abs=1e-12)
    assert solution.nbytes == sum(int(n[i]) for n, i in zip(nbytes, solution.levels, strict=True))
    assert solution.nbytes <= budget
    assert solution.bound <= solution.damage <= solution.greedy_damage


def some_instance(draw):
    """A few parts; sizes from few values as in models, or from many; damages any way round."""
    n_parts, n_levels = draw.integers(1, 6), draw.integers(1, 5)
    shape = (n_parts, n_levels)
    nbytes = draw.integers(0, draw.choice([3, 10, 1000]), shape)
    worth = draw.choice(["random", "few", "proportional", "falling"])
    if worth == "random":
        damage = draw.normal(size=shape)
    elif worth == "few":
        damage = draw.integers(-2, 3, shape).astype(float)
    elif worth == "proportional":
        damage = 7.0 - nbytes
    else:
        damage = np.exp(-nbytes / 5) * draw.lognormal(size=(n_parts, 1))
    least, most = nbytes.min(1).sum(), nbytes.max(1).sum()
    return damage.tolist(), nbytes.tolist(), int(draw.integers(least, most + 2))


@pytest.mark.parametrize("seed", range(400))
def test_nothing_is_better_than_the_solution(seed):
    damage, nbytes, budget = some_instance(np.random.default_rng(seed))
    solution = solve(damage, nbytes, budget)
    check(damage, nbytes, budget, solution)
    assert solution.exact
    assert solution.damage == pytest.approx(brute_force(damage, nbytes, budget), abs=1e-10)


numbers = st.floats(-1e300, 1e300) | st.integers(-3, 3).map(float) | st.floats(-1, 1)
parts = st.lists(
    st.lists(st.tuples(numbers, st.integers(0, 30)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


@given(parts, st.integers(0, 120))
@settings(max_examples=300, deadline=None)
def test_any_numbers(parts, budget):
    damage = [[d for d, _ in levels] for levels in parts]
    nbytes = [[n for _, n in levels] for levels in parts]
    best = brute_force(damage, nbytes, budget)
    if best is None:
        with pytest.raises(ValueError, match="least that is possible"):
            solve(damage, nbytes, budget)
        return
    solution = solve(damage, nbytes, budget)
    assert solution.nbytes <= budget
    largest = sum(max(abs(d) for d in levels) for levels in damage)
    assert solution.damage <= best + 2e-12 * largest
    assert solution.bound <= solution.damage


# --- known answers ----------------------------------------------------------------------------


def test_greedy_is_beaten_and_the_gap_is_told():
    """The dearest step fills the room that two others would have used better."""
    damage = [[12.5, 0], [9.0, 0], [9.0, 0]]  # 2.08 a byte against 1.8
    nbytes = [[0, 6], [0, 5], [0, 5]]
    solution = solve(damage, nbytes, 10)
    assert solution.levels == (0, 1, 1)
    assert (solution.damage, solution.greedy_damage) == (12.5, 18.0)
    assert solution.bound == pytest.approx(30.5 - 12.5 - 4 * 1.8)  # the relaxation, by hand


def test_levels_in_any_order():
    """The largest first or last."""
    damage = [[0.0, 5.0, 9.0], [3.0, 3.5, 0.0]]
    nbytes = [[100, 60, 25], [30, 60, 120]]
    assert solve(damage, nbytes, 130).levels == (0, 0)
    assert solve(damage, nbytes, 129).levels == (1, 0)
    assert solve(damage, nbytes, 89).levels == (2, 0)
    assert solve(damage, nbytes, 220).levels == (0, 2)


def test_more_bytes_may_do_more_damage():
    solution = solve([[1.0, 2.0], [0.5, -0.5]], [[10, 20], [10, 20]], 1000)
    assert solution.levels == (0, 1)
    assert solution.damage == 0.5 == solution.bound


def test_of_equal_levels_the_smaller_then_the_first():
    assert solve([[1.0, 1.0, 1.0]], [[30, 10, 10]], 100).levels == (1,)
    assert solve([[0.0] * 3] * 4, [[7, 5, 5]] * 4, 20).levels == (1,) * 4


def test_budget_that_just_fits():
    damage, nbytes = [[1.0, 0.0]] * 3, [[4, 10]] * 3
    with pytest.raises(ValueError, match="12 bytes are the least that is possible, 11"):
        solve(damage, nbytes, 11)
    assert solve(damage, nbytes, 12).nbytes == 12
    assert solve(damage, nbytes, 17).nbytes == 12
    assert solve(damage, nbytes, 18).nbytes == 18
    everything = solve(damage, nbytes, 10**15)
    assert (everything.damage, everything.bound, everything.nbytes) == (0.0, 0.0, 30)


def test_nothing_to_choose():
    solution = solve([], [], 0)
    assert (solution.levels, solution.damage, solution.nbytes) == ((), 0.0, 0)
    with pytest.raises(ValueError):
        solve([], [], -1)


@pytest.mark.parametrize("wrong", [nan, inf, -inf, 1e301])
def test_damage_that_is_no_number_is_refused(wrong):
    with pytest.raises(ValueError, match="part 1 has a damage"):
        solve([[1.0], [1.0, wrong]], [[1], [1, 2]], 10)


@pytest.mark.parametrize(
    ("damage", "nbytes"),
    [
        ([[1.0, 2.0]], [[1]]),
        ([[1.0]], [[1], [1]]),
        ([[]], [[]]),
        ([[1.0, 0.0]], [[1, -1]]),
        ([[1.0], [1.0]], [[2**60], [2**61]]),
    ],
)
def test_what_cannot_be_is_refused(damage, nbytes):
    with pytest.raises(ValueError):
        solve(damage, nbytes, 2**62)


# --- real sizes -------------------------------------------------------------------------------

HIDDEN, MLP, KV = 5120, 27648, 1024  # QwQ-32B
GROUPS = [HIDDEN * (HIDDEN + 2 * KV), HIDDEN * HIDDEN, 2 * HIDDEN * MLP, HIDDEN * MLP] * 64
TENSORS = [HIDDEN * n for n in (HIDDEN, KV, KV, HIDDEN, MLP, MLP, MLP)] * 64 + [152064 * HIDDEN] * 2
LADDER = (1.5625, 1.75, 2.0625, 2.3125, 2.625, 3.0625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5)


def two_levels(damage):
    nbytes = [[int(n * 0.515869), 2 * n] for n in GROUPS]
    return [[d, 0.0] for d in damage], nbytes


def ladder(draw):
    nbytes = [[int(n * bits / 8) for bits in LADDER] for n in TENSORS]
    damage = [
        [n * 4.0**-bits * draw.uniform(0.8, 1.25) * worth for bits in LADDER]
        for n, worth in zip(TENSORS, draw.lognormal(size=len(TENSORS)), strict=True)
    ]
    return damage, nbytes


CASES = {
    "256 groups, any damage": lambda draw: two_levels(draw.lognormal(-6, 1, 256)),
    "256 groups, all alike": lambda draw: two_levels([0.00847] * 256),
    "256 groups, nothing to gain": lambda draw: two_levels([0.0] * 256),
    "256 groups, damage as bytes": lambda draw: two_levels([float(n) for n in GROUPS]),
    "256 groups, nearly as bytes": lambda draw: two_levels(
        GROUPS * draw.uniform(0.999, 1.001, 256)
    ),
    "450 tensors, 12 types": ladder,
}


@pytest.mark.parametrize("case", CASES)
def test_real_models_are_solved_exactly(case):
    damage, nbytes = CASES[case](np.random.default_rng(1))
    least, most = sum(map(min, nbytes)), sum(map(max, nbytes))
    before = inf
    for share in (0.001, 0.01, 0.05, 0.1, 0.3, 0.6, 0.9, 0.999):
        budget = int(least + share * (most - least))
        solution = solve(damage, nbytes, budget)
        check(damage, nbytes, budget, solution)
        assert solution.exact
        assert solution.damage <= before
        before = solution.damage
        # The relaxation splits one part at most, so the optimum is at most that part away.
        assert solution.damage - solution.bound <= max(max(d) - min(d) for d in damage)


def test_dynamic_programme_over_bytes_agrees():
    """An independent exact method: the classic table over every possible size."""
    draw = np.random.default_rng(3)
    sizes = draw.choice([3, 5, 11, 17], 120)
    damage = draw.lognormal(size=120) * sizes
    budget = 300
    table = np.zeros(budget + 1)  # damage removed, by bytes spent
    for size, saved in zip(sizes, damage, strict=True):
        table[size:] = np.maximum(table[size:], table[:-size] + saved)
    solution = solve([[d, 0] for d in damage], [[1, 1 + n] for n in sizes], budget + 120)
    assert solution.exact
    assert solution.damage == pytest.approx(damage.sum() - table.max(), rel=1e-12)


def test_many_calls_give_one_answer():
    damage, nbytes = two_levels(np.random.default_rng(2).lognormal(size=256))
    assert solve(damage, nbytes, 20 * 10**9) == solve(damage, nbytes, 20 * 10**9)


def test_when_too_many_could_win_it_says_so(monkeypatch):
    """Sizes all different, damage as bytes: every subset is worth its price."""
    sizes = np.random.default_rng(0).integers(10**7, 10**8, 60)
    damage, nbytes = [[float(n), 0.0] for n in sizes], [[0, int(n)] for n in sizes]
    monkeypatch.setattr(selection, "MAX_STATES", 2000)
    budget = int(sizes.sum()) // 3
    solution = solve(damage, nbytes, budget)
    check(damage, nbytes, budget, solution)
    assert not solution.exact
    assert solution.damage - solution.bound < 1e-4 * solution.damage


def test_curve_falls_and_stays_within_its_budgets():
    damage, nbytes = two_levels(np.random.default_rng(4).lognormal(size=256))
    least, most = sum(map(min, nbytes)), sum(map(max, nbytes))
    budgets = np.linspace(least, most, 30).astype(int).tolist()
    curve = pareto_curve(damage, nbytes, budgets)
    assert all(spent <= budget for (spent, _), budget in zip(curve, budgets, strict=True))
    damages = [d for _, d in curve]
    assert damages == sorted(damages, reverse=True)
    assert curve[0] == (least, pytest.approx(sum(max(d) for d in damage)))
    assert curve[-1] == (most, 0.0)
