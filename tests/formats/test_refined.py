"""--refine: every block is at least as good as ggml's, and any reader decodes it."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import block_cases
import numpy as np
import pytest
from ggml_oracle import libggml
from safetensors.torch import load_file

from quant.evaluation.chunks import cut_chunks
from quant.evaluation.comparison import compare
from quant.evaluation.runners.gguf import GgufRunner
from quant.formats import FORMATS, refined_kernels_codebook
from quant.formats.format import Float16Overflow
from quant.formats.i_quants import REFUSES_WITHOUT_IMPORTANCE
from quant.formats.refined import REFINERS, refined
from quant.formats.refined_codebooks import LAYOUTS
from quant.source import open_source
from quant.texts import read_texts
from quant.to_gguf import Wishes, plan_gguf
from quant.write_gguf import write_gguf

REFINED = [FORMATS[name] for name in FORMATS if name in REFINERS]
each_format = pytest.mark.parametrize("format", REFINED, ids=lambda f: f.name)


CASES = {
    name: case
    for name, case in block_cases.CASES.items()
    if name in (
        "gaussian", "bf16 values", "heavy tails", "one outlier", "outlier columns",
        "sub-blocks of many sizes", "constant", "negative constant", "zero", "mostly zero",
        "few values", "positive", "far above zero", "far below zero", "large", "too large",
        "d subnormal in float16", "d zero in float16", "squares subnormal", "subnormal",
    )
} | {
    "d near the end of float16": lambda rng, shape: rng.standard_normal(shape) * 1.7e5,
    "greatest": lambda rng, shape: rng.choice([-1, 1], shape) * 3.4e38,
}  # fmt: skip
IMPORTANCES = ("none", "uneven", "zeros", "none of outliers", "minute", "enormous")


def importance_kinds(rng, n_columns) -> dict:
    found = block_cases.importance_kinds(rng, n_columns)
    return {name: found[name] for name in IMPORTANCES}


def block_errors(format, w, importance, encoded) -> np.ndarray:
    """Weighted squared error of every block, float64."""
    w_hat = format.decode(encoded, w.shape).astype(np.float64)
    assert np.isfinite(w_hat).all()
    weights = np.float64(1) if importance is None else importance.astype(np.float64)
    return (weights * (w_hat - w) ** 2).reshape(-1, format.block_size).sum(axis=1)


def encode_both(format, w, importance):
    """ggml's blocks and the refined ones; None if both refuse."""
    try:
        plain = format.encode(w, importance)
    except Float16Overflow:
        with pytest.raises(Float16Overflow, match=format.name):
            refined(format).encode(w, importance)
        return None
    return plain, refined(format).encode(w, importance)


@pytest.mark.parametrize("case", CASES)
@each_format
def test_no_block_is_worse_than_ggmls(format, case):
    rng = np.random.default_rng(0)
    w = CASES[case](rng, (5, 1792)).astype(np.float32)
    for kind, importance in importance_kinds(rng, 1792).items():
        if importance is None and format.name in REFUSES_WITHOUT_IMPORTANCE:
            continue
        both = encode_both(format, w, importance)
        if both is None:
            continue
        plain, better = (block_errors(format, w, importance, each) for each in both)
        assert both[1][""].dtype == np.uint8 and both[1][""].shape == both[0][""].shape
        assert (better <= plain).all(), f"{kind}: {np.argwhere(better > plain)[0]}"
        untouched = (both[0][""] == both[1][""]).reshape(-1, format.block_nbytes).all(axis=1)
        assert (untouched | (better < plain)).all(), "a block changed for nothing"


@each_format
def test_no_block_of_tiny_qwq_is_worse_and_all_are_better_together(format, tiny_qwq):
    rng = np.random.default_rng(0)
    before = after = 0.0
    for name, tensor in load_file(tiny_qwq / "model.safetensors").items():
        if "layers.3." in name and tensor.ndim == 2:
            w = tensor.float().numpy()
            importance = np.exp(rng.standard_normal(w.shape[1])).astype(np.float32)
            for given in (None, importance):
                if given is None and format.name in REFUSES_WITHOUT_IMPORTANCE:
                    continue
                both = encode_both(format, w, given)
                plain, better = (block_errors(format, w, given, each) for each in both)
                assert (better <= plain).all()
                before, after = before + plain.sum(), after + better.sum()
    assert after < 0.99 * before


ERROR_OF_GGML = {
    "Q4_0": 0.9, "Q4_1": 0.795, "Q5_0": 0.885, "Q5_1": 0.795, "Q8_0": 0.86,
    "Q2_K": 0.825, "Q3_K": 0.93, "Q4_K": 0.96, "Q5_K": 0.895, "Q6_K": 0.88,
    "IQ4_NL": 0.935, "IQ4_XS": 0.945, "IQ3_XXS": 0.72, "IQ3_S": 0.62, "IQ2_S": 0.875, "IQ1_M": 0.62,
}  # fmt: skip
"""The refined squared error of Gaussian weights is below this part of ggml's."""


@pytest.mark.parametrize("name", ERROR_OF_GGML)
def test_gaussian_weights_have_less_error_and_keep_their_size(name):
    format = FORMATS[name]
    w = np.random.default_rng(0).standard_normal((64, 1024), np.float32)
    plain, better = encode_both(format, w, None)
    part = block_errors(format, w, None, better).sum() / block_errors(format, w, None, plain).sum()
    assert part < ERROR_OF_GGML[name]
    w_hat = format.decode(better, w.shape).astype(np.float64)
    assert abs((w_hat * w).sum() / (w.astype(np.float64) ** 2).sum() - 1) < 1e-3


@each_format
def test_importance_moves_the_error_to_where_it_matters_less(format):
    w = np.random.default_rng(0).standard_normal((16, 1024), np.float32)
    importance = np.where(np.arange(1024) % 4 == 0, 100, 1).astype(np.float32)
    ones = np.ones(1024, np.float32)
    flat, weighed = (refined(format).encode(w, given) for given in (ones, importance))
    cost = [block_errors(format, w, importance, each).sum() for each in (flat, weighed)]
    assert cost[1] < 0.95 * cost[0]


def test_q4_0_is_as_good_as_every_scale_tried():
    """All float16 scales there are, for a few blocks: what the search could have found."""
    w = np.random.default_rng(0).standard_normal((24, 32), np.float32)
    format = FORMATS["Q4_0"]
    d = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    d = d[(d > 0.05) & (d < 1)]
    d = np.concatenate([d, -d])[:, None]
    least = [
        ((d * np.clip(np.round(row / d), -8, 7) - row) ** 2).sum(axis=1).min()
        for row in w.astype(np.float64)
    ]
    found = block_errors(format, w, None, refined(format).encode(w))
    # The search aims at decoded weights of the right size, which costs some 0.6 % of error.
    assert found.sum() < 1.015 * np.sum(least)


@each_format
def test_ggml_decodes_the_same_values(format):
    w = np.random.default_rng(0).standard_normal((4, 512), np.float32)
    importance = w[0] ** 2
    encoded = refined(format).encode(w, importance)
    name = format.name
    name = name.lower() if name.startswith("IQ") else name[0].lower() + name[1:]
    function = getattr(libggml(), f"dequantize_row_{name}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    values = np.empty_like(w)
    blocks = np.ascontiguousarray(encoded[""])
    function(blocks.ctypes.data, values.ctypes.data, w.size)
    np.testing.assert_allclose(values, format.decode(encoded, w.shape), rtol=1e-6, atol=1e-7)


@each_format
def test_row_blocks_in_four_threads_give_the_same_bytes(format):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((40, 768), np.float32)
    importance = rng.random(768, np.float32)
    encode = refined(format).encode
    for given in (None, importance):
        if given is None and format.name in REFUSES_WITHOUT_IMPORTANCE:
            continue
        with ThreadPoolExecutor(4) as pool:
            starts = range(0, 40, 3)
            parts = list(pool.map(lambda i, g=given: encode(w[i : i + 3], g)[""], starts))
        assert np.array_equal(np.concatenate(parts), encode(w, given)[""])


def test_rows_do_not_depend_on_one_that_overflows():
    """Near float16's end ggml encodes some rows without importance that it refuses with ones."""
    format = FORMATS["Q3_K"]
    w = (np.random.default_rng(0).standard_normal((40, 768)) * 1.75e6).astype(np.float32)
    format.encode(w)
    with pytest.raises(Float16Overflow):
        format.encode(w, np.ones(768, np.float32))
    together = refined(format).encode(w)
    alone = [refined(format).encode(w[i : i + 1])[""] for i in range(40)]
    assert np.array_equal(together[""], np.concatenate(alone))
    plain = block_errors(format, w, None, format.encode(w)).sum()
    assert block_errors(format, w, None, together).sum() < 0.95 * plain


@each_format
def test_views_and_read_only_arrays_are_taken_by_value(format):
    w = np.random.default_rng(0).standard_normal((8, 768), np.float32)
    importance = np.arange(1, 769, dtype=np.float32)
    encode = refined(format).encode
    expected = encode(np.ascontiguousarray(w[::2, 256:512]), importance[256:512].copy())[""]
    w.setflags(write=False)
    importance.setflags(write=False)
    before = w.copy()
    assert np.array_equal(encode(w[::2, 256:512], importance[256:512])[""], expected)
    assert np.array_equal(w, before)
    assert encode(w[:0], importance)[""].shape == (0, format.row_nbytes(768))


@each_format
def test_kernels_are_compiled_once(format):
    w = np.random.default_rng(0).standard_normal((2, 256), np.float32)
    for given in (np.ones(256, np.float32), None):
        if given is not None or format.name not in REFUSES_WITHOUT_IMPORTANCE:
            refined(format).encode(w, given)
    kernel = REFINERS[format.name](format)
    if format.name in LAYOUTS:  # these share one
        kernel = refined_kernels_codebook.search
    assert len(kernel.signatures) == 1


@each_format
def test_everything_but_the_encoder_is_the_formats_own(format):
    better = refined(format)
    assert better.encode is not format.encode
    assert (better.name, better.ggml_type, better.decode) == (
        format.name, format.ggml_type, format.decode,
    )  # fmt: skip
    assert better.nbytes((3, 512)) == format.nbytes((3, 512))


@each_format
def test_bad_arguments_are_refused_as_ever(format):
    w = np.ones((2, 256), np.float32)
    with pytest.raises(ValueError, match="float32"):
        refined(format).encode(w.astype(np.float64))
    with pytest.raises(ValueError, match="importance"):
        refined(format).encode(w, np.ones(512, np.float32))
    if format.name in REFUSES_WITHOUT_IMPORTANCE:
        with pytest.raises(ValueError, match="importance"):
            refined(format).encode(w)


def test_refined_q4_k_m_diverges_less(tiny_qwq, texts, tmp_path):
    """What --refine is for: llama.cpp, running the file, stays closer to the 16-bit model."""
    source = open_source(str(tiny_qwq))
    klds = []
    write_gguf(plan_gguf(source, Wishes("BF16")), tmp_path / "bf16.gguf")
    with GgufRunner(tmp_path / "bf16.gguf") as reference:
        chunks = cut_chunks(reference, read_texts(texts / "heldout.jsonl"), 256, 6000)
        for refine in (False, True):
            path = tmp_path / f"{refine}.gguf"
            write_gguf(plan_gguf(source, Wishes("Q4_K_M", refine=refine)), path)
            with GgufRunner(path) as candidate:
                klds.append(compare(reference, candidate, chunks).kld.value)
    assert (tmp_path / "True.gguf").stat().st_size == (tmp_path / "False.gguf").stat().st_size
    assert klds[1] < 0.98 * klds[0]


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "TQ1_0", "TQ2_0"])
def test_where_nothing_helps_there_is_none(name):
    assert refined(FORMATS[name]) is None


def test_every_quantized_format_was_considered():
    assert set(FORMATS) - set(REFINERS) == {"F32", "F16", "BF16", "TQ1_0", "TQ2_0"}
