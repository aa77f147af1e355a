"""What the tests of the int8 cache share."""

import json

import torch
from qwq_kernels.kv_int8 import reference_dequantize, reference_quantize
from transformers.cache_utils import DynamicCache, DynamicLayer


class OracleLayer(DynamicLayer):
    """transformers' own layer, which holds what int8 would give back.

    All but its contents is transformers': concatenation, beams, cropping, selection.
    """

    value_bits = 8

    def update(self, key_states, value_states, *args, **kwargs):
        n, is_prompt = key_states.shape[2], self.get_seq_length() == 0
        k = self._rounded(key_states, 8)
        v = self._rounded(value_states, self.value_bits)
        all_k, all_v = super().update(k, v)
        if is_prompt:
            return key_states, value_states
        return (
            torch.cat([all_k[:, :, :-n], key_states], dim=2),
            torch.cat([all_v[:, :, :-n], value_states], dim=2),
        )

    @staticmethod
    def _rounded(x, bits):
        return reference_dequantize(*reference_quantize(x, bits), x.dtype)


class OracleCache(DynamicCache):
    def __init__(self, config, value_bits: int = 8):
        super().__init__(config=config)
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[i] = OracleLayer()
                self.layers[i].value_bits = value_bits


def read_text(tokenizer, path, n_tokens: int) -> torch.Tensor:
    """The first tokens of a text fixture, (1, n_tokens)."""
    lines = path.read_text().splitlines()
    tokens = []
    for line in lines:
        tokens += tokenizer(json.loads(line)["text"]).input_ids
        if len(tokens) >= n_tokens:
            break
    return torch.tensor([tokens[:n_tokens]])


@torch.no_grad()
def step_by_step(model, tokens, cache, n_prompt: int) -> torch.Tensor:
    """Logits float64 (steps, vocabulary): after the prompt, and after each token that follows."""
    logits = [model(tokens[:, :n_prompt], past_key_values=cache).logits[:, -1]]
    for i in range(n_prompt, tokens.shape[1]):
        logits.append(model(tokens[:, i : i + 1], past_key_values=cache).logits[:, -1])
    return torch.cat(logits).double()


def divergence(expected: torch.Tensor, logits: torch.Tensor) -> tuple[float, float]:
    """Mean Kullback-Leibler divergence in nats, and the share of steps with the same best token."""
    p, q = expected.log_softmax(-1), logits.log_softmax(-1)
    kld = (p.exp() * (p - q)).sum(-1).mean().item()
    return kld, (expected.argmax(-1) == logits.argmax(-1)).double().mean().item()
