"""lm-eval's evaluation of one model, and its numbers as plain rows."""

import contextlib
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from raytrl.config.sections.benchmark import BenchmarkSection
from raytrl.roles.benchmark.sliced import SlicedLM

Row = dict[str, Any]
# Standard errors without a formula (median, F1, perplexity …) come from so many bootstrap draws; lm-eval's own 100,000 take
# minutes in several processes.
BOOTSTRAP_DRAWS = 1000
_OTHER_SEED = 1234  # lm-eval's, of numpy and of the choice of examples; Python's is 0
_EXCERPT = 500  # characters


def measure(
    loaded: Mapping[str, Any], lm: SlicedLM, section: BenchmarkSection, *, chat: bool, seed: int
) -> dict[str, Any]:
    """What lm-eval's `evaluate` returns, prepared as its `simple_evaluate` does; with seed 0 by the same random numbers.

    `simple_evaluate` itself would also collect facts about the machine (3 s) and call git.

    Args:
        loaded: tasks, groups and group_map.
        chat: whether the chat template is applied.
    """
    from lm_eval.evaluator import evaluate

    random.seed(seed)
    np.random.seed(_OTHER_SEED + seed)  # tasks' own functions draw from it
    for task in loaded["tasks"].values():
        said = task.get_config("num_fewshot")
        if said is None or (section.fewshot is not None and said != 0):
            task.set_config(key="num_fewshot", value=section.fewshot or 0)
        task.set_fewshot_seed(seed=_OTHER_SEED + seed)
    with _quiet():
        found: dict[str, Any] = evaluate(
            lm=lm,
            task_dict=loaded,
            limit=section.limit,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=True,
        )
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's progress bars beside our own, and without the processes that its bootstrap would start."""
    before, plain = os.environ.get("DISABLE_MULTIPROC"), tqdm.__init__

    def disabled(self: Any, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options | {"disable": True})

    os.environ["DISABLE_MULTIPROC"] = "1"
    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = plain
        os.environ.pop("DISABLE_MULTIPROC") if before is None else os.environ.update(DISABLE_MULTIPROC=before)


def rows_of(found: Mapping[str, Any], model: str, limit: int | None) -> list[Row]:
    """A row for each task (or group of tasks) and metric.

    Args:
        found: by `measure`.
        model: key of the model.
    """
    return [
        _row(found, name, key, value) | {"model": model, "limit": limit}
        for name, values in found["results"].items()
        for key, value in values.items()
        if "," in key and "_stderr," not in key
    ]


def _row(found: Mapping[str, Any], name: str, key: str, value: Any) -> Row:
    metric, _, filtered = key.partition(",")
    values, is_group = found["results"][name], name not in found["n-samples"]
    return {
        "task": name,
        "metric": metric,
        "filter": filtered,
        "value": plain(value),
        "stderr": plain(values.get(f"{metric}_stderr,{filtered}")),
        "n": int(values.get("sample_len", 0)),
        "of": None if is_group else int(found["n-samples"][name]["original"]),
        "fewshot": found["n-shot"].get(name),
        "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
        "task_version": found["versions"].get(name),
        "is_group": is_group,
    }


def plain(value: Any) -> float | None:
    """A finite number, or None: lm-eval writes "N/A" where it has none."""
    if isinstance(value, bool | int | float | np.generic):
        number = float(value)
        return number if math.isfinite(number) else None
    return None


def samples_of(found: Mapping[str, Any], model: str) -> list[Row]:
    """A row for each task, filter and document, with beginnings and ends of what is long."""
    return [
        {
            "model": model,
            "task": task,
            "filter": sample["filter"],
            "doc_id": sample["doc_id"],
            "doc_hash": sample["doc_hash"],
            "prompt": str(sample["arguments"][0][0])[-_EXCERPT:],
            "target": _json(sample["target"]),
            "response": _response(sample),
            "metrics": {metric: _json(sample[metric]) for metric in sample["metrics"]},
        }
        for task, samples in found["samples"].items()
        for sample in samples
    ]


def _response(sample: Mapping[str, Any]) -> str:
    """What the model wrote; of several choices the likeliest; else the log-probability."""
    given, arguments = sample["filtered_resps"], sample["arguments"]
    first = given[0]
    if isinstance(first, str):
        return first[:_EXCERPT]
    if len(given) > 1 and all(isinstance(each, Sequence) and len(each) == 2 for each in given):
        # Some metrics ask for each choice behind nothing as well, and some tasks for one answer behind several questions.
        choices = [index for index in range(len(given)) if arguments[index][0] == arguments[0][0]]
        by_question = len(choices) == 1
        best = max(range(len(given)) if by_question else choices, key=lambda index: float(given[index][0]))
        said = "".join(map(str, arguments[best][:2])) if by_question else str(arguments[best][1])
        return said[:_EXCERPT]
    return str(first)[:_EXCERPT]


def _json(value: Any) -> Any:
    """Plain values, without numpy's."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list | tuple | np.ndarray):
        return [_json(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _json(each) for key, each in value.items()}
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)[:_EXCERPT]
