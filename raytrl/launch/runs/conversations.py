"""What a rollout engine needs to make conversations of prompts."""

from typing import TYPE_CHECKING

from raytrl.config.runs.rollout import RolloutRun

if TYPE_CHECKING:
    from raytrl.roles.environment.tools import Tools
    from raytrl.roles.rollout.engine import SamplingEngine


def tools_of(run: RolloutRun) -> "Tools | None":
    """The tools and environments of a run, in processes of their own; None where it has none."""
    if not run.rollout.converses:
        return None
    from raytrl.roles.environment.tools import Tools

    return Tools(run.rollout, run.functions_by_source())


def let_converse(engine: "SamplingEngine", run: RolloutRun, tokenizer_path: str, tools: "Tools | None") -> None:
    """Give an engine the tools, where there are any.

    Raises:
        ConfigError: the tokenizer's template cannot carry them.
    """
    if tools is None:
        return
    from raytrl.roles.models.chat import Chat
    from raytrl.roles.models.tokenizer import load_tokenizer
    from raytrl.roles.rollout.episodes import Episodes

    tokenizer = load_tokenizer(tokenizer_path, None, run.model.trust_remote_code)
    chat = Chat(tokenizer, engine.turn_end_ids, run.rollout.max_result_tokens)
    engine.conversations = Episodes(tools, chat, run.rollout, run.seed)
