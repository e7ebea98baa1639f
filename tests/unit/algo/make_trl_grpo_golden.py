# mypy: ignore-errors
"""Writes trl_grpo_golden.json: what TRL 1.16's own GRPO and RLOO code computes on small fixed tensors.

The code under test is TRL's: `GRPOTrainer._compute_loss`, `RLOOTrainer._compute_loss` and the advantage lines inside
`_generate_and_score_completions` run unchanged. Only what needs a model is replaced: the trainer is made without
`__init__`, generation and rewards return fixed values, and the log-probs function returns fixed (float64) tensors.

In an environment with `torch==2.13.0 trl==1.16`:  OMP_NUM_THREADS=1 python make_trl_grpo_golden.py
"""

import json
import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)  # TRL makes tensors of lists; so that they too are exact

import trl  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.rloo_trainer import RLOOTrainer  # noqa: E402

D = torch.float64


class Accelerator:
    device = torch.device("cpu")
    num_processes = 1
    process_index = 0
    sync_gradients = True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction="sum"):
        return x

    def pad_across_processes(self, x, dim=0, pad_index=0):
        return x

    def unwrap_model(self, model):
        return model


def bare(kind, **more):
    t = object.__new__(kind)
    t.accelerator = Accelerator()
    t.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    t.args = SimpleNamespace(
        delta=None,
        use_bias_correction_kl=True,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        sapo_temperature_neg=1.05,
        sapo_temperature_pos=1.0,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        gradient_checkpointing_kwargs=None,
    )
    t._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    t._logs = {
        "prompt": [],
        "completion": [],
        "rewards": defaultdict(list),
        "advantages": [],
        "extra": defaultdict(list),
        "images": [],
    }
    t._pending_extra_logs, t._pending_metrics = defaultdict(list), defaultdict(list)
    t.beta, t.epsilon_low, t.epsilon_high = 0.0, 0.2, 0.2
    t.loss_type, t.importance_sampling_level = "dapo", "token"
    t.scale_rewards, t.multi_objective_aggregation = "group", "sum_then_normalize"
    t.top_entropy_quantile, t.off_policy_mask_threshold = 1.0, None
    t.use_vllm, t.vllm_importance_sampling_correction = False, False
    t.vllm_importance_sampling_mode = "sequence_mask"
    t.vllm_importance_sampling_clip_min, t.vllm_importance_sampling_clip_max = None, 3.0
    t.max_completion_length, t.current_gradient_accumulation_steps = 8, 1
    t.aux_loss_enabled, t._entropy_bonus_enabled, t.use_adaptive_entropy = False, False, False
    t.num_iterations, t.mask_truncated_completions = 1, False
    t.environment_factories, t.environments, t.tools = None, [], []
    t.pad_to_multiple_of, t.ref_model, t.log_multimodal = None, object(), False
    t.eos_token_ids, t._tokenizer = [1], SimpleNamespace(pad_token_id=0)
    t.processing_class, t.chat_template_kwargs, t._is_vlm = None, {}, False
    t.num_generations_eval, t.normalize_advantages, t.reward_clip_range = 1, False, None
    for name, value in more.items():
        if name.startswith("args_"):
            setattr(t.args, name[5:], value)
        else:
            setattr(t, name, value)
    return t


# ---------------------------------------------------------------- inputs of the losses: B=4, T=5
LENGTHS = [5, 3, 4, 2]
OLD = [[-1.2, -0.7, -2.1, -0.4, -1.5], [-0.9, -1.1, -0.3], [-2.0, -0.6, -0.8, -1.4], [-0.5, -1.7]]
LOG_RATIO = [[0.05, -0.30, 0.25, 0.00, 0.10], [0.40, -0.10, -0.35], [-0.05, 0.15, -0.20, 0.30], [0.60, -0.45]]
REF_MINUS_OLD = [[-0.2, 0.1, 0.3, -0.4, 0.0], [0.2, -0.1, 0.05], [0.1, -0.3, 0.2, 0.0], [-0.15, 0.25]]
OLD_MINUS_SAMPLING = [[0.02, -0.03, 0.9, 0.0, -0.01], [1.3, 0.01, -0.02], [0.0, -0.8, 0.05, 0.01], [-0.1, 0.04]]
ENTROPY = [[0.5, 1.0, 1.5, 0.25, 0.75], [1.0, 0.5, 0.1], [2.0, 0.3, 0.6, 0.9], [0.4, 1.2]]
ADVANTAGES = [0.9, -0.6, -1.1, 0.8]
TOOL_MASK = [[1, 0, 0, 1, 1], [1, 1, 1], [1, 1, 0, 1], [1, 1]]
PAD_OLD, PAD_NEW = -3.0, -1.0  # finite rubbish on the padding: no result may depend on it


def padded(rows, value):
    return torch.tensor([[*row, *[value] * (5 - len(row))] for row in rows], dtype=D)


def loss_inputs():
    old = padded(OLD, PAD_OLD)
    new = padded([[o + r for o, r in zip(a, b, strict=False)] for a, b in zip(OLD, LOG_RATIO, strict=False)], PAD_NEW)
    ref = padded([[o + r for o, r in zip(a, b, strict=False)] for a, b in zip(OLD, REF_MINUS_OLD, strict=False)], -2.0)
    sampling = padded(
        [[o - r for o, r in zip(a, b, strict=False)] for a, b in zip(OLD, OLD_MINUS_SAMPLING, strict=False)], 0.0
    )
    mask = torch.tensor([[1] * n + [0] * (5 - n) for n in LENGTHS])
    return {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.zeros(4, 5, dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGES, dtype=D),
        "num_items_in_batch": mask.sum().to(D),
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "sampling_per_token_logps": sampling,
    }, new


def is_ratio(mode, low, high):
    """TRL computes this at generation; here through TRL's own lines, see `generated`."""
    return generated("importance", mode=mode, low=low, high=high)["importance_sampling_ratio"]


def grpo_loss(drop=(), inputs_more=None, **settings):
    inputs, new = loss_inputs()
    for name in drop:
        inputs.pop(name)
    inputs.update(inputs_more or {})
    new = new.clone().requires_grad_(True)
    t = bare(GRPOTrainer, **settings)
    t._get_per_token_logps_and_entropies = lambda *a, **k: (new, padded(ENTROPY, 0.0), None)
    loss = t._compute_loss(t.model, inputs)
    loss.backward()
    metrics = {k: v[-1] for k, v in t._metrics["train"].items()}
    return {"loss": loss.item(), "gradient": new.grad.tolist(), "metrics": metrics}


def rloo_loss():
    inputs, new = loss_inputs()
    inputs["old_logps"] = (inputs.pop("old_per_token_logps") * inputs["completion_mask"]).sum(1)
    new = new.clone().requires_grad_(True)
    t = bare(RLOOTrainer)
    t._get_per_token_logps_and_entropies = lambda *a, **k: (new, padded(ENTROPY, 0.0), None)
    loss = t._compute_loss(t.model, inputs)
    loss.backward()
    return {
        "loss": loss.item(),
        "gradient": new.grad.tolist(),
        "metrics": {k: v[-1] for k, v in t._metrics["train"].items()},
    }


# ---------------------------------------------------------------- advantages
def generated(kind, rewards=None, weights=None, num_generations=4, mode=None, low=None, high=None, **settings):
    """Run `_generate_and_score_completions` with fixed completions; returns its output and metrics."""
    nan = float("nan")
    if kind == "importance":
        rewards, weights, num_generations = [[0.0]] * 4, [1.0], 4
        lengths = LENGTHS
    else:
        lengths = [1 + i % 3 for i in range(len(rewards))]
    n = len(rewards)
    values = torch.tensor([[nan if x is None else x for x in row] for row in rewards], dtype=D)
    trainer = RLOOTrainer if kind == "rloo" else GRPOTrainer
    t = bare(
        trainer,
        num_generations=num_generations,
        reward_weights=torch.tensor(weights, dtype=D),
        reward_func_names=[f"f{i}" for i in range(len(weights))],
        reward_funcs=[None] * len(weights),
        **settings,
    )
    ids = [[2] * (length - 1) + [1] for length in lengths]
    completions = ["x"] * n
    t._calculate_rewards = lambda *a: values.clone()
    width = max(lengths)
    if kind == "rloo":
        t._generate = lambda prompts: ([[5]] * n, ids, completions)
        policy = torch.tensor([[-0.5 - 0.1 * i - 0.05 * j for j in range(width)] for i in range(n)], dtype=D)
        reference = policy - torch.tensor(
            [[0.1 * ((i + j) % 3) - 0.05 for j in range(width)] for i in range(n)], dtype=D
        )
        calls = iter([policy, reference])
        t._get_per_token_logps_and_entropies = lambda *a, **k: (next(calls), None, None)
    else:
        sampling = None
        if kind == "importance":
            t.use_vllm = t.vllm_importance_sampling_correction = True
            t.vllm_importance_sampling_mode = mode
            t.vllm_importance_sampling_clip_min, t.vllm_importance_sampling_clip_max = low, high
            # float64 in, although TRL makes float32 of lists: `pad` keeps the dtype of what it is given
            sampling = [
                [o - r for o, r in zip(a, b, strict=False)] for a, b in zip(OLD, OLD_MINUS_SAMPLING, strict=False)
            ]
            t._get_per_token_logps_and_entropies = lambda *a, **k: (padded(OLD, PAD_OLD), None, None)
        t._generate = lambda prompts: ([[5]] * n, ids, None, completions, sampling, {}, None, [])
    inputs = [{"prompt": f"p{i // num_generations}"} for i in range(n)]
    out = t._generate_and_score_completions(inputs)
    out["metrics"] = {k: v[-1] for k, v in t._metrics["train"].items()}
    return out


def advantages(kind="grpo", **more):
    out = generated(kind, **more)
    keys = ("reward", "reward_std", "frac_reward_zero_std", "kl")
    return {
        "advantages": out["advantages"].tolist(),
        "metrics": {k: out["metrics"][k] for k in keys if k in out["metrics"]},
    }


def async_advantages(rewards):
    """The two lines of the experimental async worker (`async_rollout_worker.py` 1062-1065), which are not a function."""
    import numpy as np

    rewards = np.array([float("nan") if r is None else r for r in rewards])
    scored_mask = ~np.isnan(rewards)
    result = np.zeros_like(rewards)
    scored = rewards[scored_mask]
    if scored.size:
        result[scored_mask] = (scored - scored.mean()) / (scored.std() + 1e-8)
    return result.tolist()


def main():
    golden = {"trl": trl.__version__, "torch": torch.__version__}
    L = golden["losses"] = {}
    for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo", "vespo"):
        L[kind] = grpo_loss(loss_type=kind)
    L["dapo, steps_per_generation 2, 36 tokens in the generation batch"] = grpo_loss(
        loss_type="dapo", args_steps_per_generation=2, inputs_more={"num_items_in_batch": torch.tensor(36.0, dtype=D)}
    )
    L["dapo, epsilon_high 0.28"] = grpo_loss(loss_type="dapo", epsilon_high=0.28)
    L["dapo, delta 1.5"] = grpo_loss(loss_type="dapo", args_delta=1.5)
    L["dapo, delta 1.3"] = grpo_loss(loss_type="dapo", args_delta=1.3)
    L["dapo, no old log-probs"] = grpo_loss(loss_type="dapo", drop=("old_per_token_logps",))
    L["cispo, epsilon_high default"] = grpo_loss(loss_type="cispo")
    L["cispo, epsilon_high 5"] = grpo_loss(loss_type="cispo", epsilon_high=5.0)
    L["cispo, epsilon_high 1.2"] = grpo_loss(loss_type="cispo", epsilon_high=1.2)
    for kind in ("grpo", "dapo", "luspo"):
        L[f"{kind}, sequence"] = grpo_loss(loss_type=kind, importance_sampling_level="sequence")
    L["grpo, sequence, 3e-4 4e-4"] = grpo_loss(
        loss_type="grpo", importance_sampling_level="sequence", epsilon_low=3e-4, epsilon_high=4e-4
    )
    L["dapo, beta 0.1"] = grpo_loss(loss_type="dapo", beta=0.1)
    L["dapo, beta 0.1, no bias correction"] = grpo_loss(loss_type="dapo", beta=0.1, args_use_bias_correction_kl=False)
    L["grpo, beta 0.1"] = grpo_loss(loss_type="grpo", beta=0.1)
    L["grpo, beta 0.1, sequence"] = grpo_loss(loss_type="grpo", beta=0.1, importance_sampling_level="sequence")
    L["dapo, tool mask"] = grpo_loss(
        loss_type="dapo",
        inputs_more={"tool_mask": padded(TOOL_MASK, 1).long(), "num_items_in_batch": torch.tensor(11.0, dtype=D)},
    )
    L["grpo, tool mask"] = grpo_loss(loss_type="grpo", inputs_more={"tool_mask": padded(TOOL_MASK, 1).long()})
    L["dapo, off_policy_mask_threshold 0.05"] = grpo_loss(loss_type="dapo", off_policy_mask_threshold=0.05)
    golden["importance"] = {}
    for mode, low, high in (
        ("token_truncate", None, 2.0),
        ("token_mask", None, 2.0),
        ("sequence_truncate", None, 2.0),
        ("sequence_mask", None, 2.0),
        ("token_mask", 0.5, 2.0),
        ("token_truncate", 0.5, 2.0),
        ("sequence_mask", None, 3.0),
    ):
        name = f"{mode}, {low}, {high}"
        ratio = is_ratio(mode, low, high)
        golden["importance"][name] = ratio.tolist()
        L[f"dapo, {name}"] = grpo_loss(
            loss_type="dapo",
            use_vllm=True,
            vllm_importance_sampling_correction=True,
            inputs_more={"importance_sampling_ratio": ratio.to(D)},
        )
    L["dapo, token_truncate, None, 2.0, beta 0.1"] = grpo_loss(
        loss_type="dapo",
        beta=0.1,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        inputs_more={"importance_sampling_ratio": is_ratio("token_truncate", None, 2.0).to(D)},
    )
    golden["rloo loss"] = rloo_loss()

    A = golden["advantages"] = {}
    one = [[1.0], [0.0], [0.0], [0.5], [0.2], [0.2], [0.2], [0.2]]
    none = [[1.0], [0.0], [None], [0.5], [None], [None], [0.2], [None]]
    two = [[1.0, 0.0], [0.0, 4.0], [0.0, 1.0], [0.5, 3.0], [1.0, 2.0], [0.0, 2.0], [1.0, 2.0], [1.0, 2.0]]
    noise = [[0.3], [0.1 + 0.2], [0.3], [0.3]]
    for scale in ("group", "batch", "none"):
        A[f"one, {scale}"] = advantages(rewards=one, weights=[1.0], scale_rewards=scale)
        A[f"one with None, {scale}"] = advantages(rewards=none, weights=[1.0], scale_rewards=scale)
        A[f"two functions, weights 1 and 0.5, {scale}"] = advantages(
            rewards=two, weights=[1.0, 0.5], scale_rewards=scale
        )
    A["two functions, weights 1 and 0.5, normalize_then_sum"] = advantages(
        rewards=two, weights=[1.0, 0.5], multi_objective_aggregation="normalize_then_sum"
    )
    A["rounding noise, group"] = advantages(rewards=noise, weights=[1.0])
    A["pairs, group"] = advantages(rewards=[[1.0], [0.0], [3.0], [2.9]], weights=[1.0], num_generations=2)
    R = golden["rloo advantages"] = {}
    R["one"] = advantages("rloo", rewards=one, weights=[1.0])
    R["one with None"] = advantages("rloo", rewards=none, weights=[1.0])
    R["one, beta 0.1"] = advantages("rloo", rewards=one, weights=[1.0], beta=0.1)
    R["one, beta 0.1, clip -0.4 0.4"] = advantages(
        "rloo", rewards=one, weights=[1.0], beta=0.1, reward_clip_range=(-0.4, 0.4)
    )
    R["one, normalize_advantages"] = advantages("rloo", rewards=one, weights=[1.0], normalize_advantages=True)
    R["pairs"] = advantages("rloo", rewards=[[1.0], [0.0], [3.0], [2.9]], weights=[1.0], num_generations=2)
    golden["async advantages"] = {
        "first group of one": async_advantages([1.0, 0.0, 0.0, 0.5]),
        "zero variance": async_advantages([0.2] * 4),
        "rounding noise": async_advantages([0.3, 0.1 + 0.2, 0.3, 0.3]),
        "with None": async_advantages([1.0, 0.0, None, 0.5]),
    }
    golden["inputs"] = {
        "lengths": LENGTHS,
        "old": OLD,
        "log_ratio": LOG_RATIO,
        "ref_minus_old": REF_MINUS_OLD,
        "old_minus_sampling": OLD_MINUS_SAMPLING,
        "advantages": ADVANTAGES,
        "tool_mask": TOOL_MASK,
        "entropy": ENTROPY,
        "max_completion_length": 8,
        "rewards": {"one": one, "one with None": none, "two functions": two, "rounding noise": noise},
    }
    path = Path(__file__).with_name("trl_grpo_golden.json")
    path.write_text(json.dumps(golden, indent=1, default=str))
    print(path)


if __name__ == "__main__":
    main()
