"""The transformers engine: padding, seeds, stopping, versions."""

import itertools
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from toy import EOS, PROMPTS, LocalGenerator, gpt2, llama, make_engine, prompt_batch
from transformers import Lfm2Config, Lfm2ForCausalLM

from raytrl.algo.logprobs import token_logprobs
from raytrl.errors import NonFiniteError, StaleAttemptError, WeightsVersionError
from raytrl.records.samples import chunks
from raytrl.roles.models.adapters import policy_parameters
from raytrl.roles.rollout.engine import response_seed
from raytrl.roles.rollout.folder import FolderEngine
from raytrl.roles.rollout.transformers_engine import TransformersEngine
from raytrl.roles.weights.buckets import Bucket, Weights, weights_on_disk

FAMILIES = pytest.mark.parametrize("family", [gpt2, llama])


def weights_of(model: nn.Module, version: int = 0) -> Weights:
    return Weights.of(version, policy_parameters(model).items(), torch.float32)


def loaded_engine(model: nn.Module, **sampling: object):  # type: ignore[no-untyped-def]
    engine = make_engine(deepcopy(model), **sampling)
    engine.load_weights(weights_of(model))
    return engine


def convolutions() -> nn.Module:
    """Half of its layers keep a state that is no row of keys."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return Lfm2ForCausalLM(config)


@pytest.mark.parametrize("family", [gpt2, llama, convolutions])
def test_left_padding_changes_no_logprob(family: Callable[[], nn.Module]) -> None:
    """Each response's log-probs are those of an unpadded forward pass of prompt + response on its own."""
    model = family().eval()
    for temperature in (1.0, 0.6):
        responses = loaded_engine(model, temperature=temperature, max_new_tokens=6).generate(
            prompt_batch(0, range(8)), 0, samples=2
        )
        assert len({len(PROMPTS[r.row % 4]) for r in responses}) > 1
        for r in responses:
            prompt = PROMPTS[r.row % 4]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *r.token_ids]])).logits[:, len(prompt) - 1 : -1]
            expected = token_logprobs(logits, torch.tensor([r.token_ids]), temperature)[0]
            torch.testing.assert_close(torch.tensor(r.sampling_logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", [gpt2, llama, convolutions])
def test_the_cache_has_the_name_that_the_model_knows(family: Callable[[], nn.Module]) -> None:
    """A version of transformers renames it; another will refuse the old name."""
    engine = loaded_engine(family())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*past_key_values.*")
        engine.generate(prompt_batch(0, range(8)), 0)


@FAMILIES
def test_responses_do_not_depend_on_the_engines(family: Callable[[], nn.Module]) -> None:
    """One engine, three engines, another order, a part only: the same bits, log-probs included."""
    model = family()
    prompts = prompt_batch(5, range(12))
    engines = [loaded_engine(model, chunk=4, max_new_tokens=8) for _ in range(3)]

    def made_by(generator: LocalGenerator, asked: list) -> dict:  # type: ignore[type-arg]
        made = generator.generate(asked, 0, greedy=False)
        return {(r.row, r.sample): r for chunk in made for r in chunk}

    alone = made_by(LocalGenerator(engines[:1], 2, chunk_prompts=4), prompts)
    assert made_by(LocalGenerator(engines, 2, chunk_prompts=4), prompts[::-1]) == alone
    part = made_by(LocalGenerator(engines, 2, chunk_prompts=4), prompts[4:8])
    assert part == {key: alone[key] for key in part}
    assert {(r.row, r.sample): r for r in engines[0].generate(prompts, 0, samples=2)} == alone


def test_a_chunk_is_a_batch_of_its_own() -> None:
    """At this size other batches happen to give the same bits, so look at the batches themselves."""
    engine, sizes = loaded_engine(gpt2(), chunk=4), list[int]()

    def note(_: nn.Module, args: object, kwargs: dict) -> None:  # type: ignore[type-arg]
        if kwargs["input_ids"].shape[1] > 1:  # prompts
            sizes.append(len(kwargs["input_ids"]))

    engine._model.register_forward_pre_hook(note, with_kwargs=True)
    engine.generate(prompt_batch(0, range(12)), 0, samples=2)
    assert sizes == [8, 8, 8]


def test_rows_that_ended_leave_the_batch() -> None:
    """Each forward pass has less than a quarter of rows that have ended; what they sampled stands as if none had left."""
    engine, rows = loaded_engine(gpt2(), chunk=24, max_new_tokens=16), list[int]()
    engine._model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    responses = engine.generate(prompt_batch(0, range(24)), 0)
    alive = [sum(len(r.token_ids) > t for r in responses) for t in range(len(rows))]
    assert rows[0] == 24 and 0 < alive[-1] < 12
    assert all(going <= batch < going / 0.75 + 1e-9 for going, batch in zip(alive, rows, strict=True))


def test_another_batch_composition_samples_the_same_tokens() -> None:
    """Not promised to the last bit of the log-probs, see `RolloutEngine.generate`."""
    model, prompts = gpt2(), prompt_batch(5, range(12))
    whole = loaded_engine(model, chunk=12).generate(prompts, 0)
    single = loaded_engine(model, chunk=1).generate(prompts, 0)
    assert [r.token_ids for r in whole] == [r.token_ids for r in single]


def test_every_response_has_a_seed_of_its_own() -> None:
    keys = [(seed, step, row, sample) for seed in (0, 1) for step in (0, 1) for row in (0, 1) for sample in (0, 1)]
    assert len({response_seed(*key) for key in keys}) == len(keys)
    engine = loaded_engine(gpt2(spread=0.0), max_new_tokens=12)  # a uniform policy: only the draws differ
    same_prompt = [replace(p, token_ids=PROMPTS[0]) for p in prompt_batch(0, range(6))]
    first = engine.generate(same_prompt, 0, samples=2)
    assert len({r.token_ids for r in first}) == len(first)
    assert engine.generate(same_prompt, 0, samples=2) == first
    later = engine.generate([replace(p, step=1) for p in same_prompt], 0, samples=2)
    assert not {r.token_ids for r in first} & {r.token_ids for r in later}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_follow_the_distribution(temperature: float) -> None:
    model, rows = gpt2(3).eval(), 4000
    prompts = [replace(p, token_ids=PROMPTS[1]) for p in prompt_batch(0, range(rows))]
    responses = loaded_engine(model, chunk=rows, max_new_tokens=1, temperature=temperature).generate(prompts, 0)
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in responses]), minlength=8) / rows
    with torch.no_grad():
        expected = torch.softmax(model(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1] / temperature, -1)
    assert float((counts - expected).abs().sum()) < 0.06


def test_a_response_ends_with_its_end_token_and_keeps_a_sampled_pad() -> None:
    responses = loaded_engine(gpt2(spread=0.0), max_new_tokens=20).generate(prompt_batch(0, range(40)), 0)
    assert any(0 in r.token_ids for r in responses)
    for r in responses:
        assert len(r.token_ids) == len(r.sampling_logprobs)
        assert r.ended == (r.token_ids[-1] == EOS)
        assert EOS not in r.token_ids[:-1]
        assert r.text == "".join(str(token) for token in r.token_ids if token != EOS)
    assert {r.ended for r in responses} == {True, False}


def test_stop_strings_end_a_response_and_leave_its_text() -> None:
    responses = loaded_engine(gpt2(spread=0.0), max_new_tokens=20, stop=["3", "12"]).generate(
        prompt_batch(0, range(30)), 0
    )
    stopped = [r for r in responses if r.ended and r.token_ids[-1] != EOS]
    assert {r.token_ids[-1] for r in stopped} == {3, 2}
    for r in responses:
        assert "3" not in r.text and "12" not in r.text
        assert r.ended or len(r.token_ids) == 20


def test_greedy_takes_the_likeliest_token() -> None:
    model = gpt2().eval()
    (response,) = loaded_engine(model).generate(prompt_batch(0, [0]), 0, greedy=True)
    with torch.no_grad():
        assert response.token_ids[0] == int(model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())


def test_a_fresh_engine_and_another_version_are_refused() -> None:
    engine = make_engine(gpt2())
    with pytest.raises(WeightsVersionError, match="found version None"):
        engine.generate(prompt_batch(0, [0]), 0)
    engine.load_weights(weights_of(gpt2(), version=3))
    assert engine.versions == (3,)
    assert engine.generate(prompt_batch(0, [0]), 3)[0].policy_version == 3
    with pytest.raises(WeightsVersionError, match="version 4; found version 3"):
        engine.generate(prompt_batch(0, [0]), 4)


def test_weights_that_changed_on_the_way_are_refused_and_nothing_is_served() -> None:
    engine, weights = loaded_engine(gpt2()), weights_of(gpt2(1), version=1)
    (tensors,) = weights.buckets
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    next(iter(changed.values())).view(-1)[0] += 1
    engine.begin_weights(1)
    with pytest.raises(WeightsVersionError, match="version 1 are not what the learner sent; found checksum"):
        engine.take_bucket(Bucket(changed, Bucket.of(tensors).checksum))
    for goes_on in (lambda: engine.take_bucket(Bucket.of(tensors)), engine.finish_weights):
        with pytest.raises(WeightsVersionError):
            goes_on()
    with pytest.raises(WeightsVersionError, match="found version None"):
        engine.generate(prompt_batch(0, [0]), 0)
    with pytest.raises(WeightsVersionError, match="other parameters"):
        engine.load_weights(weights_of(llama(), version=1))
    with pytest.raises(WeightsVersionError, match="shape"):
        engine.load_weights(weights_of(gpt2(width=16), version=1))


def test_broken_weights_do_not_sample_nonsense() -> None:
    model = gpt2()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError):
        loaded_engine(model).generate(prompt_batch(0, [0]), 0)


def test_logits_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large vocabulary they are much to copy from a GPU, and slow to sample from on a CPU."""
    copied: list[int] = []
    cpu = torch.Tensor.cpu

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.numel())
        return cpu(tensor)

    engine = loaded_engine(gpt2(), chunk=4, max_new_tokens=6)
    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    engine.generate(prompt_batch(0, range(4)), 0, samples=2)
    assert copied and max(copied) == 8  # a token and a log-prob of each row


def test_what_is_not_wanted_any_more_is_not_sampled_to_its_end() -> None:
    engine = loaded_engine(gpt2(spread=0.0), max_new_tokens=20)
    asked = itertools.count(1)
    with pytest.raises(StaleAttemptError):
        engine.generate(prompt_batch(0, range(4)), 0, wanted=lambda: next(asked) < 3)
    assert next(asked) == 4
    assert engine.generate(prompt_batch(0, range(4)), 0)


def test_chunks_follow_from_rows_alone() -> None:
    rows = [[p.row for p in chunk] for chunk in chunks(prompt_batch(0, [9, 3, 2, 8, 0]), 4)]
    assert rows == [[0, 2, 3], [8, 9]]


@FAMILIES
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_of_whole_responses(family: Callable[[], nn.Module], temperature: float) -> None:
    """The sum of what the engine itself sampled with: over lengths, padding and batches, for its own responses."""
    model = family().eval()
    engine = loaded_engine(model, temperature=temperature, max_new_tokens=6, chunk=3)
    prompts = prompt_batch(0, range(8))
    responses = engine.generate(prompts, 0, samples=2)
    assert len({len(r.token_ids) for r in responses}) > 1
    found = torch.tensor(engine.logprobs(prompts, responses, 0))
    expected = torch.tensor([sum(r.sampling_logprobs) for r in responses])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    with pytest.raises(WeightsVersionError):
        engine.logprobs(prompts, responses, 1)


def test_a_folder_engine_holds_one_model_at_a_time() -> None:
    """Each version samples with its own model, and a path that is not that version's is refused."""
    models = [gpt2(0).eval(), gpt2(1).eval()]

    def make(version: int) -> TransformersEngine:
        return make_engine(deepcopy(models[version]), max_new_tokens=6)

    engine = FolderEngine(["a", "b"], make)
    prompts = prompt_batch(0, range(4))
    for version, path in enumerate("ab"):
        assert engine.load_weights(weights_on_disk(version, path)) == engine.load_weights(
            weights_on_disk(version, path)
        )
        held = [replace(r, policy_version=0) for r in engine.generate(prompts, version)]
        assert held == loaded_engine(models[version], max_new_tokens=6).generate(prompts, 0)
    with pytest.raises(WeightsVersionError, match="asked for responses of weights version 0"):
        engine.generate(prompts, 0)
    with pytest.raises(WeightsVersionError, match="found: 'b'"):
        engine.load_weights(weights_on_disk(1, "a"))
    with pytest.raises(WeightsVersionError):
        engine.generate(prompts, 1)
