"""A causal language model of which one decoder layer at a time is in memory.

    model = StreamedModel(checkpoint, weights)
    hidden = model.embed(tokens)
    for layer in model.layers():          # loaded, yielded, freed
        layer.run(hidden, hidden)         # in place, a few sequences at a time

The layers are transformers' own modules, made without memory (on the "meta" device) and given their
weights one at a time. What a layer is called with (masks, rotary angles) comes from transformers'
own forward too: it is run once over recorders in place of the layers. So a new model family, or
a change in transformers, needs no code here, and the result agrees with the whole model's.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from quant.calibration.experts import is_experts, watched_experts
from quant.calibration.hidden_states import HiddenStates, States
from quant.calibration.weights import CheckpointWeights, Weights
from quant.checkpoint import Checkpoint
from quant.errors import BadInput

ACTIVATION_NBYTES = 256 << 20
"""What the activations of one micro-batch may take: as many whole sequences as fit run at once."""

ACTIVATIONS = 6
"""Arrays of (tokens, intermediate) that are alive at once in an MLP, with room for attention's."""

HEAD_BLOCK_NBYTES = 64 << 20
"""Of the output matrix in float32, at a time: QwQ-32B's whole one would be 3.1 GB."""

InputHook = Callable[[str, torch.Tensor], None]
"""(full dotted name of a linear, its input (..., in_features)); experts are named as if each of
their matrices were a linear: model.layers.0.mlp.experts.3.up_proj."""


@dataclass(frozen=True)
class StreamedLayer:
    """A decoder layer with its weights. Valid until the next one is asked for."""

    index: int
    prefix: str  # "model.layers.3."
    module: nn.Module
    n_at_once: int  # sequences in a micro-batch
    _call: dict[str, object]

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Full dotted name -> linear."""
        return {
            self.prefix + name: module
            for name, module in self.module.named_modules()
            if type(module) is nn.Linear
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output for x (sequences, seq_len, hidden), on the model's device."""
        y = self.module(x, **self._call)
        return y[0] if isinstance(y, tuple) else y

    @torch.no_grad()
    def run(self, source: States, target: HiddenStates) -> None:
        """All sequences through the layer; `target` may be `source` itself."""
        for part, x in self.micro_batches(source):
            target.tensor[part] = self.forward(x).cpu()

    def micro_batches(self, source: States, share: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
        """As many whole sequences as fit at once, on the model's device, and which they are.

        share: for callers that need so many times the memory of a plain forward.
        """
        n_at_once = max(1, self.n_at_once // share)
        device = next(self.module.parameters()).device
        for start in range(0, source.n_sequences, n_at_once):
            part = slice(start, start + n_at_once)
            yield part, source.read(part).to(device)

    @contextmanager
    def watched(self, hook: InputHook) -> Iterator[None]:
        """While it is open, `hook` is called with every linear's name and input."""
        with ExitStack() as stack:
            for name, module in self.module.named_modules():
                if is_experts(module):
                    stack.enter_context(watched_experts(module, f"{self.prefix}{name}.", hook))
            for name, linear in self.linears.items():
                handle = linear.register_forward_pre_hook(
                    lambda _, inputs, name=name: hook(name, inputs[0])
                )
                stack.callback(handle.remove)
            yield

    @contextmanager
    def changed(self, weights: dict[str, torch.Tensor]) -> Iterator[None]:
        """While it is open, the named linears have these weights instead of their own."""
        linears = self.linears
        kept = {name: linears[name].weight.data for name in weights}
        for name, w in weights.items():
            linears[name].weight.data = w.to(kept[name].dtype)
        try:
            yield
        finally:
            for name, w in kept.items():
                linears[name].weight.data = w


class StreamedModel:
    """A model run layer by layer. Compute type: float32 on a CPU, bfloat16 elsewhere."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: Weights | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ):
        """Makes the model without its layers' weights. Raises BadInput if transformers cannot."""
        self.checkpoint = checkpoint
        self.weights = weights or CheckpointWeights(checkpoint)
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        model = _without_weights(checkpoint)
        self.config = model.config
        self._base = model.model
        self._layers = list(self._base.layers)
        self._base.layers = nn.ModuleList(_Recorder() for _ in self._layers)
        self._base.norm = self._filled(self._base.norm, "model.norm.")
        # Its frequencies are no stored weights: they were computed on the meta device, so again.
        self._base.rotary_emb = type(self._base.rotary_emb)(self.config).to(self.device)
        self._calls: dict[int, list[dict[str, object]]] = {}  # seq_len -> one a layer

    @property
    def n_layers(self) -> int:
        return len(self._layers)

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def n_vocab(self) -> int:
        return self.weights.shape("model.embed_tokens.weight")[0]

    @torch.no_grad()
    def embed(self, tokens: np.ndarray) -> HiddenStates:
        """The first layer's input for tokens (n_sequences, seq_len). Raises BadInput."""
        unique, where = np.unique(tokens, return_inverse=True)
        if unique[0] < 0 or unique[-1] >= self.n_vocab:
            raise BadInput(
                f"The tokenizer gives token {unique[-1]}, but the model has {self.n_vocab}.",
                "Tokenizer and model do not belong together.",
            )
        name = "model.embed_tokens.weight"
        rows = torch.cat([self.weights.read_rows(name, int(t), int(t) + 1) for t in unique])
        hidden = HiddenStates((*tokens.shape, self.hidden_size), self.dtype)
        rows = rows.to(self.dtype)
        for i, sequence in enumerate(where.reshape(tokens.shape)):
            hidden.tensor[i] = rows[torch.from_numpy(sequence)]
        return hidden

    def layers(
        self, seq_len: int, backwards: bool = False, n_done: int = 0
    ) -> Iterator[StreamedLayer]:
        """Each decoder layer with its weights, freed when the next one is asked for.

        n_done: so many, the first in that order, are left out and not loaded.
        """
        order = range(self.n_layers)
        for i in (order[::-1] if backwards else order)[n_done:]:
            yield self._load(i, seq_len)
            self._layers[i].to("meta")
            give_back_memory()

    def _load(self, index: int, seq_len: int) -> StreamedLayer:
        prefix = f"model.layers.{index}."
        module = self._filled(self._layers[index], prefix)
        widest = max(getattr(self.config, "intermediate_size", 0), 4 * self.hidden_size)
        nbytes = ACTIVATIONS * seq_len * widest * self.dtype.itemsize
        n_at_once = max(1, ACTIVATION_NBYTES // nbytes)
        return StreamedLayer(index, prefix, module, n_at_once, self._call(index, seq_len))

    def _filled(self, module: nn.Module, prefix: str) -> nn.Module:
        """A module of the meta device with its weights."""
        state = {}
        for name, empty in module.named_parameters():
            w = self.weights.read(prefix + name)
            if w.shape != empty.shape:
                raise BadInput(
                    f"{prefix}{name} has the shape {list(w.shape)}.",
                    f"config.json asks for {list(empty.shape)}.",
                )
            state[name] = w.to(self.device, self.dtype)
        module.load_state_dict(state, assign=True, strict=False)
        return module.requires_grad_(False)

    def _call(self, index: int, seq_len: int) -> dict[str, object]:
        """What transformers calls layer `index` with, besides the hidden states."""
        if seq_len not in self._calls:
            shape = (1, seq_len, self.hidden_size)
            with torch.no_grad():
                nothing = torch.zeros(shape, dtype=self.dtype, device=self.device)
                self._base(inputs_embeds=nothing, use_cache=False)
            self._calls[seq_len] = [recorder.call for recorder in self._base.layers]
        return self._calls[seq_len][index]

    # --- the output head ---

    @property
    def norm(self) -> nn.Module:
        """The last norm, with its weights, on the model's device."""
        return self._base.norm

    @property
    def head_name(self) -> str:
        """The output matrix's name; the embedding's, if the two are tied."""
        tied = self.config.tie_word_embeddings
        return "model.embed_tokens.weight" if tied else "lm_head.weight"

    def head_blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The output matrix in blocks of rows: (first token id, (rows, hidden))."""
        n_rows = max(1, HEAD_BLOCK_NBYTES // (4 * self.hidden_size))
        for start in range(0, self.n_vocab, n_rows):
            stop = min(start + n_rows, self.n_vocab)
            rows = self.weights.read_rows(self.head_name, start, stop)
            yield start, rows.to(self.device, self.dtype)
        give_back_memory()


def give_back_memory() -> None:
    """What was freed, to the system. glibc keeps it, in holes that do not fit the next layer: over
    the 24 layers of Qwen2.5-0.5B the process grew from 0.8 to 1.7 GB."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # other C libraries have none
        trim(0)


class _Recorder(nn.Module):
    """Stands in a layer's place and remembers what it was called with."""

    def forward(self, hidden: torch.Tensor, **call) -> torch.Tensor:
        self.call = call
        return hidden


def _without_weights(checkpoint: Checkpoint) -> nn.Module:
    """transformers' model for this checkpoint's config, without memory for its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):  # FP8: decoded as the weights are read
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise BadInput(
            "transformers cannot make this model from its config.json.", f"It says: {error}."
        ) from error
