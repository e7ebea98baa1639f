"""What is logged: each metric's key in metrics.jsonl, its unit and its meaning, once. Whoever shows one reads it here.

Keys and definitions of PPO follow TRL's and lm-human-preferences', those of the other kinds are TRL's own. What a trainer of
TRL logs besides is passed on as it is.
"""

from dataclasses import dataclass

# Of a PPO step, in their order; `eval` only where an evaluation was due, `idle` is what no phase accounts for.
PHASES = ("generate", "score", "experience", "update", "sync")
DRAIN = "drain"  # only with a lag
ALL_PHASES = (*PHASES, DRAIN, "eval", "idle")

STEP_S = "time/step_s"
LOSS, EVAL_LOSS, EVAL_ACCURACY = "loss", "eval_loss", "eval_accuracy"
SCORE, EVAL_SCORE, KL, LENGTH = "objective/scores_raw", "eval/score", "objective/kl", "response/length"
ENTROPY, CLIPPED, DROPPED = "policy/entropy_avg", "policy/clipfrac_avg", "objective/dropped"
ESS, SAMPLING_KL, REDONE = "importance/ess", "rollout/kl_to_sampler", "rollout/redone_newer"
FAILED, TOLD = "conversations/failed", "conversations/tool_tokens"
GAP, NUM_TOKENS, EQUAL = "rollout/logprob_gap_mean", "num_tokens", "groups/equal_fraction"


@dataclass(frozen=True)
class Metric:
    """`unit` is empty for a share, a ratio or a number of things."""

    key: str
    unit: str
    meaning: str


def time_of(phase: str) -> str:
    """The key of a phase's seconds."""
    return f"time/{phase}_s"


_PPO = (
    Metric(SCORE, "", "mean weighted sum of the reward sources, before any penalty, scaling or clip"),
    Metric("objective/scores_raw_std", "", "its standard deviation over the batch"),
    Metric(
        "objective/scores", "", "mean score as the advantages see it: scaled, clipped, less the missing-end penalty"
    ),
    Metric(DROPPED, "", "responses whose score failed and was dropped"),
    Metric(KL, "nats a response", "KL to the reference, estimated by k1: the sum of log-ratios"),
    Metric("objective/kl_k3", "nats a response", "the same, estimated by k3: never negative, of less variance"),
    Metric("objective/kl_coef", "", "coefficient of the KL penalty"),
    Metric("objective/entropy", "nats a response", "sum of the response's negative log-probs"),
    Metric("objective/non_score_reward", "", "mean KL penalty of a response"),
    Metric("objective/rlhf_reward", "", "mean score with the KL penalty"),
    Metric(
        "groups/kept",
        "",
        "sampled prompts whose responses differ in score: what a comparison within groups can learn from",
    ),
    Metric(EQUAL, "", "share of prompts whose responses all have one score: they teach nothing"),
    Metric("groups/score_std", "", "standard deviation of the scores of a prompt's responses, mean over prompts"),
    Metric("frac_reward_zero_std", "", "groups/equal_fraction, by TRL's name"),
    Metric("reward", "", "objective/scores_raw, by TRL's name"),
    Metric("completions/mean_length", "tokens", "response/length, by TRL's name"),
    Metric("completions/clipped_ratio", "", "share of responses that did not end by themselves, by TRL's name"),
    Metric("response/length", "tokens", "mean length of a response, the end token included"),
    Metric("response/ended_fraction", "", "share of responses that ended by themselves"),
    Metric("val/num_eos_tokens", "", "responses that ended by themselves"),
    Metric("val/explained_variance", "", "share of the returns' variance that the values explain"),
    Metric("conversations/turns", "", "mean number of turns that the policy takes in a conversation"),
    Metric(TOLD, "tokens", "mean length of what tools say in a conversation: attended, and nothing else"),
    Metric("conversations/no_room", "", "share of conversations in which there was no room for what a tool said"),
    Metric("conversations/turns_used_up", "", "share of conversations that end with a call beyond rollout.max_turns"),
    Metric("conversations/special_tokens", "", "special tokens in what tools said, which were taken apart"),
    Metric(FAILED, "", "conversations that were lost and left out, as a tool hung, its process ended or reset raised"),
    Metric("conversations/timed_out", "", "those of them that a clock ended, so that they may not repeat"),
    Metric("tools/call_frequency", "", "mean number of calls in a conversation, by TRL's name"),
    Metric("tools/failure_frequency", "", "share of calls that were answered with an error, by TRL's name"),
    Metric("rollout/logprob_gap_max", "nats a token", "largest difference of an engine's log-prob from the learner's"),
    Metric(GAP, "nats a token", "mean difference of the engines' log-probs from the learner's"),
    Metric("rollout/logprobs_missing", "", "tokens for which an engine gave no log-prob: they are not corrected"),
    Metric("rollout/actors", "", "rollout actors that serve"),
    Metric(
        "rollout/lag_mean", "updates", "how old the weights were that made the responses: ppo.max_lag after the start"
    ),
    Metric("rollout/lag_max", "updates", "those of the oldest response"),
    Metric(REDONE, "", "responses made by newer weights than planned, as nobody had those any more"),
    Metric(SAMPLING_KL, "nats a response", "KL from what responses were sampled from to the learner's policy (k3)"),
    Metric(
        ESS, "", "effective sample size of the batch, if responses were weighted by their whole ratio: 1 is all of it"
    ),
    Metric("importance/mean", "", "mean weight of a token"),
    Metric("importance/capped_fraction", "", "share of tokens whose weight was cut or masked"),
    Metric("loss/policy_avg", "", "policy loss, mean over optimizer steps"),
    Metric("loss/kl_avg", "", "KL penalty where it is part of the loss, mean over optimizer steps"),
    Metric("loss/value_avg", "", "value loss, mean over optimizer steps"),
    Metric("policy/approxkl_avg", "nats a token", "how far the update moved the policy: half the squared log-ratio"),
    Metric(CLIPPED, "", "share of tokens whose ratio was clipped"),
    Metric("val/clipfrac_avg", "", "share of tokens whose value was clipped"),
    Metric("val/ratio", "", "mean probability ratio of new to old policy"),
    Metric("val/ratio_var", "", "its variance"),
    Metric(
        "val/first_log_ratio", "nats a token", "largest log-ratio before the first optimizer step: 0 where all is well"
    ),
    Metric("val/grad_norm", "", "gradient norm before clipping, mean over optimizer steps"),
    Metric(ENTROPY, "nats a token", "entropy of the policy's distribution"),
    Metric("lr", "", "learning rate of the policy"),
    Metric("episode", "", "responses that were learned from so far"),
    Metric(EVAL_SCORE, "", "mean score of the responses to data.eval"),
    Metric("time/generate_s", "s", "waiting for responses"),
    Metric("time/score_s", "s", "waiting for scores, beyond generation"),
    Metric("time/experience_s", "s", "log-probs, values and advantages"),
    Metric("time/update_s", "s", "epochs of optimizer steps"),
    Metric("time/sync_s", "s", "new weights on their way to the rollout actors"),
    Metric("time/drain_s", "s", "waiting for what is sampled ahead, before a checkpoint or an evaluation"),
    Metric("time/eval_s", "s", "the evaluation after the step"),
    Metric("time/idle_s", "s", "what no phase accounts for"),
)
_SUPERVISED = (
    Metric(LOSS, "", "training loss"),
    Metric(EVAL_LOSS, "", "loss on data.eval"),
    Metric("grad_norm", "", "gradient norm before clipping"),
    Metric("learning_rate", "", "learning rate"),
    Metric("epoch", "", "passes over data.train so far"),
    Metric(NUM_TOKENS, "tokens", "learned from so far"),
    Metric("entropy", "nats a token", "entropy of the model's distribution"),
    Metric("mean_token_accuracy", "", "share of tokens that are the likeliest"),
    Metric("eval_mean_token_accuracy", "", "the same on data.eval"),
    Metric("accuracy", "", "share of pairs in which chosen scores higher"),
    Metric(EVAL_ACCURACY, "", "the same on data.eval"),
    Metric("eval_rewards/accuracies", "", "share of held-out pairs in which chosen has the larger implicit reward"),
    Metric("margin", "", "mean difference of the scores of chosen and rejected"),
    Metric("eval_margin", "", "the same on data.eval"),
    Metric("rewards/margins", "", "mean difference of the implicit rewards of chosen and rejected"),
    Metric("memory/peak_gib", "GiB", "the most that worker 0 has held so far: of its GPU, else of RAM"),
)
METRICS = {
    metric.key: metric
    for metric in (
        Metric("step", "", "steps done"),
        Metric(STEP_S, "s", "wall-clock time of the step"),
        *_PPO,
        *_SUPERVISED,
    )
}
