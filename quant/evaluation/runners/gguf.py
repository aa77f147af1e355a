"""Runs a GGUF file in llama.cpp, through the low-level API of llama-cpp-python.

Settings are those of llama-perplexity: 16-bit cache, windows read in batches of at most 512, one
after the other, so that a run gives the same bits again.
"""

import ctypes
import os
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from quant.display import printable
from quant.errors import BadInput, Unavailable
from quant.evaluation.prompts import render_prompts
from quant.gguf_file import open_gguf

BATCH = 512
"""Tokens that are worked on together (llama.cpp's n_ubatch)."""

ERROR = 4  # GGML_LOG_LEVEL_ERROR


@lru_cache(maxsize=1)
def _llama():
    """llama_cpp with its log kept from the terminal. Raises Unavailable."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(
            "llama.cpp is not installed, so .gguf files cannot be run.",
            f"{type(error).__name__}: {printable(error)}.",
            'pip install "qwq-quant[llama]"',
        ) from error
    llama_cpp.llama_backend_init()
    return llama_cpp


def _n_threads() -> int:
    """All cores this process may use, or as many as OMP_NUM_THREADS says."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) else len(os.sched_getaffinity(0))


class _Log:
    """What llama.cpp said of late: the reason, when it does not load a file."""

    def __init__(self):
        self.lines = deque(maxlen=20)
        callback = _llama().llama_log_callback
        self._callback = callback(lambda level, text, _: self.lines.append((level, text)))
        self.listen()

    def listen(self) -> None:
        self.lines.clear()
        _llama().llama_log_set(self._callback, ctypes.c_void_p(0))

    def error(self) -> str:
        """The first error since `listen`; those after it are general."""
        errors = [text for level, text in self.lines if level == ERROR] or [b"nothing"]
        return printable(errors[0].decode("utf-8", "replace").strip())


@lru_cache(maxsize=1)
def _log() -> _Log:
    return _Log()


class GgufRunner:
    """A GGUF model in llama.cpp."""

    can_answer = True

    def __init__(self, path: Path):
        """Raises BadInput if the header is damaged or llama.cpp refuses the file, Unavailable."""
        # llama.cpp ends the whole process over some damaged headers; ours is checked.
        self._template = open_gguf(path).metadata.get("tokenizer.chat_template")
        self._llama = _llama()
        self.name = path.name
        self._context, self._n_ctx, self._at = None, 0, 0
        _log().listen()
        parameters = self._llama.llama_model_default_params()
        parameters.check_tensors = True
        self._model = self._llama.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise BadInput(
                f"llama.cpp cannot load {printable(path)}.", f"It says: {_log().error()}."
            )
        self._vocab = self._llama.llama_model_get_vocab(self._model)
        self.n_vocab = self._llama.llama_vocab_n_tokens(self._vocab)
        self.n_ctx_trained = self._llama.llama_model_n_ctx_train(self._model)
        wants_bos = self._llama.llama_vocab_get_add_bos(self._vocab)
        self.bos = self._llama.llama_vocab_bos(self._vocab) if wants_bos else None
        first = self._llama.llama_vocab_eos(self._vocab)
        ends = [t for t in range(self.n_vocab) if self._llama.llama_vocab_is_eog(self._vocab, t)]
        self.eos = tuple(sorted(ends, key=lambda token: token != first))

    def __enter__(self) -> "GgufRunner":
        return self

    def __exit__(self, *exc) -> None:
        self._close_context()
        if self._model:
            self._llama.llama_model_free(self._model)
            self._model = None

    def tokenize(self, text: str, special: bool) -> np.ndarray:
        raw = text.encode("utf-8", "surrogateescape")
        n_max = len(raw) + 16
        ids = (self._llama.llama_token * n_max)()
        n = self._llama.llama_tokenize(self._vocab, raw, len(raw), ids, n_max, False, special)
        if n < 0:
            raise BadInput(f"{printable(self.name)}: llama.cpp cannot tokenize the text.")
        return np.array(ids[:n], np.int32)

    def prompts(self, messages: Sequence[str]) -> list[str]:
        template = self._template.data if self._template else None
        tokens = {
            "eos_token": self._special(self._llama.llama_vocab_eos),
            "bos_token": self._special(self._llama.llama_vocab_bos),
        }
        return render_prompts(self.name, template, tokens, messages)

    def _special(self, find) -> str:
        token = find(self._vocab)
        return "" if token < 0 else self.text([token])

    def text(self, tokens: list[int]) -> str:
        ids = (self._llama.llama_token * len(tokens))(*tokens)
        size = 64 * len(tokens) + 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._llama.llama_detokenize(
                self._vocab, ids, len(tokens), buffer, size, False, True
            )
            if n >= 0:
                return buffer.raw[:n].decode("utf-8", "replace")
            size = -n

    def logits(self, inputs: np.ndarray, first: int) -> Iterator[np.ndarray]:
        n_ctx = inputs.shape[1]
        self._open_context(n_ctx)
        for window in inputs:
            self._forget()
            blocks = []
            for start in range(0, n_ctx, BATCH):
                tokens = window[start : start + BATCH]
                positions = np.arange(start, start + len(tokens))
                blocks += self._decode(tokens, (positions >= first) & (positions < n_ctx - 1))
            yield blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def begin(self, tokens: np.ndarray, n_ctx: int) -> np.ndarray:
        self._open_context(n_ctx)
        self._forget()
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            is_last = np.arange(start, start + len(part)) == len(tokens) - 1
            found = self._decode(part, is_last)
        return found[0][0]

    def go_on(self, token: int) -> np.ndarray:
        return self._decode(np.array([token], np.int32), np.array([True]))[0][0]

    # --- llama.cpp's context ---

    def _open_context(self, n_ctx: int) -> None:
        """A context for n_ctx tokens; the one there is, if it is long enough."""
        if self._context and self._n_ctx >= n_ctx:
            return
        self._close_context()
        parameters = self._llama.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = n_ctx, BATCH, BATCH
        parameters.n_threads = parameters.n_threads_batch = _n_threads()
        _log().listen()
        self._context = self._llama.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise BadInput(
                f"llama.cpp cannot run {printable(self.name)} on {n_ctx} tokens.",
                f"It says: {_log().error()}.",
                "There may be too little memory: try a shorter window with --context.",
            )
        self._n_ctx = n_ctx

    def _close_context(self) -> None:
        if self._context:
            self._llama.llama_free(self._context)
            self._context = None

    def _forget(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        self._at = 0

    def _decode(self, tokens: np.ndarray, wanted: np.ndarray) -> list[np.ndarray]:
        """Read tokens (n,); logits where wanted (n,) bool, as at most one (n_wanted, n_vocab)."""
        batch = self._llama.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens.tolist()):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self._at + i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, bool(wanted[i])
            status = self._llama.llama_decode(self._context, batch)
        finally:
            self._llama.llama_batch_free(batch)
        if status != 0:
            raise BadInput(
                f"llama.cpp failed to run {printable(self.name)}.",
                f"llama_decode returned {status}: {_log().error()}.",
            )
        self._at += len(tokens)
        n_wanted = int(np.count_nonzero(wanted))
        if n_wanted == 0:
            return []
        flat = self._llama.llama_get_logits(self._context)
        return [np.ctypeslib.as_array(flat, (n_wanted, self.n_vocab)).copy()]
