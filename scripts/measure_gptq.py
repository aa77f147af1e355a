"""What error feedback buys: divergence from the BF16 model, against plain rounding in equal bytes.

    python scripts/measure_gptq.py

examples/tiny-qwq's linears as GPTQ integers (4 and 8 bits, groups of 32, 64 and 128) and as NF4,
each rounded to the nearest, and with feedback calibrated on the built-in text. The divergence is
measured on the built-in held-out text, in windows of 256 tokens, whose second halves are scored.
Results go to benchmarks/gptq.csv.
"""

import argparse
import csv
import datetime
import platform
from collections.abc import Callable
from importlib.metadata import version
from math import prod
from pathlib import Path

import torch

from quant.algorithms.gptq import IntegerGrid, gptq, round_to_nearest
from quant.calibration.feedback import quantize_streamed
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens, cut_tokens
from quant.calibration.weights import ChangedWeights, CheckpointWeights
from quant.check_weights import Candidate, check_weights
from quant.checkpoint import Checkpoint
from quant.feedback_4bit import encode_with_feedback
from quant.formats.gptq import Gptq
from quant.formats.nf4 import Bnb4bit
from quant.groups import find_groups
from quant.texts import built_in_texts, held_out_texts

ROOT = Path(__file__).parent.parent
SEQ_LEN = 256
DTYPE = "bfloat16"

Quantize = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]


def integers(format: Gptq, method: str) -> Quantize:
    def quantize(name: str, W: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
        group_size = format.columns_of_group(W.shape[1])
        grid = IntegerGrid(tuple(W.shape), format.bits, group_size, format.symmetric)
        if method == "nearest":
            return round_to_nearest(W, grid).W_hat
        return gptq(W, H, grid, static_groups=method == "feedback, static groups").W_hat

    return quantize


def nf4(format: Bnb4bit, method: str) -> Quantize:
    def quantize(name: str, W: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
        if method == "feedback":
            return encode_with_feedback(format, W, H, DTYPE)[1]
        importance = H.diagonal().numpy() if "importance" in method else None
        return torch.from_numpy(format.decode(format.encode(W.numpy(), DTYPE, importance), W.shape))

    return quantize


def cases() -> list[tuple[str, str, Gptq | Bnb4bit, Quantize]]:
    """(what it is, method, format, how a weight becomes its decoded copy)"""
    found = []
    kinds = [(bits, size, True) for bits in (4, 8) for size in (32, 64, 128)]
    kinds += [(bits, 128, False) for bits in (4, 8)]
    for bits, size, symmetric in kinds:
        format = Gptq(bits, size, symmetric)
        name = f"int{bits} {'sym' if symmetric else 'asym'} g{size}"
        for method in ("nearest", "feedback, static groups", "feedback, moving groups"):
            found.append((name, method, format, integers(format, method)))
    for search in (False, True):
        format = Bnb4bit(search_scales=search)
        methods = ("nearest", "nearest, by importance", "feedback")
        for method in methods if search else (methods[0], methods[2]):
            name = "nf4, scales searched" if search else "nf4"
            found.append((name, method, format, nf4(format, method)))
    return found


def quantized(checkpoint: Checkpoint, groups: list, tokens: Tokens, quantize: Quantize) -> dict:
    """Module -> its decoded copy."""
    w_hat = {}

    def keep(name: str, W: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
        w_hat[f"{name}.weight"] = quantize(name, W, H).contiguous()
        return w_hat[f"{name}.weight"]

    quantize_streamed(StreamedModel(checkpoint), groups, tokens.ids, keep)
    return w_hat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-qwq")
    parser.add_argument("--tokens", type=int, default=16384, help="of the calibration text")
    parser.add_argument("--fewer", type=int, nargs="*", default=[512, 1024, 4096])
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.model)
    groups = find_groups(checkpoint.tensors.values())
    held_out = cut_tokens(checkpoint, held_out_texts(), 8192, SEQ_LEN)
    rows = []

    def measure(n_tokens: int, name: str, method: str, format, quantize: Quantize) -> None:
        tokens = cut_tokens(checkpoint, built_in_texts(), n_tokens, SEQ_LEN)
        w_hat = quantized(checkpoint, groups, tokens, quantize)
        weights = ChangedWeights(
            CheckpointWeights(checkpoint), frozenset(w_hat), lambda name, _: w_hat[name]
        )
        shapes = [checkpoint.tensors[each].shape for each in w_hat]
        nbytes = sum(map(format.nbytes, shapes))
        _, result = check_weights(checkpoint, [Candidate("", nbytes, weights)], held_out, "cpu")
        plain = next((r for r in rows if r["format"] == name), None)
        rows.append(
            {
                "format": name,
                "method": method,
                "calibration_tokens": "" if method == "nearest" else tokens.n_tokens,
                "nbytes_of_linears": nbytes,
                "bits_per_weight": f"{8 * nbytes / sum(map(prod, shapes)):.4f}",
                "kld": f"{result.kld:.7f}",
                "kld_error": f"{result.kld_error:.7f}",
                "of_nearest": f"{result.kld / float(plain['kld']):.3f}" if plain else "1",
                "same_top": f"{result.same_top:.4f}",
                "perplexity": f"{result.perplexity:.3f}",
            }
        )
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)

    for case in cases():
        measure(args.tokens, *case)
    format = Gptq(4, 64)
    for n_tokens in args.fewer:
        method = "feedback, static groups"
        measure(n_tokens, "int4 sym g64", method, format, integers(format, method))
    about = {
        "positions": held_out.ids.shape[0] * (SEQ_LEN - SEQ_LEN // 2 - 1),
        "date": datetime.date.today().isoformat(),
        "machine": _processor(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    target = ROOT / "benchmarks" / "gptq.csv"
    with open(target, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] | about)
        writer.writeheader()
        writer.writerows(row | about for row in rows)
    print(f"written to {target.relative_to(ROOT)}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
