"""sample against the float64 rules: the same token wherever neither a filter nor the draw is near a tie."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tilestream import ops, testing
from tilestream.reference import sample as reference

# In probability. Weights are float32 exponentials of float32 differences: relative error 2 ulp + |x| ulp / 2 < 2e-6.
TIE = 3e-6
# Logits up to 16 and sums of 2048 float32 terms a chunk; float32 log_softmax of torch errs as much.
LOGPROB_ERROR = 4e-6


@dataclasses.dataclass
class Case:
    """Rows of logits and one set of parameters for all of them (penalties over each row's own history)."""

    logits: torch.Tensor
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    penalties: tuple[float, float, float] | None = None
    prompts: list[list[int]] | None = None
    outputs: list[list[int]] | None = None

    def arguments(self) -> tuple[torch.Tensor, ...]:
        n = len(self.logits)
        rows = torch.arange(n)
        return (
            self.logits,
            torch.full((n,), self.temperature),
            torch.full((n,), self.top_k, dtype=torch.int32),
            torch.full((n,), self.top_p),
            torch.full((n,), self.min_p),
            self.seed + rows,
            self.position + rows,
        )

    def penalty_tensors(self) -> ops.Penalties | None:
        if self.penalties is None:
            return None
        n = len(self.logits)
        histories = [p + o for p, o in zip(self.prompts, self.outputs, strict=True)]
        lengths = torch.tensor([0] + [len(h) for h in histories])
        return ops.Penalties(
            *[torch.full((n,), value) for value in self.penalties],
            torch.tensor(sum(histories, []), dtype=torch.int32),
            lengths.cumsum(0).int(),
            torch.tensor([len(p) for p in self.prompts], dtype=torch.int32),
        )

    def run(self, num_top_logprobs: int = 0) -> ops.SampleOutput:
        return ops.sample(*self.arguments(), penalties=self.penalty_tensors(), num_top_logprobs=num_top_logprobs)

    def exact(self, *values: float) -> list[float]:
        """The values that the float32 parameter tensors hold."""
        return [float(torch.tensor(value)) for value in values]

    def expected(self, row: int) -> reference.Draw:
        temperature, top_p, min_p = self.exact(self.temperature, self.top_p, self.min_p)
        x = self.logits[row]
        if self.penalties is not None:
            repetition, presence, frequency = self.exact(*self.penalties)
            x = reference.penalise(x, self.prompts[row], self.outputs[row], repetition=repetition, presence=presence,
                                   frequency=frequency)
        return reference.sample(x, temperature=temperature, seed=self.seed + row, position=self.position + row,
                                top_k=self.top_k, top_p=top_p, min_p=min_p, tie=TIE)

    def check(self, num_top_logprobs: int = 0) -> int:
        """Compares every row; returns how many drew the very token of the reference."""
        before = self.logits.clone()
        got = self.run(num_top_logprobs)
        assert torch.equal(torch.nan_to_num(self.logits), torch.nan_to_num(before)), "the logits were changed"
        same = 0
        for row in range(len(self.logits)):
            want, token = self.expected(row), int(got.tokens[row])
            assert token in want.acceptable, f"row {row} of {self}: {token} instead of {want}"
            same += token == want.token
            logprobs = torch.log_softmax(self.logits[row].double(), -1)
            assert abs(float(got.logprobs[row] - logprobs[token])) <= LOGPROB_ERROR
            ids, values = reference.top_logprobs(self.logits[row], num_top_logprobs)
            assert got.top_ids[row].tolist() == ids
            testing.assert_within(got.top_logprobs[row], torch.tensor(values, dtype=torch.float64), LOGPROB_ERROR)
        return same


VOCABULARIES = [1, 7, 16, 255, 256, 257, 2048, 2049, 5000]
FILTERS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 1000, "temperature": 1.7},
    {"top_p": 0.9},
    {"top_p": 0.1},
    {"top_p": 0.999, "temperature": 2.0},
    {"min_p": 0.05},
    {"top_p": 0.8, "min_p": 0.1},
    {"top_k": 20, "top_p": 0.7, "min_p": 0.02, "temperature": 0.8},
]


@pytest.mark.simt
@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items()) or "plain")
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_same_token_as_float64(backend: testing.Backend, vocab_size: int, filters: dict) -> None:
    logits = 3 * torch.randn(5, vocab_size + 3)[:, :vocab_size]  # rows are not contiguous
    assert Case(logits, seed=1 << 40, position=7, **filters).check(num_top_logprobs=min(vocab_size, 5)) >= 4


@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items()) or "plain")
def test_every_simd_level(simd_level: str, filters: dict) -> None:
    case = Case(2 * torch.randn(3, 3001), penalties=(1.3, 0.2, 0.1), prompts=[[1, 2], [], [3000] * 3],
                outputs=[[5], [7, 7, 7], []], **filters)
    assert case.check(num_top_logprobs=20) >= 2
    for row, filler in enumerate((math.nan, math.inf, -math.inf)):
        case.logits[row, 1234 if row < 2 else slice(None)] = filler
    assert case.run().tokens.tolist() == [-1, -1, -1]


@pytest.mark.simt
@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items()) or "plain")
def test_ties_and_masked_logits(backend: testing.Backend, filters: dict) -> None:
    """Whole numbers tie often; half of the vocabulary is masked."""
    logits = torch.randn(6, 700).mul(2).round()
    logits[:, ::2] = -math.inf
    case = Case(logits, **filters)
    case.check(num_top_logprobs=8)
    drawn = logits.gather(1, case.run().tokens.unsqueeze(1))
    assert bool((drawn > -math.inf).all())


@pytest.mark.simt
@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items()) or "plain")
@pytest.mark.parametrize("vocab_size", [8_193, 20_011])
def test_rows_that_several_blocks_share(backend: testing.Backend, vocab_size: int, filters: dict) -> None:
    """The CUDA kernel gives a block 8,192 logits: ties over all of them, masked stretches, all likely tokens in one."""
    logits = 3 * torch.randn(4, vocab_size + 3)[:, :vocab_size]
    logits[1] = logits[1].round()
    logits[2, 1000:7000] = -math.inf
    logits[2, :300] += 9
    logits[3, -1] = math.nan
    case = Case(logits, **filters)
    assert case.run(3).tokens[3] == -1
    case.logits = logits[:3]
    assert case.check(num_top_logprobs=3) >= 2


@pytest.mark.simt
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("misleading", [-3.0, 0.0, 3.0])
@pytest.mark.parametrize(("num", "of_each"), [(16, 512), (8, 128)], ids=["cpu's", "cuda's"])
def test_top_p_when_its_guess_is_wrong(backend: testing.Backend, num: int, of_each: int, misleading: float, top_p: float) -> None:
    """Both kernels guess from the first few of so many logits, which here lie apart from the others."""
    logits = torch.randn(2, 6000)
    logits[:, torch.arange(6000) % of_each < num] += misleading
    logits[:, torch.arange(6000) % 256 == 100] = 4.0  # lane maxima, so that the first few are not
    assert Case(logits, top_p=top_p).check() >= 1


@pytest.mark.simt
@pytest.mark.parametrize("penalties", [(1.5, 0.0, 0.0), (1.0, 0.7, 0.0), (1.0, 0.0, 0.4), (0.8, -0.5, 0.3)])
@pytest.mark.parametrize("filters", [{"temperature": 0.0}, {"top_k": 10}, {"top_p": 0.6}, {}])
def test_penalties(backend: testing.Backend, penalties: tuple, filters: dict) -> None:
    vocab_size = 600
    prompts = [torch.randint(vocab_size, (n,)).tolist() for n in (0, 1, 40, 900)]
    outputs = [torch.randint(20, (n,)).tolist() for n in (0, 30, 5, 200)]
    case = Case(torch.randn(4, vocab_size), penalties=penalties, prompts=prompts, outputs=outputs, **filters)
    assert case.check(num_top_logprobs=3) >= 3


@pytest.mark.simt
def test_history_of_any_length(backend: testing.Backend) -> None:
    """A prompt longer than the vocabulary, every token seen."""
    prompt = torch.randint(50, (5000,)).tolist()
    Case(torch.randn(1, 50), temperature=0.0, penalties=(2.0, 1.0, 0.5), prompts=[prompt], outputs=[prompt[:999]]).check()


def test_the_draw_follows_the_distribution(backend: testing.Backend) -> None:
    """Chi-square over 20,000 draws; 99.99% quantile for 7 degrees of freedom is 29.9."""
    num, row = 20_000, torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -math.inf, 1.5, -3.0, 0.1])
    got = Case(row.expand(num, -1), temperature=0.9, seed=123).run().tokens
    probs = reference.filtered(row, temperature=float(torch.tensor(0.9)))
    counts = torch.bincount(got, minlength=9).double()
    expected = probs * num
    assert counts[5] == 0
    chi_square = float(((counts - expected) ** 2 / expected)[probs > 0].sum())
    assert chi_square <= 29.9


def test_philox_known_answer() -> None:
    """The all-zero vector that comes with Random123 (Salmon et al. 2011): 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    assert reference.philox(0, 0) == 0xE169C58D6627E8D5


@pytest.mark.simt
@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items()) or "plain")
def test_rows_do_not_depend_on_others_or_threads(backend: testing.Backend, set_num_threads, filters: dict) -> None:
    """Rows are done whole by one thread or cut over all, as their number wants: the bits are the same."""
    logits = torch.randn(7, 40_000 if backend.name == "cpu" else 5_000)
    alone = [Case(logits[r : r + 1], seed=r, position=r, **filters).run(5) for r in range(7)]
    for num in (1, 2, 3, 7) if backend.name == "cpu" else (1,):
        set_num_threads(num)
        for batch in (logits, logits[:2], logits[:3]):
            got = Case(batch, **filters).run(5)
            for row in range(len(batch)):
                for field in dataclasses.fields(got):
                    assert torch.equal(getattr(got, field.name)[row], getattr(alone[row], field.name)[0]), field.name


@pytest.mark.simt
@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items()) or "plain")
def test_logprobs_are_optional(backend: testing.Backend, filters: dict) -> None:
    """Without them no exponential of the whole row is summed; tokens and the check for NaN stay."""
    logits = torch.randn(6, 3000)
    logits[4, 2999], logits[5, 0] = math.nan, math.inf
    case = Case(logits, **filters)
    tokens, none = torch.empty(6, dtype=torch.int64), (None,) * 6
    torch.ops.tilestream.sample(*case.arguments(), *none, tokens, None, torch.empty(6, 0, dtype=torch.int64), torch.empty(6, 0))
    assert torch.equal(tokens, case.run().tokens) and tokens[4:].tolist() == [-1, -1]


@pytest.mark.simt
def test_a_bad_row_does_not_hurt_its_neighbours(backend: testing.Backend) -> None:
    logits = torch.randn(5, 3000)
    want = Case(logits.clone(), top_p=0.9).run(4)
    logits[0, 2999], logits[2] = math.nan, -math.inf
    logits[3, 0] = math.inf
    got = Case(logits, top_p=0.9).run(4)
    assert got.tokens[[0, 2, 3]].tolist() == [-1, -1, -1]
    assert bool(got.logprobs[[0, 2, 3]].isnan().all()) and bool((got.top_ids[[0, 2, 3]] == -1).all())
    assert torch.equal(got.tokens[[1, 4]], want.tokens[[1, 4]]) and torch.equal(got.top_ids[[1, 4]], want.top_ids[[1, 4]])


@pytest.mark.simt
@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6, 3e38])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.5}])
def test_extreme_temperatures(backend: testing.Backend, temperature: float, filters: dict) -> None:
    logits = torch.randn(4, 300)
    logits[:, 17] = -math.inf
    tokens = Case(logits, temperature=temperature, **filters).run().tokens
    assert bool((tokens >= 0).all()) and bool((tokens != 17).all())
    if temperature < 1e-3:
        assert torch.equal(tokens, logits.argmax(1))


@pytest.mark.simt
def test_one_finite_logit(backend: testing.Backend) -> None:
    logits = torch.full((3, 500), -math.inf)
    logits[0, 0], logits[1, 250], logits[2, 499] = 0.0, 1e38, -3e38
    for filters in FILTERS:
        got = Case(logits, **filters).run(3)
        assert got.tokens.tolist() == [0, 250, 499] and got.logprobs.tolist() == [0.0, 0.0, 0.0]
        assert got.top_ids.tolist() == [[0, -1, -1], [250, -1, -1], [499, -1, -1]]


def test_opcheck() -> None:
    case = Case(torch.randn(2, 100), penalties=(1.1, 0.1, 0.1), prompts=[[1], [2, 3]], outputs=[[4], []])
    p = case.penalty_tensors()
    history = (p.repetition, p.presence, p.frequency, p.history, p.history_indptr, p.history_prompt_len)
    outputs = (torch.empty(2, dtype=torch.int64), torch.empty(2), torch.empty(2, 3, dtype=torch.int64), torch.empty(2, 3))
    torch.library.opcheck(torch.ops.tilestream.sample.default, (*case.arguments(), *history, *outputs))


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(2, 9).half(), TypeError, "logits has dtype Half; supported: Float"),
        (0, torch.zeros(9), ValueError, r"logits has 1 dimensions \[9\]; it needs 2"),
        (0, torch.zeros(2, 0), ValueError, "allowed vocabularies: 1 to 1048575"),
        (0, torch.zeros(1, 1 << 20), ValueError, "allowed vocabularies: 1 to 1048575"),
        (0, torch.zeros(9, 2).T, ValueError, "logits has strides .* last dimension must be contiguous"),
        (1, torch.tensor([1.0, -0.5]), ValueError, r"temperature\[1\] is -0.5; allowed: from 0"),
        (1, torch.tensor([math.nan, 1.0]), ValueError, r"temperature\[0\] is nan"),
        (1, torch.ones(3), ValueError, r"temperature has shape \[3\]; dimension 0 must be 2"),
        (2, torch.tensor([5, -1], dtype=torch.int32), ValueError, "top_k holds -1; allowed: 0 to"),
        (2, torch.tensor([5, 1]), TypeError, "top_k has dtype Long; supported: Int"),
        (3, torch.tensor([0.0, 1.0]), ValueError, r"top_p\[0\] is 0; allowed: above 0 to 1"),
        (3, torch.tensor([1.0, 1.5]), ValueError, r"top_p\[1\] is 1.5"),
        (4, torch.tensor([-0.1, 0.0]), ValueError, r"min_p\[0\] is -0.1; allowed: from 0 to 1"),
        (5, torch.zeros(2, dtype=torch.int32), TypeError, "seeds has dtype Int; supported: Long"),
    ],
)
def test_bad_input(index: int, value: torch.Tensor, error: type[Exception], message: str) -> None:
    arguments = list(Case(torch.zeros(2, 9)).arguments())
    arguments[index] = value
    with pytest.raises(error, match=message):
        ops.sample(*arguments)


def test_bad_history() -> None:
    case = Case(torch.zeros(2, 9), penalties=(1.1, 0.0, 0.0), prompts=[[1], [9]], outputs=[[], []])
    with pytest.raises(ValueError, match="history holds 9; allowed: 0 to 8"):
        case.run()
    penalties = dataclasses.replace(case.penalty_tensors(), history_indptr=torch.tensor([0, 3, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="history"):
        ops.sample(*case.arguments(), penalties=penalties)
    with pytest.raises(ValueError, match="top_ids asks for 10 logprobs"):
        Case(torch.zeros(2, 9)).run(10)
