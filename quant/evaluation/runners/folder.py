"""Runs a model folder in transformers: 16-bit, bitsandbytes, GPTQ, whatever it can load.

On a CPU everything is computed in float32, 4-bit layers too, so that what is measured is the
weights and not the arithmetic; on a GPU in bfloat16, as the model is used. Never code from the
folder, never a pickle.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch

from quant.calibration.device import choose_device
from quant.calibration.tokens import read_tokenizer
from quant.checkpoint import read_tensors
from quant.display import printable
from quant.errors import BadInput, Unavailable
from quant.evaluation.runners import Runner
from quant.preflight import available_memory
from quant.tensors import WEIGHT_DTYPES

WITH_ACTIVATIONS = 1.15
"""Memory a loaded model takes, over that of its weights."""


def open_folder(folder: Path, device: str) -> Runner:
    """The whole model in memory, or layer by layer if it is not quantized and does not fit.

    Raises BadInput or Unavailable.
    """
    device = choose_device(device)
    tensors = read_tensors(folder).values()  # transformers follows "../" in a shard index
    width = 4 if device == "cpu" else 2
    needed = sum(prod(tensor.shape) * width for tensor in tensors)
    plain = all(tensor.dtype in WEIGHT_DTYPES for tensor in tensors)
    if plain and needed * WITH_ACTIVATIONS > _free_memory(device):
        from quant.evaluation.runners.streamed import StreamedRunner

        return StreamedRunner(folder, device)
    return FolderRunner(folder, device)


def _free_memory(device: str) -> int:
    return available_memory() if device == "cpu" else torch.cuda.mem_get_info(device)[0]


class Talker:
    """What a folder's tokenizer and chat template can do without the weights."""

    def __init__(self, folder: Path):
        self.name = folder.name
        self._tokenizer = read_tokenizer(folder)
        start = self._tokenizer("a").input_ids[:1]
        self.bos = start[0] if start == [self._tokenizer.bos_token_id] else None

    def tokenize(self, text: str, special: bool) -> np.ndarray:
        # verbose: it warns of texts longer than the model's context
        found = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=not special, verbose=False
        )
        return np.asarray(found.input_ids, np.int32)

    def chat(self, message: str) -> str:
        if not self._tokenizer.chat_template:
            return message
        messages = [{"role": "user", "content": message}]
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


class FolderRunner(Talker):
    """A folder of safetensors in transformers."""

    def __init__(self, folder: Path, device: str):
        """Raises BadInput for a damaged or unknown model, Unavailable for a missing library."""
        super().__init__(folder)
        self._device = torch.device(device)
        self._model = _load(folder, self._device)
        self.n_vocab = self._model.config.get_text_config().vocab_size
        self.eos = self._find_eos()
        self._cache = None

    def _find_eos(self) -> tuple[int, ...]:
        listed = self._model.generation_config.eos_token_id
        listed = listed if isinstance(listed, list) else [listed]
        tokens = dict.fromkeys([self._tokenizer.eos_token_id, *listed])
        return tuple(token for token in tokens if token is not None)

    def __enter__(self) -> "FolderRunner":
        return self

    def __exit__(self, *exc) -> None:
        self._model = self._cache = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def logits(self, inputs: np.ndarray, first: int) -> Iterator[np.ndarray]:
        kept = torch.arange(first, inputs.shape[1] - 1, device=self._device)
        for window in inputs:
            ids = torch.from_numpy(window.astype(np.int64))[None].to(self._device)
            found = self._model(input_ids=ids, use_cache=False, logits_to_keep=kept)
            yield found.logits[0].float().cpu().numpy()

    def begin(self, tokens: np.ndarray, n_ctx: int) -> np.ndarray:
        self._cache = None
        return self._read(tokens)

    def go_on(self, token: int) -> np.ndarray:
        return self._read(np.array([token]))

    @torch.no_grad()
    def _read(self, tokens: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(tokens.astype(np.int64))[None].to(self._device)
        found = self._model(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = found.past_key_values
        return found.logits[0, -1].float().cpu().numpy()


def _load(folder: Path, device: torch.device):
    """transformers' model, in evaluation mode."""
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
        )
    except ImportError as error:
        raise Unavailable(
            f"A library is missing that {printable(folder)} needs.",
            f"transformers says: {printable(error)}.",
            'pip install "qwq-quant[all]"',
        ) from error
    except Exception as error:  # a damaged folder makes it raise nearly anything
        raise BadInput(
            f"transformers cannot load {printable(folder)}.",
            f"It says: {type(error).__name__}: {printable(error)}.",
        ) from error
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # bitsandbytes: what its layers compute in
            module.compute_dtype = dtype
            module.compute_type_is_set = True
    for parameter in model.parameters():  # the 16-bit linears of a 4-bit folder stay as stored
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model.eval()
