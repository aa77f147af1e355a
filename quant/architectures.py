"""What we know of each Hugging Face architecture: its GGUF name, tensors, metadata. No I/O.

One entry of ARCHITECTURES is all it takes to support a model family: the name llama.cpp gives it,
the names of its tensors, how its q and k rows are laid out, and what llama.cpp's graph takes for
granted. Everything else here turns an entry and a checkpoint's headers into the tensors to write.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from quant.assembly import Assembly, Piece
from quant.checkpoint import Checkpoint
from quant.display import printable
from quant.errors import BadInput
from quant.gguf_file import Metadata, Value
from quant.rope import llama3_rope_factors, rope_metadata
from quant.tensors import WEIGHT_DTYPES, TensorInfo

ATTENTION = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
QKV_BIAS = {
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
}
OUTPUT_BIAS = {"self_attn.o_proj.bias": "attn_output.bias"}
QK_NORM = {
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
}
MLP = {
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
MLP_BIAS = {
    name.replace("weight", "bias"): to.replace("weight", "bias") for name, to in MLP.items()
}
ROUTER = {"mlp.gate.weight": "ffn_gate_inp.weight"}
SHARED_EXPERT = {
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
}
EXPERT_PARTS = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
}

NOT_WEIGHTS = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")
"""Buffers that old releases saved and no loader reads."""


@dataclass(frozen=True)
class Architecture:
    """One family of models and how llama.cpp sees it."""

    hf_names: tuple[str, ...]  # config.json's "architectures"
    gguf_name: str
    title: str
    layer: dict[str, str]  # tensors every layer must have, behind "model.layers.N."
    optional: dict[str, str]  # tensors a layer may have
    interleaved_rope: bool = False  # llama.cpp's graph rotates neighbouring rows
    experts: bool = False
    normalised_routing: bool | None = None  # norm_topk_prob that llama.cpp's graph implies
    output_required: bool = False  # llama.cpp does not fall back on the embedding


ARCHITECTURES = (
    Architecture(
        ("Qwen2ForCausalLM",), "qwen2", "Qwen2 (Qwen1.5, Qwen2.5, QwQ-32B)",
        {**ATTENTION, **MLP}, QKV_BIAS,
    ),
    Architecture(
        ("Qwen3ForCausalLM",), "qwen3", "Qwen3", {**ATTENTION, **QK_NORM, **MLP}, QKV_BIAS,
    ),
    Architecture(
        ("Qwen2MoeForCausalLM",), "qwen2moe", "Qwen2-MoE",
        {**ATTENTION, **ROUTER, **SHARED_EXPERT}, QKV_BIAS,
        experts=True, normalised_routing=False, output_required=True,
    ),
    Architecture(
        ("Qwen3MoeForCausalLM",), "qwen3moe", "Qwen3-MoE",
        {**ATTENTION, **QK_NORM, **ROUTER}, QKV_BIAS, experts=True, normalised_routing=True,
    ),
    Architecture(
        ("LlamaForCausalLM", "LLaMAForCausalLM"), "llama", "Llama (2, 3, 3.1 to 3.3)",
        {**ATTENTION, **MLP}, {**QKV_BIAS, **OUTPUT_BIAS, **MLP_BIAS}, interleaved_rope=True,
    ),
    Architecture(
        ("MistralForCausalLM",), "llama", "Mistral (7B, Nemo)",
        {**ATTENTION, **MLP}, {}, interleaved_rope=True,
    ),
)  # fmt: skip


def find_architecture(config: dict) -> Architecture:
    """The entry for this config.json. Raises BadInput with the list of what is supported."""
    names = config.get("architectures")
    found = names[0] if isinstance(names, list) and names else None
    for architecture in ARCHITECTURES:
        if found in architecture.hf_names:
            return architecture
    code = config.get("auto_map")
    why = f"config.json names {printable(found)!r}." if found else "config.json names none."
    if isinstance(code, dict):
        files = sorted({str(v).split("--")[-1].split(".")[0] + ".py" for v in code.values()})
        why += (
            f" It asks to run code of its own ({printable(', '.join(files))}), which is never run."
        )
    supported = "; ".join(f"{a.title}: {a.hf_names[0]}" for a in ARCHITECTURES)
    raise BadInput("This model's architecture is not supported.", why, f"Supported: {supported}.")


# --- numbers from config.json -----------------------------------------------------------------


@dataclass(frozen=True)
class Dimensions:
    """The sizes that shapes follow from, read from config.json and checked to be sane."""

    n_layers: int
    hidden: int
    intermediate: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int
    context: int
    n_experts: int = 0
    n_experts_used: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0


_LIMITS = {"num_hidden_layers": 512, "num_experts": 1024}  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS


def _count(config: dict, key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        what = "is missing" if value is None else f"is {printable(value, 40)}"
        raise BadInput(f'"{key}" in config.json {what}.', "A whole number above 0 is needed.")
    if value > _LIMITS.get(key, 2**31 - 1):
        raise BadInput(f'"{key}" in config.json is {value}.', "llama.cpp cannot load that many.")
    return value


def _flag(config: dict, key: str, default: bool) -> bool:
    """True or false; "false" in quotes, which programs take for true, is refused."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise BadInput(
            f'"{key}" in config.json is {printable(value, 40)}.', "true or false is needed."
        )
    return value


def read_dimensions(architecture: Architecture, config: dict) -> Dimensions:
    """Sizes from config.json. Raises BadInput, naming the key that is missing or wrong."""
    hidden = _count(config, "hidden_size")
    n_heads = _count(config, "num_attention_heads")
    head_dim = _count(config, "head_dim", hidden // n_heads or None)
    n_kv_heads = _count(config, "num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        raise BadInput(f"{n_heads} attention heads cannot share {n_kv_heads} key and value heads.")
    if architecture.gguf_name.startswith("qwen2") and head_dim * n_heads != hidden:
        raise BadInput(
            f"head_dim {head_dim} x {n_heads} heads is not hidden_size {hidden}.",
            "llama.cpp's Qwen2 derives the head size from the two and cannot load this model.",
        )
    experts = {}
    if architecture.experts:
        experts = {
            # transformers 5 saves Qwen3-MoE's number of experts under Mixtral's name
            "n_experts": _count(config, "num_experts", config.get("num_local_experts")),
            "n_experts_used": _count(config, "num_experts_per_tok"),
            "expert_intermediate": _count(config, "moe_intermediate_size"),
        }
        if any(name.startswith("mlp.shared_expert") for name in architecture.layer):
            experts["shared_intermediate"] = _count(config, "shared_expert_intermediate_size")
    return Dimensions(
        n_layers=_count(config, "num_hidden_layers"),
        hidden=hidden,
        intermediate=_count(config, "intermediate_size"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        n_vocab=_count(config, "vocab_size"),
        context=_count(config, "max_position_embeddings"),
        **experts,
    )


def check_graph(architecture: Architecture, config: dict) -> list[str]:
    """Refuse what llama.cpp's graph would compute otherwise; warnings for what it ignores."""
    act = config.get("hidden_act", "silu")
    if act != "silu":
        raise BadInput(
            f"hidden_act is {printable(act)!r}.", f"llama.cpp's {architecture.gguf_name} uses silu."
        )
    if architecture.experts:
        _check_routing(architecture, config)
    return _check_window(architecture, config)


def _check_window(architecture: Architecture, config: dict) -> list[str]:
    """A warning if the model looks back on fewer tokens than its longest text has."""
    if not _flag(config, "use_sliding_window", architecture.title.startswith("Mistral")):
        return []
    context = _count(config, "max_position_embeddings")
    window = _count(config, "sliding_window", context)
    if window >= context:
        return []
    return [
        f"The model attends to the last {window} tokens only (sliding_window); "
        f"llama.cpp's {architecture.gguf_name} attends to all. Longer texts will differ."
    ]


def _check_routing(architecture: Architecture, config: dict) -> None:
    dense = config.get("mlp_only_layers")
    if dense is not None and not isinstance(dense, list):
        raise BadInput(
            f'"mlp_only_layers" in config.json is {printable(dense, 40)}.',
            "A list of layers is needed.",
        )
    if dense or _count(config, "decoder_sparse_step", 1) != 1:
        raise BadInput(
            "Some layers of this model have no experts (mlp_only_layers, decoder_sparse_step).",
            f"llama.cpp's {architecture.gguf_name} has experts in every layer.",
        )
    normalised = _flag(config, "norm_topk_prob", False)
    if normalised != architecture.normalised_routing:
        raise BadInput(
            f"norm_topk_prob is {str(normalised).lower()} in config.json.",
            f"llama.cpp's {architecture.gguf_name} computes the other; the output would be wrong.",
        )


def hyperparameters(
    architecture: Architecture, config: dict, size: Dimensions
) -> tuple[Metadata, list[str]]:
    """The `<architecture>.*` keys llama.cpp reads, and warnings.

    # ref: llama_model_base::load_hparams, and load_arch_hparams of each architecture
    """
    arch = architecture.gguf_name
    eps = config.get("rms_norm_eps")
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 1e-30 < eps < 1:
        raise BadInput(
            '"rms_norm_eps" in config.json is missing, or no number between 0 and 1 that 32-bit '
            "floats can hold."
        )
    metadata = {
        "block_count": Value("u32", size.n_layers),
        "context_length": Value("u32", size.context),
        "embedding_length": Value("u32", size.hidden),
        "feed_forward_length": Value("u32", size.intermediate),
        "attention.head_count": Value("u32", size.n_heads),
        "attention.head_count_kv": Value("u32", size.n_kv_heads),
        "attention.layer_norm_rms_epsilon": Value("f32", float(eps)),
    }
    if config.get("head_dim") is not None:
        metadata["attention.key_length"] = Value("u32", size.head_dim)
        metadata["attention.value_length"] = Value("u32", size.head_dim)
    if arch == "llama":
        metadata["vocab_size"] = Value("u32", size.n_vocab)
        metadata["rope.dimension_count"] = Value("u32", size.head_dim)
    if architecture.experts:
        metadata["expert_count"] = Value("u32", size.n_experts)
        metadata["expert_used_count"] = Value("u32", size.n_experts_used)
        metadata["expert_feed_forward_length"] = Value("u32", size.expert_intermediate)
    if size.shared_intermediate:
        metadata["expert_shared_feed_forward_length"] = Value("u32", size.shared_intermediate)
    rope, warnings = rope_metadata(config, arch)
    return {**{f"{arch}.{key}": value for key, value in metadata.items()}, **rope}, warnings


# --- tensors ----------------------------------------------------------------------------------


class _Taker:
    """Takes tensors out of the checkpoint by name, checking each, and remembers what is left."""

    def __init__(self, checkpoint: Checkpoint):
        self.left = {
            name: info
            for name, info in checkpoint.tensors.items()
            if not name.endswith(NOT_WEIGHTS)
        }

    def take(self, name: str, shape: tuple[int, ...]) -> TensorInfo | None:
        """The tensor of this name, or None; its shape and type are what they must be."""
        info = self.left.pop(name, None)
        if info is None:
            return None
        if info.shape != shape:
            raise BadInput(
                f"{printable(name)} has the shape {_times(info.shape)} instead of {_times(shape)}.",
                "config.json and the weights do not belong together.",
            )
        if info.dtype not in WEIGHT_DTYPES:
            raise BadInput(
                f"{printable(name)} is stored as {info.dtype}, which cannot be read as a weight.",
                f"Readable types: {', '.join(WEIGHT_DTYPES)}.",
            )
        return info

    def need(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self.take(name, shape)
        if info is None:
            raise BadInput(f"The checkpoint has no tensor {name}.", "The model needs it.")
        return info


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _layer_shapes(size: Dimensions) -> dict[str, tuple[int, ...]]:
    """Shape of each layer tensor by its GGUF name, Hugging Face order (out, in)."""
    q, kv = size.n_heads * size.head_dim, size.n_kv_heads * size.head_dim
    hidden, inner, shared = size.hidden, size.intermediate, size.shared_intermediate
    return {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (q, hidden),
        "attn_k.weight": (kv, hidden),
        "attn_v.weight": (kv, hidden),
        "attn_q.bias": (q,),
        "attn_k.bias": (kv,),
        "attn_v.bias": (kv,),
        "attn_q_norm.weight": (size.head_dim,),
        "attn_k_norm.weight": (size.head_dim,),
        "attn_output.weight": (hidden, q),
        "attn_output.bias": (hidden,),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (inner, hidden),
        "ffn_up.weight": (inner, hidden),
        "ffn_down.weight": (hidden, inner),
        "ffn_gate.bias": (inner,),
        "ffn_up.bias": (inner,),
        "ffn_down.bias": (hidden,),
        "ffn_gate_inp.weight": (size.n_experts, hidden),
        "ffn_gate_shexp.weight": (shared, hidden),
        "ffn_up_shexp.weight": (shared, hidden),
        "ffn_down_shexp.weight": (hidden, shared),
        "ffn_gate_inp_shexp.weight": (1, hidden),
    }


def assemble(
    architecture: Architecture, checkpoint: Checkpoint, size: Dimensions
) -> tuple[list[Assembly], list[str]]:
    """Every tensor to write, in order, and warnings. Nothing is read but headers.

    Raises BadInput for a missing tensor, a wrong shape or type, and for tensors left over.
    """
    taker = _Taker(checkpoint)
    embedding = taker.need("model.embed_tokens.weight", (size.n_vocab, size.hidden))
    tensors = [_copy("token_embd.weight", embedding)]
    for layer in range(size.n_layers):
        tensors += _assemble_layer(architecture, taker, size, layer)
    tensors.append(_copy("output_norm.weight", taker.need("model.norm.weight", (size.hidden,))))
    head, warnings = _output_head(architecture, checkpoint, taker, size, embedding)
    tensors += head
    factors = llama3_rope_factors(checkpoint.config)
    if factors is not None:
        tensors.append(_rope_factors(architecture, factors))
    if taker.left:
        names = ", ".join(printable(name) for name in sorted(taker.left)[:10])
        raise BadInput(
            f"{len(taker.left)} tensors have no place in {architecture.title}: {names}"
            + (", ..." if len(taker.left) > 10 else "."),
            "Leaving weights out would change the model, so nothing is written.",
        )
    return tensors, warnings


def check_weights(checkpoint: Checkpoint) -> None:
    """Raise BadInput unless the tensors are those that config.json calls for: none missing, none
    besides, each in its shape and in a type that can be read.
    """
    architecture = find_architecture(checkpoint.config)
    assemble(architecture, checkpoint, read_dimensions(architecture, checkpoint.config))


def _copy(name: str, info: TensorInfo, **more) -> Assembly:
    return Assembly(name, info.shape, (Piece.whole(info),), **more)


def _assemble_layer(
    architecture: Architecture, taker: _Taker, size: Dimensions, layer: int
) -> Iterator[Assembly]:
    shapes = _layer_shapes(size)
    for suffix, gguf_suffix in {**architecture.layer, **architecture.optional}.items():
        get = taker.need if suffix in architecture.layer else taker.take
        info = get(f"model.layers.{layer}.{suffix}", shapes[gguf_suffix])
        if info is None:
            continue
        rotated = gguf_suffix.startswith(("attn_q.", "attn_k.")) and architecture.interleaved_rope
        tensor = _copy(
            f"blk.{layer}.{gguf_suffix}", info, rotary_rows=size.head_dim if rotated else 0
        )
        if gguf_suffix == "ffn_gate_inp_shexp.weight":  # (1, hidden), a vector for llama.cpp
            tensor = Assembly(tensor.name, (size.hidden,), tensor.pieces)
        yield tensor
    if architecture.experts:
        yield from _assemble_experts(taker, size, layer)


def _assemble_experts(taker: _Taker, size: Dimensions, layer: int) -> Iterator[Assembly]:
    """Three stacked tensors (n_experts, out, in), from one matrix an expert or from fused ones."""
    prefix = f"model.layers.{layer}.mlp.experts"
    n, inner, hidden = size.n_experts, size.expert_intermediate, size.hidden
    fused = taker.take(f"{prefix}.gate_up_proj", (n, 2 * inner, hidden))
    for part, gguf_name in EXPERT_PARTS.items():
        shape = (hidden, inner) if part == "down_proj" else (inner, hidden)
        if fused is None:
            names = (f"{prefix}.{expert}.{part}.weight" for expert in range(n))
            pieces = tuple(Piece.whole(taker.need(name, shape)) for name in names)
            if len({piece.info.dtype for piece in pieces}) > 1:
                raise BadInput(f"The experts of layer {layer} are stored in different types.")
        elif part == "down_proj":
            pieces = (Piece.whole(taker.need(f"{prefix}.down_proj", (n, *shape))),)
        else:
            skip = inner if part == "up_proj" else 0
            starts = range(skip, 2 * inner * n, 2 * inner)
            pieces = tuple(Piece(fused, start, start + inner) for start in starts)
        yield Assembly(f"blk.{layer}.{gguf_name}.weight", (n, *shape), pieces)


def _output_head(
    architecture: Architecture,
    checkpoint: Checkpoint,
    taker: _Taker,
    size: Dimensions,
    embedding: TensorInfo,
) -> tuple[list[Assembly], list[str]]:
    """output.weight, unless config.json ties it to the embedding."""
    head = taker.take("lm_head.weight", (size.n_vocab, size.hidden))
    if not _flag(checkpoint.config, "tie_word_embeddings", False):
        if head is None:
            raise BadInput(
                "The checkpoint has no lm_head.weight, and config.json does not tie it.",
                "Without it the model has no output layer.",
                'If the model does tie them, say "tie_word_embeddings": true in config.json.',
            )
        return [_copy("output.weight", head)], []
    warnings = []
    if head is not None:
        warnings.append(
            "lm_head.weight is stored although config.json ties it to the embedding; the embedding "
            "is used, as transformers does."
        )
    if architecture.output_required:
        return [_copy("output.weight", embedding)], warnings
    return [], warnings


def _rope_factors(architecture: Architecture, factors: np.ndarray) -> Assembly:
    if not architecture.interleaved_rope:
        raise BadInput(
            "rope_type llama3 is set for a model that is no Llama.",
            f"llama.cpp's {architecture.gguf_name} reads no rope factors.",
        )
    return Assembly("rope_freqs.weight", factors.shape, constant=factors.astype(np.float32))
