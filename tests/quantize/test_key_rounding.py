"""Keys rounded with feedback: how it is found, what it saves, and its way through the directory into the cache."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tilestream.models import ModelLoadError, load_model
from tilestream.ops import KeyRounding, KvCache, gather_kv
from tilestream.quantize.key_rounding import KeyStatistics, find_key_rounding
from tilestream.quantize.rounding import round_keys, round_kv
from tilestream.quantize import Recipe, quantize

from tests.models.helpers import PAGE_SIZE, PagedRunner
from tests.quantize.test_end_to_end import RECIPE, TEXT

HEADS, DIM = 2, 64


def _queries_and_keys() -> tuple[torch.Tensor, torch.Tensor]:
    """[windows, heads, tokens, DIM]: queries that mostly lie in a few directions, of four heads; keys around a mean, of two."""
    draw = torch.Generator().manual_seed(8)
    directions = torch.randn(HEADS, 12, DIM, generator=draw).repeat_interleave(2, 0)
    q = torch.randn(3, 4, 50, 12, generator=draw) @ directions + 0.3 * torch.randn(3, 4, 50, DIM, generator=draw)
    return q, torch.randn(3, HEADS, 50, DIM, generator=draw) + 2 * torch.randn(HEADS, 1, DIM, generator=draw)


def _statistics(q: torch.Tensor, k: torch.Tensor) -> KeyStatistics:
    statistics = KeyStatistics(HEADS, DIM)
    for part_q, part_k in zip(q, k, strict=True):
        seen = statistics.watch(part_q[None], part_k[None], -part_k[None])
        assert torch.equal(torch.cat(seen), torch.stack([part_k, -part_k]))
    return statistics


def test_statistics_are_of_each_kv_head() -> None:
    q, k = _queries_and_keys()
    statistics = _statistics(q, k)
    assert torch.allclose(statistics.mean.float(), k.mean((0, 2)), atol=1e-5)
    for head, moment in enumerate(statistics.moment):
        rows = q[:, 2 * head : 2 * head + 2].reshape(-1, DIM).double()
        assert torch.allclose(moment, rows.T @ rows)


def test_feedback_is_the_best_answer_to_each_error() -> None:
    statistics = _statistics(*_queries_and_keys())
    rounding = find_key_rounding(statistics, logits_soft_cap=0.0)
    assert torch.equal(rounding.offset, statistics.mean.float())
    assert torch.equal(rounding.feedback, rounding.feedback.triu(1))
    for moment, order, feedback in zip(statistics.moment, rounding.order.long(), rounding.feedback, strict=True):
        assert torch.equal(order.sort().values, torch.arange(DIM))
        c = moment[order][:, order]
        assert (c.diagonal().diff() <= 0).all()
        c += 0.01 * c.diagonal().mean() * torch.eye(DIM)
        for i in (0, 20, DIM - 2):
            # Where the i-th is stored less e, those behind it (r) do best to move by C_rr^-1 C_ri e.
            triangle = torch.linalg.cholesky(c[i + 1 :, i + 1 :])
            best = -torch.cholesky_solve(c[i + 1 :, i, None], triangle)[:, 0]
            assert torch.allclose(feedback[i, i + 1 :].double(), best, atol=1e-5)


def test_a_capped_softmax_would_see_an_offset() -> None:
    statistics = _statistics(*_queries_and_keys())
    capped, free = (find_key_rounding(statistics, logits_soft_cap=cap) for cap in (30.0, 0.0))
    assert not capped.offset.any()
    assert torch.equal(capped.feedback, free.feedback)


def test_heads_that_nothing_asks() -> None:
    _, k = _queries_and_keys()
    rounding = find_key_rounding(_statistics(torch.zeros(3, 4, 50, DIM), k), logits_soft_cap=0.0)
    assert not rounding.feedback.any()
    assert torch.allclose(round_keys(k, rounding), k, atol=1.0)


def test_logits_err_less() -> None:
    q, k = _queries_and_keys()
    rounding = find_key_rounding(_statistics(q[:2], k[:2]), logits_soft_cap=0.0)
    q, k = q[2:], k[2:]  # another text's

    def error(rounded: torch.Tensor) -> torch.Tensor:
        return (q @ (rounded - k).repeat_interleave(2, 1).mT).square().mean()

    no_offset = KeyRounding(torch.zeros_like(rounding.offset), rounding.order, rounding.feedback)
    assert error(round_keys(k, no_offset)) < 0.4 * error(round_kv(k, 4))
    assert error(round_keys(k, rounding)) < 0.5 * error(round_keys(k, no_offset))


def test_without_feedback_every_element_goes_to_the_nearest() -> None:
    _, k = _queries_and_keys()
    k[0, 0, 0] = 3.25  # no range, scale 0
    order = torch.randperm(DIM, generator=torch.Generator().manual_seed(0)).int().expand(HEADS, DIM)
    rounding = KeyRounding(torch.zeros(HEADS, DIM), order, torch.zeros(HEADS, DIM, DIM))
    assert torch.equal(round_keys(k, rounding), round_kv(k, 4))


@pytest.fixture(scope="module")
def quantised(hf_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("keys") / "out"
    quantize(str(hf_model("llama")[1]), TEXT, out, Recipe(group_size=32, int4_share=0.0, **RECIPE))
    return out


def test_a_directory_says_how(quantised: Path) -> None:
    tensors = load_file(quantised / "model.safetensors")
    model = load_model(quantised).model
    for i, layer in enumerate(model.layers):
        rounding = layer.attention.key_rounding
        for part, dtype in (("offset", torch.float32), ("order", torch.int32), ("feedback", torch.float16)):
            stored = tensors[f"blk.{i}.attn_k.{part}"]
            assert stored.dtype == dtype
            assert torch.equal(stored.to(getattr(rounding, part).dtype), getattr(rounding, part))
        assert rounding.offset.shape == (HEADS, DIM)
        assert torch.equal(rounding.order.sort().values, torch.arange(DIM).int().expand(HEADS, DIM))
        assert rounding.feedback.dtype == torch.float32
        assert rounding.feedback.any()
        assert torch.equal(rounding.feedback, rounding.feedback.triu(1))


def test_a_directory_without(hf_model, tmp_path: Path) -> None:
    quantize(str(hf_model("llama")[1]), TEXT, tmp_path / "out", Recipe(method="rtn", **RECIPE))
    assert not any(".attn_k.o" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert all(layer.attention.key_rounding is None for layer in load_model(tmp_path / "out").model.layers)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("order", None, "the tensor blk.1.attn_k.order is missing"),
        ("offset", torch.zeros(HEADS, DIM).half(), r"attn_k.offset is torch.float16 \[2, 64\]; expected torch.float32 of 2 dim"),
        ("feedback", torch.zeros(HEADS, DIM).half(), r"feedback is torch.float16 \[2, 64\]; expected torch.float16 of 3 dim"),
        ("feedback", torch.zeros(HEADS, DIM, 32).half(), r"feedback has shape \[2, 64, 32\]; expected \[2, 64, 64\]"),
        ("offset", torch.zeros(1, DIM), r"offset has shape \[1, 64\]; expected \[2, 64\]"),
        ("order", torch.zeros(HEADS, DIM).int(), "order must have each of 0 to 63 once in every row"),
        ("order", torch.arange(DIM).int().expand(HEADS, DIM) + 1, "order must have each of 0 to 63 once in every row"),
    ],
)
def test_damaged_directories(part: str, tensor: torch.Tensor | None, message: str, quantised: Path, tmp_path: Path) -> None:
    for file in quantised.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(quantised / "model.safetensors") | {f"blk.1.attn_k.{part}": tensor}
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=message):
        load_model(tmp_path)


def test_ranks_have_their_heads(quantised: Path) -> None:
    whole = load_model(quantised).model
    for rank in range(2):
        communicator = SimpleNamespace(rank=rank, world_size=2, empty=torch.empty, replays=True)
        part = load_model(quantised, connect=lambda config, communicator=communicator: communicator).model
        for layer, own in zip(whole.layers, part.layers, strict=True):
            both = layer.attention.key_rounding, own.attention.key_rounding
            for name in ("offset", "order", "feedback"):
                of_all, of_rank = (getattr(rounding, name) for rounding in both)
                assert torch.equal(of_rank, of_all[rank : rank + 1])


def test_caches_hold_what_the_simulation_gives(quantised: Path) -> None:
    """Of the first layer, whose keys do not depend on how the cache holds others."""
    held = {}
    for kv_dtype in ("float32", "int4"):
        runner = PagedRunner(load_model(quantised).model)
        pages = runner.block_table.numel()
        runner.caches = [KvCache.allocate(pages, HEADS, PAGE_SIZE, DIM, kv_dtype=kv_dtype) for _ in runner.caches]
        tokens = list(TEXT[:100].encode())
        for chunk in (tokens[:90], *([token] for token in tokens[90:])):  # from the second token on a program is replayed
            runner.step({0: chunk})
        slots = (runner.block_table[0][:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()[:100].int()
        held[kv_dtype] = gather_kv(runner.caches[0], slots)[0].transpose(0, 1)[None]
    rounding = runner.model.layers[0].attention.key_rounding
    simulated = round_keys(held["float32"], rounding) - rounding.offset[:, None]
    assert torch.isclose(held["int4"], simulated, atol=1e-3).float().mean() > 0.99
    assert torch.isclose(held["int4"], round_kv(held["float32"] - rounding.offset[:, None], 4), atol=1e-3).float().mean() < 0.9
