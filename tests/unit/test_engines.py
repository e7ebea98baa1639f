"""Which rollout engine a run file takes, and what is refused of vLLM, read from its source without importing it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from raytrl.config.load import load_run
from raytrl.config.runs.ppo import PpoRun
from raytrl.config.sections import engines
from raytrl.config.sections.engines import engine_words
from raytrl.errors import ConfigError
from tests.ppo_files import ppo_file


def ppo_run(folder: Path, *overrides: str, head_size: int = 64) -> PpoRun:
    (folder / "policy").mkdir(exist_ok=True)
    shape = {"hidden_size": 2 * head_size, "num_attention_heads": 2}
    (folder / "policy/config.json").write_text(json.dumps(shape))
    file = ppo_file(folder, "run", rollout={"engine": "auto"})
    run = load_run(file, list(overrides), "ppo").run
    assert isinstance(run, PpoRun)
    return run


def test_auto_is_vllm_where_it_runs_the_model(tmp_path: Path) -> None:
    run = ppo_run(tmp_path)
    assert run.rollout.engine == "vllm"
    assert engine_words(run.asked) == "vllm"


def test_auto_says_why_it_is_not_vllm(tmp_path: Path) -> None:
    run = ppo_run(tmp_path, head_size=16)
    assert run.rollout.engine == "transformers"
    assert engine_words(run.asked).startswith("transformers (not vllm: its attention on CPUs has no heads of that size")
    assert ppo_run(tmp_path, "rollout.resources={GPU: 1}", head_size=16).rollout.engine == "vllm"
    assert ppo_run(tmp_path, "lora={use_dora: true}").rollout.engine == "transformers"


@pytest.mark.parametrize("is_here", [True, False])
def test_another_cluster_has_the_engine_that_its_gpus_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_here: bool
) -> None:
    """Whatever is installed on the laptop that plans for it; run files for this machine go by what is here."""
    ppo_run(tmp_path)
    monkeypatch.setattr(engines, "vllm_is_installed", lambda: is_here)

    def there(*overrides: str) -> PpoRun:
        run = load_run(str(tmp_path / "run.yaml"), list(overrides), elsewhere=True).run
        assert isinstance(run, PpoRun)
        return run

    gpu = "rollout.resources={GPU: 1}"
    assert there(gpu).rollout.engine == "vllm"
    assert there(gpu).assumed() == [
        "rollout.engine: vllm, which raytrl's image for GPUs has; for a cluster without it plan with "
        "rollout.engine=transformers"
    ]
    assert there().rollout.engine == "transformers"
    assert there("rollout.engine=vllm", "rollout.engine_args={max_model_len: 64}").rollout.engine == "vllm"
    assert there("rollout.engine=transformers", gpu).rollout.engine == "transformers"
    assert there(gpu, "lora={use_dora: true}").rollout.engine == "transformers"
    with pytest.raises(ConfigError, match=r"rollout.engine_args.dtype: is set by model.dtype"):
        there("rollout.engine=vllm", "rollout.engine_args={dtype: half}")
    here = load_run(str(tmp_path / "run.yaml"), [gpu]).run
    assert isinstance(here, PpoRun)
    assert here.rollout.engine == ("vllm" if is_here else "transformers")
    assert here.assumed() == []


def test_a_build_for_gpus_is_not_taken_where_none_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would compute on the node's first GPU, which the learner has."""
    monkeypatch.setattr(engines.importlib.metadata, "version", lambda name: {"vllm": "0.33.0"}[name])
    run = ppo_run(tmp_path)
    assert run.rollout.engine == "transformers"
    assert "this build computes on GPUs alone" in engine_words(run.asked)
    assert ppo_run(tmp_path, "rollout.resources={GPU: 1}").rollout.engine == "vllm"
    with pytest.raises(
        ConfigError, match=r"vllm cannot be taken: this build computes on GPUs alone.*found: vllm 0\.33\.0"
    ):
        ppo_run(tmp_path, "rollout.engine=vllm")
    monkeypatch.setattr(engines.importlib.metadata, "version", lambda name: {"vllm": "0.33.0+cpu"}[name])
    assert ppo_run(tmp_path).rollout.engine == "vllm"


@pytest.mark.parametrize(("device", "context"), [("cuda", "LLM_CLASS"), ("cpu", "ENGINE_CONTEXT")])
def test_vllm_has_the_batch_of_its_own_llm_class_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, context: str
) -> None:
    """For another context vLLM's defaults are 128 sequences and 2,048 tokens."""
    vllm = pytest.importorskip("vllm")
    from raytrl.roles.rollout.vllm.engine import _maker

    asked: list[str] = []
    monkeypatch.setattr(vllm, "EngineArgs", lambda **arguments: arguments)
    make = SimpleNamespace(from_engine_args=lambda arguments, usage_context: asked.append(usage_context.name))
    monkeypatch.setattr(vllm, "LLMEngine", make)
    _maker({}, device)()
    assert asked == [context]


def test_a_chosen_engine_stays(tmp_path: Path) -> None:
    assert ppo_run(tmp_path, "rollout.engine=transformers").rollout.engine == "transformers"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora={use_dora: true}"], "rollout.engine: vllm cannot be taken: lora.use_dora"),
        (
            ["rollout.engine_args={max_model_length: 9}"],
            "max_model_length: unknown key; nearest known key: max_model_len",
        ),
        (["rollout.engine_args={max_model_len: many}"], "valid integer.*expected: int"),
        (["rollout.engine_args={dtype: half}"], "rollout.engine_args.dtype: is set by model.dtype"),
        (["rollout.engine_args={tensor_parallel_size: 2}"], "an engine on CPUs is one process"),
        (
            ["rollout.engine_args={tensor_parallel_size: 4}", "rollout.resources={GPU: 2}"],
            "as many GPUs as its actor has; found: 2 and .* of 4 in all",
        ),
        (["rollout.engine_args={enforce_eager: false}"], "engine_args.enforce_eager: .* may keep old weights"),
        (["lora={bias: all}"], "lora.bias: does nothing for ppo; found: 'all'"),
        (["lora={modules_to_save: [lm_head]}"], "lora.modules_to_save: does nothing for ppo"),
        (["lora={lora_dropout: 0.1}"], "lora.lora_dropout: does nothing for ppo"),
        (["rollout.resources={GPU: 1.5}"], "a whole number, or a part of one GPU"),
    ],
)
def test_what_vllm_cannot_do_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ppo_run(tmp_path, "rollout.engine=vllm", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.engine=transformers", "rollout.resources={GPU: 2}"], "rollout.resources.GPU: a transformers engine"),
        (["learner.resources={GPU: 2}"], "learner.*resources.GPU: a worker computes on one GPU; found: 2"),
        (
            ["learner.resources={GPU: 0.5}", "learner.workers=2"],
            "NCCL takes no two workers on one GPU; found: 0.5 for 2",
        ),
        (
            ["reward.sources=[{name: a, model: m}]", "reward.resources={GPU: 2}"],
            "reward.*resources.GPU: a reward model computes on one GPU; found: 2",
        ),
    ],
)
def test_gpus_that_nothing_would_use_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ppo_run(tmp_path, *overrides)


def test_a_part_of_a_gpu_for_one_and_several_for_a_function_are_taken(tmp_path: Path) -> None:
    ppo_run(tmp_path, "rollout.engine=transformers", "learner.resources={GPU: 0.5}", "learner.workers=1")
    ppo_run(tmp_path, "rollout.engine=transformers", "reward.resources={GPU: 2}")  # its judge may


def test_engine_arguments_that_fit(tmp_path: Path) -> None:
    run = ppo_run(
        tmp_path,
        "rollout.resources={GPU: 4}",
        "rollout.engine_args={tensor_parallel_size: 2, pipeline_parallel_size: 2}",
    )
    assert run.rollout.engine == "vllm"
