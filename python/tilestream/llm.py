"""`LLM`: a model, its KV cache and an engine, in one object."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from tilestream.engine.async_engine import AsyncEngine
from tilestream.engine.batch import largest_step
from tilestream.engine.config import EngineConfig
from tilestream.engine.engine import Engine
from tilestream.engine.errors import QueueFullError
from tilestream.engine.prefix_groups import SharingCost
from tilestream.engine.request import RequestDelta
from tilestream.kv_size import element_bytes, kv_token_bytes
from tilestream.loading import ModelOptions, load
from tilestream.request_output import RequestOutput
from tilestream.sampling_params import SamplingParams

DEFAULT_MODEL = "smollm2-135m-instruct"

Prompt = str | Sequence[int]


class LLM:
    """Generates text with a model, on this machine.

    Args:
        model: "smollm2-135m-instruct", a GGUF file, a Hugging Face directory, or a hub id.
        device: "cpu", "cuda" or "cuda:<index>".
        dtype: "auto" (a GGUF's own quantised weights; bfloat16 for others), "float32" or "bfloat16".
        kv_dtype: "auto" (float32 with dtype="float32", else bfloat16), float32, float16, bfloat16, fp8, int8 or int4.
        page_size: tokens per KV page: 16, 32 or 64.
        kv_cache_tokens: tokens the KV cache holds; None: a quarter of the free memory (of a GPU nine tenths of what its
            weights leave), at most 16 full contexts.
        max_model_len: most tokens of one request; None: the model's context length, or the cache if smaller.
        max_num_seqs, token_budget, tbt_ms, policy, max_queued_requests, max_queued_tokens, enable_prefix_caching,
            batch_invariant, seed: see EngineConfig.
        act_bits: of the activations that meet quantised weights: "auto", "4", "8" or "16": see load_model.
        softmax_ranges: a file of tilestream.calibrate, from which layers get the maximum that decodes on CUDA weigh by;
            None: the online softmax.
        tensor_parallel_size: ranks that have a part of the model each, on GPUs of their own or sharing the CPU: processes that
            this one starts, or that torchrun has started; there other ranks than 0 do not return from here.
        num_threads: CPU threads; None: TILESTREAM_NUM_THREADS, or one for every core this process may use. Of each rank: then
            an even share of the cores.
        progress: called with (done, total) bytes while loading.
    Attributes:
        name, tokenizer, config, engine: of the model that was loaded.
        weight_bytes: of all weight matrices; kv_token_bytes: of one token in the KV cache, over all layers.
    Raises:
        ModelLoadError: the model cannot be found or read, with the file and what is wrong.
        ValueError: an option that is not allowed, with its value and what is.
        RankDiedError: a rank has died, or has not come; from here on any call that runs steps may raise it.
    """

    def __init__(
        self,
        model: str | os.PathLike = DEFAULT_MODEL,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        kv_dtype: str = "auto",
        act_bits: str = "auto",
        page_size: int = 32,
        kv_cache_tokens: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        token_budget: int = 512,
        tbt_ms: float | None = None,
        policy: str = "fcfs",
        max_queued_requests: int = 1024,
        max_queued_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        batch_invariant: bool = False,
        seed: int | None = None,
        softmax_ranges: str | os.PathLike | None = None,
        tensor_parallel_size: int = 1,
        num_threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        options = ModelOptions(
            model=os.fspath(model),
            device=device,
            dtype=dtype,
            kv_dtype=("float32" if dtype == "float32" else "bfloat16") if kv_dtype == "auto" else kv_dtype,
            act_bits=act_bits,
            page_size=page_size,
            batch_invariant=batch_invariant,
            softmax_ranges=softmax_ranges,
            num_threads=num_threads,
            most_tokens=largest_step(token_budget, max_num_seqs),
            tensor_parallel_size=tensor_parallel_size,
        )
        self._model = load(options, progress)
        loaded, m = self._model.loaded, self._model.loaded.config
        if kv_cache_tokens is None:
            kv_cache_tokens = self._model.room_tokens
        capacity = kv_cache_tokens // max(1, page_size) * page_size
        self.name = loaded.name
        self.tokenizer = loaded.tokenizer
        self.config = m
        self.weight_bytes = self._model.weight_bytes
        self.kv_token_bytes = kv_token_bytes(m, options.kv_dtype)
        with ExitStack() as undo:
            undo.callback(self._model.close)
            engine_config = EngineConfig(
                kv_cache_tokens=kv_cache_tokens,
                max_model_len=min(m.max_position, capacity) if max_model_len is None else max_model_len,
                page_size=page_size,
                max_num_seqs=max_num_seqs,
                token_budget=token_budget,
                tbt_ms=tbt_ms,
                policy=policy,
                max_queued_requests=max_queued_requests,
                max_queued_tokens=max_queued_tokens,
                enable_prefix_caching=enable_prefix_caching,
                batch_invariant=batch_invariant,
                seed=seed,
            )
            if engine_config.max_model_len > m.max_position:
                raise ValueError(f"max_model_len is {max_model_len}; this model's positions end at {m.max_position}")
            self.engine = Engine(self._model.build(engine_config), loaded.tokenizer, engine_config)
            local, device = loaded.model.config, loaded.model.placement.device
            self.engine.scheduler.prefix_groups.cost = SharingCost.of(
                device.type, local.num_qo_heads, local.num_kv_heads, local.head_dim, element_bytes(options.kv_dtype)
            )
            undo.pop_all()
        self._ids = itertools.count()
        self._unread: dict[str, deque[RequestDelta]] = {}  # what steps gave for each request of generate() and stream()
        self._async_engine: AsyncEngine | None = None

    @property
    def async_engine(self) -> AsyncEngine:
        """The engine on a thread of its own, for `async for delta in llm.async_engine.stream(request_id, token_ids, params)`.

        From its first use on that thread runs the steps, and generate(), chat() and stream() are closed.
        """
        if self._async_engine is None:
            self._async_engine = AsyncEngine(self.engine)
            self._model.on_failure(self._async_engine.fail)
        return self._async_engine

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the other ranks, where there are some. The end of a `with` does it, and that of the process, too."""
        if self._async_engine is not None:
            self._async_engine.shutdown()
        self._model.close()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Answer prompts, batched; returns when all are done.

        Args:
            prompts: a text or token ids, or a list of them.
            params: for all, or one for each; default SamplingParams().
        Returns:
            One output per prompt, in order.
        Raises:
            ValueError: an empty or too long prompt, or as many params as prompts are needed; nothing is left running.
            RuntimeError: async_engine is in use.
        """
        self._check_not_async()
        batch = [prompts] if _is_one_prompt(prompts) else list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(batch)
        if len(each) != len(batch):
            raise ValueError(f"{len(batch)} prompts but {len(each)} params; give one params for all, or one for each")
        token_ids = [self.engine.validate(self._encode(prompt), p) for prompt, p in zip(batch, each, strict=True)]
        ids = [f"llm-{next(self._ids)}" for _ in batch]
        queue = deque(zip(ids, token_ids, each, strict=True))
        deltas: dict[str, deque[RequestDelta]] = {request_id: deque() for request_id in ids}
        self._unread |= deltas
        unfinished = set(ids)
        try:
            while unfinished:
                while queue and self._has_room(queue[0][1]):
                    self.engine.add_request(*queue.popleft())
                unfinished -= {delta.request_id for delta in self._step() if delta.finish_reason is not None}
        finally:
            for request_id in ids:
                del self._unread[request_id]
            for request_id in unfinished:  # only after an interruption
                self.engine.abort(request_id)
        return [RequestOutput.of(p, t, deltas[i]) for p, t, i in zip(batch, token_ids, ids, strict=True)]

    def chat(self, messages: Sequence[dict], params: SamplingParams | None = None) -> RequestOutput:
        """Answer a conversation, through the model's chat template.

        Args:
            messages: [{"role": "user", "content": "..."}, ...].
            params: default SamplingParams().
        Returns:
            The answer.
        Raises:
            ValueError: the model has no chat template, or it refuses these messages.
        """
        text = self.tokenizer.apply_chat_template(list(messages))
        return self.generate([self.tokenizer.encode(text, add_special_tokens=False)], params)[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestDelta]:
        """Answer one prompt, token by token; leaving the loop early aborts the request.

        Args:
            prompt: a text or token ids.
            params: default SamplingParams().
        Returns:
            An iterator of deltas; the last one has a finish_reason.
        Raises:
            ValueError: an empty or too long prompt.
        """
        self._check_not_async()
        request_id = f"llm-{next(self._ids)}"
        self.engine.add_request(request_id, self._encode(prompt), params or SamplingParams())
        unread = self._unread[request_id] = deque()
        finished = False
        try:
            while not finished:
                while not unread:
                    self._step()
                delta = unread.popleft()
                finished = delta.finish_reason is not None
                yield delta
        finally:
            del self._unread[request_id]
            if not finished:
                self.engine.abort(request_id)

    def _step(self) -> list[RequestDelta]:
        """A step of the engine. It may be for others as well: streams and generate() may take turns."""
        deltas = self.engine.step()
        for delta in deltas:
            if delta.request_id in self._unread:
                self._unread[delta.request_id].append(delta)
        return deltas

    def _has_room(self, token_ids: list[int]) -> bool:
        try:
            self.engine.check_queue(len(token_ids))
        except QueueFullError:
            return False
        return True

    def _check_not_async(self) -> None:
        if self._async_engine is not None:
            raise RuntimeError("this engine runs on its own thread since async_engine was first used; use async_engine.stream()")

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)


def _is_one_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(p, int) for p in prompts))
