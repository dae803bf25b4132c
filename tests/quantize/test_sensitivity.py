"""Gradients a layer at a time are those of the whole model; tuning brings the rounded model nearer to the float one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tilestream.models.loader import open_checkpoint
from tilestream.quantize.decoder import Decoder
from tilestream.quantize.gptq import nearest
from tilestream.quantize.head import Head
from tilestream.quantize.layers import RoundedLayer
from tilestream.quantize.rounding import round_rows
from tilestream.quantize.select import block_harm
from tilestream.quantize.sensitivity import measure_sensitivity
from tilestream.quantize.source import INPUTS, Source
from tilestream.quantize.transform import Identity
from tilestream.quantize.tune import tune

TOKENS = torch.randint(2, 250, (64, 40), generator=torch.Generator().manual_seed(3))
NUM_SEEN = 56  # an eighth is held out


def _open(path: Path, num_windows: int = len(TOKENS)) -> tuple[Source, Decoder, Head, torch.Tensor]:
    opened = open_checkpoint(path)
    source = Source(opened.checkpoint, opened.config)
    config, table = source.config, source.matrix("token_embd")
    weight = table if config.tied_embeddings else source.matrix("output")
    head = Head(source.vector("output_norm.weight"), weight, config.rms_eps, config.final_soft_cap)
    return source, Decoder(config, TOKENS.size(1)), head, table[TOKENS[:num_windows]] * config.embedding_scale


@pytest.mark.parametrize("name", ["llama-wide-mlp", "gemma3"])
def test_gradients_are_those_of_the_whole_model(name: str, hf_model) -> None:
    source, decoder, head, x = _open(hf_model(name)[1], num_windows=5)
    found = measure_sensitivity(source, Identity(), decoder, x, head, lambda: None)
    rows, outputs, stream = {}, {}, x.requires_grad_()
    for i in range(source.config.num_layers):
        def keep(kept: dict, i: int = i):
            def watch(name: str, rows: torch.Tensor) -> torch.Tensor:
                rows.retain_grad()
                return kept.setdefault((i, name), rows)
            return watch
        stream = decoder.layer(i, source.layer(i), stream, keep(rows), outputs=keep(outputs))
    generator, loss = torch.Generator().manual_seed(0), 0.0
    for window in stream:
        logprobs = head.logits(window).log_softmax(-1)
        loss = loss - logprobs.gather(1, torch.multinomial(logprobs.detach().exp(), 1, generator=generator)).sum()
    loss.backward()
    for (i, name), kept in rows.items():
        entry, weights = found.inputs[i, name], found.token_weights[i, name]
        harm = block_harm(kept.detach().flatten(0, 1), kept.grad.flatten(0, 1)) / x[..., 0].numel()
        assert torch.allclose(entry.harm, harm, rtol=2e-2)  # layers' inputs are kept as bfloat16
        assert entry.k == kept.size(-1) and entry.n == sum(outputs[i, reader].size(-1) for reader in INPUTS[name])
        lengths = sum(outputs[i, reader].grad.square().sum(-1) for reader in INPUTS[name]).sqrt()
        assert torch.allclose(weights, lengths / lengths.mean(), rtol=2e-2, atol=1e-5)
    assert rows.keys() == found.inputs.keys() == found.token_weights.keys()


@pytest.mark.parametrize(("name", "group"), [("llama-wide-mlp", 32), ("qwen3", 128)])
def test_tuning_lessens_the_divergence_and_leaves_codes(name: str, group: int, hf_model) -> None:
    source, decoder, head, x = _open(hf_model(name)[1])
    layers, teacher = [], x
    for i in range(source.config.num_layers):
        weights = source.layer(i)
        codes = {linear: nearest(weight, group) for linear, weight in weights.linear.items()}
        layers.append(RoundedLayer(codes, weights.bias, weights.norm, weights.down_hadamard))
        teacher = decoder.layer(i, weights, teacher)
    wanted = head.logits(teacher)
    k4 = {(i, name): 128 for i in range(len(layers)) for name in INPUTS}

    def divergence(layers: list[RoundedLayer], head: Head) -> float:
        stream = x
        for i, layer in enumerate(layers):
            stream = decoder.layer(i, layer.weights(), stream, lambda name, rows, i=i: round_rows(rows, k4[i, name]))
        return float(F.kl_div(head.logits(stream).log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum"))

    before, steps = divergence(layers, head), []
    codes = [{linear: c.q.clone() for linear, c in layer.codes.items()} for layer in layers]
    tuned = tune(layers, head, k4, decoder, x, lambda window: wanted[window], lambda: steps.append(1))
    assert len(steps) == NUM_SEEN
    assert divergence(layers, tuned.head) < 0.97 * before
    assert tuned.after < 0.99 * tuned.before
    assert all(
        torch.equal(c.q, kept[linear]) for layer, kept in zip(layers, codes, strict=True) for linear, c in layer.codes.items()
    )
    assert all(c.scale.dtype == c.zero.dtype == torch.float16 for layer in layers for c in layer.codes.values())
    assert tuned.head.weight is head.weight and not tuned.head.norm.requires_grad


def test_what_tuning_makes_worse_stays(hf_model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilestream.quantize.tune._RATE", 1.0)
    source, decoder, head, x = _open(hf_model("llama-wide-mlp")[1])
    layers, kept = [], []
    for i in range(source.config.num_layers):
        weights = source.layer(i)
        codes = {linear: nearest(weight, 32) for linear, weight in weights.linear.items()}
        layers.append(RoundedLayer(codes, weights.bias, weights.norm, weights.down_hadamard))
        kept.append((codes, weights.norm))
    k4 = {(i, name): 0 for i in range(len(layers)) for name in INPUTS}
    stream = x
    for i in range(len(layers)):
        stream = decoder.layer(i, source.layer(i), stream)
    wanted = head.logits(stream)
    tuned = tune(layers, head, k4, decoder, x, lambda window: wanted[window], lambda: None)
    assert not tuned.after < tuned.before
    assert tuned.head is head
    for layer, (codes, norm) in zip(layers, kept, strict=True):
        assert all(torch.equal(layer.norm[name], norm[name]) for name in norm)
        assert all(
            torch.equal(c.scale, codes[name].scale) and torch.equal(c.zero, codes[name].zero) for name, c in layer.codes.items()
        )
