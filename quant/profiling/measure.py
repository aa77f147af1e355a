"""One case, run and measured in the process it is called in, which should do nothing else.

Memory at its peak is, on CUDA, what torch had allocated at most, the weights included. On a CPU it
is the weights and what the process grew by, at most, while the case ran (VmHWM of Linux): its
libraries, which take more than a small model, and what loading left behind are not in it.
"""

import ctypes
import gc
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers.cache_utils import Cache, DynamicCache

from quant.display import printable
from quant.errors import BadInput, Unavailable
from quant.kv_cache import Int8Cache, enable_int8_attention
from quant.profiling.cases import Case

SEED = 0
N_WARMING = 4
"""Tokens generated before anything is measured, so that kernels are compiled and libraries there.
"""

NOTE_LENGTH = 400
"""Characters of a warning that are shown at most."""


@dataclass(frozen=True)
class Job:
    """What to measure, as plain data."""

    folder: Path
    is_int8: bool  # the KV cache
    case: Case
    device: str
    n_repeats: int


@dataclass(frozen=True)
class Measured:
    """peak_nbytes: None where the system does not tell. seconds: of each repetition."""

    model_nbytes: int
    cache_nbytes: int
    peak_nbytes: int | None
    seconds: tuple[float, ...]


def measure(job: Job, say) -> Measured | None:
    """Load the model and run the case `n_repeats` times; None if the memory does not suffice.

    Calls say("advance", 1) after each, and say("note", text) once for each text of warnings.
    Raises BadInput or Unavailable for a model that cannot be loaded or run.
    """
    with warnings_as_notes(say):
        try:
            return _measure(job, say)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None


@contextmanager
def warnings_as_notes(say) -> Iterator[None]:
    """What libraries warn of, on a line each, without the place in their source; at the end."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            yield
        finally:  # what failed was perhaps warned of
            for text in dict.fromkeys(" ".join(str(x.message).split()) for x in caught):
                say("note", printable(text, NOTE_LENGTH))


def is_out_of_memory(error: Exception) -> bool:
    """torch has a class for it on CUDA, and on a CPU only words."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error)


def _measure(job: Job, say) -> Measured:
    model = load_model(job.folder, job.device)
    memory = PeakMemory(model)
    if job.is_int8:
        enable_int8_attention(model)
    few = min(job.case.n_generated, N_WARMING)
    run_case(model, job.is_int8, replace(job.case, n_generated=few))
    memory.begin()
    seconds, nbytes = [], 0
    for _ in range(job.n_repeats):
        started = time.perf_counter()
        cache = run_case(model, job.is_int8, job.case)
        seconds.append(time.perf_counter() - started)
        nbytes = cache_nbytes(cache)
        del cache  # else two were there in the next round
        say("advance", 1)
    return Measured(memory.model_nbytes, nbytes, memory.peak_nbytes(), tuple(seconds))


@torch.no_grad()
def run_case(model, is_int8: bool, case: Case) -> Cache:
    """Generate greedily from random tokens, to the full length; the cache as it is at the end."""
    from transformers import GenerationConfig

    size = (case.batch, case.n_prompt)
    n_vocab = model.config.get_text_config(decoder=True).vocab_size
    tokens = torch.randint(n_vocab, size, generator=torch.Generator().manual_seed(SEED))
    tokens = tokens.to(model.device)
    cache = (
        Int8Cache(model.config, reserve=case.n_cached)
        if is_int8
        else DynamicCache(config=model.config)
    )
    # The folder's own would end at an end-of-text token, and draw at random.
    model.generation_config = GenerationConfig(max_new_tokens=case.n_generated, pad_token_id=0)
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache)
    assert out.shape == (case.batch, case.n_prompt + case.n_generated)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return cache


def cache_nbytes(cache: Cache) -> int:
    """What its buffers take."""
    nbytes = cache.nbytes_allocated if isinstance(cache, Int8Cache) else 0
    for layer in cache.layers:
        stored = getattr(layer, "keys", None), getattr(layer, "values", None)
        nbytes += sum(x.nbytes for x in stored if isinstance(x, torch.Tensor))
    return nbytes


# --- memory -----------------------------------------------------------------------------------


class PeakMemory:
    """Of a loaded model: its weights, and the peak with them from `begin` on."""

    def __init__(self, model):
        self._device = model.device
        self._cuda = model.device.type == "cuda"
        self.model_nbytes = (
            torch.cuda.memory_allocated(model.device) if self._cuda else model_nbytes(model)
        )
        self._before = 0

    def begin(self) -> None:
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with suppress(OSError, AttributeError):  # what was freed goes back to the system: glibc
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):  # VmHWM := VmRSS. ref: man 5 proc_pid_clear_refs
            Path("/proc/self/clear_refs").write_text("5")
        self._before = resident_nbytes("VmRSS") or 0

    def peak_nbytes(self) -> int | None:
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._device)
        peak = resident_nbytes("VmHWM")
        return None if peak is None else self.model_nbytes + max(0, peak - self._before)


def resident_nbytes(field: str) -> int | None:
    """VmRSS (now) or VmHWM (at most) of this process; None where the system is not Linux."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def model_nbytes(model) -> int:
    """Weights and buffers, and the scales that bitsandbytes keeps beside its weights."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:  # with a second one for the scales of the scales
            tensors += [x for x in vars(state).values() if isinstance(x, torch.Tensor)]
            state = state.state2
    unique = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(unique.values())


# --- loading ----------------------------------------------------------------------------------


def load_model(folder: Path, device: str):
    """transformers' model in bf16, or quantized as its folder says. Raises BadInput, Unavailable.

    Never code from the folder, never a pickle.
    """
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            device_map={"": torch.device(device)},
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
        if is_out_of_memory(error):
            raise
        raise BadInput(
            f"transformers cannot load {printable(folder)}.",
            f"It says: {type(error).__name__}: {printable(error)}.",
        ) from error
    return model.eval()
