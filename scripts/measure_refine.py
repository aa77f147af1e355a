"""What --refine buys: error of the weights, and divergence from the BF16 model, type by type.

    python scripts/measure_refine.py --types Q4_K Q4_K_M

Every type on all weights (--pure), and some of llama.cpp's mixtures; each with ggml's rounding and
with --refine, without and with an importance matrix (of tests/texts/calibration.jsonl, or
--imatrix). The divergence is that of llama.cpp's library running the files of examples/tiny-qwq, on
tests/texts/heldout.jsonl in windows of 256 tokens, whose second halves are scored; the change has
the standard error of the positions' differences. Speeds are of one core (processor time of the
thread) and 4 million Gaussian weights. Results go to benchmarks/refine.csv.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize
from results import BENCHMARKS, ROOT, circumstances, write_results

from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import cut_tokens
from quant.evaluation.chunks import Chunks, cut_chunks
from quant.evaluation.divergence import Accumulator, PositionScores, compare_logits
from quant.evaluation.runners.gguf import GgufRunner
from quant.formats import FORMATS
from quant.formats.refined import REFINERS, refined
from quant.imatrix import measure_importance
from quant.importance import write_importance
from quant.mixtures import MIXTURES, NEEDS_IMPORTANCE, Choices
from quant.source import open_source
from quant.texts import read_texts
from quant.to_gguf import Wishes, plan_gguf
from quant.write_gguf import write_gguf

MODEL = ROOT / "examples" / "tiny-qwq"
TEXTS = ROOT / "tests" / "texts"
NAMED = ("Q4_K_M", "Q3_K_M", "Q2_K", "Q5_K_M")
"""The mixtures; Q2_K is one of them and a type."""
N_CTX = 256


def make_importance(path: Path) -> Path:
    """The importance matrix that `qwq-quant imatrix --calibration` makes."""
    checkpoint = open_source(str(MODEL))
    tokens = cut_tokens(checkpoint, read_texts(TEXTS / "calibration.jsonl"), 65536, N_CTX)
    squares, counts = measure_importance(StreamedModel(checkpoint), tokens)
    write_importance(path, squares, counts, N_CTX, len(tokens.ids), [tokens.text_name])
    return path


def wishes_for(name: str, pure: bool, imatrix: Path | None, refine: bool) -> Wishes:
    if not pure:
        return Wishes(name, imatrix=imatrix, refine=refine)
    mixture = next(m.name for m in MIXTURES.values() if m.default == name)
    # An importance matrix has nothing on these two, and some types cannot do without.
    others = "Q4_K" if name in NEEDS_IMPORTANCE else None
    choices = Choices(pure=True, embedding_type=others, output_type=others)
    return Wishes(mixture, choices=choices, imatrix=imatrix, refine=refine)


def scores(path: Path, chunks: Chunks, reference: list[np.ndarray]) -> PositionScores:
    accumulator = Accumulator()
    with GgufRunner(path) as runner:
        logits = runner.logits(chunks.inputs, chunks.first)
        for p, q, targets in zip(reference, logits, chunks.targets, strict=True):
            accumulator.add(compare_logits(p, q, targets))
    return accumulator.scores()


def matrices(path: Path) -> dict[str, np.ndarray]:
    """Name -> float32 values of every weight that is quantized."""
    return {
        t.name: dequantize(t.data, t.tensor_type)
        for t in GGUFReader(path).tensors
        if len(t.shape) > 1
    }


def relative_rmse(path: Path, exact: dict[str, np.ndarray]) -> float:
    squares = [
        ((w_hat - exact[name]) ** 2).sum(dtype=np.float64) for name, w_hat in matrices(path).items()
    ]
    return float(np.sqrt(sum(squares) / sum((w**2).sum(dtype=np.float64) for w in exact.values())))


def speed(format, importance: np.ndarray | None, repeats: int = 3) -> float:
    """Million weights a second of one core; the best of a few."""
    w = np.random.default_rng(0).standard_normal((1024, 4096), np.float32) * np.float32(0.02)
    format.encode(w[:1], importance)
    best = np.inf
    for _ in range(repeats):
        start = time.thread_time()
        format.encode(w, importance)
        best = min(best, time.thread_time() - start)
    return w.size / best / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--types", nargs="+", help="default: every type, then the mixtures")
    parser.add_argument("--imatrix", type=Path, help="default: made of tests/texts/calibration")
    parser.add_argument("--tokens", type=int, help="of the held-out text; default: all")
    args = parser.parse_args()
    # (name, whether every weight gets it)
    wanted = [(name, True) for name in FORMATS if name in REFINERS] + [(m, False) for m in NAMED]
    if args.types:
        wanted = [each for each in wanted if each[0] in args.types]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = open_source(str(MODEL))
        imatrix = args.imatrix or make_importance(folder / "imatrix.gguf")
        write_gguf(plan_gguf(source, Wishes("BF16")), folder / "bf16.gguf")
        exact = matrices(folder / "bf16.gguf")
        with GgufRunner(folder / "bf16.gguf") as runner:
            chunks = cut_chunks(runner, read_texts(TEXTS / "heldout.jsonl"), N_CTX, args.tokens)
            reference = list(runner.logits(chunks.inputs, chunks.first))

        def measure(name: str, pure: bool, given: Path | None) -> dict:
            klds, rmses = [], []
            for refine in (False, True):
                job = plan_gguf(source, wishes_for(name, pure, given, refine))
                write_gguf(job, folder / "candidate.gguf", force=True)
                klds.append(scores(folder / "candidate.gguf", chunks, reference).kld)
                rmses.append(relative_rmse(folder / "candidate.gguf", exact))
            plain, better = (kld.mean() for kld in klds)
            error = (klds[1] - klds[0]).std(ddof=1) / np.sqrt(len(klds[0]))
            row = {
                "weights": f"all {name}" if pure else f"{name} mixture",
                "importance": "yes" if given else "no",
                "bits_per_weight": f"{job.plan.bits_per_weight:.4f}",
                "rmse": f"{rmses[0]:.6f}",
                "rmse_refined": f"{rmses[1]:.6f}",
                "rmse_change": f"{rmses[1] / rmses[0] - 1:+.1%}",
                "kld": f"{plain:.6f}",
                "kld_refined": f"{better:.6f}",
                "kld_change": f"{better / plain - 1:+.1%} +- {error / plain:.1%}",
                "encode": "",
                "encode_refined": "",
            }
            if pure:
                ones = np.ones(4096, np.float32) if given else None
                row["encode"] = f"{speed(FORMATS[name], ones):.0f}"
                row["encode_refined"] = f"{speed(refined(FORMATS[name]), ones):.0f}"
            return row

        for name, pure in wanted:
            for given in (None, imatrix):
                if given is None and name in NEEDS_IMPORTANCE:
                    continue
                rows.append(measure(name, pure, given))
                print("  ".join(f"{k} {v}" for k, v in rows[-1].items() if v), flush=True)
    about = {
        "positions": chunks.n_positions,
        **circumstances("numba", "llama-cpp-python", one_core=True),
    }
    write_results(BENCHMARKS / "refine.csv", [row | about for row in rows])


if __name__ == "__main__":
    main()
