"""Key/value caches of streaming attention: `kv.py` is the machine, every other file is one policy."""

from streamgen.cache.ema_sink import EMA_SINK
from streamgen.cache.kv import BlockCache, CacheSpec, KVCache, Policy
from streamgen.cache.quantised import STORAGES, QuantisedKVCache
from streamgen.cache.relative import RELATIVE
from streamgen.cache.rows import RowsCache
from streamgen.cache.window import WINDOW

POLICIES = {policy.name: policy for policy in (WINDOW, RELATIVE, EMA_SINK)}


def policy(name: str) -> Policy:
    """The policy of that name; ValueError lists the names there are."""
    if name not in POLICIES:
        raise ValueError(f"unknown cache policy {name!r}; there are: {', '.join(sorted(POLICIES))}")
    return POLICIES[name]


__all__ = [
    "POLICIES",
    "STORAGES",
    "BlockCache",
    "CacheSpec",
    "KVCache",
    "Policy",
    "QuantisedKVCache",
    "RowsCache",
    "policy",
]
