"""What is checked before a PPO run is started, and what is then going to run where."""

from raytrl.config.deepspeed import zero_stage
from raytrl.config.engines import engine_words
from raytrl.config.eval_run import EvalRun
from raytrl.config.ppo_run import PpoRun
from raytrl.config.reward import RewardSection
from raytrl.config.runs import DataSource
from raytrl.errors import ConfigError
from raytrl.launch.placement import amounts
from raytrl.launch.preflight import check_model_path, check_trackers
from raytrl.launch.session import joins_cluster
from raytrl.roles.device import check_cpu
from raytrl.roles.reward_function import FunctionSource


def check_ppo(run: PpoRun) -> dict[str, str]:
    """Checks models, tokenizer, reward sources and every prompt.

    Returns:
        Words about the data, by dataset key.

    Raises:
        ConfigError: something is missing, or does not fit together.
    """
    models = {
        "model.path": run.model.path,
        "value_model.init": run.value_model.init,
        "reference.path": run.reference.path,
    }
    for key, path in models.items():
        if path is not None:
            check_model_path(path, key)
    check_sources(run.reward)
    check_trackers(run)
    if not run.learner.uses_gpu and not joins_cluster(run):
        check_cpu(run)
    words = {"data.train": check_prompt_data(run, run.data.train, "data.train")}
    if run.data.eval is not None:
        words["data.eval"] = check_prompt_data(run, run.data.eval, "data.eval")
    return words


def check_sources(section: RewardSection) -> None:
    """Reward models can be had, reward functions can be loaded."""
    for i, source in enumerate(section.sources):
        key = f"reward.sources.{i}"
        if source.model is not None:
            check_model_path(source.model, f"{key}.model", adapters=True)
        elif source.function is not None:
            FunctionSource(source).close()  # in a process of its own, as in the run


def check_prompt_data(run: PpoRun | EvalRun, source: DataSource, where: str) -> str:
    """Goes through every prompt; returns words about them."""
    from raytrl.data import check_columns, load_data  # datasets: 1.3 s
    from raytrl.roles.prompts import PromptTable, check_prompts, max_positions
    from raytrl.roles.tokenizer import load_tokenizer

    dataset = load_data(source, where)
    check_columns(dataset, run, where)
    try:
        tokenizer = load_tokenizer(run.tokenizer_path, None, run.model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.tokenizer: cannot be loaded: {str(error).splitlines()[0]}") from None
    longest, num_cut = check_prompts(PromptTable(dataset, tokenizer, run.rollout, where), tokenizer, where)
    kept, new = min(longest, run.rollout.max_prompt_length), run.rollout.sampling.max_new_tokens
    positions = max_positions(str(run.model.path), run.model.trust_remote_code)
    if positions is not None and kept + new > positions:
        raise ConfigError(
            f"{where}: the longest prompt and its response do not fit the model; found: {kept} tokens + "
            f"rollout.sampling.max_new_tokens {new} = {kept + new}; expected: at most {positions}; lower max_new_tokens or "
            f"rollout.max_prompt_length"
        )
    cut = f", {num_cut:,} cut to rollout.max_prompt_length" if num_cut else ""
    return f"{len(dataset):,} prompts of up to {longest} tokens{cut}"


def describe_ppo(run: PpoRun, data: dict[str, str]) -> str:
    """The table of what will run where, and how large a step is, in words."""
    learner, stage = run.learner, zero_stage(run.learner.deepspeed)
    workers = learner.max_workers
    how = f"DeepSpeed ZeRO-{stage}" if stage else "one process" if workers == 1 else "data parallel"
    where = run.cluster.address or ("the Ray job's cluster" if joins_cluster(run) else "a local Ray on this machine")
    sources = [f"{source.weight:g} x {source.name}" for source in run.reward.sources]
    ppo, tuning = run.ppo, "full fine-tuning" if run.lora is None else f"LoRA r={run.lora.get('r', 8)}"
    kl = f"KL coefficient {ppo.kl.coef:g}" + (f", target {ppo.kl.target:g}" if ppo.kl.target else "")
    lines = [
        f"model    {run.model.path}, {tuning}",
        f"data     {data['data.train']}" + (f"; evaluation: {data['data.eval']}" if "data.eval" in data else ""),
        f"reward   {' + '.join(sources)}",
        f"learner  {workers} x {amounts(learner.resources)}, {how}, on {where}",
        f"rollout  {run.rollout.actors} x {amounts(run.rollout.resources)}, {engine_words(run.asked)}",
        f"scoring  {run.reward.actors} x {amounts(run.reward.resources)}",
        f"step     {ppo.batch_size} responses, {ppo.epochs} epochs of {ppo.minibatches} minibatches; {ppo.steps} steps; {kl}",
    ]
    return "\n".join(lines)
