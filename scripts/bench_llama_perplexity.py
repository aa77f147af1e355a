"""What llama.cpp's own llama-perplexity --kl-divergence says of examples/tiny-qwq.

    tar xf llama_cpp_python-*.tar.gz && cd llama_cpp_python-*/vendor/llama.cpp
    cmake -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF
    cmake --build build --target llama-perplexity
    python scripts/bench_llama_perplexity.py build/bin/llama-perplexity

The reference is the model in F32, the text the code and English of tests/texts/heldout.jsonl. The
figures go to benchmarks/llama_perplexity.csv, and tests hold quant.evaluation against them.
"""

import argparse
import csv
import datetime
import hashlib
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "benchmarks" / "llama_perplexity.csv"
TYPES = ("Q8_0", "Q6_K", "Q4_K_M", "Q2_K")
N_CTX, N_WINDOWS = 256, 24
HEADER_NBYTES = 8 + 3 * 4 + 4 * N_CTX * N_WINDOWS

FIGURE = re.compile(r"^(.+?) *: *(-?[\d.]+|nan)(?: ± *(-?[\d.]+|nan))? *%?$")
"""A line such as "Mean PPL(Q)                   :  20.039666 ±   0.615652"."""


def text() -> str:
    """What is measured on."""
    lines = (ROOT / "tests" / "texts" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return "\n\n".join(r["text"] for r in records if r["category"] != "reasoning")


def call(tool: Path, *arguments) -> str:
    """Everything the tool says; ends the script if it fails."""
    command = [str(tool), "-c", str(N_CTX), "--chunks", str(N_WINDOWS), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def figures(said: str) -> list[tuple[str, str, str]]:
    """(name, value, error) of every line of the closing tables."""
    tables = said[said.index("====== Perplexity statistics") :]
    found = [FIGURE.match(line.strip()) for line in tables.splitlines()]
    rows = [m.groups(default="") for m in found if m]
    return [(re.sub(r"\s+", " ", name), value, error) for name, value, error in rows]


def convert(output: Path, type_name: str) -> Path:
    code = "from quant.cli import main; main()"
    model = ROOT / "examples" / "tiny-qwq"
    command = [sys.executable, "-c", code, "to-gguf", model, "-o", output, "--type", type_name]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tool", type=Path)
    parser.add_argument("--source", default="the one in llama-cpp-python-0.3.36")
    arguments = parser.parse_args()
    tool = arguments.tool.resolve()
    about = [N_CTX, N_WINDOWS, arguments.source, platform.machine(), datetime.date.today()]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "text.txt").write_text(text(), encoding="utf-8")
        base = folder / "base.kld"
        reference = convert(folder / "F32.gguf", "F32")
        said = call(tool, "-m", reference, "-f", folder / "text.txt", "--kl-divergence-base", base)
        final = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", said)
        rows.append(["F32", "Final estimate PPL", *final.groups(), *about])
        header = base.read_bytes()[:HEADER_NBYTES]
        digest = hashlib.sha256(header).hexdigest()
        rows.append(["F32", "sha256 of the base file up to its rows", digest, "", *about])
        rows.append(["F32", "bytes of the base file", base.stat().st_size, "", *about])
        for name in TYPES:
            model = convert(folder / f"{name}.gguf", name)
            said = call(tool, "-m", model, "--kl-divergence-base", base, "--kl-divergence")
            rows += [[name, *figure, *about] for figure in figures(said)]
    with OUTPUT.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        names = ["type", "figure", "value", "error", "n_ctx", "n_windows"]
        out.writerow([*names, "llama_cpp", "machine", "date"])
        out.writerows(rows)


if __name__ == "__main__":
    main()
