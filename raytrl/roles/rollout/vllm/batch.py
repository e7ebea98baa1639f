"""vLLM's continuous batch: one thread owns the engine and steps it; requests come from any thread at any time."""

import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from raytrl.errors import StaleAttemptError

T = TypeVar("T")


@dataclass(frozen=True)
class _Request:
    token_ids: Sequence[int]
    params: Any  # vllm.SamplingParams
    ends: Callable[[Sequence[int]], bool] | None
    wanted: Callable[[], bool]
    adapter: Any  # vllm.lora.request.LoRARequest
    future: "Future[Any]" = field(default_factory=Future)


@dataclass(frozen=True)
class _Work:
    function: Callable[[Any], Any]
    future: "Future[Any]" = field(default_factory=Future)


class ContinuousBatch:
    """An `LLMEngine` and its thread.

    vLLM's engine is not safe to call from two threads, and the number of its OpenMP threads belongs to the thread that
    computes, so the engine is made in that thread as well.
    """

    def __init__(self, make_engine: Callable[[], Any]) -> None:
        """Raises what `make_engine` raises."""
        self._inbox: queue.SimpleQueue[_Request | _Work | None] = queue.SimpleQueue()
        self._running: dict[str, _Request] = {}
        self._numbers = itertools.count()
        self._broken: BaseException | None = None  # what ended the thread
        made: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(make_engine, made), name="vllm", daemon=True)
        self._thread.start()
        made.result()

    def submit(
        self,
        token_ids: Sequence[int],
        params: Any,
        ends: Callable[[Sequence[int]], bool] | None = None,
        wanted: Callable[[], bool] = lambda: True,
        adapter: Any = None,
    ) -> "Future[Any]":
        """The finished `RequestOutput`, in time; StaleAttemptError where it is not wanted any more.

        Args:
            ends: called with the tokens sampled so far; where it is true, the response ends. Needs cumulative outputs.
            wanted: asked between two steps of the engine.
            adapter: a `LoRARequest`; None: the model as it is.
        """
        request = _Request(token_ids, params, ends, wanted, adapter)
        self._put(request)
        return request.future

    def call(self, function: Callable[[Any], T]) -> T:
        """What the function returns for the engine, between two steps of it."""
        work = _Work(function)
        self._put(work)
        result: T = work.future.result()
        return result

    def close(self) -> None:
        """Ends the thread and lets go of the engine."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self, make_engine: Callable[[], Any], made: "Future[None]") -> None:
        try:
            engine = make_engine()
        except BaseException as error:
            made.set_exception(error)
            return
        made.set_result(None)
        try:
            while self._take_in(engine):
                if self._running:
                    self._step(engine)
        except BaseException as error:  # nobody steps the engine any more: no future may stay open
            self._broken = error
            for request in self._running.values():
                request.future.set_exception(error)
            self._running = {}
            self._refuse()

    def _let_go(self, engine: Any) -> None:
        """Of what nobody waits for."""
        unwanted = [name for name, request in self._running.items() if not request.wanted()]
        if unwanted:
            engine.abort_request(unwanted)
        for name in unwanted:
            self._running.pop(name).future.set_exception(StaleAttemptError("rollout engine: not wanted any more"))

    def _refuse(self) -> None:
        """Whatever still comes is answered with what ended the thread."""
        assert self._broken is not None
        while True:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                return
            if item is not None:
                item.future.set_exception(self._broken)

    def _put(self, item: "_Request | _Work") -> None:
        self._inbox.put(item)
        if self._broken is not None:
            self._refuse()

    def _take_in(self, engine: Any) -> bool:
        """Start what has come; waits for something while there is nothing to step. False: closed."""
        while not self._inbox.empty() or not self._running:
            item = self._inbox.get()
            if item is None:
                return False
            try:
                if isinstance(item, _Work):
                    item.future.set_result(item.function(engine))
                else:
                    name = str(next(self._numbers))
                    prompt = {"prompt_token_ids": list(item.token_ids)}
                    engine.add_request(name, prompt, item.params, lora_request=item.adapter)
                    self._running[name] = item
            except Exception as error:
                item.future.set_exception(error)
        return True

    def _step(self, engine: Any) -> None:
        self._let_go(engine)
        try:
            outputs = engine.step()
        except Exception as error:  # every request was part of the step that failed
            running, self._running = self._running, {}
            for request in running.values():
                request.future.set_exception(error)
            engine.abort_request(list(running))
            return
        for output in outputs:
            request = self._running[output.request_id]
            stopped = request.ends is not None and not output.finished and request.ends(output.outputs[0].token_ids)
            if stopped:
                engine.abort_request([output.request_id])
            if stopped or output.finished:
                del self._running[output.request_id]
                request.future.set_result(output)
