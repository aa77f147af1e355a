"""The real llama.cpp and the real transformers, asked about tokens in a process of their own.

llama.cpp aborts on some damaged files, and an abort would take this process with it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from quant.checkpoint import Checkpoint
from quant.errors import Unavailable
from quant.gguf_file import encode_header, encode_metadata

SECONDS = 300

TEXTS = (
    "The quick brown fox, 1234567890 times: don't we'll I'M.\n\n  indented\tand trailing  \r\n",
    "def f(x: int) -> dict[str, int]:\n    return {'a': x ** 2, \"b\": 0x1F}  # ok?\n",
    "Größe, été, Владимир, 中文的测试,日本語のテキスト, العربية, हिन्दी, 한국어 😀👍🏽 ½ ≤ ∑",
    "a" * 40 + "   " + "\n" * 7 + "\u00a0\u2003x\u200b" + "!?!?...---===",
)
"""What tokenizers differ over: digits, contractions, runs of spaces and newlines, scripts."""

CHILD = Path(__file__).with_name("llama_child.py")

_START = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
"""Run so, and from "/", Python looks for no module beside the file or where the user stands."""


def load_problem(path: Path) -> str:
    """Why llama.cpp does not load the vocabulary of a GGUF file; "" if it does."""
    return _ask({"gguf": str(path.resolve()), "texts": [], "folder": None})["problem"]


def different_ids(checkpoint: Checkpoint) -> list[str]:
    """Texts that llama.cpp, given our GGUF vocabulary, cuts otherwise than transformers.

    Raises QwqQuantError where the checkpoint cannot be converted at all.
    """
    from quant.source import source_files
    from quant.to_gguf import Wishes, plan_gguf

    metadata = plan_gguf(checkpoint, Wishes()).metadata
    special = [t for t in ("<|im_start|>", "<|im_end|>", "<think>") if t in _tokens(metadata)]
    texts = [*TEXTS, "\n".join(special)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        path.write_bytes(encode_header(encode_metadata(metadata), len(metadata), [], 32))
        # transformers is given the small files alone: no index for it to follow.
        weights = {path.name for path in source_files(checkpoint)}
        for name in SMALL_FILES:
            content = None if name in weights else checkpoint.read_bytes(name)
            if content is not None:
                (Path(folder) / name).write_bytes(content)
        answer = _ask({"gguf": str(path), "texts": texts, "folder": folder})
    if answer["problem"]:
        return [f"llama.cpp does not load the vocabulary: {answer['problem']}"]
    pairs = zip(texts, answer["llama"], answer["theirs"], strict=True)
    return [_difference(text, ours, theirs) for text, ours, theirs in pairs if ours != theirs]


SMALL_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip


def _tokens(metadata) -> set[str]:
    return set(metadata["tokenizer.ggml.tokens"].data)


def _difference(text: str, ours: list[int], theirs: list[int]) -> str:
    pairs = enumerate(zip(ours, theirs, strict=False))
    i = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    return (
        f"{text[:30]!r}: token {i} is {ours[i : i + 3]} in llama.cpp, {theirs[i : i + 3]} in "
        f"transformers"
    )


def _ask(request: dict) -> dict:
    """The child's answer. Raises Unavailable without llama-cpp-python."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _START, str(CHILD)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            cwd="/",
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"it did not answer in {SECONDS} seconds"}
    if "No module named 'llama_cpp'" in done.stderr:
        raise Unavailable(
            "llama-cpp-python is not installed.", "", "pip install 'qwq-quant[llama]'"
        )
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"problem": f"it ended with code {done.returncode}: {last[:200]}"}
