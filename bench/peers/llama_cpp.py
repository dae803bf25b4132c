"""llama.cpp through llama-cpp-python's low-level API: prompts and batched decodes of random tokens."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from bench.traffic import Ask


@llama_cpp.llama_log_callback
def _ignore_log(level: int, text: bytes, user_data: object) -> None:
    pass


llama_cpp.llama_log_set(_ignore_log, None)


def requantise_q4_0(source: Path, target: Path) -> Path:
    """llama.cpp's best 4-bit file of a model: Q4_0, for which it has repacked kernels."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
        params.allow_requantize = True
        params.nthread = 2
        if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) != 0:
            raise RuntimeError(f"llama.cpp could not requantise {source}")
    return target


class LlamaCpp:
    """One model and context.

    Args:
        path: GGUF file.
        num_threads: for prompts and decodes.
        max_seqs: sequences of the largest batch; max_tokens: of all of them together, each may have an even share.
    """

    def __init__(self, path: Path, *, num_threads: int, max_seqs: int, max_tokens: int) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        self.max_seqs = max_seqs
        self.num_batch_tokens = 2048  # llama-server's default, as 512 for n_ubatch
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = max_tokens, self.num_batch_tokens, 512, max_seqs
        params.n_threads = params.n_threads_batch = num_threads
        params.kv_unified = False  # a cache for each sequence: a batch of 32 decodes 1.4 times as fast as in one for all
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(self.num_batch_tokens, 0, 1)
        self.random = random.Random(0)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)

    def prompt(self, num_tokens: int) -> None:
        """Read one prompt of random tokens, up to its logits, in an empty context."""
        self.clear()
        self._decode([(self.random.randrange(self.vocab_size), i, 0, i == num_tokens - 1) for i in range(num_tokens)])

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits of every position of one sequence: [len(tokens), vocab_size], float32."""
        self.clear()
        self._decode([(token, i, 0, True) for i, token in enumerate(tokens)])
        first = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(first, shape=(len(tokens), self.vocab_size)).copy()

    def fill(self, num_seqs: int, num_tokens: int) -> None:
        """Give each of num_seqs sequences a context of num_tokens."""
        self.clear()
        for seq in range(num_seqs):
            self._decode([(self.random.randrange(self.vocab_size), i, seq, False) for i in range(num_tokens)])

    def decode(self, num_seqs: int, start: int, num_tokens: int) -> None:
        """num_tokens greedy steps of num_seqs sequences whose contexts hold `start` tokens."""
        tokens = [self.random.randrange(self.vocab_size) for _ in range(num_seqs)]
        for step in range(num_tokens):
            self._decode([(tokens[seq], start + step, seq, True) for seq in range(num_seqs)])
            tokens = [self._likeliest(seq) for seq in range(num_seqs)]

    def load(self, asks: Sequence[Ask]) -> list[tuple[float, float, float, int]]:
        """(sent_s, first_token_s, end_s, num_output_tokens) of requests of random tokens.

        Batches as llama-server makes them: the next token of every answer, then prompts up to n_batch. A request waits until
        one of the max_seqs sequences is free.
        """
        self.clear()
        prompts = [[self.random.randrange(self.vocab_size) for _ in range(ask.prompt_tokens)] for ask in asks]
        num_read = [0] * len(asks)
        answers: list[list[int]] = [[] for _ in asks]
        first_s, end_s = [0.0] * len(asks), [0.0] * len(asks)
        waiting, free = deque(range(len(asks))), list(range(self.max_seqs))
        running: dict[int, int] = {}  # request -> its sequence
        begin_s = time.perf_counter()
        while waiting or running:
            now_s = time.perf_counter() - begin_s
            while waiting and free and asks[waiting[0]].arrival_s <= now_s:
                running[waiting.popleft()] = free.pop()
            if not running:
                time.sleep(asks[waiting[0]].arrival_s - now_s)
                continue
            entries, drawing = [], {}  # drawing: request -> the entry whose logits it draws from
            for i, seq in running.items():
                if answers[i]:
                    drawing[i] = len(entries)
                    entries.append((answers[i][-1], len(prompts[i]) + len(answers[i]) - 1, seq, True))
            for i, seq in running.items():
                last = len(prompts[i]) - 1
                end = min(last + 1, num_read[i] + self.num_batch_tokens - len(entries))
                if num_read[i] < end:
                    entries += [(prompts[i][j], j, seq, j == last) for j in range(num_read[i], end)]
                    num_read[i] = end
                    if end == last + 1:
                        drawing[i] = len(entries) - 1
            self._decode(entries)
            for i, entry in drawing.items():
                answers[i].append(self._likeliest(entry))
                end_s[i] = time.perf_counter() - begin_s
                if len(answers[i]) == 1:
                    first_s[i] = end_s[i]
                if len(answers[i]) == asks[i].output_tokens:
                    free.append(running.pop(i))
                    llama_cpp.llama_memory_seq_rm(self.memory, free[-1], -1, -1)
        return [(ask.arrival_s, first, end, ask.output_tokens) for ask, first, end in zip(asks, first_s, end_s, strict=True)]

    def _likeliest(self, entry: int) -> int:
        """Greedy token of the last batch's entry."""
        row = llama_cpp.llama_get_logits_ith(self.context, entry)
        return int(np.ctypeslib.as_array(row, shape=(self.vocab_size,)).argmax())

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, seq, wants_logits) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = seq, wants_logits
        if llama_cpp.llama_decode(self.context, batch) != 0:
            raise RuntimeError(f"llama_decode failed on a batch of {len(entries)}")
