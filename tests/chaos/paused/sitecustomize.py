"""On the path of a run's processes, this makes one of them stop for a moment where a test wants it to be killed.

A test writes the name of a phase into `want`; the first process that gets there renames the file to `at`, adds its pid,
and sleeps. With `break` before the name it raises in place of that, then and ever after. Python imports `sitecustomize`
by itself at the start of every process.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("RAYTRL_TEST_PAUSES", "/nonexistent"))
PAUSE_S = 2.0
BROKEN: set[str] = set()  # phases that this process raises in
# Module, class, method, phase, whether the pause comes after the method has done its work.
PLACES = [
    ("raytrl.roles.rollout.transformers_engine", "TransformersEngine", "_sample", "generate", False),
    ("raytrl.roles.rollout.transformers_engine", "TransformersEngine", "_take", "sync", True),
    ("raytrl.roles.reward.sources", "RewardSources", "score", "score", False),
    ("raytrl.roles.learner.learner", "PpoLearner", "_minibatch", "update", True),
    ("raytrl.roles.learner.learner", "PpoLearner", "save", "checkpoint", True),  # written, not yet committed
]


def pause(phase: str) -> None:
    if phase not in BROKEN:
        want = FOLDER / "want"
        try:
            wanted = want.read_text()
            if wanted.removeprefix("break ") != phase:
                return
            want.rename(FOLDER / f"at-{os.getpid()}")
        except FileNotFoundError:  # nobody wants it, or another process was first
            return
        if wanted == phase:
            time.sleep(PAUSE_S)
            return
        BROKEN.add(phase)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def paused(method: Callable[..., Any], phase: str, after: bool) -> Callable[..., Any]:
    def call(*arguments: Any, **names: Any) -> Any:
        if not after:
            pause(phase)
        result = method(*arguments, **names)
        if after:
            pause(phase)
        return result

    return call


class Finder(importlib.abc.MetaPathFinder):
    """Puts the pauses into a module when it is imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        places = [place for place in PLACES if place[0] == name]
        spec = importlib.machinery.PathFinder.find_spec(name, path) if places else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            for _, class_name, method_name, phase, after in places:
                owner = getattr(module, class_name)
                setattr(owner, method_name, paused(getattr(owner, method_name), phase, after))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if FOLDER.is_dir():
    sys.meta_path.insert(0, Finder())
