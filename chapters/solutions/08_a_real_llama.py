"""Solutions of chapter 08."""

import math


def kv_head(h, heads, kv_heads):
    return h // (heads // kv_heads)


def cache_bytes(cfg, tokens, size=2):
    return 2 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim * tokens * size


def slow_pairs(theta, head_dim, tokens):
    return sum(tokens * theta ** (-2 * i / head_dim) < 2 * math.pi for i in range(head_dim // 2))
