"""GPTQ against the paper's equations, one column at a time in float64."""

import numpy as np
import pytest
import torch

from quant.algorithms.gptq import (
    BLOCK_SIZE,
    Hessian,
    IntegerGrid,
    LevelGrid,
    NotFinite,
    _blocks,
    gptq,
    inverse_factor,
    output_error,
    round_to_nearest,
)
from quant.formats.nf4 import ASCENDING, QUANT_MAPS

ROWS, COLUMNS, TOKENS = 24, 192, 1000


def inputs(n_columns=COLUMNS, n_tokens=TOKENS, seed=0) -> np.ndarray:
    """float64 (tokens, columns), correlated, of very different sizes, as activations are."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((n_columns, n_columns)) / np.sqrt(n_columns)
    x = rng.standard_normal((n_tokens, n_columns)) @ (mixing + np.eye(n_columns))
    return x * np.exp(rng.standard_normal(n_columns))


def weights(rows=ROWS, n_columns=COLUMNS, seed=1) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(5, (rows, n_columns)) * 0.02


def case(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """W and H."""
    x = inputs()
    return torch.from_numpy(weights()).to(dtype), torch.from_numpy(x.T @ x).to(dtype)


def integer_grid(bits=4, group_size=32, symmetric=True, shape=(ROWS, COLUMNS)) -> IntegerGrid:
    return IntegerGrid(shape, bits, group_size, symmetric)


def nf4_grid(W: torch.Tensor, blocksize=64, dtype=torch.float32) -> LevelGrid:
    flat = W.float().reshape(-1)
    scales = torch.nn.functional.pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize)
    levels = torch.from_numpy(QUANT_MAPS["nf4"][ASCENDING["nf4"]])
    return LevelGrid(tuple(W.shape), levels, scales.abs().amax(1), blocksize, dtype)


def reference_scales(w: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale, in 8 significant bits, and zero point of each row of a group (rows, group_size)."""
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    if symmetric:
        high = np.maximum(high, -low)
        low = -high
    mantissa, exponent = np.frexp((high - low) / (2**bits - 1))
    scale = np.ldexp(np.round(mantissa * 256) / 256, exponent)
    return scale, np.full(len(w), 2.0 ** (bits - 1)) if symmetric else np.round(-low / scale)


def reference(W, H, round_column, fit, order, damp=0.01) -> np.ndarray:
    """Optimal brain compression, equation by equation: the inverse anew for every column.

    # ref: GPTQ, arXiv 2210.17323, equations 2 and 3
    """
    W, W_hat = W.copy(), np.zeros_like(W)
    H = H + damp * np.mean(np.diag(H)) * np.eye(len(H))
    for at, q in enumerate(order):
        F = order[at:]  # what is not rounded yet
        Hinv = np.linalg.inv(H[np.ix_(F, F)])
        fit(W, q)
        W_hat[:, q] = round_column(W[:, q], q)
        e = (W[:, q] - W_hat[:, q]) / Hinv[0, 0]
        W[:, F] -= np.outer(e, Hinv[0])
    return W_hat


def integer_reference(W, H, bits, group_size, symmetric, static) -> np.ndarray:
    W, H = W.numpy(), H.numpy()
    parameters = {}

    def fit(W, j):
        if j % group_size == 0:
            parameters[j] = reference_scales(W[:, j : j + group_size], bits, symmetric)

    if static:
        for j in range(0, W.shape[1], group_size):
            fit(W, j)

    def round_column(w, j):
        scale, zero = parameters[j - j % group_size]
        return (np.clip(np.round(w / scale + zero), 0, 2**bits - 1) - zero) * scale

    order = np.argsort(-np.diag(H), kind="stable") if static else np.arange(len(H))
    return reference(W, H, round_column, (lambda W, j: None) if static else fit, order)


# --- the algorithm is the paper's ----------------------------------------------------------------


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 16), (4, 64), (4, 192), (8, 96)])
def test_the_paper_column_by_column(bits, group_size, symmetric, static):
    W, H = case()
    found = gptq(W, H, integer_grid(bits, group_size, symmetric), static_groups=static)
    expected = integer_reference(W, H, bits, group_size, symmetric, static)
    assert found.W_hat.dtype == torch.float64
    np.testing.assert_allclose(found.W_hat.numpy(), expected, atol=1e-12)
    assert found.damp == 0.01


def test_the_paper_on_the_nf4_grid():
    W, H = case()
    grid = nf4_grid(W)
    levels, scales = grid.levels.double().numpy(), grid.scales.double().numpy()

    def round_column(w, j):
        scale = scales[(np.arange(ROWS) * COLUMNS + j) // 64]
        nearest = np.abs(w[:, None] / scale[:, None] - levels).argmin(1)
        return levels[nearest] * scale

    order = np.argsort(-np.diag(H.numpy()), kind="stable")
    expected = reference(W.numpy(), H.numpy(), round_column, lambda W, j: None, order)
    np.testing.assert_allclose(gptq(W, H, grid).W_hat.numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("static", [True, False])
def test_blocks_change_nothing(static):
    W, H = case()
    whole = gptq(W, H, integer_grid(), static_groups=static, block_size=COLUMNS)
    for block_size in (1, 7, 32, 100, BLOCK_SIZE):
        found = gptq(W, H, integer_grid(), static_groups=static, block_size=block_size)
        assert torch.equal(found.Q, whole.Q)


@pytest.mark.parametrize("group_size", [1, 3, 32, 128, 192, 256, 768])
@pytest.mark.parametrize("block_size", [1, 100, 128])
def test_every_group_is_fitted_where_all_errors_have_arrived(group_size, block_size):
    blocks = list(_blocks(768, block_size, group_size))
    assert [i for i1, i2 in blocks for i in range(i1, i2)] == list(range(768))
    assert max(i2 - i1 for i1, i2 in blocks) <= block_size
    starts = {i1 for i1, _ in blocks}
    for i1, i2 in blocks:
        for first in range(-(-i1 // group_size) * group_size, i2, group_size):
            assert first in starts or first + group_size <= i2


def test_single_precision_comes_close():
    W, H = case(torch.float32)
    found = gptq(W, H, integer_grid())
    exact = gptq(*case(), integer_grid())
    assert (found.Q == exact.Q).float().mean() > 0.98
    errors = [output_error(W.double() - r.W_hat.double(), case()[1]) for r in (found, exact)]
    assert errors[0] == pytest.approx(errors[1], rel=0.03)


# --- what it is for ------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 64, 192])
def test_worse_on_weights_and_better_on_outputs(bits, group_size, symmetric, static):
    W, H = case(torch.float32)
    plain = round_to_nearest(W, integer_grid(bits, group_size, symmetric))
    found = gptq(W, H, integer_grid(bits, group_size, symmetric), static_groups=static)
    assert (W - found.W_hat).square().sum() > (W - plain.W_hat).square().sum()
    assert output_error(W - found.W_hat, H) < 0.8 * output_error(W - plain.W_hat, H)


def test_worse_on_weights_and_better_on_outputs_with_nf4():
    W, H = case(torch.float32)
    plain, found = round_to_nearest(W, nf4_grid(W)), gptq(W, H, nf4_grid(W))
    assert (W - found.W_hat).square().sum() > (W - plain.W_hat).square().sum()
    assert output_error(W - found.W_hat, H) < 0.7 * output_error(W - plain.W_hat, H)


def test_held_out_inputs_gain_too():
    W = torch.from_numpy(weights()).float()
    x = torch.from_numpy(inputs(n_tokens=6000)).float()
    seen, other = x[:3000], x[3000:]
    plain = round_to_nearest(W, integer_grid()).W_hat
    found = gptq(W, seen.T @ seen, integer_grid()).W_hat
    errors = [(other @ (W - w).T).square().sum() for w in (found, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_without_correlation_there_is_nothing_to_make_good():
    W, _ = case(torch.float32)
    H = torch.diag(torch.linspace(1, 9, COLUMNS))
    plain = round_to_nearest(W, integer_grid())
    assert torch.equal(gptq(W, H, integer_grid()).Q, plain.Q)


def test_the_arguments_are_left_alone():
    W, H = case(torch.float32)
    before = W.clone(), H.clone()
    gptq(W, H, integer_grid())
    round_to_nearest(W, integer_grid())
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])


# --- grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_groups_reach_the_largest_magnitude(bits):
    W = torch.tensor([[0.0, 0.1, 0.2, 0.7], [-0.7, 0.1, 0.0, 0.2], [-0.7, -0.1, -0.2, -0.3]])
    grid = integer_grid(bits, 4, shape=(3, 4))
    found = round_to_nearest(W, grid)
    assert (grid.zero == 2 ** (bits - 1)).all()
    # All but the largest code lie on the grid; +0.7 falls between the last code and the next.
    assert (found.W_hat - W).abs().max() <= 0.51 * grid.scale.max()


@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric_groups_reach_both_ends(bits):
    W = torch.tensor([[0.0, 0.1, 0.2, 0.7], [-0.3, 0.1, 0.0, 0.2], [-0.7, -0.1, -0.2, -0.3]])
    grid = integer_grid(bits, 4, False, shape=(3, 4))
    found = round_to_nearest(W, grid)
    assert grid.zero[0, 0] == 0 and grid.zero[0, 2] == 2**bits - 1
    assert grid.zero[0, 1] == pytest.approx(0.6 * (2**bits - 1), abs=1)
    # A scale in 8 bits may take 1/512 from the range.
    assert (found.W_hat - W).abs().max() <= 0.51 * grid.scale.max() + 0.7 / 512


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros(symmetric):
    W, H = torch.zeros(ROWS, COLUMNS), case(torch.float32)[1]
    found = gptq(W, H, integer_grid(symmetric=symmetric))
    assert not found.W_hat.any()
    assert not gptq(W, H, nf4_grid(W)).W_hat.any()


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e4])
def test_scales_are_the_same_in_both_16_bit_types(scale):
    grid = integer_grid()
    W = case(torch.float32)[0] * scale
    grid.fit(W)
    assert torch.equal(grid.scale.half().float(), grid.scale)
    assert torch.equal(grid.scale.bfloat16().float(), grid.scale)
    assert (grid.scale > 0).all()


def test_codes_and_values_agree():
    W, H = case(torch.float32)
    grid = integer_grid(symmetric=False)
    found = gptq(W, H, grid)
    scale, zero = (a.T.repeat_interleave(32, 1) for a in (grid.scale, grid.zero))
    assert torch.equal((found.Q.float() - zero) * scale, found.W_hat)
    nf4 = nf4_grid(W, dtype=torch.bfloat16)
    found = gptq(W, H, nf4)
    values = nf4.levels[found.Q.long()] * nf4.scales.view(ROWS, -1).repeat_interleave(64, 1)
    assert torch.equal(values.bfloat16().float(), found.W_hat)


def test_blocks_of_levels_may_cross_rows():
    W = torch.from_numpy(weights(5, 48)).float()  # 3.75 blocks of 64
    x = torch.from_numpy(inputs(48)).float()
    plain, found = round_to_nearest(W, nf4_grid(W)), gptq(W, x.T @ x, nf4_grid(W))
    scales = nf4_grid(W).scales.repeat_interleave(64)[: W.numel()].view(W.shape)
    nearest = (W / scales)[..., None].sub(nf4_grid(W).levels).abs().argmin(-1)
    assert torch.equal(plain.Q.long(), nearest)
    assert output_error(W - found.W_hat, x.T @ x) < output_error(W - plain.W_hat, x.T @ x)


def test_grids_that_do_not_fit():
    with pytest.raises(ValueError, match="groups of 128 do not divide rows of 192"):
        integer_grid(group_size=128)
    with pytest.raises(ValueError, match="3 scales"):
        LevelGrid((4, 64), torch.zeros(16), torch.zeros(3), 64, torch.float32)


# --- the Hessian ---------------------------------------------------------------------------------


def test_the_hessian_is_the_sum_of_outer_products():
    x = inputs(n_tokens=600)
    hessian = Hessian(COLUMNS)
    for part in np.split(x, [100, 350]):
        hessian.add(torch.from_numpy(part).view(-1, 10, COLUMNS))
    assert hessian.n_tokens == 600
    assert hessian.H.dtype == torch.float32
    np.testing.assert_allclose(hessian.H.numpy(), x.T @ x, rtol=1e-4, atol=1e-3)


def test_the_factor_of_the_inverse():
    _, H = case()
    Hinv, damp = inverse_factor(H, 0.02)
    expected = np.linalg.inv(H.numpy() + 0.02 * np.diag(H.numpy()).mean() * np.eye(COLUMNS))
    assert damp == 0.02
    assert torch.equal(Hinv, Hinv.triu())
    np.testing.assert_allclose((Hinv.T @ Hinv).numpy(), expected, rtol=1e-8, atol=1e-12)


def test_fewer_tokens_than_columns():
    """H is singular; damping alone makes it invertible."""
    W = torch.from_numpy(weights()).float()
    x = torch.from_numpy(inputs(n_tokens=40)).float()
    found = gptq(W, x.T @ x, integer_grid())
    plain = round_to_nearest(W, integer_grid())
    assert found.damp == 0.01
    assert output_error(W - found.W_hat, x.T @ x) < 0.1 * output_error(W - plain.W_hat, x.T @ x)


@pytest.mark.parametrize("damp", [0.0, 1e-12])
def test_damping_grows_until_a_singular_one_is_solved(damp):
    W = torch.from_numpy(weights()).float()
    x = torch.from_numpy(inputs(n_tokens=40)).float()
    found = gptq(W, x.T @ x, integer_grid(), damp)
    assert damp < found.damp < 0.01
    assert torch.isfinite(found.W_hat).all()


def test_columns_without_inputs_are_rounded_to_the_nearest():
    W, _ = case(torch.float32)
    x = torch.from_numpy(inputs()).float()
    dead = torch.tensor([0, 5, 100, 191])
    x[:, dead] = 0
    grid = integer_grid()
    found, plain = gptq(W, x.T @ x, grid), round_to_nearest(W, integer_grid())
    assert torch.equal(found.Q[:, dead], plain.Q[:, dead])
    assert not torch.equal(found.Q, plain.Q)
    alive = np.setdiff1d(np.arange(COLUMNS), dead)
    assert not torch.equal(found.Q[:, alive], plain.Q[:, alive])


def test_columns_without_inputs_need_no_damping():
    W, H = case()
    dead = torch.tensor([0, 5, 100, 191])
    H[dead] = H[:, dead] = 0
    found = gptq(W, H, integer_grid(), damp=0.0)
    assert found.damp == 0
    assert torch.equal(found.Q[:, dead], round_to_nearest(W, integer_grid()).Q[:, dead])


def test_no_inputs_at_all_is_plain_rounding():
    W, _ = case(torch.float32)
    found = gptq(W, Hessian(COLUMNS).H, integer_grid())
    assert torch.equal(found.Q, round_to_nearest(W, integer_grid()).Q)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_or_weights_that_are_not_finite(bad):
    W, H = case(torch.float32)
    x = torch.from_numpy(inputs()).float()
    x[3, 7] = bad
    hessian = Hessian(COLUMNS)
    hessian.add(x)
    with pytest.raises(NotFinite, match="inputs"):
        gptq(W, hessian.H, integer_grid())
    W[2, 2] = bad
    with pytest.raises(NotFinite, match="weights"):
        gptq(W, H, integer_grid())


def test_inputs_whose_squares_overflow_end():
    """H is finite, but not its diagonal's sum, so neither the damping: no more of it helps."""
    W, H = case(torch.float32)
    H *= 3e38 / H.max()
    assert torch.isfinite(H).all()
    with pytest.raises(NotFinite, match="overflow"):
        gptq(W, H, integer_grid())
