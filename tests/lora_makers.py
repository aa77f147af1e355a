"""LoRA adapters made by the real PEFT, with an effect, and PEFT's own merge of them."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def make_adapter(folder: Path, base: Path, *, stored: torch.dtype | None = None, **config) -> Path:
    """Train nothing, but move every trainable weight: an adapter whose B is not zero.

    stored: the type to save the adapter in, if not PEFT's own choice.
    """
    model = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of saved embeddings, and of tied ones
        config = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **config}
        model = get_peft_model(model, LoraConfig(**config))
        torch.manual_seed(1)
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p += 0.02 * torch.randn_like(p)
        model.save_pretrained(folder)
    if stored is not None:
        tensors = load_file(folder / WEIGHTS)
        save_file({name: t.to(stored) for name, t in tensors.items()}, folder / WEIGHTS)
    return folder


def merged_by_peft(base: Path, adapter: Path):
    """The model that merge_and_unload gives, in the type that `base` is stored in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def save_merged(base: Path, adapter: Path, folder: Path) -> Path:
    """PEFT's merge as a checkpoint of its own, with the tokenizer of `base`."""
    merged_by_peft(base, adapter).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (base / name).exists():
            shutil.copy(base / name, folder / name)
    return folder


def adds_in_order() -> bool:
    """Whether torch's matrix product is a chain of fused multiply-adds here, as MKL's is on x86.

    Elsewhere PEFT's own merge differs from machine to machine in the last bit of a few weights.
    """
    b, a = torch.randn(96, 16), torch.randn(16, 80)
    total = torch.zeros(96, 80)
    for k in range(16):  # a product of two float32 is exact in float64
        total = (b[:, k, None].double() * a[k].double() + total.double()).float()
    return (total != b @ a).sum() <= 1  # rounded twice, once in 2**29 steps


def bits(t: torch.Tensor) -> np.ndarray:
    """The stored bits, (rows, columns)."""
    signed = {2: torch.int16, 4: torch.int32}[t.element_size()]
    return t.detach().contiguous().view(signed).numpy().reshape(-1, t.shape[-1])


def edit_config(folder: Path, **changes) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **changes}))


def edit_tensors(folder: Path, change) -> None:
    """change: called with the adapter's tensors, to be changed in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
