"""Seeing the inputs of a mixture-of-experts layer, expert by expert.

transformers 5 keeps a layer's experts in two parameters and has several ways to multiply with them;
none of them calls a module for each expert, so there is nothing to hook. While they are watched,
the experts run in the plain loop that defines them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds all experts of a layer: (n_experts, out, in) twice."""
    parts = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return all(isinstance(w, nn.Parameter) and w.dim() == 3 for w in parts)


@contextmanager
def watched_experts(
    experts: nn.Module, prefix: str, hook: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """While it is open, `hook` gets (prefix + "3.up_proj", inputs (n_tokens, in)) of each expert.

    An expert that no token is sent to is not mentioned.
    """

    def forward(hidden: torch.Tensor, expert_of: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """hidden (tokens, in), expert_of and share (tokens, experts used) -> (tokens, in)."""
        result = torch.zeros_like(hidden)
        for i in expert_of.unique().tolist():
            token, place = torch.where(expert_of == i)
            x = hidden[token]
            gate, up = F.linear(x, experts.gate_up_proj[i]).chunk(2, dim=-1)
            inner = experts.act_fn(gate) * up
            for name, seen in (("gate_proj", x), ("up_proj", x), ("down_proj", inner)):
                hook(f"{prefix}{i}.{name}", seen)
            y = F.linear(inner, experts.down_proj[i]) * share[token, place, None]
            result.index_add_(0, token, y.to(result.dtype))
        return result

    experts.forward = forward  # on the instance; deleting it brings the class's back
    try:
        yield
    finally:
        del experts.forward
