"""Which codes come next: guidance, temperature, top-k and one draw per request, each with its own generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trainer.evaluation.generation import Sampling


class Draws:
    """Chooses the codes of B requests, step by step, and notes whether any logit was not finite.

    On a CPU the codes of a request are, bit for bit, those that transformers' `generate` draws when torch's default
    generator is in the state of the request's (processors and warpers of version 5.23: guidance, temperature, top-k).
    """

    def __init__(self, sampling: Sampling, generators: Sequence[torch.Generator], guided_G: Tensor):
        """guided_G: int64, on the logits' device: the requests with a null row, in the order of these rows, which
        follow the first B."""
        self._sampling, self._generators = sampling, generators
        self._guided_G = guided_G
        self._broken = torch.zeros((), dtype=torch.bool, device=guided_G.device)

    @property
    def broken(self) -> bool:
        """Whether a logit was NaN or infinite. Waits for the device."""
        return bool(self._broken)

    def __call__(self, logits_RKV: Tensor) -> Tensor:
        """The next codes (B, K) int64 in [0, V).

        logits_RKV  (B + guided, K, V): those of the requests, then those of the null conditions
        """
        scores_BKV = self._guide(self._finite(logits_RKV.float()))
        if self._sampling.greedy:
            return scores_BKV.argmax(dim=-1)
        if self._sampling.temperature != 1:
            scores_BKV = scores_BKV / self._sampling.temperature
        if self._sampling.top_k:
            least = scores_BKV.topk(min(self._sampling.top_k, scores_BKV.shape[-1])).values[..., -1:]
            scores_BKV = scores_BKV.masked_fill(scores_BKV < least, -torch.inf)
        return drawn(scores_BKV.softmax(dim=-1), self._generators)

    def _finite(self, logits_RKV: Tensor) -> Tensor:
        """What is not finite is noted without waiting for the device, and replaced, so that the draws can go on."""
        self._broken |= ~logits_RKV.isfinite().all()
        return logits_RKV.nan_to_num()

    def _guide(self, logits_RKV: Tensor) -> Tensor:
        requests = len(self._generators)
        logits_BKV, null_GKV = logits_RKV[:requests], logits_RKV[requests:]
        if not len(null_GKV):
            return logits_BKV
        guided_GKV = null_GKV + (logits_BKV[self._guided_G] - null_GKV) * self._sampling.guidance
        return logits_BKV.index_copy(0, self._guided_G, guided_GKV)


def drawn(probabilities_BKV: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One code per row, (B, K) int64: of row i, what torch.multinomial draws with generator i, which goes on by K rows.

    probabilities_BKV  (B, K, V) float32, on any device; the generators are on the CPU. So one seed gives one sound on
                       every device, but for rounding, and the host need not wait for a GPU

    Source: torch 2.10 to 2.13, ATen/native/Distributions.cpp, multinomial_out: where one is drawn, it is the largest of
    p / q with exponential q. torch.multinomial itself takes no generator of the CPU for values on a GPU.
    """
    on_gpu = probabilities_BKV.device.type == "cuda"
    q_BKV = torch.empty(probabilities_BKV.shape, pin_memory=on_gpu)
    for q_KV, generator in zip(q_BKV, generators, strict=True):
        q_KV.exponential_(1, generator=generator)
    # Pinned memory is not used again before the copy is done (torch's caching host allocator sees to that). Of other
    # memory nobody says so for other devices than CUDA's: Apple's reads it where it lies, later.
    return (probabilities_BKV / q_BKV.to(probabilities_BKV.device, non_blocking=on_gpu)).argmax(dim=-1)
