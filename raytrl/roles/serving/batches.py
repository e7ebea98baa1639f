"""Batches of the moment: what waits is sampled together, in one thread, and what comes meanwhile waits for its end."""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from raytrl.config.sections.serve import BATCH_PROMPT_TOKENS
from raytrl.roles.rollout.decoding import Decoding
from raytrl.roles.serving.responses import Call, Row, TokenLogprob
from raytrl.roles.serving.sampling import Knobs
from raytrl.roles.serving.text_stream import TokenTexts

_log = logging.getLogger(__name__)

_WINDOW_S = 0.005  # for others to come, once there is something to do
_FAILURES = 3  # batches in a row: then it is not what was asked that fails
_LEAST_LOGPROB = -9999.0  # JSON has no -inf; vLLM says this, too

_Taken = tuple[Call, int, Row]


class Batches:
    """A model and the thread that samples from it.

    A row depends on its seed, its prompt and the weights; what shares its batch changes the last bits of its logits, and so
    a token only where a draw falls that near to a border.
    """

    def __init__(self, model: Any, tokenizer: Any, max_rows: int) -> None:
        """
        Args:
            model: a causal language model, or PEFT's around it where calls name adapters.
            tokenizer: the thread's own: a tokenizer takes one caller at a time.
            max_rows: of a batch.
        """
        self._model, self._tokenizer, self._max_rows = model, tokenizer, max_rows
        self._texts = TokenTexts(tokenizer)
        self._device = next(model.parameters()).device
        self._calls: deque[Call] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._failures = 0
        self.num_sampled = 0  # tokens, of all rows
        self._thread = threading.Thread(target=self._work, name="sampling", daemon=True)
        self._thread.start()

    def submit(self, call: Call) -> None:
        """Its rows will be sampled, unless it is not wanted any more."""
        with self._changed:
            if self._closed:
                call.fail()
            else:
                self._calls.append(call)
                self._changed.notify()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """What is open fails."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _work(self) -> None:
        try:
            while batch := self._collected():
                self._try(batch)
                del batch
        except Exception as error:
            _log.error("the sampling thread ends: %s", type(error).__name__)
        finally:
            with self._changed:
                self._closed = True
                for call in self._calls:
                    call.fail()
                self._calls.clear()

    def _collected(self) -> list[_Taken]:
        """The next batch: rows of one adapter, one of each call in turn; empty: it is closed."""
        with self._changed:
            while not self._closed:
                self._changed.wait_for(lambda: self._calls or self._closed)
                until = time.monotonic() + _WINDOW_S
                while (left := until - time.monotonic()) > 0 and self._num_waiting() < self._max_rows:
                    self._changed.wait(left)
                self._calls = deque(call for call in self._calls if call.is_wanted)
                if self._calls and not self._closed:
                    return self._taken()
        return []

    def _num_waiting(self) -> int:
        return sum(len(call.waiting) for call in self._calls)

    def _taken(self) -> list[_Taken]:
        adapter = self._calls[0].adapter
        served = [call for call in self._calls if call.adapter == adapter]
        turns = zip_longest(*([(call, *each) for each in call.waiting] for call in served))
        found, width = list[_Taken](), 0
        for call, index, row in (each for turn in turns for each in turn if each is not None):
            wider = max(width, len(row.token_ids))
            if len(found) == self._max_rows or (found and wider * (len(found) + 1) > BATCH_PROMPT_TOKENS):
                continue
            found.append((call, index, row))
            width = wider
        taken = {id(row) for _, _, row in found}
        for call in served:
            call.waiting = deque(each for each in call.waiting if id(each[1]) not in taken)
        # Who has had a turn and has more rows stands behind those who have not.
        mine = {id(call) for call, _, _ in found}
        others = [call for call in self._calls if id(call) not in mine]
        self._calls = deque([*others, *(call for call in served if id(call) in mine and call.waiting)])
        return found

    def _try(self, batch: list[_Taken]) -> None:
        """Sample it; where that fails, its calls fail, and after some in a row all do."""
        try:
            with self._adapted(batch[0][0].adapter):
                self._sample(batch)
            self._failures = 0
        except Exception as error:  # its text may hold what was asked: only its kind is logged
            _log.error("a batch of %d rows failed: %s", len(batch), type(error).__name__)
            calls = {id(call): call for call, _, _ in batch}
            for call in calls.values():
                call.fail(by_another=len(calls) > 1)
            if self._device.type == "cuda" and isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            self._failures += 1
            if self._failures >= _FAILURES:
                raise

    def _adapted(self, adapter: str | None) -> contextlib.AbstractContextManager[Any]:
        if adapter is not None:
            self._model.set_adapter(adapter)
        elif hasattr(self._model, "disable_adapter"):
            disabled: contextlib.AbstractContextManager[Any] = self._model.disable_adapter()
            return disabled
        return contextlib.nullcontext()

    @torch.inference_mode()
    def _sample(self, batch: list[_Taken]) -> None:
        """Until every row has ended, is full, or is not wanted any more; such rows leave at the next token."""
        for _, _, row in batch:
            row.begin(self._tokenizer)
        decoding = Decoding(self._model, [row.token_ids for _, _, row in batch], self._device)
        knobs = Knobs([row.sampling for _, _, row in batch], self._device)
        while True:
            logits_BV = decoding.logits()
            draws_B = torch.tensor([row.draw() for _, _, row in batch], dtype=torch.float64, device=self._device)
            tokens_B = knobs.pick(logits_BV, draws_B)
            tokens, logprobs = tokens_B.tolist(), self._logprobs(logits_BV, tokens_B, [row for _, _, row in batch])
            for i, (call, index, row) in enumerate(batch):
                call.say(index, row.take(tokens[i], logprobs.get(i)))
            self.num_sampled += len(batch)
            kept = [i for i, (call, _, row) in enumerate(batch) if row.finish is None and call.is_wanted]
            if self._closed:
                for call, _, _ in batch:
                    call.fail()
            if self._closed or not kept:
                return
            decoding.append(tokens_B)
            if len(kept) < len(batch):
                batch = [batch[i] for i in kept]
                knobs = Knobs([row.sampling for _, _, row in batch], self._device)
                decoding.keep(torch.tensor(kept, device=self._device))

    def _logprobs(self, logits_BV: Tensor, tokens_B: Tensor, rows: Sequence[Row]) -> dict[int, TokenLogprob]:
        """Of the rows that ask for them, by their place in the batch."""
        asking = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
        if not asking:
            return {}
        logprobs_AV = logits_BV[asking].log_softmax(-1).clamp(min=_LEAST_LOGPROB)
        most = max(rows[i].sampling.logprobs or 0 for i in asking)
        likeliest = logprobs_AV.topk(min(most, logits_BV.shape[-1]), dim=-1)
        values, indices = likeliest.values.tolist(), likeliest.indices.tolist()
        tokens_A = tokens_B[asking]
        own, tokens = logprobs_AV.gather(-1, tokens_A.unsqueeze(-1)).squeeze(-1).tolist(), tokens_A.tolist()
        return {
            i: TokenLogprob(
                self._texts.of(tokens[a]),
                own[a],
                list(zip(map(self._texts.of, indices[a]), values[a], strict=True))[: rows[i].sampling.logprobs],
                rows[i].characters,
            )
            for a, i in enumerate(asking)
        }
