"""Tiny real models of every supported architecture, saved by transformers as releases are.

Random weights, but none left at a value that hides a mistake: biases, norms and routers are random
too, and heads, key-value heads and sizes all differ, so that a swapped shape cannot go unseen.
"""

import shutil
from pathlib import Path

import torch
import transformers

TINY_QWQ = Path(__file__).parent.parent / "examples" / "tiny-qwq"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
N_VOCAB = 4096  # examples/tiny-qwq's

_COMMON = {
    "vocab_size": N_VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 4091,
    "eos_token_id": 4093,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

MODELS = {
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-5}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 64}),
    "qwen2moe": (
        "Qwen2Moe",
        {**_EXPERTS, "shared_expert_intermediate_size": 160, "norm_topk_prob": False},
    ),
    "qwen3moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 64, "norm_topk_prob": True}),
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"head_dim": 64, "sliding_window": None}),
}
"""Name -> (transformers' class prefix, config)."""


def make_model(name: str, folder: Path, **config) -> transformers.PreTrainedModel:
    """Save the tiny model `name` in `folder` (float32, tokenizer included) and return it."""
    prefix, own = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**{**_COMMON, **own, **config})
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key:
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif p.dim() == 1:
                p.normal_(std=0.5)
            else:
                p.normal_(std=0.08)
    model.save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copy(TINY_QWQ / file, folder)
    return model


def torch_logits(model, tokens: list[int]):
    """transformers' logits in float32, numpy (len(tokens), n_vocab)."""
    with torch.no_grad():
        return model.float()(torch.tensor([tokens])).logits[0].numpy()
