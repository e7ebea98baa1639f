"""`raytrl eval`: responses of finished models, scored by the reward sources, from rollout and reward actors alone."""

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raytrl.config.load import LoadedRun
from raytrl.config.runs.evaluation import EvalRun
from raytrl.launch.runs.resume import inspect_run
from raytrl.launch.runs.run import failure_noted, write_start
from raytrl.launch.session.session import check_output_dir, cluster_of, prepare_environment, ray_session
from raytrl.plan.capacity import Room
from raytrl.records.progress import Progress
from raytrl.records.samples import Attempt, Prompt, Response, Score, sample_row
from raytrl.roles.reward.summary import compare, summarize
from raytrl.rundir import RunDirectory, now

if TYPE_CHECKING:
    from raytrl.launch.actors.generator import PoolGenerator
    from raytrl.launch.actors.scorer import PoolScorer
    from raytrl.roles.rollout.engine import RolloutEngine
    from raytrl.roles.rollout.folder import FolderEngine
from raytrl.plan.checks.evaluation import check_eval
from raytrl.plan.need import need_of
from raytrl.plan.words import describe_eval


@dataclass
class Answers:
    """What one model made of the prompts."""

    prompts: list[Prompt]
    responses: list[Response]
    scores: list[Score]
    kls: list[float] | None = field(default=None)  # one a response, nats


def evaluate(loaded: LoadedRun, command: str, fresh: bool, show: Callable[[Progress], None]) -> dict[str, Any]:
    """Runs an evaluation to its end; one that is finished is not done again.

    Returns:
        The manifest with `results` (what results.json holds) and `samples` (rows of samples.jsonl).

    Raises:
        ConfigError: the request cannot be run; nothing was started.
        RunError: it was started and failed.
    """
    run = loaded.run
    assert isinstance(run, EvalRun)
    prepare_environment()
    check_output_dir(run)
    started = time.time()
    run_dir = RunDirectory(run.output_dir, run.name)
    need = need_of(run)
    with run_dir.locked():
        already = not fresh and inspect_run(run, run_dir).state == "done"
        if not already:
            with cluster_of(run) as cluster:
                room = Room.on(cluster, need)
                prompts = check_eval(run)
                memory, notes = room.memory(run)
                for note in notes:
                    show(Progress("notice", text=note))
                show(Progress("plan", text=describe_eval(run, run_dir, prompts) + memory))
                run_dir.clear()
                write_start(loaded, run_dir, command)
                with failure_noted(run_dir), ray_session(run, need):
                    answers = _on_actors(run, show)
            _write(run, run_dir, answers, time.time() - started)
            run_dir.update_manifest(state="done", finished=now())
        results = json.loads(run_dir.read("results.json") or "{}")
        return run_dir.manifest() | {
            "already_done": already,
            "results": results,
            "samples": run_dir.rows("samples.jsonl"),
        }


def _on_actors(run: EvalRun, show: Callable[[Progress], None]) -> dict[str, Answers]:
    """Every model's answers; the actors hold one model after the other, version by version."""
    from raytrl.launch.actors.calls import RayCalls
    from raytrl.launch.actors.generator import PoolGenerator, requests_in_flight
    from raytrl.launch.actors.pool import Pool
    from raytrl.launch.actors.scorer import PoolScorer, scoring_limit_s
    from raytrl.launch.actors.start import started_actors
    from raytrl.launch.actors.transport import send
    from raytrl.launch.runs.ppo import make_sources
    from raytrl.launch.session.gauges import RoleGauges
    from raytrl.roles.weights.buckets import weights_on_disk

    show(Progress("phase", text="starting actors"))
    who, limit_s = "the evaluation", scoring_limit_s(run.rollout, run.reward, 1)
    with started_actors(run, functools.partial(make_engine, run), functools.partial(make_sources, run)) as actors:
        generator = PoolGenerator(
            Pool(
                RayCalls(actors[0], RoleGauges(run.name, "rollout")),
                "rollout actors",
                who,
                run.rollout.timeout_s,
                window=requests_in_flight(run.rollout, 1),
            ),
            run.rollout,
            samples=1,
            attempt=Attempt(run.name, 1),
            send_weights=send,
        )
        scorer = PoolScorer(
            Pool(RayCalls(actors[1], RoleGauges(run.name, "reward")), "reward actors", who, limit_s),
            run.reward,
            attempt=Attempt(run.name, 1),
            start_timeout_s=run.rollout.start_timeout_s,
            gather=lambda scores: scores,
        )
        answers = {}
        paths = _paths(run)
        for version, key in enumerate(run.models):
            show(Progress("phase", text=f"sampling and scoring: {key}"))
            generator.load_weights(weights_on_disk(version, paths[version]))
            answers[key] = _answers(_prompts(run, key), version, run.greedy, generator, scorer)
        if run.reference.path is not None:
            show(Progress("phase", text="log-probabilities of the reference"))
            version = len(paths) - 1
            generator.load_weights(weights_on_disk(version, paths[version]))
            for found in answers.values():
                reference = generator.logprobs(found.prompts, found.responses, version)
                found.kls = [sum(r.sampling_logprobs) - reference[r.row, r.sample] for r in found.responses]
        return answers


def _answers(
    prompts: list[Prompt], version: int, greedy: bool, generator: "PoolGenerator", scorer: "PoolScorer"
) -> Answers:
    responses: list[Response] = []
    for part in generator.generate(prompts, version, greedy=greedy):
        scorer.submit(prompts, part)  # scored while the next are sampled
        responses += part
    responses.sort(key=lambda response: (response.row, response.sample))
    return Answers(prompts, responses, scorer.collect())


def _prompts(run: EvalRun, key: str) -> list[Prompt]:
    from raytrl.data import load_data
    from raytrl.roles.models.tokenizer import load_tokenizer
    from raytrl.roles.prompts import PromptTable

    tokenizer = load_tokenizer(run.models[key][1], None, run.model.trust_remote_code)
    table = PromptTable(load_data(run.data.eval, "data.eval"), tokenizer, run.rollout, "data.eval")
    return [table.prompt(row, 0, row) for row in range(min(run.rows or len(table), len(table)))]


def _paths(run: EvalRun) -> list[str]:
    """What each version stands for."""
    paths = [path for path, _ in run.models.values()]
    return paths if run.reference.path is None else [*paths, run.reference.path]


def make_engine(run: EvalRun) -> "FolderEngine":
    """The engine of one rollout actor."""
    from raytrl.roles.models.base import torch_dtype
    from raytrl.roles.rollout.engines import engine_class
    from raytrl.roles.rollout.folder import FolderEngine

    engine = engine_class(run.rollout.engine)
    paths = _paths(run)
    tokenizers = [tokenizer for _, tokenizer in run.models.values()]

    def load(version: int) -> "RolloutEngine":
        return engine.from_pretrained(
            paths[version],
            tokenizers[version] if version < len(tokenizers) else paths[version],
            run.rollout,
            seed=run.seed,
            dtype=torch_dtype(run.model.dtype, run.rollout.uses_gpu),
            device="cuda" if run.rollout.uses_gpu else "cpu",
            trust_remote_code=run.model.trust_remote_code,
        )

    return FolderEngine(paths, load)


def _write(run: EvalRun, run_dir: RunDirectory, answers: dict[str, Answers], seconds: float) -> None:
    """samples.jsonl, then results.json."""
    rows = [row for key, found in answers.items() for row in _sample_rows(key, found)]
    run_dir.write("samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    results: dict[str, Any] = {
        key: {"path": run.models[key][0], **summarize(found.responses, found.scores, found.kls).to_json()}
        for key, found in answers.items()
    }
    if "compare" in answers:
        results["comparison"] = compare(answers["model"].scores, answers["compare"].scores).to_json()
    results["seconds"] = seconds
    run_dir.write("results.json", json.dumps(results, indent=2) + "\n")


def _sample_rows(key: str, found: Answers) -> list[dict[str, Any]]:
    prompts = {prompt.row: prompt for prompt in found.prompts}
    scores = {(score.row, score.sample): score for score in found.scores}
    kls: list[float | None] = [*found.kls] if found.kls is not None else [None] * len(found.responses)
    return [
        sample_row(prompts[response.row], response, scores[response.row, response.sample], model=key)
        | ({} if kl is None else {"kl": kl})
        for response, kl in zip(found.responses, kls, strict=True)
    ]
