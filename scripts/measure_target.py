"""What a target size buys: divergence from the BF16 model, against the mixtures of equal size.

    python scripts/measure_target.py

For every named mixture, --target-bpw with as many bits as it has: without and with an importance
matrix (of tests/texts/calibration.jsonl), plain and with --refine. The divergence is that of
llama.cpp's library running the files, on tests/texts/heldout.jsonl in windows of 256 tokens, whose
second halves are scored. Results go to benchmarks/target.csv.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from results import BENCHMARKS, ROOT, circumstances, write_results

from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import cut_tokens
from quant.evaluation.chunks import Chunks, cut_chunks
from quant.evaluation.divergence import Accumulator, Statistics, compare_logits
from quant.evaluation.runners.gguf import GgufRunner
from quant.imatrix import measure_importance
from quant.importance import write_importance
from quant.source import open_source
from quant.target_size import Target
from quant.texts import read_texts
from quant.to_gguf import Wishes, plan_gguf
from quant.write_gguf import write_gguf

MODEL = ROOT / "examples" / "tiny-qwq"
TEXTS = ROOT / "tests" / "texts"
MIXTURES = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K")
N_CTX = 256


def make_importance(path: Path) -> Path:
    """The importance matrix that `qwq-quant imatrix --calibration` makes."""
    checkpoint = open_source(str(MODEL))
    tokens = cut_tokens(checkpoint, read_texts(TEXTS / "calibration.jsonl"), 65536, N_CTX)
    squares, counts = measure_importance(StreamedModel(checkpoint), tokens)
    write_importance(path, squares, counts, N_CTX, len(tokens.ids), [tokens.text_name])
    return path


def logits(path: Path, chunks: Chunks) -> Iterator[np.ndarray]:
    with GgufRunner(path) as runner:
        yield from runner.logits(chunks.inputs, chunks.first)


def divergence(path: Path, chunks: Chunks, reference: list[np.ndarray]) -> Statistics:
    accumulator = Accumulator()
    for p, q, targets in zip(reference, logits(path, chunks), chunks.targets, strict=True):
        accumulator.add(compare_logits(p, q, targets))
    return accumulator.statistics()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mixtures", nargs="+", default=MIXTURES)
    parser.add_argument("--tokens", type=int, help="of the held-out text; default: all")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = open_source(str(MODEL))
        imatrix = make_importance(folder / "imatrix.gguf")
        write_gguf(plan_gguf(source, Wishes("BF16")), folder / "bf16.gguf")
        with GgufRunner(folder / "bf16.gguf") as runner:
            chunks = cut_chunks(runner, read_texts(TEXTS / "heldout.jsonl"), N_CTX, args.tokens)
        reference = list(logits(folder / "bf16.gguf", chunks))

        def measure(mixture: str, what: str, wishes: Wishes) -> float:
            """Write the file, run it, and note what it is; its bits per weight."""
            job = plan_gguf(source, wishes)
            write_gguf(job, folder / "candidate.gguf", force=True)
            found = divergence(folder / "candidate.gguf", chunks, reference)
            rows.append(
                {
                    "size_of": mixture,
                    "formats": what,
                    "importance": "yes" if wishes.imatrix else "no",
                    "refine": "yes" if wishes.refine else "no",
                    "tensor_nbytes": job.plan.nbytes,
                    "bits_per_weight": f"{job.plan.bits_per_weight:.4f}",
                    "kld": f"{found.kld.value:.6f}",
                    "kld_error": f"{found.kld.error:.6f}",
                    "same_top": f"{found.same_top.value:.4f}",
                }
            )
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            # Half a byte more, so that rounding does not cost the last whole one.
            return 8 * (job.plan.nbytes + 0.5) / job.plan.n_weights

        for mixture in args.mixtures:
            for given in (None, imatrix):
                for refine in (False, True):
                    bits = measure(mixture, mixture, Wishes(mixture, imatrix=given, refine=refine))
                    target = Wishes(target=Target(bits), imatrix=given, refine=refine)
                    measure(mixture, "target", target)
    about = {
        "positions": chunks.n_positions,
        **circumstances("llama-cpp-python"),
    }
    write_results(BENCHMARKS / "target.csv", [row | about for row in rows])


if __name__ == "__main__":
    main()
