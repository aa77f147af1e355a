"""Models for the doctor: the four recipes' own files in small, and how defects are planted."""

import json
import struct
from pathlib import Path

import numpy as np

from quant.doctor.checks import examine
from quant.doctor.opening import open_to_examine
from quant.gguf_file import GgufFile, TensorEntry, encode_header, encode_metadata
from quant.recipe import choose_recipe

# Short templates that do to the doctor's conversations what the makers' own do.
QWQ = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}"
    "{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}"
    "{%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}"
    "{{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)
QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}{%- set said = messages[0]['content'] %}"
    "{%- else %}{%- set said = 'You are Qwen, created by Alibaba Cloud. You are a helpful "
    "assistant.' %}{%- endif %}{{- '<|im_start|>system\\n' + said + '<|im_end|>\\n' }}"
    "{%- for message in messages %}{%- if message.role != 'system' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
QWEN3 = QWQ.replace(
    "'<|im_start|>assistant\\n<think>\\n' }}",
    "'<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}",
)
QWEN3_INSTRUCT = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{{- '<｜User｜>' + message.content }}{%- elif message.role == 'assistant' %}"
    "{{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"
)

QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>",
)  # fmt: skip
DEEPSEEK_TOKENS = (
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜begin▁of▁sentence｜>",
)
FIRST = 151643  # the id of the first added token in all of them

RELEASES = {
    "QwQ-32B": {
        "config": {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0, "max_position_embeddings": 131072, "vocab_size": 152064,
            "bos_token_id": 151643, "eos_token_id": 151645, "tie_word_embeddings": False,
            "sliding_window": 32768, "use_sliding_window": False, "torch_dtype": "bfloat16",
        },
        "generation": {
            "bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True,
            "eos_token_id": [151645, 151643], "repetition_penalty": 1.0, "temperature": 0.6,
            "top_k": 40, "top_p": 0.95,
        },
        "tokens": QWEN_TOKENS, "plain": ("<think>", "</think>"),
        "named": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None},
        "template": QWQ,
    },
    "Qwen2.5-7B-Instruct": {
        "config": {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "max_position_embeddings": 32768, "vocab_size": 152064,
            "bos_token_id": 151643, "eos_token_id": 151645, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        "generation": {
            "bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True,
            "eos_token_id": [151645, 151643], "repetition_penalty": 1.05, "temperature": 0.7,
            "top_p": 0.8, "top_k": 20,
        },
        "tokens": QWEN_TOKENS, "plain": (),
        "named": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None},
        "template": QWEN25,
    },
    "Qwen3-8B": {
        "config": {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rms_norm_eps": 1e-06,
            "rope_theta": 1000000, "rope_scaling": None, "max_position_embeddings": 40960,
            "vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "head_dim": 128,
        },
        "generation": {
            "bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
            "pad_token_id": 151643, "temperature": 0.6, "top_k": 20, "top_p": 0.95,
        },
        "tokens": QWEN_TOKENS, "plain": ("<think>", "</think>"),
        "named": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None},
        "template": QWEN3,
    },
    "Qwen3-4B-Instruct-2507": {
        "config": {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rms_norm_eps": 1e-06,
            "rope_theta": 5000000, "rope_scaling": None, "max_position_embeddings": 262144,
            "vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "head_dim": 128,
        },
        "generation": {
            "bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
            "pad_token_id": 151643, "temperature": 0.7, "top_k": 20, "top_p": 0.8,
        },
        "tokens": QWEN_TOKENS, "plain": ("<think>", "</think>"),
        "named": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None},
        "template": QWEN3_INSTRUCT,
    },
    "DeepSeek-R1-Distill-Qwen-32B": {
        "config": {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0, "max_position_embeddings": 131072, "vocab_size": 152064,
            "bos_token_id": 151643, "eos_token_id": 151643, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        "generation": {
            "bos_token_id": 151646, "eos_token_id": 151643, "do_sample": True,
            "temperature": 0.6, "top_p": 0.95,
        },
        "tokens": DEEPSEEK_TOKENS, "plain": ("<think>", "</think>"),
        "named": {
            "eos_token": "<｜end▁of▁sentence｜>", "pad_token": "<｜end▁of▁sentence｜>",
            "bos_token": "<｜begin▁of▁sentence｜>",
        },
        "template": DEEPSEEK,
    },
}  # fmt: skip
"""The numbers and tokens of the published files."""


def save_release(parent: Path, name: str) -> Path:
    """A release's small files, and an embedding and a head of eight columns that are holes."""
    release, folder = RELEASES[name], parent / name
    folder.mkdir()
    added = [{"id": FIRST + i, "content": text, "special": True, "normalized": False}
             for i, text in enumerate(release["tokens"])]  # fmt: skip
    added += [{"id": FIRST + len(added) + i, "content": text, "special": False, "normalized": False}
              for i, text in enumerate(release["plain"])]  # fmt: skip
    pieces = {"a": 0, "b": 1, "ab": 2, **{f"t{i}": i for i in range(3, FIRST)}}
    tokenizer = {
        "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        "model": {"type": "BPE", "vocab": pieces, "merges": [["a", "b"]]},
    }
    config = {**release["named"], "chat_template": release["template"]}
    for file_name, content in {
        "config.json": release["config"],
        "generation_config.json": release["generation"],
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": config,
    }.items():
        (folder / file_name).write_text(json.dumps(content))
    n_rows = release["config"]["vocab_size"]
    write_hole(folder / "model.safetensors", {
        "model.embed_tokens.weight": (n_rows, 8), "lm_head.weight": (n_rows, 8),
    })  # fmt: skip
    return folder


def write_hole(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    header, end, size = {}, 0, {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}[dtype]
    for key, shape in shapes.items():
        start, end = end, end + size * int(np.prod(shape))
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)


def edit(folder: Path, file_name: str, **changes) -> None:
    """Set keys of a JSON file of the folder; ... deletes one."""
    path = folder / file_name
    content = json.loads(path.read_text()) if path.exists() else {}
    content = {k: v for k, v in {**content, **changes}.items() if v is not ...}
    path.write_text(json.dumps(content))


def template_of(folder: Path) -> str:
    return json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]


def rewrite_gguf(path: Path, out: Path, change) -> Path:
    """A copy of a GGUF file whose metadata `change` was called on."""
    gguf = GgufFile.open(path)
    metadata = dict(gguf.metadata)
    change(metadata)
    entries = [
        TensorEntry(i.name, i.shape, i.dtype, i.offset - gguf.data_start)
        for i in gguf.tensors.values()
    ]
    header = encode_header(encode_metadata(metadata), len(metadata), entries, gguf.alignment)
    out.write_bytes(header + path.read_bytes()[gguf.data_start :])
    return out


def diagnose(model, recipe: str | None = None, deep: bool = False):
    source = open_to_examine(str(model))
    return examine(source, choose_recipe(source, recipe), deep)


def found(model, **options) -> set[str]:
    return {finding.id for finding in diagnose(model, **options).findings}
