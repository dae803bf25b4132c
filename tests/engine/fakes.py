"""A tokenizer and a runner that are cheap, exact and unforgiving."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tilestream.engine.config import EngineConfig
from tilestream.engine.cost_model import CostModel
from tilestream.engine.engine import Engine
from tilestream.engine.errors import EngineDeadError
from tilestream.engine.request import RequestDelta
from tilestream.engine.step_budget import TILE_TOKENS
from tilestream.engine.step_plan import SampledTokens, StepPlan
from tilestream.sampling_params import SamplingParams

EOS = 256
NUM_LETTERS = 26
GREEDY = SamplingParams(temperature=0, max_tokens=8)
# A step of 64 tokens takes about 10 ms, with 100 keys behind them about 1 ms more.
COSTS = CostModel(
    fixed_s=2e-3, token_s=1e-4, dense_token_s=5e-5, knee_tokens=48, sample_s=1e-4, kv_token_s=1e-6, pair_s=2e-7
)


class ByteTokenizer:
    """Token i < 256 is byte i; 256 ends a sequence."""

    vocab_size = 257
    eos_token_ids = frozenset({EOS})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == EOS else bytes([token_id])

    def special_token_bytes(self, token_id: int) -> bytes:
        return b"<eos>" if token_id == EOS else bytes([token_id])


def mix(state: int, token_id: int) -> int:
    """The "KV" of a token: it depends on every token up to it."""
    return hash((state, token_id))


def draw(state: int, params: SamplingParams, seed: int, position: int) -> int:
    """A letter, decided by the history alone (greedy), or also by (seed, position)."""
    key = (state,) if params.is_greedy else (state, seed, position)
    return ord("a") + hash(key) % NUM_LETTERS


def expected_output(prompt: Sequence[int], params: SamplingParams, seed: int, num_tokens: int) -> list[int]:
    """What a request must give, computed without pages, chunks or batches."""
    state = 0
    for token_id in prompt:
        state = mix(state, token_id)
    output: list[int] = []
    for _ in range(num_tokens):
        output.append(draw(state, params, seed, len(prompt) + len(output)))
        state = mix(state, output[-1])
    return output


class FakeRunner:
    """Keeps real pages: a token's KV is computed from the one before it, as read from the request's pages.
    So a page that is wrong, stale, shared too early or overwritten changes the tokens drawn.

    Args:
        config: for the page size and the budget.
        script: request id -> the tokens to draw instead, in order of output position; -1 for NaN logits.
    """

    def __init__(
        self, config: EngineConfig, script: dict[str, list[int]] | None = None, *, overlaps: bool = False
    ) -> None:
        self.overlaps = overlaps
        self.drawn: list[int] = []  # by the step launched last
        self.vocab_size = ByteTokenizer.vocab_size
        self.config = config
        self.script = script or {}
        self.kv: dict[tuple[int, int], int] = {}
        self.engine: Engine | None = None
        self.fail_with: Exception | None = None  # raised once, by launch()
        self.fail_collect_with: Exception | None = None  # raised once, by collect()
        self.is_broken = False
        self.on_run: Callable[[StepPlan], None] = lambda plan: None
        self.plans: list[StepPlan] = []

    def launch(self, plan: StepPlan) -> SampledTokens:
        self.plans.append(plan)
        self._check(plan)
        self.on_run(plan)
        if self.fail_with is not None:
            error, self.fail_with = self.fail_with, None
            raise error
        # In order: what is computed in this step may be shared in it, by those that come later in the plan.
        token_ids = []
        for index, item in enumerate(plan.scheduled):
            request = item.request
            state = self._read(request.pages, item.start - 1)
            later = {id(other.request) for other in plan.scheduled[index:]}
            for position in range(item.start, item.start + item.num_new_tokens):
                token_id = request.token_ids[position]
                state = mix(state, token_id if token_id >= 0 else self.drawn[-1 - token_id])
                self._write(request.pages, position, state, later)
            if item.samples:
                script = self.script.get(request.request_id)
                drawn = draw(state, request.params, request.seed, request.num_tokens)
                num_output_tokens = request.num_output_tokens + request.num_pending_tokens
                token_ids.append(script[num_output_tokens] if script and num_output_tokens < len(script) else drawn)
        self.drawn = token_ids
        top = [[token, 0] for token in token_ids]
        return SampledTokens(token_ids, [-0.5] * len(token_ids), top, [[-0.5, -1.5] for _ in token_ids])

    def collect(self, launched: SampledTokens) -> SampledTokens:
        if self.fail_collect_with is not None:
            error, self.fail_collect_with = self.fail_collect_with, None
            raise error
        return launched

    def check(self) -> None:
        if self.is_broken:
            raise EngineDeadError("broken for good")

    def _read(self, pages: list[int], position: int) -> int:
        page_size = self.config.page_size
        return self.kv[pages[position // page_size], position % page_size] if position >= 0 else 0

    def _write(self, pages: list[int], position: int, state: int, later: set[int]) -> None:
        page = pages[position // self.config.page_size]
        if self.engine.scheduler.pool.ref_count(page) > 1:
            owners = [request for request in self.engine.scheduler.running if page in request.pages]
            assert all(id(owner) in later for owner in owners), "a page is written that others have read"
        self.kv[page, position % self.config.page_size] = state

    def _check(self, plan: StepPlan) -> None:
        assert plan.scheduled
        assert sum(item.num_new_tokens for item in plan.scheduled) == plan.num_tokens <= self.config.token_budget
        assert len({item.request.request_id for item in plan.scheduled}) == len(plan.scheduled)
        for item in plan.scheduled:
            request = item.request
            assert item.num_new_tokens > 0 and item.start == request.num_computed_tokens
            assert item.samples == (item.start + item.num_new_tokens == request.num_tokens)
            assert len(request.pages) * self.config.page_size >= item.start + item.num_new_tokens
        if self.config.tbt_ms is not None and plan.num_prefill_tokens > TILE_TOKENS:
            assert COSTS.step_s(plan) <= self.config.tbt_ms / 1e3, "over the target, by more than a tile of prefill"
        # Stall-free: whoever runs and is one token behind is in the step.
        scheduled = {item.request.request_id for item in plan.scheduled}
        for request in self.engine.scheduler.running:
            at_its_end = request.num_tokens >= request.max_num_tokens
            waits = request.num_uncomputed_tokens == 1 and request.request_id not in scheduled
            assert not waits or at_its_end, "a decode waits"


def make_config(**changes: object) -> EngineConfig:
    defaults = {"page_size": 16, "kv_cache_tokens": 16 * 64, "max_model_len": 512, "token_budget": 64, "seed": 0}
    return EngineConfig(**{**defaults, **changes})


def make_engine(
    script: dict[str, list[int]] | None = None, *, overlaps: bool = False, **changes: object
) -> Engine:
    config = make_config(**changes)
    runner = FakeRunner(config, script, overlaps=overlaps)
    runner.engine = Engine(runner, ByteTokenizer(), config, COSTS)
    return runner.engine


def run_all(engine: Engine, *, max_steps: int = 10_000) -> dict[str, list[RequestDelta]]:
    """Step until there is no work, checking page ownership after each step; deltas by request."""
    deltas: dict[str, list[RequestDelta]] = {}
    for _ in range(max_steps):
        if not engine.has_work():
            assert engine.scheduler.pool.num_owned_pages == 0, "pages leaked"
            return deltas
        for delta in engine.step():
            deltas.setdefault(delta.request_id, []).append(delta)
        engine.scheduler.check_invariants()
    raise AssertionError(f"still work after {max_steps} steps")


def tokens_of(deltas: list[RequestDelta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


def text_of(deltas: list[RequestDelta]) -> str:
    return "".join(delta.text for delta in deltas)
