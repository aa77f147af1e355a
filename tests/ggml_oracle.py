"""llama.cpp's own encoders, called through ctypes: what our bytes are compared with."""

import ctypes
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np


@lru_cache(maxsize=1)
def libggml() -> ctypes.CDLL:
    """libggml-base of the installed llama-cpp-python. Raises RuntimeError if there is none."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise RuntimeError('tests need llama.cpp: pip install -e ".[test]"')
    folder = Path(spec.origin).parent / "lib"
    found = sorted(p for p in folder.glob("*ggml-base*") if p.suffix in (".so", ".dylib", ".dll"))
    if not found:
        raise RuntimeError(f"llama_cpp is installed, but there is no ggml-base library in {folder}")
    ggml = ctypes.CDLL(str(found[0]))
    ggml.ggml_row_size.restype = ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    ggml.ggml_quantize_init.argtypes = [ctypes.c_int]
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return ggml


def quantize(type_id: int, w: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """`w` float32 (rows, columns) in the ggml type `type_id`, as uint8 (rows, row_nbytes)."""
    assert w.dtype == np.float32 and w.ndim == 2 and w.flags.c_contiguous
    assert importance is None or (
        importance.dtype == np.float32 and importance.shape == w.shape[1:]
    )
    ggml = libggml()
    n_rows, n_columns = w.shape
    out = np.empty((n_rows, ggml.ggml_row_size(type_id, n_columns)), np.uint8)
    ggml.ggml_quantize_init(type_id)
    weights = None if importance is None else np.ascontiguousarray(importance)
    nbytes = ggml.ggml_quantize_chunk(
        type_id, w.ctypes.data, out.ctypes.data, 0, n_rows, n_columns,
        None if weights is None else weights.ctypes.data,
    )  # fmt: skip
    assert nbytes == out.nbytes
    return out
