"""What is told of a step's conversations with tools, beside what is told of every response."""

from collections.abc import Mapping, Sequence

import torch

from raytrl.records.metrics import FAILED, TOLD
from raytrl.records.samples import Response
from raytrl.roles.learner.collectives import sum_over_workers


def metrics_of_conversations(responses: Sequence[Response], device: torch.device) -> Mapping[str, float]:
    """Means over the conversations of all workers that did not fail; none where there are no conversations. Collective."""
    episodes = [(response, response.episode) for response in responses if response.episode is not None]
    if not episodes:
        return {}
    sound = [(response, episode) for response, episode in episodes if episode.end != "failed"]
    sums = {
        "sound": len(sound),
        "conversations/turns": sum(len(episode.sampled) for _, episode in sound),
        TOLD: sum(len(response.token_ids) - response.num_sampled for response, _ in sound),
        "conversations/no_room": sum(episode.end == "budget" for _, episode in sound),
        "conversations/turns_used_up": sum(episode.end == "turns" for _, episode in sound),
        "conversations/special_tokens": sum(episode.split_tokens for _, episode in sound),
        FAILED: len(episodes) - len(sound),
        "conversations/timed_out": sum(episode.timed_out for _, episode in episodes),
        "tools/call_frequency": sum(episode.calls for _, episode in sound),
        "tools/failure_frequency": sum(episode.failed_calls for _, episode in sound),
    }
    values = sum_over_workers(torch.tensor(list(sums.values()), dtype=torch.float64, device=device)).tolist()
    found = dict(zip(sums, values, strict=True))
    count, calls = max(1.0, found.pop("sound")), found["tools/call_frequency"]
    counted = ("conversations/special_tokens", FAILED, "conversations/timed_out")
    means = {key: value if key in counted else value / count for key, value in found.items()}
    return {**means, "tools/failure_frequency": found["tools/failure_frequency"] / calls if calls else 0.0}
