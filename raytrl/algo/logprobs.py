"""Log-probabilities and entropies of sampled tokens. B sequences, R response width, V vocabulary."""

import torch
from torch import Tensor


def token_logprobs(logits_BRV: Tensor, tokens_BR: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at the given tokens.

    Args:
        logits_BRV: the logits that *predict* each token, i.e. those one position before it; any float dtype.
        tokens_BR: token ids; padding may hold any id within the vocabulary.
        temperature: the one that the tokens were sampled with.

    Returns:
        float32, shape (B, R), nats. The arithmetic is float32 even for bfloat16 logits: a bfloat16 log-softmax is
        off by about 1e-2, which PPO would read as policy change.
    """
    logits_BRV = logits_BRV.float() / temperature
    picked_BR = logits_BRV.gather(-1, tokens_BR.unsqueeze(-1)).squeeze(-1)
    return picked_BR - torch.logsumexp(logits_BRV, dim=-1)


def token_entropy(logits_BRV: Tensor, temperature: float) -> Tensor:
    """Entropy of softmax(logits / temperature): float32, shape (B, R), nats."""
    logprobs_BRV = torch.log_softmax(logits_BRV.float() / temperature, dim=-1)
    # exp(-inf) * -inf is NaN; a token of probability 0 contributes 0.
    return -torch.where(logprobs_BRV.isneginf(), 0.0, logprobs_BRV.exp() * logprobs_BRV).sum(-1)
