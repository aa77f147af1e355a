"""Runs a model folder in transformers: 16-bit, bitsandbytes, GPTQ, whatever it can load.

On a CPU everything is computed in float32, 4-bit layers too, so that what is measured is the
weights and not the arithmetic; on a GPU in bfloat16, as the model is used. GPTQ's integers are
decoded when they are loaded, for the same reason: its kernels differ, and need GPTQModel. Never
code from the folder, never a pickle.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from quant.calibration.device import choose_device
from quant.calibration.gptq_weights import GptqWeights
from quant.checkpoint import read_tensors
from quant.display import printable
from quant.errors import BadInput, QwqQuantError, Unavailable
from quant.evaluation.runners import Runner
from quant.evaluation.runners.stored import find_weights, loaded_nbytes
from quant.evaluation.runners.talker import Talker
from quant.preflight import available_memory

WITH_ACTIVATIONS = 1.15
"""Memory a loaded model takes, over that of its weights."""


def open_folder(
    folder: Path, device: str, work: Path | None = None, say: Callable | None = None
) -> Runner:
    """The whole model in memory, or layer by layer if it does not fit and its weights can be read.

    work, say: see open_runner. Raises BadInput or Unavailable.
    """
    device = choose_device(device)
    read_tensors(folder)  # transformers follows "../" in a shard index: it is refused here
    weights = find_weights(folder)
    needed = loaded_nbytes(folder, weights, 4 if device == "cpu" else 2)
    if weights is not None and needed * WITH_ACTIVATIONS > _free_memory(device):
        from quant.evaluation.runners.streamed import StreamedRunner

        return StreamedRunner(folder, weights, device, work, say)
    return FolderRunner(folder, device, weights if isinstance(weights, GptqWeights) else None)


def _free_memory(device: str) -> int:
    return available_memory() if device == "cpu" else torch.cuda.mem_get_info(device)[0]


class FolderRunner(Talker):
    """A folder of safetensors in transformers."""

    can_answer = True

    def __init__(self, folder: Path, device: str, decoded: GptqWeights | None = None):
        """decoded: weights to take instead of those that transformers would read.

        Raises BadInput for a damaged or unknown model, Unavailable for a missing library.
        """
        super().__init__(folder)
        self._device = torch.device(device)
        self._model = _load(folder, self._device, decoded)
        config = self._model.config.get_text_config()
        self.n_vocab = config.vocab_size
        self.n_ctx_trained = getattr(config, "max_position_embeddings", None)
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
    def logits(self, inputs: np.ndarray, first: int, n_done: int = 0) -> Iterator[np.ndarray]:
        kept = torch.arange(first, inputs.shape[1] - 1, device=self._device)
        for window in inputs[n_done:]:
            ids = torch.from_numpy(window.astype(np.int64))[None].to(self._device)
            found = self._model(input_ids=ids, use_cache=False, logits_to_keep=kept)
            yield found.logits[0].float().cpu().numpy()

    def begin(self, tokens: np.ndarray, n_ctx: int) -> np.ndarray:
        self._cache = None
        _use_bfloat16_kernels(self._model, True)
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


def _load(folder: Path, device: torch.device, decoded: GptqWeights | None):
    """transformers' model, in evaluation mode."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    how = {"dtype": dtype, "device_map": {"": device}, "output_loading_info": True}
    try:
        if decoded is None:
            model, info = _from_folder(folder, how)
        else:
            model, info = _from_decoded(folder, decoded, how)
    except QwqQuantError:
        raise
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
    _require_all(folder, info["missing_keys"])
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # bitsandbytes: what its layers compute in
            module.compute_dtype = dtype
            module.compute_type_is_set = True
    _use_bfloat16_kernels(model, False)
    for parameter in model.parameters():  # the 16-bit linears of a 4-bit folder stay as stored
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def _use_bfloat16_kernels(model, yes: bool) -> None:
    """Whether bitsandbytes may compute in bfloat16 on CPUs that can, whatever it is told.

    That is quick, as answers want it, but would measure a rounding that is not the weights'. It
    packs the weights anew when it begins, and cannot go back.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            from bitsandbytes.functional import has_avx512bf16

            module.support_avx512bf16_for_cpu = yes and has_avx512bf16()


def _from_folder(folder: Path, how: dict) -> tuple:
    """As transformers reads it: (model, what it says of the loading)."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True, use_safetensors=True, **how
    )


def _from_decoded(folder: Path, weights: GptqWeights, how: dict) -> tuple:
    """The model that config.json describes, as if it were not quantized, with these weights."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    place = {"device": how["device_map"][""], "dtype": how["dtype"]}
    state = {name: weights.read(name).to(**place) for name in weights.names}
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, info = kind.from_pretrained(None, config=config, state_dict=state, **how)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model, info


def _require_all(folder: Path, missing: set[str]) -> None:
    """Raise BadInput for weights that are not there: transformers makes random ones up."""
    if missing:
        first = sorted(missing)[0]
        raise BadInput(
            f"{printable(folder)} lacks {len(missing)} of its model's tensors.",
            f"One of them is {printable(first)}.",
            "Download it again, or ask its maker.",
        )
