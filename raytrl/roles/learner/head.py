"""Log-probs of given tokens from the last hidden states: the logits of all tokens are never held at once.

With 152k token ids the logits of 1,024 tokens, their softmax and its gradient take 2.6 GiB; a part of the vocabulary at a
time, computed again in the backward pass (TRL's `ChunkedLogProbFunction`), takes 0.1 GiB, in no more time.
"""

import torch
from torch import Tensor, nn
from trl.kernels import ChunkedLogProbFunction

from raytrl.algo.logprobs import token_entropy, token_logprobs
from raytrl.config.sections.ppo import HEAD_CHUNK


class LogProbHead(nn.Linear):
    """A language model's head, in the place of the one that it had; told the tokens, it returns no logits."""

    def __init__(self, head: nn.Linear, scale: float, softcap: float | None) -> None:
        """With the head's own parameters; logits are `softcap · tanh(scale · head(hidden) / softcap)`."""
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self.scale, self.softcap = scale, softcap
        self.is_proven = False  # that this is how the model computes its logits

    def forward(  # type: ignore[override]  # told no tokens it is the layer that it replaces
        self, hidden: Tensor, tokens_N: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Logits; for `tokens_N` and the `hidden` (N, D) that predict them: their log-probs, and entropies where there is
        a gradient. Both float32, (N,), nats; entropies carry no gradient."""
        if tokens_N is None:
            return super().forward(hidden)
        on_gpu = hidden.device.type == "cuda"
        chunk = HEAD_CHUNK["gpu" if on_gpu else "cpu"]
        if self.out_features <= chunk and not on_gpu:
            return of_logits(self._logits(hidden), tokens_N, temperature)
        wanted = ("entropy",) if torch.is_grad_enabled() else ()
        arguments = (self.weight, self.bias, tokens_N, temperature, chunk, self.softcap, self.scale, wanted)
        logprobs_N, entropies_N, *_ = ChunkedLogProbFunction.apply(hidden, *arguments)
        return logprobs_N, None if entropies_N is None else entropies_N.detach()

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        logits_NV = super().forward(hidden_ND)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)


def of_logits(logits_NV: Tensor, tokens_N: Tensor, temperature: float) -> tuple[Tensor, Tensor | None]:
    """What `LogProbHead` returns, from logits."""
    logprobs_N = token_logprobs(logits_NV, tokens_N, temperature)
    if not torch.is_grad_enabled():
        return logprobs_N, None
    with torch.no_grad():
        return logprobs_N, token_entropy(logits_NV, temperature)


def give_head(model: nn.Module) -> None:
    """Puts a `LogProbHead` in the place of a causal model's head, where that is a plain linear layer."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear:  # an adapter's, a quantised one
        return
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    divisor = getattr(config, "logits_scaling", None)  # Granite's; Cohere multiplies
    scale = float(getattr(config, "logit_scale", None) or (1.0 / divisor if divisor else 1.0))
    model.set_output_embeddings(LogProbHead(head, scale, getattr(config, "final_logit_softcapping", None)))  # type: ignore[operator]


def head_of(model: nn.Module) -> LogProbHead | None:
    """The model's head, where it can be told tokens and is proven to compute as the model does."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head if isinstance(head, LogProbHead) and head.is_proven else None
