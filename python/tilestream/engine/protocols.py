"""What the engine asks of a runner and of a tokenizer."""

from __future__ import annotations

from typing import Any, Protocol

from tilestream.engine.detokenizer import TokenBytes
from tilestream.engine.step_plan import SampledTokens, StepPlan


class Runner(Protocol):
    """Runs steps of the model and samples.

    vocab_size: token ids that the model can embed.
    overlaps: launch() returns while the step runs on a device, and takes the next plan before collect() was called: a
        token id -1 - i in it is the token that row i of the step launched before draws.
    """

    vocab_size: int
    overlaps: bool

    def launch(self, plan: StepPlan) -> Any: ...

    def collect(self, launched: Any) -> SampledTokens: ...

    def check(self) -> None:
        """After an exception: raises EngineDeadError if no step can run any more."""

    def clear_pages(self, num_pages: int) -> None:
        """Set the first so many KV pages to zero, in memory of their own."""


class EngineTokenizer(TokenBytes, Protocol):
    """What the engine asks of a tokenizer."""

    eos_token_ids: frozenset[int]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
