"""PPO reaches the known optimum (facts 5.3: every planted fault of the objective ends far above the mark)."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
from optimum import Optimum
from toy import (
    LocalGenerator,
    LocalScorer,
    Log,
    Prompts,
    config,
    gpt2,
    make_engine,
    make_learner,
    vllm_engine,
)

from raytrl.loop.loop import Schedule, run
from raytrl.roles.rollout.engine import RolloutEngine

WIDTH = 64  # vLLM's attention on CPUs has heads of 32 and more


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RolloutEngine]:
    model = gpt2(1, width=WIDTH)
    if request.param == "transformers":
        yield make_engine(model, chunk=256)
        return
    vllm = vllm_engine(model, tmp_path)
    yield vllm
    vllm.close()


def test_ppo_reaches_the_known_optimum(engine: RolloutEngine) -> None:
    model = gpt2(1, width=WIDTH)
    optimum = Optimum.of(model, length=3, beta=0.5)
    start = optimum.distance(model)
    ppo = config(steps=60, batch_size=256, epochs=4, minibatches=1, kl={"coef": 0.5})
    learner, log = make_learner(deepcopy(model), ppo), Log()
    run(Schedule(60), Prompts(256), LocalGenerator([engine], 1, 256), LocalScorer(), learner, log)
    end = optimum.distance(learner._backend.networks.policy)
    print(f"KL to the optimum: {start:.4f} -> {end:.4f}", log.metrics[-1])
    assert start > 0.2
    assert end <= 0.02 and end <= 0.1 * start
