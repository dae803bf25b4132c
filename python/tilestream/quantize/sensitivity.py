"""How much the model's loss minds an error, from gradients of the float model in its new basis.

To first order an error e of what a layer's linears read changes the log-likelihood of a token by e . g, g being the gradient
there. Tokens are drawn from the model's own distribution, so the mean of the square is the Fisher information's answer to
"by how much does the output distribution move"; a relative error of the linear's own output would count a layer that hardly
matters like one that does. The gradient's length at a linear's output says how much an error there, at that token, counts:
GPTQ weighs its rows by it (GuidedQuant, 2505.07004, weighs by the square, which leaves too few tokens in charge here).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tilestream.quantize.decoder import Decoder
from tilestream.quantize.head import Head
from tilestream.quantize.select import Input, Key, block_harm
from tilestream.quantize.source import INPUTS, LayerWeights, Source
from tilestream.quantize.transform import Identity, Transform

_CHUNK = 4  # windows at a time

Advance = Callable[[], None]


@dataclass(slots=True)
class Sensitivity:
    """What gradients say of one model.

    Attributes:
        inputs: what INT4 activations would do to every block of every linear.
        token_weights: [windows, tokens], by layer and input: what an error of what its linears give counts, 1 on average.
    """

    inputs: dict[Key, Input]
    token_weights: dict[Key, torch.Tensor]


def measure_sensitivity(
    source: Source, transform: Transform | Identity, decoder: Decoder, x: torch.Tensor, head: Head, advance: Advance
) -> Sensitivity:
    """One pass forwards and one backwards through the float model, a layer's weights at a time.

    Args:
        x: [windows, tokens, hidden], token embeddings in the new basis. Every layer's input is kept,
            as bfloat16, until it is met again.
        head: in the new basis.
        advance: called after each layer, in both directions.
    """
    streams = []
    for i in range(source.config.num_layers):
        streams.append(x.bfloat16())
        weights = transform.layer(i, source.layer(i))
        x = torch.cat([decoder.layer(i, weights, part) for part in x.split(_CHUNK)])
        advance()
    generator = torch.Generator().manual_seed(0)
    gradient = torch.stack([_drawn_tokens_gradient(window, head, generator) for window in x])
    found = Sensitivity({}, {})
    for i in reversed(range(source.config.num_layers)):
        weights = transform.layer(i, source.layer(i))
        harm, lengths = dict.fromkeys(INPUTS, torch.zeros(())), {name: [] for name in INPUTS}
        before = []
        for part, part_gradient in zip(streams.pop().split(_CHUNK), gradient.split(_CHUNK), strict=True):
            pass_back = _Backwards(i, weights, decoder, part.float(), part_gradient)
            before.append(pass_back.gradient)
            for name in INPUTS:
                harm[name] = harm[name] + pass_back.harm(name)
                lengths[name].append(pass_back.output_lengths(name))
        gradient = torch.cat(before)
        for name, readers in INPUTS.items():
            widths = [weights.linear[reader].shape for reader in readers]
            found.inputs[i, name] = Input(widths[0][1], sum(n for n, _ in widths), harm[name] / gradient[..., 0].numel())
            all_lengths = torch.cat(lengths[name])
            found.token_weights[i, name] = all_lengths / all_lengths.mean().clamp_min(1e-30)
        advance()
    return found


def _drawn_tokens_gradient(x: torch.Tensor, head: Head, generator: torch.Generator) -> torch.Tensor:
    """Of the negative log-likelihood of one drawn token behind each position, by the stream x [tokens, hidden]."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logprobs = head.logits(x).log_softmax(-1)
        drawn = torch.multinomial(logprobs.detach().exp(), 1, generator=generator)
        return torch.autograd.grad(-logprobs.gather(1, drawn).sum(), x)[0]


class _Backwards:
    """One layer forwards and backwards over some windows.

    Args:
        x: [windows, tokens, hidden], the stream before it.
        gradient: by the stream behind it.
    Attributes:
        gradient: by x.
    """

    def __init__(self, layer_idx: int, weights: LayerWeights, decoder: Decoder, x: torch.Tensor, gradient: torch.Tensor) -> None:
        self._rows: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            behind = decoder.layer(layer_idx, weights, x, self._keep_in(self._rows), outputs=self._keep_in(self._outputs))
            behind.backward(gradient)
        self.gradient = x.grad

    @staticmethod
    def _keep_in(kept: dict[str, torch.Tensor]) -> Callable[[str, torch.Tensor], torch.Tensor]:
        def watch(name: str, rows: torch.Tensor) -> torch.Tensor:
            rows.retain_grad()
            kept[name] = rows
            return rows

        return watch

    def harm(self, name: str) -> torch.Tensor:
        """Summed over the rows, block by block."""
        rows = self._rows[name]
        return block_harm(rows.detach().flatten(0, 1), rows.grad.flatten(0, 1))

    def output_lengths(self, name: str) -> torch.Tensor:
        """[windows, tokens]: of the gradient by what all readers of an input give."""
        return sum(self._outputs[reader].grad.square().sum(-1) for reader in INPUTS[name]).sqrt()
