"""The cache of keys and values in 8 bits, for transformers.

    from quant.kv_cache import Int8Cache, enable_int8_attention

    model.generate(**inputs, past_key_values=Int8Cache(model.config))
    enable_int8_attention(model)   # decoding reads the int8 cache; without, it is dequantized

    cache.py      Int8Cache and its layers: storage, growth, beams, cropping
    attention.py  attention and mask functions, registered with transformers
    scales.py     channel scales of K: measured, written, read
    qwen.py       layer_past tuples of Qwen-7B, to and from
The arithmetic is in kernels/ (qwq_kernels). This package imports torch and transformers.
"""

from qwq_kernels.qwen_kv import dequantize_cache_torch, quantize_cache_v

from quant.kv_cache.attention import enable_int8_attention
from quant.kv_cache.cache import Int8Cache
from quant.kv_cache.qwen import from_layer_past, to_layer_past
from quant.kv_cache.scales import KvScales, RecordingCache, read_scales, write_scales

__all__ = [
    "Int8Cache",
    "KvScales",
    "RecordingCache",
    "dequantize_cache_torch",
    "enable_int8_attention",
    "from_layer_past",
    "quantize_cache_v",
    "read_scales",
    "to_layer_past",
    "write_scales",
]
