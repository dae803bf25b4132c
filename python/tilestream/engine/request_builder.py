"""From what a caller asks to a Request that the scheduler can run."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from tilestream.engine.admission import checked_prompt
from tilestream.engine.config import EngineConfig
from tilestream.engine.constraints import GrammarCompiler, Matcher
from tilestream.engine.detokenizer import Detokenizer
from tilestream.engine.protocols import EngineTokenizer
from tilestream.engine.request import Request, RequestOptions
from tilestream.sampling_params import SamplingParams


class RequestBuilder:
    """Makes Requests; any thread may call it.

    Args:
        tokenizer: end-of-sequence tokens and token bytes.
        config: limits.
        vocab_size: of the model.
    """

    def __init__(self, tokenizer: EngineTokenizer, config: EngineConfig, vocab_size: int) -> None:
        self._tokenizer, self._config, self._vocab_size = tokenizer, config, vocab_size
        self._grammars = GrammarCompiler(tokenizer, vocab_size)
        self._seeds = random.Random(config.seed)

    def prepare(self, params: SamplingParams) -> Matcher | None:
        """Check parameters against the vocabulary and compile their constraint, which is known then.

        Returns:
            A matcher of the constraint, at its beginning; None if there is none.
        Raises:
            ValueError: logit_bias names a token that the model does not have.
            ConstraintError: the constraint cannot be compiled.
        """
        if params.logit_bias and (largest := params.logit_bias[-1][0]) >= self._vocab_size:
            raise ValueError(f"logit_bias names token {largest}; token ids are 0..{self._vocab_size - 1}")
        return None if params.constraint is None else self._grammars.matcher(params.constraint)

    def make_request(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, options: RequestOptions
    ) -> Request:
        """A new request, not queued yet; what it raises: see Engine.validate."""
        token_ids = checked_prompt(prompt_token_ids, params, self._config, self._vocab_size)
        matcher = self.prepare(params)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self._tokenizer.eos_token_ids)}
        return Request(
            request_id=request_id,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            params=params,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            detokenizer=Detokenizer(
                self._tokenizer,
                params.stop,
                include_stop=params.include_stop_str_in_output,
                skip_special=params.skip_special_tokens,
            ),
            arrival_s=time.monotonic(),
            max_num_tokens=self._max_num_tokens(len(token_ids), params),
            options=options,
            edits_logits=params.edits_logits,
            end_token_ids=tuple(token_id for token_id in ends if token_id < self._vocab_size),
            matcher=matcher,
        )

    def _max_num_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """How many tokens a request can have. One more than the cache holds: the last one's KV is never needed. Also one
        that only has its prompt scored draws a token, which nobody sees."""
        limits = [self._config.max_model_len, self._config.capacity_tokens + 1]
        if params.max_tokens is not None:
            limits.append(num_prompt_tokens + max(1, params.max_tokens))
        return min(limits)
