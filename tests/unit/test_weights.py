"""The weights that are loaded are the ones that were meant, seen before anything starts."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast

from raytrl.config.runs.supervised import SftRun
from raytrl.errors import ConfigError
from raytrl.plan.checks.weights import check_vocabulary, check_weights
from raytrl.roles.models.adapters import merge_adapter
from raytrl.roles.models.loading import look_at


def saved(folder: Path, head: str, **more: object) -> str:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_labels=1,
        **more,
    )
    auto = AutoModelForCausalLM if head == "causal" else AutoModelForSequenceClassification
    auto.from_config(config).save_pretrained(folder)
    return str(folder)


def changed(folder: str, change: object) -> str:
    file = Path(folder, "model.safetensors")
    save_file(dict(filter(None, map(change, load_file(file).items()))), file, metadata={"format": "pt"})  # type: ignore[arg-type, call-overload]
    return folder


def test_whole_models_are_looked_at_without_being_held(tmp_path: Path) -> None:
    causal, score = saved(tmp_path / "lm", "causal"), saved(tmp_path / "rm", "score")
    tied = saved(tmp_path / "tied", "causal", tie_word_embeddings=True)
    assert [look_at(path, "causal", "model.path") for path in (causal, tied)] == [8, 8]
    assert look_at(score, "score", "model.path") == 8
    assert look_at(causal, "score", "value_model.init", new_head=True, num_labels=1) == 8


@pytest.mark.parametrize("tied", [False, True])
def test_a_classifier_is_no_language_model(tmp_path: Path, tied: bool) -> None:
    path = saved(tmp_path, "score", tie_word_embeddings=tied)
    with pytest.raises(ConfigError, match=r"^model\.path: .*not a whole language model .*(lm_head|score)\.weight"):
        look_at(path, "causal", "model.path")


def test_a_language_model_is_no_classifier_where_no_head_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^reward\.model: .*no weights for score\.weight, which would be random"):
        look_at(saved(tmp_path, "causal"), "score", "reward.model")


def test_other_names_a_lost_layer_another_shape_and_a_layer_too_many(tmp_path: Path) -> None:
    prefixed = changed(saved(tmp_path / "a", "causal"), lambda item: (f"module.{item[0]}", item[1]))
    half = changed(saved(tmp_path / "b", "causal"), lambda item: None if "layers.1." in item[0] else item)
    shape = changed(
        saved(tmp_path / "c", "causal"),
        lambda item: (item[0], torch.zeros(9, 8)) if "lm_head" in item[0] else item,
    )
    more = changed(
        saved(tmp_path / "d", "causal"), lambda item: (item[0].replace("layers.1.", "layers.2."), item[1].clone())
    )
    for path, found in (
        (prefixed, "lm_head"),
        (half, r"layers\.1\."),
        (shape, "another shape"),
        (more, r"layers\.1\."),
    ):
        with pytest.raises(ConfigError, match=f"not a whole language model .*{found}"):
            look_at(path, "causal", "model.path")


class Ids:
    def __init__(self, size: int) -> None:
        self._size = size

    def get_vocab(self) -> dict[str, int]:
        return {str(index): index for index in range(self._size)}


def test_a_vocabulary_fits_the_embeddings_or_is_refused_with_both_sizes() -> None:
    assert check_vocabulary(Ids(8), 8, "model.tokenizer") == ""
    assert "4 of 12 embeddings are no token" in check_vocabulary(Ids(8), 12, "model.tokenizer")
    with pytest.raises(ConfigError, match="a vocabulary of 10 ids and 8 embeddings"):
        check_vocabulary(Ids(10), 8, "model.tokenizer")


@pytest.mark.parametrize(("more", "is_refused"), [({}, True), ({"lora": {"r": 4}}, False)])
def test_a_model_that_could_not_be_saved_after_the_training_is_refused_before_it(
    tmp_path: Path, more: dict[str, object], is_refused: bool
) -> None:
    path = saved(tmp_path / "lm", "causal")
    Path(path, "generation_config.json").write_text('{"do_sample": false, "temperature": 0.7}')
    values = {"kind": "sft", "name": "a", "model": {"path": path}, "data": {"train": "a.jsonl"}, **more}
    run = SftRun.model_validate(values)
    if is_refused:
        with pytest.raises(ConfigError, match=r"^model\.path: .*generation_config\.json.*`temperature`"):
            check_weights(run)
    else:  # an adapter is saved alone, and the merged model as it was read
        assert check_weights(run) == {"model.path": 8}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", None, "a folder without weights; found: config.json"),
        ("model.safetensors", b"half", "cannot be loaded: SafetensorError"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer of git-lfs"),
        ("pytorch_model.bin", b"nothing", "cannot be loaded: UnpicklingError"),
        (
            "model.safetensors.index.json",
            b'{"metadata": {}, "weight_map": {"a": "gone.safetensors"}}',
            "gone.safetensors",
        ),
    ],
)
def test_a_folder_that_is_no_whole_download_is_refused(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    path = saved(tmp_path, "causal")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    if content is not None:
        (tmp_path / name).write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    run = SftRun.model_validate({"kind": "sft", "name": "a", "model": {"path": path}, "data": {"train": "a.jsonl"}})
    with pytest.raises(ConfigError, match=r"^model\.path: ") as caught:
        check_weights(run)
    assert words in str(caught.value)


def test_a_hub_id_is_looked_at_where_the_cache_has_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--some--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("0" * 40)
    saved(cache / "snapshots" / ("0" * 40), "score")
    run = SftRun.model_validate(
        {"kind": "sft", "name": "a", "model": {"path": "some/model"}, "data": {"train": "a.jsonl"}}
    )
    with pytest.raises(ConfigError, match=r"^model\.path: .*not a whole language model"):
        check_weights(run)
    (cache / "snapshots" / ("0" * 40) / "model.safetensors").unlink()  # only its config was needed so far
    assert check_weights(run) == {}


def test_an_adapter_is_merged_into_the_revision_that_it_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--some--model"
    (cache / "refs").mkdir(parents=True)
    for seed, name in enumerate(("main", "v1")):
        torch.manual_seed(seed)
        (cache / "refs" / name).write_text(str(seed) * 40)
        saved(cache / "snapshots" / (str(seed) * 40), "causal")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(cache / "snapshots" / ("1" * 40)), LoraConfig(task_type="CAUSAL_LM", r=2)
    )
    adapted.save_pretrained(str(tmp_path / "adapter"))
    words = Tokenizer(WordLevel({str(token): token for token in range(8)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")
    run = SftRun.model_validate(
        {"kind": "sft", "name": "a", "model": {"path": "some/model", "revision": "v1"}, "data": {"train": "a.jsonl"}}
    )
    merge_adapter(run, "some/model", str(tmp_path / "adapter"), tokenizer, str(tmp_path / "merged"))
    merged = load_file(tmp_path / "merged/model.safetensors")
    main, v1 = (load_file(cache / "snapshots" / (seed * 40) / "model.safetensors") for seed in "01")
    assert all(torch.equal(merged[name], v1[name]) for name in merged)  # a new adapter changes nothing
    assert not all(torch.equal(merged[name], main[name]) for name in merged)
