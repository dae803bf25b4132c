"""Sampling in float64: penalties, filters and a draw whose closeness to a tie is reported."""

import dataclasses
import math

import torch

_MASK32 = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class Draw:
    """One row's result.

    token: the drawn id, -1 when nothing finite can be drawn.
    acceptable: every id that a filter threshold or a draw moved by `tie` would give, `token` included.
    """

    token: int
    acceptable: frozenset[int]


def philox(seed: int, position: int) -> int:
    """64 bits of Philox4x32-10 with key `seed` and counter `position` (Salmon et al. 2011, section 3.3)."""
    counter = [position & _MASK32, (position >> 32) & _MASK32, 0, 0]
    key = [seed & _MASK32, (seed >> 32) & _MASK32]
    for _ in range(10):
        low = 0xD2511F53 * counter[0]
        high = 0xCD9E8D57 * counter[2]
        counter = [
            (high >> 32) ^ counter[1] ^ key[0],
            high & _MASK32,
            (low >> 32) ^ counter[3] ^ key[1],
            low & _MASK32,
        ]
        key = [(key[0] + 0x9E3779B9) & _MASK32, (key[1] + 0xBB67AE85) & _MASK32]
    return counter[1] << 32 | counter[0]


def penalise(logits: torch.Tensor, prompt: list[int], output: list[int], *, repetition: float, presence: float,
             frequency: float) -> torch.Tensor:
    """Repetition over prompt and output, then presence and frequency over the output, each token once.

    Args:
        logits: [vocab_size].
        prompt, output: token ids.
    Returns:
        [vocab_size], float64.
    """
    result = logits.double().clone()
    for token in set(prompt) | set(output):
        value = result[token]
        value = value / repetition if value > 0 else value * repetition
        count = output.count(token)
        result[token] = value - (presence + frequency * count if count else 0.0)
    return result


def filtered(logits: torch.Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0,
             min_p: float = 0.0) -> torch.Tensor:
    """The distribution after temperature, top-k, top-p and min-p.

    Args:
        logits: [vocab_size], no NaN or +inf, something above -inf.
        temperature: > 0.
    Returns:
        [vocab_size], float64, sums to 1.
    """
    scaled = logits.double() / temperature
    weight = torch.exp(scaled - scaled.max())
    order = torch.sort(scaled, descending=True, stable=True).indices  # ties: lowest id first
    if top_k:
        order = order[:top_k]
    order = order[weight[order] > 0]
    if top_p < 1.0:
        mass = torch.cumsum(weight[order] / weight[order].sum(), 0)
        last = min(int((mass < top_p).sum()), len(order) - 1)
        order = order[scaled[order] >= scaled[order[last]]]  # ties at the threshold all stay
    order = order[weight[order] >= min_p]
    probs = torch.zeros_like(weight)
    probs[order] = weight[order] / weight[order].sum()
    return probs


def inverse_cdf(probs: torch.Tensor, u: float) -> int:
    """The first id whose cumulative probability exceeds u."""
    token = int((torch.cumsum(probs, 0) <= u).sum())
    return token if token < len(probs) else int(probs.nonzero()[-1])


def sample(logits: torch.Tensor, *, temperature: float, seed: int = 0, position: int = 0, top_k: int = 0,
           top_p: float = 1.0, min_p: float = 0.0, tie: float = 0.0) -> Draw:
    """Draw one token from one row of (penalised) logits by the inverse CDF in id order.

    Args:
        logits: [vocab_size].
        temperature: 0 takes the arg max, lowest id on ties.
        tie: how far, in probability, float32 arithmetic may move thresholds and the draw.
    Returns:
        Draw.
    """
    x = logits.double()
    if bool(x.isnan().any()) or bool((x == math.inf).any()) or bool((x == -math.inf).all()):
        return Draw(-1, frozenset({-1}))
    if temperature == 0.0 or top_k == 1:
        token = int((x == x.max()).nonzero()[0])
        return Draw(token, frozenset({token}))
    u = philox(seed, position) / 2.0**64

    def draw(p_shift: float, min_shift: float, u_shift: float) -> int:
        probs = filtered(x, temperature=temperature, top_k=top_k, top_p=top_p + p_shift if top_p < 1.0 else 1.0,
                         min_p=min_p * (1.0 + min_shift))
        return inverse_cdf(probs, min(max(u + u_shift, 0.0), 1.0))

    shifts = (-tie, 0.0, tie)
    acceptable = {draw(p, m, du) for p in (shifts if top_p < 1.0 else (0.0,)) for m in (shifts if min_p > 0.0 else (0.0,))
                  for du in shifts}
    return Draw(draw(0.0, 0.0, 0.0), frozenset(acceptable))


def top_logprobs(logits: torch.Tensor, num: int) -> tuple[list[int], list[float]]:
    """The `num` most likely ids of the raw logits and their log-probabilities; -1 and -inf past the finite ones."""
    logprobs = torch.log_softmax(logits.double(), -1)
    order = torch.sort(logits.double(), descending=True, stable=True).indices[:num].tolist()
    ids = [i for i in order if logits[i] > -math.inf]
    missing = num - len(ids)
    return ids + [-1] * missing, [float(logprobs[i]) for i in ids] + [-math.inf] * missing
