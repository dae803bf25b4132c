"""Constraints on outputs: compiled once by llguidance, followed token by token by each request's own matcher."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from tilestream.constraint import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from tilestream.engine.protocols import EngineTokenizer

_MAX_CACHED_GRAMMARS = 64  # a kilobyte to 50 MB each
# The time to compile grows faster than the text: at most some seconds with these. References are followed by recursion, and
# some thousands in a chain (3,500, not 2,000) overflow the stack, which no one catches.
_MAX_CHARACTERS = {"json_schema": 131_072, "regex": 16_384, "choice": 131_072, "grammar": 16_384}
_MAX_REFERENCES = 1000
_MAX_EXACT_INTEGER = 2**53  # llguidance reads numbers as doubles
_MAX_LEXER_WORK = {"initial_lexer_fuel": 300_000, "step_lexer_fuel": 100_000, "max_lexer_states": 50_000}
# JSON allows any amount of white space between tokens, and a small model may well write nothing else.
_JSON_WHITESPACE = r"[ \t\n]{0,20}"


class ConstraintError(ValueError):
    """A constraint that cannot be used: HTTP 400."""


class Matcher:
    """Where the output of one request stands in its grammar."""

    __slots__ = ("_matcher",)

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def accept(self, token_id: int) -> None:
        """Take a token that was drawn.

        Raises:
            ConstraintError: it does not fit, or the grammar has become too complex to follow.
        """
        if not self._matcher.consume_token(token_id):
            raise ConstraintError(_first_line(self._matcher.get_error()))

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return self._matcher.is_stopped()

    def fill_allowed(self, address: int, num_bytes: int) -> None:
        """Write one bit per token id, lowest first: whether it may come next. num_bytes is a multiple of 4."""
        self._matcher.unsafe_compute_mask_ptr(address, num_bytes)


class GrammarCompiler:
    """Compiles constraints for one vocabulary, and keeps the ones used last. Any thread may use it.

    Args:
        tokenizer: the bytes of every token, and which tokens end an output.
        vocab_size: of the model; ids past the tokenizer's are never allowed.
    """

    def __init__(self, tokenizer: EngineTokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._grammars: OrderedDict[Constraint, LLMatcher] = OrderedDict()

    def matcher(self, constraint: Constraint) -> Matcher:
        """A matcher at the beginning of its grammar.

        Raises:
            ConstraintError: what is wrong with the constraint.
        """
        with self._lock:
            grammar = self._grammars.get(constraint)
            if grammar is not None:
                self._grammars.move_to_end(constraint)
                return Matcher(grammar.deep_copy())
        grammar = self._compile(constraint)
        with self._lock:
            self._grammars[constraint] = grammar
            while len(self._grammars) > _MAX_CACHED_GRAMMARS:
                self._grammars.popitem(last=False)
        return Matcher(grammar.deep_copy())

    def _compile(self, constraint: Constraint) -> LLMatcher:
        try:
            import llguidance
        except ImportError as error:
            raise ConstraintError(f"constraints need the package llguidance, which is not there: {error}") from None
        kind, text = constraint.kind, constraint.text
        _check_size(kind, text)
        try:
            if kind == "json_schema":
                json.loads(text, parse_int=_check_integer)
                options = {"whitespace_pattern": _JSON_WHITESPACE}
                source = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=options)
            else:
                source = llguidance.grammar_from(kind, text)
        except ValueError as error:
            raise ConstraintError(f"the {kind} cannot be compiled: {error}") from None
        limits = llguidance.LLParserLimits(**_MAX_LEXER_WORK)
        grammar = llguidance.LLMatcher(self._get_vocabulary(), source, log_level=0, limits=limits)
        grammar.compute_bitmask()  # some grammars prove too large only now; and the first one of each takes the longest
        if grammar.is_error():
            raise ConstraintError(f"the {kind} cannot be compiled: {_first_line(grammar.get_error())}")
        return grammar

    def _get_vocabulary(self) -> LLTokenizer:
        """The vocabulary as llguidance wants it: a prefix tree of all tokens' bytes, a third of a second for 50,000."""
        import llguidance

        with self._lock:
            if self._vocabulary is None:
                end = sorted(self._tokenizer.eos_token_ids)
                if not end:
                    raise ConstraintError("constraints need an end-of-sequence token, and this model has none")
                tokens = [self._tokenizer.token_bytes(token_id) for token_id in range(self._vocab_size)]
                vocabulary = _Vocabulary(self._tokenizer, tokens, end[0])
                wrapper = llguidance.TokenizerWrapper(vocabulary)
                self._vocabulary = llguidance.LLTokenizer(wrapper, n_vocab=self._vocab_size, eos_token=end)
                vocabulary.greedy = self._vocabulary.greedy_tokenize
            return self._vocabulary


class _Vocabulary:
    """What llguidance asks of a tokenizer. It has texts split that the grammar forces, so that the model gets to see them
    in tokens as it knows them.

    Args:
        tokenizer: splits texts.
        tokens: every token's bytes.
    """

    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()
    greedy: Callable[[str], list[int]]

    def __init__(self, tokenizer: EngineTokenizer, tokens: list[bytes], eos_token_id: int) -> None:
        self.tokenizer, self.tokens, self.eos_token_id = tokenizer, tokens, eos_token_id

    def __call__(self, text: bytes) -> list[int]:
        """Token ids with exactly these bytes: a tokenizer may put a space first, or read a special token out of them."""
        token_ids = self.tokenizer.encode(text.decode(), add_special_tokens=False)
        exact = b"".join(self.tokens[token_id] for token_id in token_ids) == text
        return token_ids if exact else self.greedy(text.decode())


def _check_size(kind: str, text: str) -> None:
    if len(text) > (most := _MAX_CHARACTERS[kind]):
        raise ConstraintError(f"the {kind} has {len(text)} characters; at most {most} are allowed")
    mark, what = ('"$ref"', "references") if kind == "json_schema" else (":", "rules")  # each rule has a colon
    if kind in ("json_schema", "grammar") and (num := text.count(mark)) > _MAX_REFERENCES:
        raise ConstraintError(f"the {kind} has {num} {what}; at most {_MAX_REFERENCES} are allowed")


def _check_integer(digits: str) -> None:
    if len(digits) > 17 or abs(int(digits)) > _MAX_EXACT_INTEGER:
        raise ValueError(f"integers are exact up to {_MAX_EXACT_INTEGER}, and it has {digits[:40]}")


def _first_line(message: str) -> str:
    """llguidance's messages go on with the grammar's own text; those of regexes say what is wrong in an `error:` line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("error:")), "")
    return " ".join([*lines[:1], reason]).strip()
