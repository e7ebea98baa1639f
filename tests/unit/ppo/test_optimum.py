"""PPO reaches the known optimum (facts 5.3: every planted fault of the objective ends far above the mark)."""

from copy import deepcopy

from optimum import Optimum
from toy import LocalGenerator, LocalScorer, Log, Prompts, config, gpt2, make_engine, make_learner

from raytrl.ppo.loop import Schedule, run


def test_ppo_reaches_the_known_optimum() -> None:
    model = gpt2(1)
    optimum = Optimum.of(model, length=3, beta=0.5)
    start = optimum.distance(model)
    ppo = config(steps=60, batch_size=256, epochs=4, minibatches=1, kl={"coef": 0.5})
    learner, engine, log = make_learner(deepcopy(model), ppo), make_engine(deepcopy(model), chunk=256), Log()
    run(Schedule(60), Prompts(256), LocalGenerator([engine], 1, 256), LocalScorer(), learner, log)
    end = optimum.distance(learner._backend.networks.policy)
    print(f"KL to the optimum: {start:.4f} -> {end:.4f}", log.metrics[-1])
    assert start > 0.2
    assert end <= 0.02 and end <= 0.1 * start
