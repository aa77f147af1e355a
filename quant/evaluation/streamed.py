"""Comparing models that do not fit in memory: scores from their last hidden states.

The logits of 4096 positions of QwQ-32B are 2.5 GB, and its output matrix 3.1 GB in float32; neither
is ever held whole. The vocabulary passes by in blocks, and everything a position needs is summed
up on the way, about the running maximum m of its logits l (online softmax):

    s = sum exp(l - m)          ln p_i = l_i - m - ln s
    t = sum exp(l - m) (l - k)  k: the candidate's logits, s' and m' its own
    kld = t / s - (m + ln s) + (m' + ln s')

# ref: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from quant.calibration.hidden_states import HiddenStates
from quant.calibration.passes import UNKEPT, Passes
from quant.calibration.streamed_model import StreamedModel
from quant.errors import BadInput
from quant.evaluation.divergence import PositionScores

LOGITS_AT_ONCE = 1 << 22
"""Logits of one model that are alive at a time: 16 MB in float32."""


def final_states(
    model: StreamedModel,
    tokens: np.ndarray,
    passes: Passes = UNKEPT,
    name: str = "final states",
    until: str = "",
    progress: Callable[[int], None] = lambda n: None,
) -> HiddenStates:
    """The output of the last decoder layer for tokens (n_sequences, seq_len), not normed yet.

    name, until: of the pass, and of the one that needs the result. Calls progress(1) after each
    layer, first of all with those that an interrupted run had done.
    """
    walk = passes.begin(name, model.n_layers, until)
    hidden = model.embed(tokens)
    walk.restore("hidden", hidden.tensor)
    if walk.n_done:
        progress(walk.n_done)
    for layer in model.layers(tokens.shape[1], n_done=walk.n_done):
        layer.run(hidden, hidden)
        walk.done({}, {"hidden": hidden.tensor})
        progress(1)
    return hidden


@torch.no_grad()
def compare_streamed(
    model: StreamedModel,
    reference: HiddenStates,
    candidates: Sequence[HiddenStates],
    tokens: np.ndarray,
    first: int = 0,
) -> list[PositionScores]:
    """Scores of every candidate against the reference at positions first ... seq_len - 2.

    model: whose last norm and output matrix all of them share; reference, candidates: what
    final_states gave for `tokens` (n_sequences, seq_len). Positions are in reading order.
    Raises BadInput if a model gives NaN.
    """
    targets = torch.from_numpy(tokens[:, first + 1 :].reshape(-1)).to(model.device)
    states = [_scored(each, first) for each in (reference, *candidates)]
    running = [_Running(len(targets), model.device) for _ in states]
    for token, w in model.head_blocks():
        n_at_once = max(1, LOGITS_AT_ONCE // len(w))
        for start in range(0, len(targets), n_at_once):
            part = slice(start, start + n_at_once)
            logits = None
            for state, sums in zip(states, running, strict=True):
                x = model.norm(state[part].to(model.device))
                own = (x @ w.T).float()
                logits = own if logits is None else logits
                sums.add(part, own, logits, token, targets[part])
    return [running[0].scores(each) for each in running[1:]]


def _scored(states: HiddenStates, first: int) -> torch.Tensor:
    """The hidden states at the scored positions, (n_positions, hidden)."""
    return states.tensor[:, first:-1].reshape(-1, states.tensor.shape[-1])


class _Running:
    """What has been seen of one model's logits so far, at n positions."""

    def __init__(self, n: int, device: torch.device):
        def zeros() -> torch.Tensor:
            return torch.zeros(n, dtype=torch.float64, device=device)

        self.m = torch.full((n,), -torch.inf, dtype=torch.float64, device=device)
        self.s, self.target = zeros(), zeros()
        self.top = torch.zeros(n, dtype=torch.int64, device=device)
        self.m_reference = self.m.clone()
        self.t = zeros()

    def add(
        self,
        part: slice,
        own: torch.Tensor,
        reference: torch.Tensor,
        token: int,
        targets: torch.Tensor,
    ) -> None:
        """Logits (n, n_tokens) of tokens `token` ... at positions `part`, and the reference's."""
        before = self.m[part].clone()
        self.m[part], e = _advance(before, own)
        self.s[part] = self.s[part] * _shrink(before, self.m[part]) + e.sum(1, dtype=torch.float64)
        largest, where = own.max(1)
        self.top[part] = torch.where(largest > before, where + token, self.top[part])
        inside = (targets >= token) & (targets < token + own.shape[1])
        column = torch.where(inside, targets - token, 0)[:, None]
        found = own.gather(1, column)[:, 0].double()
        self.target[part] = torch.where(inside, found, self.target[part])
        if own is not reference:
            before = self.m_reference[part].clone()
            self.m_reference[part], e = _advance(before, reference)
            t = (e * (reference - own)).sum(1, dtype=torch.float64)
            self.t[part] = self.t[part] * _shrink(before, self.m_reference[part]) + t

    def nll(self) -> torch.Tensor:
        return self.m + self.s.log() - self.target

    def scores(self, candidate: "_Running") -> PositionScores:
        """The candidate's, self being the reference."""
        kld = candidate.t / self.s - (self.m + self.s.log()) + candidate.m + candidate.s.log()
        nll = self.nll(), candidate.nll()
        if not all(bool(torch.isfinite(x).all()) for x in (*nll, kld)):
            raise BadInput(
                "The model's output is not finite.",
                "It gives NaN or infinity instead of probabilities: its weights are damaged, or "
                "they overflow in the type it is computed in.",
            )
        same = self.top == candidate.top
        return PositionScores(*(x.cpu().numpy() for x in (*nll, kld, same)))


def _advance(m: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The new maxima (float64), and exp(logits - them)."""
    m = torch.maximum(m, logits.max(1).values.double())
    return m, torch.exp(logits - m.to(logits.dtype)[:, None])


def _shrink(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """What sums about the old maximum are worth about the new one."""
    return torch.exp(before - after)
