"""The metadata keys that GGUF readers know: type, meaning, limits, and who reads each.

llama.cpp reads a scalar only if its type is exactly the one expected ("key ... has wrong type"),
and silently ignores a key it does not know: a typing error in a name is never noticed. This table
is what makes both visible before a byte is written.

Types are what llama.cpp's loader asks for; where it does not read a key, what gguf-py writes.
# ref: llama-arch.cpp, LLM_KV_NAMES; llama-model.cpp, load_hparams; llama-vocab.cpp, impl::load;
# ref: llama-model-loader.cpp, GKV::get_kv (exact types), get_key_or_arr; gguf-py, gguf_writer.py
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from quant.gguf_file import Value

ARCHITECTURES = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe")
"""The architectures whose `{arch}.*` keys are known one by one. Mistral converts as llama."""


@dataclass(frozen=True)
class Key:
    """One metadata key: the types its readers accept, and the values that make sense."""

    types: tuple[str, ...]  # accepted by readers; the first is the one to write
    about: str
    choices: tuple = ()
    range: tuple[float, float] | None = None  # both ends included
    set_by: str = "user"  # "tensors": must agree with the weights; "container": the writer's own
    readers: tuple[str, ...] = ARCHITECTURES  # whose loader reads it, for {arch} keys


_U32, _I32, _F32, _BOOL, _STR = ("u32",), ("i32",), ("f32",), ("bool",), ("str",)
_PER_LAYER = ("u32", "arr[i32]", "arr[u32]")  # one number for all layers, or one for each
_COUNT = (0, 2**31 - 1)
_POSITIVE = (1, 2**31 - 1)
_FRACTION = (0.0, 1.0)

SCALING_TYPES = ("none", "linear", "yarn", "longrope")
"""llama.cpp aborts on any other rope.scaling.type. # ref: llama-model.cpp, LLAMA_ROPE_SCALING_TYPES
"""

TOKENIZER_MODELS = (
    "gpt2", "llama", "bert", "t5", "rwkv", "plamo2", "gemma4", "hybriddna", "whitespace",
    "no_vocab", "none",
)  # fmt: skip

PRE_TOKENIZERS = (
    "default", "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0",
    "lfm2", "jina-v5-nano", "minicpm5", "deepseek-llm", "deepseek-coder", "deepseek-v3",
    "deepseek-r1-qwen", "spark2_5", "youtu", "falcon", "mpt", "starcoder", "gpt-2", "phi-2",
    "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "mellum2",
    "modern-bert", "jais", "jais-2", "gemma4", "granite-embed-multi-311m",
    "granite-embed-multi-97m", "sarvam-moe", "jina-v1-en", "jina-v2-code", "roberta-bpe",
    "whitespace", "refact", "command-r", "qwen2", "qwen35", "kormo", "f2llmv2", "stablelm2", "olmo",
    "dbrx", "smaug-bpe", "poro-chat", "chatglm-bpe", "glm4", "glm5", "viking", "tekken", "smollm",
    "codeshell", "bloom", "gpt3-finnish", "exaone", "exaone4", "exaone-moe", "chameleon",
    "minerva-7b", "megrez", "gpt-4o", "llama4", "kanana2", "talkie", "tiny_aya", "cohere2moe",
    "superbpe", "trillion", "granite-docling", "bailingmoe", "bailingmoe2", "llada-moe",
    "seed-coder", "hunyuan", "hunyuan-dense", "hy_v4", "joyai-llm", "kimi-k2", "ufakzeka", "grok-2",
    "afmoe", "laguna", "minimax-m2", "solar-open",
)  # fmt: skip
"""Pre-tokenizers that llama.cpp knows; any other name keeps the file from loading.
# ref: llama-vocab.cpp, llama_vocab::impl::load
"""

SAMPLING = {
    "sequence": Key(_STR, "samplers in their order, separated by ';'"),
    "top_k": Key(_I32, "keep the k likeliest tokens; 0 or less keeps all"),
    "top_p": Key(_F32, "keep the likeliest tokens up to this total probability", range=_FRACTION),
    "min_p": Key(_F32, "drop tokens below this share of the likeliest one", range=_FRACTION),
    "xtc_probability": Key(_F32, "how often XTC removes the top choices", range=_FRACTION),
    "xtc_threshold": Key(_F32, "least probability of a token that XTC removes", range=_FRACTION),
    "temp": Key(_F32, "temperature; 0 picks the likeliest token", range=(0.0, 100.0)),
    "penalty_last_n": Key(_I32, "tokens the repetition penalty looks back on", range=_COUNT),
    "penalty_repeat": Key(_F32, "repetition penalty; 1 is off", range=(0.01, 100.0)),
    "mirostat": Key(_I32, "0 off; 1 and 2 replace the whole sampler sequence", choices=(0, 1, 2)),
    "mirostat_tau": Key(_F32, "Mirostat's target surprise", range=(0.0, 100.0)),
    "mirostat_eta": Key(_F32, "Mirostat's learning rate", range=(0.0, 100.0)),
}
"""The twelve sampling settings a GGUF can carry, without their prefix `general.sampling.`.

# ref: common/common.cpp, common_init_sampler_from_model (any scalar parses there; other readers
# want gguf-py's types, which these are)
"""

_GENERAL = {
    "architecture": Key(_STR, "whose loader reads the file", set_by="tensors"),
    "type": Key(_STR, "what the file holds", choices=("model", "adapter", "mmproj", "vocab")),
    "alignment": Key(_U32, "bytes that tensor data is aligned to", set_by="container"),
    "quantization_version": Key(_U32, "version of the quantized formats, 2 today"),
    "file_type": Key(_U32, "llama.cpp's number for the mixture; informational"),
    "tensor_extra.name": Key(("arr[str]",), "tensors with options of their own"),
    "tensor_extra.prec_a4": Key(("arr[bool]",), "whether each may use 4-bit activations"),
    "name": Key(_STR, "the model's name, as people say it"),
    "author": Key(_STR, "who made the model"),
    "version": Key(_STR, "the model's version"),
    "organization": Key(_STR, "who published the model"),
    "finetune": Key(_STR, "what it was fine-tuned for"),
    "basename": Key(_STR, "the name without size, version and fine-tune"),
    "description": Key(_STR, "free text about the model"),
    "quantized_by": Key(_STR, "who made this file"),
    "size_label": Key(_STR, "the model's size, such as 32B"),
    "license": Key(_STR, "an SPDX licence expression"),
    "license.name": Key(_STR, "the licence's name for people"),
    "license.link": Key(_STR, "where the licence can be read"),
    "url": Key(_STR, "this file's home page"),
    "doi": Key(_STR, "this file's DOI"),
    "uuid": Key(_STR, "this file's UUID"),
    "repo_url": Key(_STR, "this file's repository"),
    "source.url": Key(_STR, "the original model's home page"),
    "source.doi": Key(_STR, "the original model's DOI"),
    "source.uuid": Key(_STR, "the original model's UUID"),
    "source.repo_url": Key(_STR, "the original model's repository"),
    "source.huggingface.repository": Key(_STR, "the original model's name on the hub"),
    "base_model.count": Key(_U32, "how many base models are listed"),
    "dataset.count": Key(_U32, "how many data sets are listed"),
    "tags": Key(("arr[str]",), "words to find the model by"),
    "languages": Key(("arr[str]",), "two-letter codes of the languages it knows"),
    "datasets": Key(("arr[str]",), "data sets it was trained on"),
}

_LINEAGE = (
    "name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url",
)  # fmt: skip

_SIZES = {
    "vocab_size": Key(_U32, "tokens in the vocabulary", set_by="tensors"),
    "context_length": Key(_U32, "longest text in tokens", range=_POSITIVE),
    "embedding_length": Key(_U32, "hidden size", set_by="tensors"),
    "embedding_length_out": Key(_U32, "size of an output embedding", set_by="tensors"),
    "block_count": Key(_U32, "layers", range=(1, 512), set_by="tensors"),
    "feed_forward_length": Key(_PER_LAYER, "inner size of the feed-forward", set_by="tensors"),
    "nextn_predict_layers": Key(_U32, "extra layers for multi-token prediction", set_by="tensors"),
    "pooling_type": Key(_U32, "0 none, 1 mean, 2 cls, 3 last, 4 rank", choices=(0, 1, 2, 3, 4)),
    "classifier.output_labels": Key(("arr[str]",), "names of a classifier's outputs"),
    "classifier.pooling_type": Key(_U32, "a classifier's pooling", choices=(0, 1, 2, 3, 4)),
    "expert_count": Key(_U32, "experts in a layer", set_by="tensors"),
    "expert_used_count": Key(_PER_LAYER, "experts active for a token"),
    "expert_feed_forward_length": Key(
        _PER_LAYER, "inner size of one expert", set_by="tensors", readers=("qwen2moe", "qwen3moe")
    ),
    "expert_shared_feed_forward_length": Key(
        _U32, "inner size of the shared expert", set_by="tensors", readers=("qwen2moe",)
    ),
    "expert_group_count": Key(_U32, "groups that experts are chosen in"),
    "expert_group_used_count": Key(_U32, "groups active for a token"),
    "expert_weights_norm": Key(_BOOL, "whether the experts' weights sum to 1", readers=()),
    "expert_weights_scale": Key(_F32, "factor on the experts' weights", readers=()),
    "expert_shared_count": Key(_U32, "shared experts in a layer", readers=()),
    "expert_gating_func": Key(_U32, "1 softmax, 2 sigmoid", readers=()),
    "tensor_data_layout": Key(_STR, "how q and k rows were reordered", readers=()),
    "logit_scale": Key(_F32, "factor on the logits", readers=()),
}

_ATTENTION = {
    "head_count": Key(_PER_LAYER, "query heads", set_by="tensors"),
    "head_count_kv": Key(_PER_LAYER, "key and value heads", set_by="tensors"),
    "key_length": Key(_U32, "size of a key head", set_by="tensors"),
    "value_length": Key(_U32, "size of a value head", set_by="tensors"),
    "layer_norm_rms_epsilon": Key(_F32, "epsilon of every RMS norm", range=(0.0, 0.1)),
    "causal": Key(_BOOL, "whether a token sees only what came before"),
    "layer_norm_epsilon": Key(_F32, "epsilon of a LayerNorm", range=(0.0, 0.1), readers=()),
    "scale": Key(_F32, "factor on attention scores", readers=()),
    "clamp_kqv": Key(_F32, "largest absolute value of q, k and v", readers=()),
    "sliding_window": Key(_U32, "tokens each layer looks back on", readers=()),
    "sliding_window_pattern": Key(("u32", "arr[bool]"), "which layers have a window", readers=()),
    "temperature_scale": Key(_F32, "attention temperature on long texts", readers=()),
    "temperature_length": Key(_U32, "where attention temperature begins", readers=()),
}

_ROPE = {
    "dimension_count": Key(_U32, "rotated dimensions of a head", set_by="tensors"),
    "freq_base": Key(_F32, "theta, the base of the rotary frequencies", range=(1.0, 1e15)),
    "scale_linear": Key(_F32, "old name of scaling.factor", range=(1.0, 1e6)),
    "scaling.type": Key(_STR, "how positions are stretched", choices=SCALING_TYPES),
    "scaling.factor": Key(_F32, "how many times longer the context becomes", range=(1.0, 1e6)),
    "scaling.original_context_length": Key(
        _U32, "context length before YaRN stretches it", range=_POSITIVE
    ),
    "scaling.attn_factor": Key(
        _F32, "factor on cos and sin, besides YaRN's own 1 + 0.1 ln(factor)", range=(1e-3, 1e3)
    ),
    "scaling.finetuned": Key(_BOOL, "whether the model was trained with the scaling"),
    "scaling.yarn_ext_factor": Key(_F32, "YaRN's extrapolation mix", readers=()),
    "scaling.yarn_attn_factor": Key(_F32, "YaRN's factor on cos and sin", readers=()),
    "scaling.yarn_beta_fast": Key(_F32, "YaRN's upper rotation count, 32", readers=()),
    "scaling.yarn_beta_slow": Key(_F32, "YaRN's lower rotation count, 1", readers=()),
    "scaling.yarn_log_multiplier": Key(_F32, "YaRN's mscale_all_dim", readers=()),
    "dimension_sections": Key(("arr[i32]",), "dimensions per axis, for images", readers=()),
    "freq_base_swa": Key(_F32, "theta of sliding-window layers", readers=()),
}

_TOKENIZER = {
    "model": Key(_STR, "kind of vocabulary", choices=TOKENIZER_MODELS),
    "pre": Key(_STR, "rules that split text before merging", choices=PRE_TOKENIZERS),
    "tokens": Key(("arr[str]",), "text of each token, by id", set_by="tensors"),
    "token_type": Key(("arr[i32]",), "1 normal, 2 unknown, 3 control, 4 user, 5 unused, 6 byte"),
    "token_type_count": Key(_U32, "token types, for BERT"),
    "scores": Key(("arr[f32]", "arr[i32]"), "SentencePiece score of each token"),
    "merges": Key(("arr[str]",), "byte-pair merges, first come first"),
    "precompiled_charsmap": Key(("arr[u8]", "arr[i8]"), "SentencePiece's text normaliser"),
    "suppress_tokens": Key(("arr[i32]",), "tokens that are never sampled"),
    "add_bos_token": Key(_BOOL, "whether a text begins with the BOS token"),
    "add_eos_token": Key(_BOOL, "whether a text ends with the EOS token"),
    "add_sep_token": Key(_BOOL, "whether two texts are parted by the SEP token"),
    "add_space_prefix": Key(_BOOL, "whether a text is given a leading space"),
    "remove_extra_whitespaces": Key(_BOOL, "whether runs of spaces become one"),
    "normalizer.lowercase": Key(_BOOL, "whether text is lowercased"),
    "normalizer.strip_accents": Key(_BOOL, "whether accents are removed"),
}

SPECIAL_IDS = {
    f"tokenizer.ggml.{name}_token_id": Key(_U32, f"id of {about}")
    for name, about in {
        "bos": "the token that begins a text",
        "eos": "the token that ends a text",
        "eot": "the token that ends a turn",
        "eom": "the token that ends a message",
        "unknown": "the token for unknown text",
        "seperator": "the separator (spelled so by llama.cpp)",
        "padding": "the padding token",
        "cls": "the classifier's token",
        "mask": "the mask token",
        "fim_pre": "the fill-in-the-middle prefix token",
        "fim_suf": "the fill-in-the-middle suffix token",
        "fim_mid": "the fill-in-the-middle middle token",
        "fim_pad": "the fill-in-the-middle padding token",
        "fim_rep": "the fill-in-the-middle repository token",
        "fim_sep": "the fill-in-the-middle file separator",
        "prefix": "the fill-in-the-middle prefix token (old name)",
        "suffix": "the fill-in-the-middle suffix token (old name)",
        "middle": "the fill-in-the-middle middle token (old name)",
    }.items()
}

KEYS: dict[str, Key] = {
    **{f"general.{name}": key for name, key in _GENERAL.items()},
    **{
        f"general.{group}.{{id}}.{field}": Key(_STR, f"{field} of one {about}")
        for group, about in {"base_model": "base model", "dataset": "data set"}.items()
        for field in _LINEAGE
    },
    **{f"general.sampling.{name}": key for name, key in SAMPLING.items()},
    **{f"{{arch}}.{name}": key for name, key in _SIZES.items()},
    **{f"{{arch}}.attention.{name}": key for name, key in _ATTENTION.items()},
    **{f"{{arch}}.rope.{name}": key for name, key in _ROPE.items()},
    **{f"tokenizer.ggml.{name}": key for name, key in _TOKENIZER.items()},
    **SPECIAL_IDS,
    "tokenizer.chat_template": Key(_STR, "the chat template, in Jinja"),
    "tokenizer.chat_template.{name}": Key(_STR, "a named template; llama.cpp uses tool_use"),
    "tokenizer.chat_templates": Key(("arr[str]",), "names of the named templates"),
    "tokenizer.huggingface.json": Key(_STR, "the whole tokenizer.json"),
    "quantize.imatrix.file": Key(_STR, "importance matrix the file was made with"),
    "quantize.imatrix.dataset": Key(_STR, "text that the importance matrix saw"),
    "quantize.imatrix.entries_count": Key(_U32, "tensors in the importance matrix"),
    "quantize.imatrix.chunks_count": Key(_U32, "chunks of text it saw"),
    "split.no": Key(("u16",), "number of this shard", set_by="container"),
    "split.count": Key(("u16",), "shards of the model", set_by="container"),
    "split.tensors.count": Key(_I32, "tensors in all shards", set_by="container"),
}
"""Every known key. `{arch}` is the architecture's name, `{id}` a number, `{name}` any name."""

_NUMBERED = re.compile(r"^(general\.(?:base_model|dataset))\.\d+\.")
_TEMPLATE = "tokenizer.chat_template."


def expected(key: str, arch: str) -> Key | None:
    """What readers of a model of this architecture expect under `key`; None if nobody reads it."""
    if "{" in key:
        return None
    template = _NUMBERED.sub(r"\1.{id}.", key)
    if key.startswith(f"{arch}."):
        template = "{arch}" + key[len(arch) :]
    elif key.startswith(_TEMPLATE) and key != _TEMPLATE:
        template = _TEMPLATE + "{name}"
    return KEYS.get(template)


def is_read(key: str, arch: str) -> bool:
    """Whether llama.cpp's loader of this architecture reads the key; True where we cannot know."""
    known = expected(key, arch)
    return known is None or arch not in ARCHITECTURES or arch in known.readers


def nearest(key: str, arch: str) -> str | None:
    """The key that is read and most like a misspelt one, or None if none is near.

    The key may lack the architecture ("context_length"), misspell it ("qqwen2.context_length") or
    name another one ("llama.context_length" for a Qwen2 model).
    """
    names = [name.format(arch=arch, id=0, name="tool_use") for name in KEYS]
    names = [name for name in names if is_read(name, arch)]
    tail = key.partition(".")[2]
    for guess in (f"{arch}.{tail}", f"{arch}.{key}", f"general.{key}"):
        if guess in names:
            return guess
    best = [
        (difflib.SequenceMatcher(None, guess, match).ratio(), match)
        for guess in (key, f"{arch}.{tail}", f"{arch}.{key}")
        for match in difflib.get_close_matches(guess, names, n=1, cutoff=0.75)
    ]
    return max(best)[1] if best else None


def objection(value: Value, key: Key) -> str:
    """Why readers would not take this value of an accepted type, or "" if they do."""
    items: Sequence = value.data if value.type.startswith("arr[") else (value.data,)
    for item in items:
        if key.choices and item not in key.choices:
            near = difflib.get_close_matches(str(item), map(str, key.choices), n=1)
            if len(key.choices) > 12:
                return "is none of the names readers know" + (f"; near: {near[0]}" if near else "")
            return f"must be one of {', '.join(map(str, key.choices))}"
        if key.range and not key.range[0] <= item <= key.range[1]:
            return f"must be between {key.range[0]:g} and {key.range[1]:g}"
    return ""
