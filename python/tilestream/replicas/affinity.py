"""Which replica a request goes to: the one that has its prefix cached, unless that one has too much to do.

Replicas are ranked by a hash of the prefix and their name (rendezvous hashing): one that comes or goes moves only its own
prefixes. A replica past its bounded share of the load (consistent hashing with bounded loads, arXiv 1608.01350) is passed
over, and the next in rank caches the prefix, too: so a prefix that all requests have spreads as far as the load makes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from typing import Any

BLOCK_BYTES = 128  # of text, about a page of 32 tokens; of token ids, 4 bytes each, exactly one
_MOST_BLOCKS = 8  # what comes later tells requests apart that had better stay together
_FEW_REQUESTS = 4  # a replica that runs less takes one more at hardly any cost
_MOST_SHARE = 1.25  # of the mean load


def prefix_key(body: bytes) -> bytes | None:
    """What requests have in common that share at least their first KV pages.

    Args:
        body: of a request, as it came.
    Returns:
        A hash; None where there is nothing to share, or the body cannot be read: any replica may say what is wrong with it.
    """
    try:
        fields = json.loads(body)
        salt, prefix = str(fields.get("cache_salt") or "").encode(), _prefix(fields)
    except (ValueError, AttributeError, TypeError, LookupError, RecursionError, struct.error):
        return None
    num_blocks = min(len(prefix) // BLOCK_BYTES, _MOST_BLOCKS)
    if num_blocks == 0:
        return None
    return hashlib.blake2b(prefix[: num_blocks * BLOCK_BYTES], key=salt[:64], digest_size=16).digest()


def _prefix(fields: dict[str, Any]) -> bytes:
    """The beginning of a prompt; of a conversation as much as its later turns have, too."""
    if "messages" in fields:
        texts = [json.dumps(fields.get("tools") or [])]
        for message in fields["messages"]:
            texts.append(f"{message['role']}: {message['content']}")
            if message["role"] == "user":
                break
        return "\n".join(texts).encode()
    prompt = fields["prompt"]
    if isinstance(prompt, list) and not isinstance(prompt[0], int):
        prompt = prompt[0]
    return prompt.encode() if isinstance(prompt, str) else struct.pack(f"<{len(prompt)}I", *prompt)


def in_order(key: bytes | None, loads: Mapping[str, int]) -> list[str]:
    """The replicas, best first.

    Args:
        key: of prefix_key().
        loads: how many requests each of them has.
    """
    by_load = sorted(loads, key=lambda name: (loads[name], name))
    if key is None:
        return by_load
    most = max(_FEW_REQUESTS, math.ceil(_MOST_SHARE * (sum(loads.values()) + 1) / len(loads))) if loads else 0
    free = [name for name in loads if loads[name] < most]
    free.sort(key=lambda name: hashlib.blake2b(name.encode(), key=key).digest())
    return free + [name for name in by_load if loads[name] >= most]
