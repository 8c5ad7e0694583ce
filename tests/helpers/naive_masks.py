# SPDX-License-Identifier: Apache-2.0
"""Who sees whom, element by element: the oracle of explicit masks."""

import torch


def naive_mask(seq_len, *, causal=True, window=None, documents=None, lengths=None, rule=None, batch=1, heads=1):
    """[batch, heads, S, S] bool, True = keep. A token always sees itself, so that no row is empty.

    Args:
        window: tokens that a token sees, itself included (in both directions unless causal).
        documents: [batch][S] ids; lengths: [batch] tokens before padding; rule: (batch, head, query, key) -> bool.
    """
    mask = torch.zeros(batch, heads, seq_len, seq_len, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for query in range(seq_len):
                for key in range(seq_len):
                    seen = not causal or key <= query
                    seen = seen and (window is None or abs(query - key) < window)
                    seen = seen and (documents is None or documents[b][query] == documents[b][key])
                    seen = seen and (lengths is None or max(query, key) < lengths[b])
                    seen = seen and (rule is None or bool(rule(b, h, query, key)))
                    mask[b, h, query, key] = seen or query == key
    return mask
