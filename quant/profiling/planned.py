"""Bytes by arithmetic: weights as they lie in memory, and the cache of a case. Nothing is run.

    bf16   a token, layer and key head:  2 x head_size x 2
    int8                                 2 x (head_size + 4)

What a run takes besides (logits, activations, a copy of a layer while it grows) is not in it, so a
plan is less than a peak.
"""

from dataclasses import dataclass
from pathlib import Path

from quant.checkpoint import read_tensors
from quant.display import printable
from quant.errors import BadInput
from quant.profiling.cases import Case
from quant.tensors import TensorInfo

_LOADED_IN_BF16 = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Bytes:
    """Of a model's weights and of its cache at the end of a case."""

    model_nbytes: int
    cache_nbytes: int

    @property
    def total(self) -> int:
        return self.model_nbytes + self.cache_nbytes


@dataclass(frozen=True)
class Shape:
    """What the bytes of a model and of its cache follow from."""

    model_nbytes: int
    n_heads: int  # of keys and values
    head_size: int
    windows: tuple[int | None, ...]  # one for each layer with a cache: tokens it keeps; None: all
    why_no_int8: str = ""  # where there is no int8 cache for it

    def planned(self, case: Case, is_int8: bool) -> Bytes:
        from qwq_kernels.kv_int8 import token_nbytes

        nbytes = 0
        for window in self.windows:
            n = case.n_cached if window is None else min(case.n_cached, window)
            int8 = is_int8 and window is None
            a_token = token_nbytes(self.head_size, self.head_size) if int8 else 4 * self.head_size
            nbytes += case.batch * n * self.n_heads * a_token
        return Bytes(self.model_nbytes, nbytes)


def read_shape(folder: Path) -> Shape:
    """From config.json and the headers of the weights. Raises BadInput or InputMissing."""
    from transformers import AutoConfig
    from transformers.cache_utils import DynamicCache, DynamicLayer

    tensors = read_tensors(folder).values()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        config = config.get_text_config(decoder=True)
        n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None)
        head_size = head_size or config.hidden_size // config.num_attention_heads
        layers = DynamicCache(config=config).layers
    except Exception as error:  # configs of strangers fail in many ways
        raise BadInput(
            f"transformers cannot make a model from {printable(folder)}.",
            f"It says: {type(error).__name__}: {printable(error)}.",
        ) from error
    windows = tuple(
        layer.sliding_window - 1 if layer.is_sliding else None
        for layer in layers
        if isinstance(layer, DynamicLayer)
    )
    nbytes = sum(map(_loaded_nbytes, tensors))
    return Shape(nbytes, n_heads, head_size, windows, _why_no_int8(layers, head_size))


def _why_no_int8(layers: list, head_size: int) -> str:
    """Why Int8Cache would refuse the model, or an empty string."""
    from qwq_kernels.kv_int8 import check_head_size
    from transformers.cache_utils import DynamicLayer

    if not any(type(layer) is DynamicLayer for layer in layers):  # as Int8Cache asks
        return f"none of the model's {len(layers)} layers is one of full attention"
    try:
        check_head_size(head_size)
    except ValueError as error:
        return f"the model has {error}"
    return ""


def _loaded_nbytes(info: TensorInfo) -> int:
    """Floating weights are loaded in bf16; packed integers, and their scales, as they are."""
    if info.dtype in _LOADED_IN_BF16 and info.name.endswith((".weight", ".bias")):
        return 2 * info.n_weights
    return info.nbytes
