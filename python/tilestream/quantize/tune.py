"""The last bits of accuracy: scales, zeros and norms learn the float model's distribution, the whole rounded model at once.

Codes stay what GPTQ made them. A window at a time, the Kullback-Leibler divergence from the float model's next-token
distributions is followed down by Adam through the rounded layers, rounding of activations passing gradients through as if it
were not there (end-to-end training of quantisation parameters: EfficientQAT, 2407.11062, section 3.3; of norms: Norm Tweaking,
2309.02784). What was rounded layer by layer learns here what the layers behind it make of its errors. Some windows are held
out: unless the divergence on them has fallen, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tilestream.quantize.decoder import Decoder
from tilestream.quantize.gptq import Codes
from tilestream.quantize.head import Head
from tilestream.quantize.layers import RoundedLayer
from tilestream.quantize.rounding import round_rows
from tilestream.quantize.select import Key
from tilestream.quantize.source import LayerWeights

_RATE = 5e-4  # of Adam, at first; it falls to 0 by half a cosine

Advance = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning came to.

    Attributes:
        head: with its norm tuned.
        before, after: the Kullback-Leibler divergence on the held-out windows, nats per token.
    """

    head: Head
    before: float
    after: float


def num_held_out(num_windows: int) -> int:
    """Windows that tuning does not see: an eighth."""
    return -(-num_windows // 8)


@torch.no_grad()
def tune(
    layers: list[RoundedLayer],
    head: Head,
    k4: Mapping[Key, int],
    decoder: Decoder,
    x: torch.Tensor,
    teacher: Callable[[int], torch.Tensor],
    advance: Advance,
) -> Tuned:
    """Replaces the layers' scales, zeros and norms by tuned ones, if these are better.

    Args:
        layers: of the rounded model; overwritten.
        head: float, in the layers' basis.
        k4: how many channels of each input are INT4.
        x: [windows, tokens, hidden], token embeddings; at least two windows, the last num_held_out() of which are held out.
        teacher: window -> [tokens, vocabulary], the float model's logits.
        advance: called after each window that is seen.
    """
    tuned = [_TunedLayer(i, layer, k4, decoder) for i, layer in enumerate(layers)]
    tuned_head = replace(head, norm=head.norm.clone().requires_grad_())
    parameters = [tuned_head.norm, *(parameter for layer in tuned for parameter in layer.parameters())]
    num_seen = len(x) - num_held_out(len(x))

    def divergence(window: int) -> torch.Tensor:
        stream = x[window : window + 1]
        for layer in tuned:
            stream = checkpoint(layer.run, stream, use_reentrant=False)
        logprobs, wanted = (logits.log_softmax(-1) for logits in (tuned_head.logits(stream[0]), teacher(window)))
        return F.kl_div(logprobs, wanted, log_target=True, reduction="batchmean")

    def held_out() -> float:
        return sum(float(divergence(window)) for window in range(num_seen, len(x))) / (len(x) - num_seen)

    before = held_out()
    adam = torch.optim.Adam(parameters, lr=_RATE)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, num_seen)
    for window in torch.randperm(num_seen, generator=torch.Generator().manual_seed(0)).tolist():
        adam.zero_grad()
        with torch.enable_grad():
            divergence(window).backward()
        adam.step()
        falling.step()
        advance()
    after = held_out()
    if not after < before:
        return Tuned(head, before, after)
    for layer, learnt in zip(layers, tuned, strict=True):
        layer.codes, layer.norm = learnt.result()
    return Tuned(replace(head, norm=tuned_head.norm.detach()), before, after)


class _Steps:
    """A weight whose codes are fixed.

    Attributes:
        stretch, shift: [n, groups, 1], what is learnt: scale = first scale * (1 + stretch), zero = first zero + shift * scale.
    """

    def __init__(self, codes: Codes) -> None:
        self._codes = codes
        self._scale, self._zero = (t.float()[..., None] for t in (codes.scale, codes.zero))
        self.stretch, self.shift = (torch.zeros_like(self._scale).requires_grad_() for _ in range(2))

    def weight(self) -> torch.Tensor:
        codes, k = self._codes, self._codes.q.size(1)
        q = F.pad(codes.q, (0, -k % codes.group)).unflatten(1, (-1, codes.group)).float()
        return ((q + self.shift) * (self._scale * (1 + self.stretch)) + self._zero).flatten(1)[:, :k]

    def result(self) -> Codes:
        scale = (self._scale * (1 + self.stretch)).detach()
        zero = self._zero + self.shift.detach() * scale
        return replace(self._codes, scale=scale[..., 0].half(), zero=zero[..., 0].half())


class _TunedLayer:
    """A rounded layer with rounded activations, which can be differentiated."""

    def __init__(self, layer_idx: int, layer: RoundedLayer, k4: Mapping[Key, int], decoder: Decoder) -> None:
        self._layer_idx, self._layer, self._k4, self._decoder = layer_idx, layer, k4, decoder
        self._steps = {name: _Steps(codes) for name, codes in layer.codes.items()}
        self._norm = {name: norm.clone().requires_grad_() for name, norm in layer.norm.items()}

    def parameters(self) -> list[torch.Tensor]:
        return [*self._norm.values(), *(t for steps in self._steps.values() for t in (steps.stretch, steps.shift))]

    def run(self, x: torch.Tensor) -> torch.Tensor:
        linear = {name: steps.weight() for name, steps in self._steps.items()}
        weights = LayerWeights(linear, self._layer.bias, self._norm, self._layer.down_hadamard)
        return self._decoder.layer(self._layer_idx, weights, x, self._round)

    def _round(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return rows + (round_rows(rows.detach(), self._k4[self._layer_idx, name]) - rows.detach())

    def result(self) -> tuple[dict[str, Codes], dict[str, torch.Tensor]]:
        return {name: steps.result() for name, steps in self._steps.items()}, {n: t.detach() for n, t in self._norm.items()}
