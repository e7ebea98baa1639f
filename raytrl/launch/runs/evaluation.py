"""`raytrl eval`: responses of finished models, scored by the reward sources, from rollout and reward actors alone."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raytrl.config.runs.evaluation import EvalRun
from raytrl.errors import ActorsGoneError, NonFiniteError
from raytrl.launch.runs.conversations import let_converse, tools_of
from raytrl.launch.runs.measuring import EvaluationKind, write_results
from raytrl.launch.runs.run import Start
from raytrl.loop.ahead import without
from raytrl.plan.checks.common import Facts
from raytrl.plan.checks.evaluation import check_eval
from raytrl.records.progress import Progress
from raytrl.records.samples import Attempt, Prompt, Response, Score, sample_row
from raytrl.roles.reward.summary import compare, summarize
from raytrl.rundir import RunDirectory

if TYPE_CHECKING:
    from raytrl.launch.actors.generator import PoolGenerator
    from raytrl.launch.actors.scorer import PoolScorer
    from raytrl.roles.rollout.engine import RolloutEngine
    from raytrl.roles.rollout.folder import FolderEngine


@dataclass
class Answers:
    """What one model made of the prompts."""

    prompts: list[Prompt]
    responses: list[Response]
    scores: list[Score]
    kls: list[float] | None = field(default=None)  # one a response, nats


class EvalKind(EvaluationKind[EvalRun]):
    """`run.Kind` of responses that are sampled and scored."""

    def check(self, run_dir: RunDirectory, before_last: Callable[[], None]) -> Facts:
        return check_eval(self.run, self.tell_rows, before_last)

    def work(self, start: Start) -> dict[str, Any]:
        started = time.time()
        with start.ray.running(start.need):
            answers = _on_actors(self.run, start.show)
        seconds = time.time() - started + start.clock["checks_s"]
        _write(self.run, start.run_dir, answers, seconds)
        return {}


def _on_actors(run: EvalRun, show: Callable[[Progress], None]) -> dict[str, Answers]:
    """Every model's answers; the actors hold one model after the other, version by version."""
    from raytrl.launch.actors.generator import generator_on
    from raytrl.launch.actors.scorer import scorer_on
    from raytrl.launch.actors.start import started_actors
    from raytrl.launch.actors.transport import send
    from raytrl.launch.runs.ppo import make_sources
    from raytrl.roles.weights.buckets import weights_on_disk

    show(Progress("phase", text="starting actors"))
    who, attempt = "the evaluation", Attempt(run.name, 1)
    with started_actors(
        run, functools.partial(make_folder_engine, run), functools.partial(make_sources, run)
    ) as actors:
        generator = generator_on(actors[0], run, who=who, attempt=attempt, send_weights=send)
        scorer = scorer_on(actors[1], run, who=who, attempt=attempt, gather=lambda scores: scores)
        if run.rollout.shares_gpu:
            scorer.start()  # the engines load when they are asked, and measure then what their GPU has left
        answers = {}
        paths = run.versions
        for version, key in enumerate(run.evaluated):
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
                if missing := [r.row for r, kl in zip(found.responses, found.kls, strict=True) if kl != kl]:
                    raise NonFiniteError(f"rollout engine: row {missing[0]}: gave no log-prob for a token")
        return answers


def _answers(
    prompts: list[Prompt], version: int, greedy: bool, generator: "PoolGenerator", scorer: "PoolScorer"
) -> Answers:
    responses: list[Response] = []
    for part in generator.generate(prompts, version, greedy=greedy):
        scorer.submit(prompts, part)  # scored while the next are sampled
        responses += part
    if lost := without(prompts, responses):
        raise ActorsGoneError(f"rollout actors: all were lost; {len(lost)} of {len(prompts)} prompts have no answer")
    responses.sort(key=lambda response: (response.row, response.sample))
    return Answers(prompts, responses, scorer.collect())


def _prompts(run: EvalRun, key: str) -> list[Prompt]:
    from raytrl.data import load_data
    from raytrl.roles.models.tokenizer import load_tokenizer
    from raytrl.roles.prompts import PromptTable

    tokenizer = load_tokenizer(run.evaluated[key][1], None, run.model.trust_remote_code)
    table = PromptTable(load_data(run.data.eval, "data.eval"), tokenizer, run.rollout, "data.eval")
    return [table.prompt(row, 0, row) for row in range(min(run.rows or len(table), len(table)))]


def make_folder_engine(run: EvalRun) -> "FolderEngine":
    """The engine of one rollout actor."""
    from raytrl.roles.models.base import torch_dtype
    from raytrl.roles.rollout.engines import engine_class
    from raytrl.roles.rollout.folder import FolderEngine

    engine = engine_class(run.rollout.engine)
    paths = run.versions
    tokenizers = [tokenizer for _, tokenizer in run.evaluated.values()]

    tools = tools_of(run)

    def load(version: int) -> "RolloutEngine":
        tokenizer = str(tokenizers[version] if version < len(tokenizers) else paths[version])
        loaded = engine.from_pretrained(
            paths[version],
            tokenizer,
            run.rollout,
            seed=run.seed,
            dtype=torch_dtype(run.model.dtype, run.rollout.uses_gpu),
            device="cuda" if run.rollout.uses_gpu else "cpu",
            trust_remote_code=run.model.trust_remote_code,
        )
        if version < len(tokenizers):  # the reference is asked for log-probs alone
            let_converse(loaded, run, tokenizer, tools)
        return loaded

    return FolderEngine(paths, load)


def _write(run: EvalRun, run_dir: RunDirectory, answers: dict[str, Answers], seconds: float) -> None:
    rows = [row for key, found in answers.items() for row in _rows(key, found)]
    results: dict[str, Any] = {
        key: {"path": run.evaluated[key][0], **summarize(found.responses, found.scores, found.kls).to_json()}
        for key, found in answers.items()
    }
    if "compare" in answers:
        results["comparison"] = compare(answers["model"].scores, answers["compare"].scores).to_json()
    results["seconds"] = seconds
    write_results(run_dir, results, rows)


def _rows(key: str, found: Answers) -> list[dict[str, Any]]:
    prompts = {prompt.row: prompt for prompt in found.prompts}
    scores = {(score.row, score.sample): score for score in found.scores}
    kls: list[float | None] = [*found.kls] if found.kls is not None else [None] * len(found.responses)
    return [
        sample_row(prompts[response.row], response, scores[response.row, response.sample], model=key)
        | ({} if kl is None else {"kl": kl})
        for response, kl in zip(found.responses, kls, strict=True)
    ]
