"""Write a Qwen2 checkpoint with random bf16 weights, for benchmarks: no model hub is needed.

    python scripts/make_checkpoint.py OUT --size 0.5b --shards 4

The sizes are Qwen2.5's own, but for 2b. The vocabulary has as many tokens and merges as the real
one (made up by joining tokens of examples/tiny-qwq), so that reading it costs what it costs in
life.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

TINY_QWQ = Path(__file__).parent.parent / "examples" / "tiny-qwq"

SIZES = {  # hidden, intermediate, layers, heads, key-value heads, tied embeddings
    "tiny": (896, 1024, 2, 14, 2, True),
    "0.5b": (896, 4864, 24, 14, 2, True),
    "1.5b": (1536, 8960, 28, 12, 2, True),
    "2b": (2048, 11008, 18, 16, 2, False),  # Qwen2.5-3B's layers, half of them
    "3b": (2048, 11008, 36, 16, 2, True),
    "7b": (3584, 18944, 28, 28, 4, False),
}
N_VOCAB, N_TOKENS = 151936, 151643


def tensor_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, in the order Qwen2 releases store them."""
    hidden, inner, n_layers, heads, kv_heads, tied = SIZES[size]
    kv = hidden // heads * kv_heads
    shapes = {"model.embed_tokens.weight": (N_VOCAB, hidden)}
    for i in range(n_layers):
        layer = {
            "input_layernorm.weight": (hidden,),
            "mlp.down_proj.weight": (hidden, inner),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, hidden),
            "self_attn.q_proj.bias": (hidden,),
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.v_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, hidden),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (N_VOCAB, hidden)
    return shapes


def random_bf16(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal weights of standard deviation 0.02 as bf16 bits (uint16), the low bits dropped."""
    w = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    return (w.view(np.uint32) >> 16).astype(np.uint16)


def write_weights(folder: Path, size: str, n_shards: int, seed: int) -> None:
    """Shards of about equal bytes, and their index."""
    import torch
    from safetensors.torch import save_file as save_torch

    rng = np.random.default_rng(seed)
    shapes = tensor_shapes(size)
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        if groups[-1] and filled + nbytes > total / n_shards and len(groups) < n_shards:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    weight_map = {}
    for i, names in enumerate(groups):
        shard = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {
            name: torch.from_numpy(random_bf16(rng, shapes[name])).view(torch.bfloat16)
            for name in names
        }
        save_torch(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_config(folder: Path, size: str) -> None:
    hidden, inner, n_layers, heads, kv_heads, tied = SIZES[size]
    config = json.loads((TINY_QWQ / "config.json").read_text())
    config |= {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": n_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "vocab_size": N_VOCAB,
        "max_position_embeddings": 32768,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shutil.copy(TINY_QWQ / "generation_config.json", folder)


def write_tokenizer(folder: Path, seed: int) -> None:
    """examples/tiny-qwq's tokenizer, grown to the size of Qwen2's by joining its tokens.

    The added tokens move behind the new ones, where the tokenizers library expects them.
    """
    rng = np.random.default_rng(seed)
    tokenizer = json.loads((TINY_QWQ / "tokenizer.json").read_text())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    added, pieces = tokenizer["added_tokens"], list(vocab)
    while len(vocab) < N_TOKENS - len(added):
        left, right = (pieces[i] for i in rng.integers(0, len(pieces), 2))
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append([left, right] if isinstance(merges[0], list) else f"{left} {right}")
    moved = {token["id"]: len(vocab) + i for i, token in enumerate(added)}
    for token in added:
        token["id"] = moved[token["id"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))

    config = json.loads((TINY_QWQ / "tokenizer_config.json").read_text())
    decoder = config["added_tokens_decoder"]
    config["added_tokens_decoder"] = {str(moved[int(i)]): t for i, t in decoder.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if isinstance(content.get(key), list):
                content[key] = [moved[i] for i in content[key]]
            elif key in content:
                content[key] = moved[content[key]]
        (folder / name).write_text(json.dumps(content, indent=1))


def make_checkpoint(folder: Path, size: str, n_shards: int = 1, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, size)
    write_tokenizer(folder, seed)
    write_weights(folder, size, n_shards, seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_checkpoint(args.out, args.size, args.shards, args.seed)
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.iterdir()) / 1e9:.2f} GB")
