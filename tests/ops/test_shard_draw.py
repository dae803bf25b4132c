"""Draws from parts of rows: the tokens of sample on the whole rows, and what a part tells of itself against float64."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tilestream import ops, testing
from tilestream.reference import shard_draw as reference

# Of a mass: weights are float32 exponentials, relative error 2 ulp + |x| ulp / 2 < 2e-6 for weights that are not 0 in fixed point;
# and a unit of fixed point for each logit.
RELATIVE_ERROR = 2e-6


@dataclasses.dataclass
class Case:
    """Rows and their settings; bounds: where the parts begin, and the end."""

    logits: torch.Tensor
    bounds: list[int]
    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    num_top_p: int | None = None  # None: all rows

    def __post_init__(self) -> None:
        n = len(self.logits)
        self.num_top_p = n if self.num_top_p is None else self.num_top_p
        self.seeds, self.positions = (1 << 40) + torch.arange(n), 3 * torch.arange(n)

    def parts(self) -> list[torch.Tensor]:
        return [self.logits[:, begin:end] for begin, end in pairwise(self.bounds)]

    def rows(self) -> ops.ShardRows:
        return ops.ShardRows(self.logits.amax(1), self.temperature, self.top_p, self.min_p, self.seeds, self.positions)

    def histograms(self) -> torch.Tensor:
        """Of all rounds, summed over the parts."""
        rows, done = self.rows(), torch.empty(0, self.num_top_p, 256, dtype=torch.int64)
        for _ in range(4):
            found = [ops.shard_histogram(part, rows, done) for part in self.parts()]
            done = torch.cat([done, torch.stack(found).sum(0, keepdim=True)])
        return done

    def draw(self) -> torch.Tensor:
        rows, histograms = self.rows(), self.histograms()
        chunks = [ops.shard_masses(part, rows, histograms) for part in self.parts()]
        masses = torch.stack([masses.sum(1) for masses in chunks])
        drawn = [
            ops.shard_draw(part, rows, histograms, chunks[rank], masses, rank=rank, first_id=self.bounds[rank])
            for rank, part in enumerate(self.parts())
        ]
        assert bool(((torch.stack(drawn) >= 0).sum(0) <= 1).all()), "two ranks draw"
        return torch.stack(drawn).amax(0)

    def sample(self) -> torch.Tensor:
        top_k = torch.zeros(len(self.logits), dtype=torch.int32)
        s = (self.temperature, top_k, self.top_p, self.min_p, self.seeds, self.positions)
        return ops.sample(self.logits, *s, num_top_logprobs=None).tokens

    def check(self) -> torch.Tensor:
        before = self.logits.clone()
        got, want = self.draw(), self.sample()
        assert torch.equal(self.logits.nan_to_num(), before.nan_to_num()), "the logits were changed"
        assert torch.equal(got, want)
        return got


def uniform(
    logits: torch.Tensor, bounds: list[int], temperature: float = 1.0, top_p: float = 1.0, min_p: float = 0.0, **rest
) -> Case:
    """The same settings in all rows."""
    return Case(logits, bounds, *(torch.full((len(logits),), value) for value in (temperature, top_p, min_p)), **rest)


FILTERS = [
    {}, {"temperature": 0.3}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_p": 1e-6}, {"top_p": 0.999, "temperature": 2.0},
    {"min_p": 0.05}, {"min_p": 1.0}, {"top_p": 0.8, "min_p": 0.1}, {"top_p": 0.5, "min_p": 1e-4, "temperature": 1.3},
]  # fmt: skip
each_filter = pytest.mark.parametrize("filters", FILTERS, ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items()) or "plain")

BOUNDS = [
    [0, 1],
    [0, 1, 2],
    [0, 255, 257, 700],
    [0, 1024, 2049],
    [0, 32, 4000, 4001, 5000],
    [0, 700, 1400, 2100, 2800, 3000, 3001, 3002, 3100],
]


@pytest.mark.simt
@each_filter
@pytest.mark.parametrize("bounds", BOUNDS, ids=lambda bounds: "-".join(map(str, bounds)))
def test_tokens_are_those_of_whole_rows(backend: testing.Backend, bounds: list[int], filters: dict) -> None:
    logits = 3 * torch.randn(4, bounds[-1] + 3)[:, : bounds[-1]]  # rows are not contiguous
    assert bool((uniform(logits, bounds, **filters).check() >= 0).all())


@pytest.mark.simt
@each_filter
def test_ties_and_masked_logits(backend: testing.Backend, filters: dict) -> None:
    """Whole numbers tie often; half of the vocabulary is masked, and in one row a whole part."""
    logits = torch.randn(6, 1500).mul(2).round()
    logits[:, ::2] = -math.inf
    logits[3, :600] = -math.inf
    logits[4] = torch.where(torch.arange(1500) % 2 == 0, 0.0, -0.0)
    logits[5] = 7.25
    tokens = uniform(logits, [0, 600, 1300, 1500], **filters).check()
    assert bool((logits.gather(1, tokens.unsqueeze(1)) > -math.inf).all())


@pytest.mark.simt
def test_mixed_rows(backend: testing.Backend) -> None:
    """Rows with top-p come first; among them may be some that have none."""
    logits = 2 * torch.randn(9, 1300)
    logits[1, 1200], logits[3] = math.nan, -math.inf
    logits[5, 3] = math.inf
    temperature = torch.tensor([1.0, 0.7, 0.0, 1.0, 1e-30, 1.0, 3e38, 0.5, 1.0])
    top_p = torch.tensor([0.9, 0.5, 0.3, 0.9, 0.99, 1.0, 1.0, 1.0, 1.0])
    min_p = torch.tensor([0.0, 0.1, 0.0, 0.2, 0.0, 0.0, 0.5, 0.02, 0.0])
    for num_top_p in (5, 7, 9):
        tokens = Case(logits, [0, 512, 1300], temperature, top_p, min_p, num_top_p).check()
        assert (tokens == -1).nonzero().flatten().tolist() == [1, 3, 5]


@pytest.mark.simt
@pytest.mark.parametrize("temperature", [1e-38, 1e-6, 1e6, 3e38])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}, {"top_p": 0.9, "min_p": 0.3}])
def test_extreme_temperatures(backend: testing.Backend, temperature: float, filters: dict) -> None:
    logits = torch.randn(4, 300)
    logits[:, 17] = -math.inf
    tokens = uniform(logits, [0, 100, 300], temperature, **filters).check()
    assert bool((tokens >= 0).all()) and bool((tokens != 17).all())


@pytest.mark.simt
def test_one_finite_logit(backend: testing.Backend) -> None:
    logits = torch.full((3, 500), -math.inf)
    logits[0, 0], logits[1, 250], logits[2, 499] = 0.0, 1e38, -3e38
    for filters in FILTERS:
        assert uniform(logits, [0, 250, 500], **filters).check().tolist() == [0, 250, 499]


@each_filter
def test_every_simd_level(simd_level: str, filters: dict) -> None:
    logits = 2 * torch.randn(4, 3001)
    logits[1] = logits[1].round()
    uniform(logits, [0, 1030, 3001], **filters).check()


@each_filter
def test_threads_do_not_matter(set_num_threads, filters: dict) -> None:
    logits = torch.randn(3, 60_000)
    want = uniform(logits, [0, 60_000], **filters).draw()
    for num in (1, 2, 3, 7):
        set_num_threads(num)
        assert torch.equal(uniform(logits, [0, 29_000, 60_000], **filters).check(), want)


def test_masses_of_the_largest_vocabulary() -> None:
    """Their sum takes all 64 bits."""
    logits = torch.zeros(2, (1 << 20) - 1)
    for top_p in (1.0, 0.9, 0.4):
        uniform(logits, [0, 1 << 18, 1 << 19, (1 << 20) - 1], top_p=top_p).check()


values = st.one_of(
    st.integers(-3, 3).map(float), st.floats(width=32, allow_nan=False), st.sampled_from([-math.inf, math.nan, -0.0])
)


@given(
    row=st.lists(values, min_size=1, max_size=70),
    cuts=st.sets(st.integers(1, 69), max_size=7),
    temperature=st.one_of(st.just(1.0), st.floats(0, 2.0**100, width=32)),
    top_p=st.one_of(st.just(1.0), st.floats(2.0**-100, 1.0, width=32)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1, width=32)),
    offset=st.sampled_from([0.0, 60.0]),
)
def test_any_row(row: list[float], cuts: set[int], temperature: float, top_p: float, min_p: float, offset: float) -> None:
    logits = torch.tensor([row] * 3) + torch.tensor([[0.0], [offset], [-offset]])
    uniform(logits, [0, *sorted(cut for cut in cuts if cut < len(row)), len(row)], temperature, top_p, min_p).check()


# ---- what a part tells ----------------------------------------------------------------------------


def assert_masses(got: torch.Tensor, want: torch.Tensor, num_logits: int) -> None:
    assert bool(((got.double() - want).abs() <= RELATIVE_ERROR * want + num_logits).all())


@pytest.mark.simt
@pytest.mark.parametrize("temperature", [0.4, 1.0, 5.0])
def test_histograms_against_float64(backend: testing.Backend, temperature: float) -> None:
    """Of one part of two, in each round below the bin that has the most of the other part."""
    logits = 4 * torch.randn(3, 3000)
    logits[1] = logits[1].round()
    case = uniform(logits, [0, 1100, 3000], temperature, top_p=0.7)
    histograms, (part, _), scale = case.histograms(), case.parts(), float(torch.tensor(temperature))
    for row in range(3):
        ordered = logits[row].sort(descending=True).values
        mass = reference.masses(ordered, maximum=float(ordered[0]), temperature=scale).cumsum(0)
        threshold = ordered[int((mass < 0.7 * mass[-1]).sum())]
        bits = int(reference.ordered_bits(threshold))
        for i in range(4):
            got = ops.shard_histogram(part, case.rows(), histograms[:i])[row]
            want = reference.histogram(
                part[row], maximum=float(ordered[0]), temperature=scale, prefix=bits >> 32 - 8 * i, num_known=8 * i
            )
            assert_masses(got, want, 1100)
            assert bool((got[want == 0] == 0).all()) and bool((want > 0).any() or i > 1)


@pytest.mark.simt
def test_masses_against_float64(backend: testing.Backend) -> None:
    logits = 2 * torch.randn(3, 2500)
    logits[2, 7] = math.nan
    case = uniform(logits, [0, 2500], 0.8, top_p=0.6, min_p=0.01)
    got = ops.shard_masses(logits, case.rows(), case.histograms())
    scale = float(torch.tensor(0.8))
    for row in range(2):
        ordered, maximum = logits[row].sort(descending=True).values, float(logits[row].max())
        mass = reference.masses(ordered, maximum=maximum, temperature=scale).cumsum(0)
        threshold = float(ordered[int((mass < 0.6 * mass[-1]).sum())])
        kept = reference.masses(logits[row], maximum=maximum, temperature=scale, threshold=threshold, min_p=0.01)
        want = torch.stack([part.sum() for part in kept.split(1024)])
        assert_masses(got[row], want, 1024)
    assert got.shape == (3, 3) and got[2].tolist() == [0, 0, 0]


@pytest.mark.simt
def test_outputs_are_filled_and_not_exceeded(backend: testing.Backend) -> None:
    """Masses are added to a histogram; what else is there at first does not matter, nor do rows without top-p."""
    case = uniform(torch.randn(3, 1500), [0, 1500], top_p=0.5, num_top_p=2)
    rows, histograms, seven = case.rows(), case.histograms(), torch.full((2, 256), 7)
    torch.ops.tilestream.shard_histogram(case.logits, rows.maxima, rows.temperature, rows.top_p, histograms[:0], seven)
    assert torch.equal(seven - 7, histograms[0])
    masses = torch.full((5, 2), -5)
    settings = (rows.maxima, rows.temperature, rows.top_p, rows.min_p)
    torch.ops.tilestream.shard_masses(case.logits, *settings, histograms, masses[1:4])
    assert torch.equal(masses[1:4], ops.shard_masses(case.logits, rows, histograms)) and bool((masses[[0, 4]] == -5).all())


def test_opcheck() -> None:
    case = uniform(torch.randn(2, 100), [0, 100], top_p=0.5)
    rows, histograms = case.rows(), case.histograms()
    filters = (case.logits, rows.maxima, rows.temperature, rows.top_p, rows.min_p)
    torch.library.opcheck(
        torch.ops.tilestream.shard_histogram.default, (*filters[:4], histograms[:1], torch.zeros(2, 256).long())
    )
    chunks = ops.shard_masses(case.logits, rows, histograms)
    torch.library.opcheck(torch.ops.tilestream.shard_masses.default, (*filters, histograms, torch.empty_like(chunks)))
    tokens = torch.empty(2, dtype=torch.int64)
    arguments = (*filters, rows.seeds, rows.positions, histograms, chunks, chunks.sum(1)[None], 0, 0, tokens)
    torch.library.opcheck(torch.ops.tilestream.shard_draw.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 9).half()}, TypeError, "logits has dtype Half; supported: Float"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "logits has shape .*; allowed: 1 to 1048575 tokens"),
        ({"maxima": torch.zeros(3)}, ValueError, r"maxima has shape \[3\]; dimension 0 must be 2"),
        ({"temperature": torch.tensor([1.0, -0.5])}, ValueError, r"temperature\[1\] is -0.5; allowed: from 0"),
        ({"top_p": torch.tensor([0.0, 1.0])}, ValueError, r"top_p\[0\] is 0; allowed: above 0 to 1"),
        ({"min_p": torch.tensor([0.0, 1.5])}, ValueError, r"min_p\[1\] is 1.5; allowed: from 0 to 1"),
        ({"seeds": torch.zeros(2)}, TypeError, "seeds has dtype Float; supported: Long"),
        (
            {"histograms": torch.zeros(3, 2, 256).long()},
            ValueError,
            r"histograms has shape \[3, 2, 256\]; dimension 0 must be 4 \(rounds\)",
        ),
        (
            {"histograms": torch.zeros(4, 3, 256).long()},
            ValueError,
            r"histograms has shape \[4, 3, 256\], but logits only 2 rows",
        ),
        ({"histograms": torch.zeros(4, 2, 255).long()}, ValueError, r"histograms has shape .*; dimension 2 must be 256"),
        ({"histograms": torch.zeros(256, 2, 4).long().transpose(0, 2)}, ValueError, "histograms has strides"),
        ({"chunk_masses": torch.zeros(2, 2).long()}, ValueError, r"chunk_masses has shape \[2, 2\]; dimension 1 must be 1"),
        ({"masses": torch.zeros(3, 1).long()}, ValueError, r"masses has shape \[3, 1\]; dimension 1 must be 2"),
        ({"rank": 3}, ValueError, "rank is 3; allowed: 0 to 2, rows of masses"),
        ({"first_id": -1}, ValueError, "first_id is -1; allowed: 0 to 1048566"),
        ({"first_id": 1 << 20}, ValueError, "first_id is 1048576; allowed: 0 to 1048566"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    rows = {"maxima": torch.zeros(2), "temperature": torch.ones(2), "top_p": torch.ones(2), "min_p": torch.zeros(2)}
    rows |= {"seeds": torch.zeros(2).long(), "positions": torch.zeros(2).long()}
    rest = {"logits": torch.zeros(2, 9), "histograms": torch.zeros(4, 2, 256).long(), "chunk_masses": torch.zeros(2, 1).long()}
    rest |= {"masses": torch.zeros(3, 2).long(), "rank": 0, "first_id": 0}
    changed = ops.ShardRows(**rows | {name: value for name, value in change.items() if name in rows})
    with pytest.raises(error, match=message):
        ops.shard_draw(rows=changed, **rest | {name: value for name, value in change.items() if name in rest})


def test_a_fifth_round() -> None:
    case = uniform(torch.zeros(2, 9), [0, 9], top_p=0.5)
    with pytest.raises(ValueError, match=r"histograms has shape \[4, 2, 256\]; allowed rounds before this one: 0 to 3"):
        ops.shard_histogram(case.logits, case.rows(), case.histograms())
