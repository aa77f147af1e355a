"""The real llama.cpp, through llama-cpp-python's ctypes: load a GGUF file, ask it things."""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np


@llama_cpp.llama_log_callback
def _record_log(level, text, user_data):
    LOG.append(text.decode("utf-8", "replace"))


LOG: list[str] = []
"""What llama.cpp said since the last `listen`."""

llama_cpp.llama_backend_init()


def listen() -> None:
    """Empty LOG and have llama.cpp speak to it; other tests may have taken its ear away."""
    LOG.clear()
    llama_cpp.llama_log_set(_record_log, ctypes.c_void_p(0))


@contextlib.contextmanager
def loaded(path: Path, vocab_only: bool = False) -> Iterator[ctypes.c_void_p]:
    """The model at `path`; fails the test with llama.cpp's own words if it cannot be loaded."""
    listen()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = vocab_only
    params.check_tensors = not vocab_only
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise AssertionError(f"llama.cpp cannot load {path}:\n{''.join(LOG[-6:])}")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def metadata(path: Path) -> dict[str, str]:
    """Every scalar metadata key as llama.cpp prints it (llama_model_meta_val_str)."""
    with loaded(path, vocab_only=True) as model:
        found = {}
        for i in range(llama_cpp.llama_model_meta_count(model)):
            key = _text(llama_cpp.llama_model_meta_key_by_index, model, i)
            found[key] = _text(llama_cpp.llama_model_meta_val_str_by_index, model, i)
        return found


def _text(function, model, i: int) -> str:
    size = 1 << 16
    buffer = ctypes.create_string_buffer(size)
    n = function(model, i, buffer, size)
    assert 0 <= n < size
    return buffer.raw[:n].decode("utf-8", "surrogateescape")


def chat_template(path: Path, name: str | None = None) -> str | None:
    """The chat template llama.cpp would use."""
    with loaded(path, vocab_only=True) as model:
        found = llama_cpp.llama_model_chat_template(model, name.encode() if name else None)
        return None if found is None else found.decode()


def logits(path: Path, tokens: list[int]) -> np.ndarray:
    """Next-token logits after each token, float32 (len(tokens), n_vocab); everything in float32."""
    with loaded(path) as model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(64, len(tokens))
        params.n_threads = params.n_threads_batch = 2
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(model, params)
        assert context, "".join(LOG[-6:])
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, 1
            assert llama_cpp.llama_decode(context, batch) == 0
            n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
            flat = llama_cpp.llama_get_logits(context)
            return np.ctypeslib.as_array(flat, (len(tokens), n_vocab)).copy()
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)


def tokenize(
    path: Path, texts: list[str], add_special: bool = False, parse_special: bool = True
) -> list[list[int]]:
    """Token ids of each text."""
    with loaded(path, vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        return [_tokenize(vocab, text.encode(), add_special, parse_special) for text in texts]


def _tokenize(vocab, text: bytes, add_special: bool, parse_special: bool) -> list[int]:
    n_max = len(text) + 16
    ids = (llama_cpp.llama_token * n_max)()
    n = llama_cpp.llama_tokenize(vocab, text, len(text), ids, n_max, add_special, parse_special)
    assert n >= 0
    return list(ids[:n])
