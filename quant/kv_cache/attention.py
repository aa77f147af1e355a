"""Attention that reads an Int8Cache directly: registered with transformers beside the model's own.

    enable_int8_attention(model)             model.config._attn_implementation: sdpa -> int8_kv_sdpa
    model.set_attn_implementation("sdpa")    undoes it

Prompts, training and whatever the kernel cannot do go to the attention that the model had, with its
own masks, so flash attention and an int8 cache work together. A step of up to 16 tokens over an
Int8Cache goes to `decode_attention`: on CUDA that reads int8 from memory, elsewhere it is the same
mathematics in plain torch.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from qwq_kernels.decode_attention import MAX_QUERIES, decode_attention, supports
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quant.display import printable
from quant.errors import Unavailable
from quant.kv_cache.cache import INT8_ATTENTION, Placeholder, warn_once

_HARMLESS = {
    "cache_position", "is_causal", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "position_ids", "return_dict", "use_cache",
}  # fmt: skip
"""Arguments of attention functions that change nothing about one decoding step. With any other that
is given (softcap, attention sinks, biases ...) the model's own attention is called."""


def enable_int8_attention(model) -> None:
    """Let `model` read Int8Caches directly; with other caches it works as before.

    Raises Unavailable for a model whose attention cannot be exchanged, or without Triton on CUDA.
    """
    config = model.config.get_text_config(decoder=True)
    own = config._attn_implementation or "sdpa"
    if own.startswith(INT8_ATTENTION):
        return
    if not model._can_set_attn_implementation() or not _exists(own, model):
        raise Unavailable(
            f"{printable(type(model).__name__)} cannot read an int8 cache directly.",
            "Its attention does not go through transformers' AttentionInterface.",
            "Int8Cache works without it: the cache is dequantized for each step.",
        )
    if model.device.type == "cuda" and find_spec("triton") is None:
        raise Unavailable(
            "int8 attention on CUDA needs Triton, which is not installed.", "", "pip install triton"
        )
    name = INT8_ATTENTION + own
    AttentionInterface.register(name, Int8Attention(own))
    if own in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, MaskFunction(ALL_MASK_ATTENTION_FUNCTIONS[own]))
    # Not by set_attn_implementation: of a name with "flash" in it that would look for a library.
    config._attn_implementation = name


def _exists(own: str, model) -> bool:
    if own == "eager":
        return hasattr(sys.modules[type(model).__module__], "eager_attention_forward")
    return own in ALL_ATTENTION_FUNCTIONS


# --- the mask function ------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskFunction:
    """The model's own mask function, whose mask then also carries `as_numbers`: what the kernel
    reads, made once for all layers. For causal queries that is the padding alone."""

    own: object

    def __call__(self, *args, **kwargs):
        mask = self.own(*args, **kwargs)
        q_length = kwargs.get("q_length")
        if isinstance(mask, torch.Tensor) and isinstance(q_length, int) and q_length <= MAX_QUERIES:
            padding = kwargs.get("attention_mask")
            is_causal = kwargs.get("mask_function") is causal_mask_function
            fits = padding is None or padding.shape == (mask.shape[0], kwargs.get("kv_length"))
            is_causal = is_causal and fits and mask.ndim == 4
            mask.as_numbers = _as_numbers(padding if is_causal else mask)
        return mask


def _as_numbers(mask: torch.Tensor | None) -> torch.Tensor | None:
    """What is added to logits, in float32: for booleans 0, or -infinity."""
    if mask is None or mask.is_floating_point():
        return None if mask is None else mask.float()
    return torch.where(mask.bool(), 0.0, -torch.inf)


# --- the attention function -------------------------------------------------------------------


@dataclass(frozen=True)
class Int8Attention:
    """An attention function of transformers: int8 where it can, else `own`."""

    own: str

    def __call__(
        self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query (batch, heads, n, head_size) -> (batch, n, heads, head_size), and no weights."""
        if _are_of_one_cache(key, value):
            stored = key.stored
            if query.shape[2] <= MAX_QUERIES:
                mask = getattr(attention_mask, "as_numbers", attention_mask)
                why_not = _why_not(module, query, stored.kv, mask, dropout, kwargs)
                if not why_not:
                    out = decode_attention(query, stored.kv, mask, scaling)
                    return out.transpose(1, 2), None
                warn_once(type(module).__name__, why_not)
            key, value = stored.exact()
        elif isinstance(key, Placeholder) or isinstance(value, Placeholder):
            key, value = (x.exact() if isinstance(x, Placeholder) else x for x in (key, value))
        elif getattr(key, "was_int8", False):
            warn_once(type(module).__name__, "the cache follows another config object")
        return self._own_function(module)(
            _AsBefore(module, self.own), query, key, value, attention_mask,
            scaling=scaling, dropout=dropout, **kwargs,
        )  # fmt: skip

    def _own_function(self, module):
        if self.own == "eager":
            return sys.modules[type(module).__module__].eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS[self.own]


def _are_of_one_cache(key, value) -> bool:
    """Whether they stand for K and V as they were cached: DiffLlama attends with the same keys to
    one half of the values, then to the other."""
    both = isinstance(key, Placeholder) and isinstance(value, Placeholder)
    return both and key.stored is value.stored and key.is_key and not value.is_key


def _why_not(module, query, kv, mask, dropout: float, kwargs: dict) -> str:
    """Why int8 cannot be read directly in this call, or an empty string."""
    if dropout or (torch.is_grad_enabled() and query.requires_grad):
        return "it has no gradients and no dropout"
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        return "it is causal"
    for name, value in kwargs.items():
        if name not in _HARMLESS and value is not None and value is not False:
            return f"it knows nothing of {name}"
    return supports(query, kv, mask)


class _AsBefore:
    """An attention module as its own attention function knew it: config names that function.

    Flash attention's reads the name from the module to find its library.
    """

    def __init__(self, module, own: str):
        self._module, self._own = module, own

    def __getattr__(self, name: str):
        value = getattr(self._module, name)
        return _ConfigAsBefore(value, self._own) if name == "config" else value


class _ConfigAsBefore:
    def __init__(self, config, own: str):
        self._config, self._attn_implementation = config, own

    def __getattr__(self, name: str):
        return getattr(self._config, name)
