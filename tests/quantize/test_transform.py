"""Changes of basis leave a float model's outputs as they are; the float decoder is transformers'."""

from __future__ import annotations

import pytest
import torch
from tilestream.models.loader import open_checkpoint
from tilestream.quantize.calibration import gather_statistics
from tilestream.quantize.decoder import Decoder
from tilestream.quantize.head import Head
from tilestream.quantize.source import Source
from tilestream.quantize.transform import Transform, energy_order, hadamard, principal_blocks

TOKENS = torch.arange(2, 42).view(1, 40) * 7 % 250


def _logits(source: Source, transform: Transform | None = None) -> torch.Tensor:
    config, decoder = source.config, Decoder(source.config, TOKENS.size(1))
    table = source.matrix("token_embd")
    head = Head(
        source.vector("output_norm.weight"), table if config.tied_embeddings else source.matrix("output"), config.rms_eps,
        config.final_soft_cap,
    )  # fmt: skip
    if transform is not None:
        head, table = transform.head(head), transform.table(table)
    x = table[TOKENS] * config.embedding_scale
    for i in range(config.num_layers):
        weights = source.layer(i)
        x = decoder.layer(i, weights if transform is None else transform.layer(i, weights), x)
    return head.logits(x)


@pytest.mark.parametrize(
    "name", ["llama", "llama-wide-mlp", "llama-biases", "llama-llama3-rope", "mistral", "qwen2", "qwen3", "gemma3"]
)
@pytest.mark.parametrize("rotate", [True, False])
def test_outputs_stay(name: str, rotate: bool, hf_model) -> None:
    model, path = hf_model(name)
    opened = open_checkpoint(path)
    source = Source(opened.checkpoint, opened.config)
    if rotate and source.config.post_norms:
        rotate = False  # a norm behind the branch ties the stream to its channels
    with torch.no_grad():
        expected = model(TOKENS).logits
        assert torch.allclose(_logits(source), expected, atol=2e-4 * float(expected.abs().max()))
        x = source.matrix("token_embd")[TOKENS] * source.config.embedding_scale
        statistics = gather_statistics(source, Decoder(source.config, 40), x, fold=rotate, advance=lambda: None)
        turned = Transform(source.config, statistics, rotate=rotate, granule=1)
        assert torch.allclose(_logits(source, turned), expected, atol=5e-4 * float(expected.abs().max()))
        first = turned.layer(0, source.layer(0)).linear
        assert not torch.allclose(first["k"], source.layer(0).linear["k"], atol=1e-2)  # something did move
        assert turned.down_hadamard is (rotate and source.config.intermediate_size % 128 == 0)


def test_bases() -> None:
    torch.manual_seed(0)
    rows = torch.randn(500, 192) @ torch.randn(192, 192)
    moment = rows.t() @ rows
    basis = principal_blocks(moment)
    assert torch.allclose(basis.t() @ basis, torch.eye(192), atol=1e-5)
    energy = (basis.t() @ moment @ basis).diagonal()
    assert energy[:128].max() < energy[128:].min()
    for n in (1, 64, 96):
        assert torch.allclose(hadamard(n) @ hadamard(n).t(), torch.eye(n), atol=1e-6)
    order = energy_order(torch.arange(100.0).flip(0), 32)
    assert order.tolist() == [*range(64, 96), *range(32, 64), *range(32), *range(96, 100)]
