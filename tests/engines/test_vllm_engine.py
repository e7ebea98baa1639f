"""vLLM's real engine on this machine's CPU, held against transformers: the same weights, the same log-probs."""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from raytrl.algo.logprobs import token_logprobs
from raytrl.config.sections.rollout import RolloutSection
from raytrl.errors import NonFiniteError, StaleAttemptError, WeightsVersionError
from raytrl.records.samples import Prompt, Response
from raytrl.roles.models.adapters import add_policy_adapter, policy_parameters
from raytrl.roles.rollout.folder import FolderEngine
from raytrl.roles.rollout.vllm.engine import VllmEngine, _chosen_arguments
from raytrl.roles.rollout.vllm.places import Places
from raytrl.roles.weights.buckets import Bucket, Weights, weights_on_disk
from tests.ppo_files import make_policy

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
KINDS = ("llama", "gpt2", "llama-lora", "gpt2-lora")


def rollout(**sampling: Any) -> RolloutSection:
    return RolloutSection(engine="vllm", max_prompt_length=32, sampling={"max_new_tokens": 12} | sampling)


def some_prompts(rows: int, step: int = 0) -> list[Prompt]:
    draw = torch.Generator().manual_seed(step)
    lengths = [3 + row % 7 for row in range(rows)]
    ids = [tuple(torch.randint(4, 290, (length,), generator=draw).tolist()) for length in lengths]
    return [Prompt(step=step, row=row, text="", token_ids=ids[row]) for row in range(rows)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for family in ("llama", "gpt2"):
        folder = tmp_path_factory.mktemp(family)
        found[family] = make_policy(folder, family, head_size=32, spread=0.1)
    return found


class Case:
    """An engine, and the learner's model whose weights it is given."""

    def __init__(self, path: str, lora: bool, config: RolloutSection) -> None:
        self.sampling = config.sampling
        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.model = (add_policy_adapter(base, LORA) if lora else base).eval()
        self.engine = VllmEngine.from_pretrained(path, path, config, seed=7, lora=LORA if lora else None)
        self.load(0)

    bucket_bytes = 50_000  # so that fused layers are spread over several

    def weights(self, version: int) -> Weights:
        named = {name: value.clone() for name, value in policy_parameters(self.model).items()}
        return Weights.of(version, named.items(), torch.float32, bucket_bytes=self.bucket_bytes)

    def load(self, version: int) -> None:
        assert self.engine.load_weights(self.weights(version)) == self.weights(version).checksum

    def change(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in policy_parameters(self.model).values():
                parameter += 0.02 * torch.randn(parameter.shape, generator=draw)

    @torch.no_grad()
    def expected_logprobs(self, prompt: Prompt, response: Response) -> torch.Tensor:
        """Of an unpadded forward pass of transformers, in float64."""
        tokens = torch.tensor([[*prompt.token_ids, *response.token_ids]])
        logits = self.model.double()(input_ids=tokens).logits[:, len(prompt.token_ids) - 1 : -1]
        self.model.float()
        return token_logprobs(logits, torch.tensor([response.token_ids]), self.sampling.temperature)[0].float()

    def check(self, prompts: list[Prompt], responses: list[Response]) -> None:
        by_row = {prompt.row: prompt for prompt in prompts}
        for response in responses:
            expected = self.expected_logprobs(by_row[response.row], response)
            torch.testing.assert_close(torch.tensor(response.sampling_logprobs), expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def case(folders: dict[str, str]) -> Iterator[Callable[..., Case]]:
    made: dict[str, Case] = {}

    def of(kind: str, **sampling: Any) -> Case:
        key = f"{kind}{sampling}"
        if key not in made:
            made[key] = Case(folders[kind.removesuffix("-lora")], kind.endswith("lora"), rollout(**sampling))
        return made[key]

    yield of
    for one in made.values():
        one.engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_those_of_transformers_before_and_after_updates(case: Callable[..., Case], kind: str) -> None:
    one = case(kind, temperature=0.7)
    prompts, seen = some_prompts(6), []
    for version in range(3):
        if version:
            one.change(version)
            one.load(version)
        responses = one.engine.generate(prompts, version, samples=2)
        assert {r.policy_version for r in responses} == {version}
        one.check(prompts, responses)
        seen.append([r.token_ids for r in responses])
    assert seen[0] != seen[1] != seen[2]


def in_worker(one: Case, function: Callable[[Any], Any]) -> Any:
    """What the function returns for vLLM's worker, which holds the model."""
    (found,) = one.engine._batch.call(lambda engine: engine.collective_rpc(function))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_go_straight_to_their_places_are_those_of_vllms_own_way(
    case: Callable[..., Case], kind: str
) -> None:
    """Bit by bit, in every response."""
    one = case(kind, temperature=0.7)
    one.load(9)
    places = in_worker(one, lambda worker: worker._raytrl_places)
    assert isinstance(places, Places), places
    assert len(places.packed) == 8  # four linear layers in each of two blocks
    one.change(10)
    one.load(10)
    straight = one.engine.generate(some_prompts(6), 10, samples=2)
    kept = {name: value.detach().clone() for name, value in policy_parameters(one.model).items()}
    in_worker(one, lambda worker: setattr(worker, "_raytrl_places", "not for this test"))
    one.change(11)
    one.load(11)
    assert one.engine.generate(some_prompts(6), 11, samples=2) != straight
    with torch.no_grad():
        for name, value in policy_parameters(one.model).items():
            value.copy_(kept[name])
    one.load(10)
    assert one.engine.generate(some_prompts(6), 10, samples=2) == straight
    in_worker(one, lambda worker: setattr(worker, "_raytrl_places", None))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama-lora"])
def test_a_layer_that_computes_with_older_weights_is_found(
    case: Callable[..., Case], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a tied head did in vLLM 0.32. Nothing is served, and the next weights are right again."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    one = case(kind, temperature=0.7)
    one.load(12)
    stale: dict[int, Any] = {}
    heads = [UnquantizedEmbeddingMethod] if kind == "gpt2" else []  # its head is the one that is tied
    for method in [UnquantizedLinearMethod, *heads][-1:]:
        packs = method.process_weights_after_loading

        def packs_the_first_for_good(self: Any, layer: Any, packs: Any = packs) -> None:
            packs(self, layer)
            layer.cpu_linear = stale.setdefault(id(layer), layer.cpu_linear)

        monkeypatch.setattr(method, "process_weights_after_loading", packs_the_first_for_good)
    one.load(12)
    one.change(13)
    with pytest.raises(WeightsVersionError, match="computes with other weights than it was given"):
        one.load(13)
    with pytest.raises(WeightsVersionError, match="found version None"):
        one.engine.generate(some_prompts(1), 13)
    monkeypatch.undo()
    one.load(14)
    one.check(some_prompts(4), one.engine.generate(some_prompts(4), 14))


def test_logprobs_of_given_responses(case: Callable[..., Case]) -> None:
    one = case("llama")
    one.load(0)
    prompts = some_prompts(8)
    responses = one.engine.generate(prompts, 0, samples=2)
    found = torch.tensor(one.engine.logprobs(prompts, responses, 0))
    expected = torch.tensor([sum(r.sampling_logprobs) for r in responses])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_response_depends_on_its_seed_and_not_on_what_shares_the_batch(case: Callable[..., Case]) -> None:
    one = case("llama")
    one.load(0)
    prompts = some_prompts(16)
    whole = one.engine.generate(prompts, 0, samples=2)
    assert [(r.row, r.sample) for r in whole] == [(row, sample) for row in range(16) for sample in range(2)]
    assert one.engine.generate(prompts[::-1], 0, samples=2) == whole
    with ThreadPoolExecutor(16) as threads:
        single = [r for part in threads.map(lambda p: one.engine.generate([p], 0, samples=2), prompts) for r in part]
    assert [r.token_ids for r in single] == [r.token_ids for r in whole]
    assert [r.token_ids for r in one.engine.generate(some_prompts(3)[2:], 0)] == [whole[4].token_ids]
    same = [replace(prompt, token_ids=prompts[0].token_ids) for prompt in prompts]
    assert len({r.token_ids for r in one.engine.generate(same, 0, samples=2)}) == 32
    later = [replace(prompt, step=1) for prompt in prompts]
    assert not {r.token_ids for r in whole} & {r.token_ids for r in one.engine.generate(later, 0, samples=2)}


def test_how_responses_end(case: Callable[..., Case], folders: dict[str, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    one = case("llama", max_new_tokens=40, stop=["o", "the"])
    responses = one.engine.generate(some_prompts(32), 0)
    ends = {"end token": 0, "stop": 0, "cut": 0}
    for r in responses:
        assert "o" not in r.text and "the" not in r.text
        assert len(r.token_ids) == len(r.sampling_logprobs)
        if not r.ended:
            assert len(r.token_ids) == 40
            ends["cut"] += 1
        elif r.token_ids[-1] == tokenizer.eos_token_id:
            ends["end token"] += 1
        else:
            assert any(word in tokenizer.decode(r.token_ids) for word in ("o", "the"))
            assert not any(word in tokenizer.decode(r.token_ids[:-1]) for word in ("o", "the"))
            ends["stop"] += 1
        assert tokenizer.eos_token_id not in r.token_ids[:-1]
    assert ends["stop"] > 5, ends
    one.check(some_prompts(32), responses)


def test_greedy(case: Callable[..., Case]) -> None:
    one = case("llama", temperature=0.7)
    one.load(9)
    (prompt,) = some_prompts(1)
    (response,) = one.engine.generate([prompt], 9, greedy=True)
    with torch.no_grad():
        logits = one.model(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1]
    assert response.token_ids[0] == int(logits.argmax())


@pytest.mark.parametrize("kind", ["llama", "llama-lora"])
def test_weights_that_are_not_right_are_refused_and_nothing_is_served(case: Callable[..., Case], kind: str) -> None:
    one = case(kind, temperature=0.7)
    one.load(4)
    with pytest.raises(WeightsVersionError, match="version 5; found version 4"):
        one.engine.generate(some_prompts(1), 5)
    first = next(iter(one.weights(5).buckets))
    changed = {name: tensor.clone() for name, tensor in first.items()}
    next(iter(changed.values())).view(-1)[0] += 1
    one.engine.begin_weights(5)
    with pytest.raises(WeightsVersionError, match="version 5 are not what the learner sent; found checksum"):
        one.engine.take_bucket(Bucket(changed, Bucket.of(first).checksum))
    with pytest.raises(WeightsVersionError, match="found version None"):
        one.engine.generate(some_prompts(1), 4)
    part = Weights.of(6, list(policy_parameters(one.model).items())[:-1], torch.float32)
    with pytest.raises(WeightsVersionError, match=r"sent no weights for|other parameters"):
        one.engine.load_weights(part)
    one.load(7)
    assert one.engine.generate(some_prompts(1), 7)


def test_broken_weights_do_not_sample_nonsense(case: Callable[..., Case]) -> None:
    one = case("gpt2", max_new_tokens=4)  # an engine of its own: NaN stay in its cache, as in a run, which then ends
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in policy_parameters(one.model).items()}
    one.engine.load_weights(Weights.of(19, broken.items(), torch.float32))
    with pytest.raises(NonFiniteError):
        one.engine.generate(some_prompts(1), 19)


def test_a_log_prob_that_vllm_could_not_tell_is_not_told(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = case("llama")
    one.load(20)
    expected = one.engine.generate(some_prompts(2), 20)
    submit = one.engine._batch.submit

    def broken(*asked: Any) -> Any:
        """As of a kernel that fails at the first token of each response."""
        future: Future[Any] = Future()
        output = submit(*asked).result()
        for entry in output.outputs[0].logprobs[0].values():
            entry.logprob = -math.inf
        future.set_result(output)
        return future

    monkeypatch.setattr(one.engine._batch, "submit", broken)
    for response, whole in zip(one.engine.generate(some_prompts(2), 20), expected, strict=True):
        assert response.token_ids == whole.token_ids
        assert math.isnan(response.sampling_logprobs[0])
        assert response.sampling_logprobs[1:] == whole.sampling_logprobs[1:]


def test_what_is_not_wanted_any_more_is_not_sampled_to_its_end(case: Callable[..., Case]) -> None:
    one = case("llama")
    one.load(21)
    asked = itertools.count()
    with pytest.raises(StaleAttemptError):
        one.engine.generate(some_prompts(4), 21, samples=2, wanted=lambda: next(asked) < 4 * 8)  # 4 steps
    assert next(asked) < 6 * 8
    assert one.engine._batch.call(lambda engine: engine.has_unfinished_requests()) is False
    one.load(22)  # which a request under way would not let
    one.check(some_prompts(4), one.engine.generate(some_prompts(4), 22))


def test_an_evaluation_goes_from_model_to_model(folders: dict[str, str]) -> None:
    paths = [folders["llama"], folders["gpt2"]]
    engine = FolderEngine(paths, lambda v: VllmEngine.from_pretrained(paths[v], paths[v], rollout(), seed=7))
    prompts = some_prompts(3)
    for version, path in enumerate(paths):
        engine.load_weights(weights_on_disk(version, path))
        assert engine.concurrent
        responses = engine.generate(prompts, version)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for prompt, response in zip(prompts, responses, strict=True):
            tokens = torch.tensor([[*prompt.token_ids, *response.token_ids]])
            with torch.no_grad():
                logits = model(input_ids=tokens).logits[:, len(prompt.token_ids) - 1 : -1]
            expected = token_logprobs(logits, torch.tensor([response.token_ids]), 1.0)[0].float()
            torch.testing.assert_close(torch.tensor(response.sampling_logprobs), expected, atol=1e-5, rtol=0)
    engine.close()


def test_prompts_that_do_not_fit_into_one_step_wait_for_the_next(folders: dict[str, str]) -> None:
    """In parts they would set their generators back, which vLLM can do on a GPU only."""
    arguments = {"max_model_len": 48, "max_num_batched_tokens": 50, "max_num_seqs": 24}
    one = Case(folders["llama"], False, rollout().model_copy(update={"engine_args": arguments}))
    try:
        prompts = some_prompts(24)
        one.check(prompts, one.engine.generate(prompts, 0))
    finally:
        one.engine.close()


def test_a_batch_on_a_cpu_holds_the_longest_sequence_whoever_set_its_length() -> None:
    """vLLM refuses a smaller one where it may not split a prompt."""
    config = AutoConfig.for_model("llama", max_position_embeddings=8192)

    def batch(**arguments: Any) -> int:
        section = RolloutSection(engine="vllm", max_prompt_length=32, engine_args=arguments)
        return int((_chosen_arguments(section, config, torch.float32, "cpu") | arguments)["max_num_batched_tokens"])

    assert batch() == 2048
    assert batch(max_model_len=4096) == 4096
    assert batch(max_num_seqs=3000) == 3000
    assert batch(max_num_batched_tokens=512) == 512


def test_the_engine_has_no_process_of_its_own(case: Callable[..., Case]) -> None:
    case("llama")
    found = [" ".join(child.cmdline()) for child in psutil.Process(os.getpid()).children()]
    # Python's own, one for a process that has ever spawned another: other tests of this session do.
    assert [line for line in found if "resource_tracker" not in line] == []


def test_unknown_weights_are_named(case: Callable[..., Case], tmp_path: Path) -> None:
    one = case("llama", temperature=0.7)
    tensors = {**policy_parameters(one.model), "model.layers.0.self_attn.odd.weight": torch.zeros(2, 2)}
    with pytest.raises(Exception, match="odd"):
        one.engine.load_weights(Weights.of(30, tensors.items(), torch.float32))
    one.load(31)


def test_adapters_side_by_side(folders: dict[str, str]) -> None:
    """Two versions in one continuous batch, the one as it was while the next comes; the third takes the place of the first."""
    path = folders["llama"]
    engine = VllmEngine.from_pretrained(path, path, rollout(), seed=7, lora=LORA, num_versions=2)
    policies = []
    for version in range(3):
        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        policies.append(add_policy_adapter(base, LORA).eval())
        torch.manual_seed(version)
        for parameter in policy_parameters(policies[-1]).values():
            torch.nn.init.normal_(parameter, std=0.1)

    def load(version: int) -> None:
        engine.load_weights(Weights.of(version, policy_parameters(policies[version]).items(), torch.float32))

    def gap(responses: list[Response], policy: Any) -> float:
        prompts, largest = {prompt.row: prompt.token_ids for prompt in some_prompts(8)}, 0.0
        for response in responses:
            asked, made = prompts[response.row], torch.tensor([response.token_ids])
            with torch.no_grad():
                logits = policy(input_ids=torch.tensor([[*asked, *response.token_ids]])).logits
            expected = token_logprobs(logits[:, len(asked) - 1 : -1], made, 1.0)[0]
            largest = max(largest, float((torch.tensor(response.sampling_logprobs) - expected).abs().max()))
        return largest

    try:
        load(0)
        alone = engine.generate(some_prompts(8), 0)
        load(1)
        with ThreadPoolExecutor(2) as threads:
            both = [threads.submit(engine.generate, some_prompts(8), version) for version in (0, 1)]
            found = [future.result() for future in both]
        assert engine.versions == (0, 1)
        assert [r.token_ids for r in found[0]] == [r.token_ids for r in alone]
        for version in range(2):
            assert gap(found[version], policies[version]) < 1e-4 < 0.01 < gap(found[version], policies[1 - version])
        load(2)
        assert engine.versions == (1, 2)
        assert gap(engine.generate(some_prompts(8), 2), policies[2]) < 1e-4
        assert gap(engine.generate(some_prompts(8), 1), policies[1]) < 1e-4
        with pytest.raises(WeightsVersionError, match="found version 1, 2"):
            engine.generate(some_prompts(8), 0)
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "llama-lora"])
def test_an_engine_of_two_processes(folders: dict[str, str], kind: str) -> None:
    """Tensor parallelism, as on two GPUs: each process takes its part of what is sent once."""
    split = rollout().model_copy(
        update={"engine_args": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}}
    )
    one = Case(folders["llama"], kind.endswith("lora"), split)
    try:
        for version in range(1, 3):
            one.change(version)
            one.load(version)
            one.check(some_prompts(4), one.engine.generate(some_prompts(4), version))
        # vLLM's processes answer out of turn after an error: not one of ours, so that the actor is started anew.
        with pytest.raises(RuntimeError, match="nobody's"):
            one.engine.load_weights(Weights(3, [{"nobody's": torch.zeros(2)}]))
    finally:
        one.engine.close()
