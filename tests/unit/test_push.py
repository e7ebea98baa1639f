"""A finished run's model to a hub: a fake one on this machine, the real client."""

import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from raytrl.cli import app
from raytrl.config.load import load_run
from raytrl.config.runs.base import TrainingRun
from raytrl.roles.models import push as pushing
from raytrl.roles.models.card import write_model_card
from raytrl.rundir import RunDirectory
from tests.fake_hub import TOKEN, FakeHub, fake_hub
from tests.runs import TINY_LLAMA, raytrl, run_file

Answer = tuple[int, str]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The client of this process speaks to it, by LFS, with a token in HF_TOKEN."""
    with fake_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
        set_client_factory(default_client_factory)


def make_run(folder: Path, base: str | None = None, **manifest: Any) -> Path:
    """A finished run of a tiny model; with a `base`, of a LoRA adapter to it and the merged model."""
    torch.manual_seed(0)
    words = {word: at for at, word in enumerate(["<unk>", "</s>", "a", "film", "good"])}
    vocabulary = Tokenizer(WordLevel(words, unk_token="<unk>"))
    vocabulary.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="</s>")
    config = {**TINY_LLAMA, "vocab_size": len(words)}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    into = folder / "runs/a/model"
    if base is not None:
        model.name_or_path = base
        adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
        adapted.save_pretrained(into)
        tokenizer.save_pretrained(into)
        model = adapted.merge_and_unload()
    whole = into / "merged" if base is not None else into
    model.save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    run = load_run(run_file(folder, "a", **({"lora": {"r": 2}} if base is not None else {})), []).run
    assert isinstance(run, TrainingRun)
    write_model_card(
        str(into), run, f"raytrl sft {folder}/a.yaml data.train={folder}/x.jsonl", {"ray": "2"}, 8, {"loss": 1}
    )
    run_dir = RunDirectory(str(folder / "runs"), "a")
    run_dir.write("config.yaml", "secret: of this machine")
    run_dir.write("checkpoints/1/weights.safetensors", "")
    run_dir.update_manifest(**{"state": "done", "kind": "sft", "command": "raytrl sft a.yaml", **manifest})
    return folder / "runs/a"


def push(run: Path | str, *words: str, repo: str = "me/a") -> Answer:
    """Exit status and all that was printed."""
    done = CliRunner().invoke(app, ["push", str(run), repo, *words], catch_exceptions=False)
    return done.exit_code, done.output


def files_below(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name != "README.md"}


def received(hub: FakeHub, repo: str = "me/a", branch: str = "main") -> dict[str, bytes]:
    """What is in a repository, but for its card and what the hub puts there."""
    files = hub.repos[repo].branches[branch]
    return {name: file for name, file in files.items() if name not in ("README.md", ".gitattributes")}


def as_folder(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, file in files.items():
        (folder / name).write_bytes(file)
    return folder


def test_a_command_pushes_a_model_that_loads(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with fake_hub() as hub:
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf"),
        }
        output = raytrl("push", str(run), "me/a", **environment, HF_HUB_DISABLE_XET="1")
        files = received(hub)
        assert output.splitlines()[-1] == f"{hub.url}/me/a/commit/{'1' * 40}"
        assert "%|" not in output  # no bars in a pipe
        assert hub.repos["me/a"].private
        assert hub.repos["me/a"].messages == [f"a (sft), by raytrl {pushing.versions()['raytrl']}"]
        again = raytrl("push", str(run), "me/a", **environment, HF_HUB_DISABLE_XET="1")
        assert len(hub.uploads) == len(hub.repos["me/a"].messages) == 1  # nothing is sent twice
        by_xet = raytrl("push", str(run), "me/b", **environment, HF_HUB_DISABLE_XET="0")
        assert hub.repos["me/b"].branches["main"].keys() == hub.repos["me/a"].branches["main"].keys()
        assert any("/v1/xorbs/" in line for line in hub.requests)
    assert files == files_below(run / "model")
    loaded = AutoModelForCausalLM.from_pretrained(as_folder(files, tmp_path / "got"))
    there = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    assert all(torch.equal(value, there[name]) for name, value in loaded.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "got")("a good film")["input_ids"] == [2, 4, 3]
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    assert TOKEN not in output + again + by_xet
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]


def test_of_a_lora_run_the_merged_model_or_the_adapter_alone(hub: FakeHub, tmp_path: Path) -> None:
    run = make_run(tmp_path, base="some-org/base")
    assert push(run)[0] == 0
    assert received(hub) == files_below(run / "model/merged")
    card = hub.repos["me/a"].branches["main"]["README.md"].decode()
    assert "library_name: transformers" in card
    status, output = push(run, "--adapter")  # over the merged model, of which nothing may be loaded with it
    assert status == 0
    assert "taken out of me/a: config.json, generation_config.json, model.safetensors" in output
    assert received(hub) == files_below(run / "model")
    assert "library_name: peft" in hub.repos["me/a"].branches["main"]["README.md"].decode()
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run / "model/merged"))
    PeftModel.from_pretrained(base, str(as_folder(received(hub), tmp_path / "got")))


def test_only_what_would_be_loaded_with_it_is_taken_out(hub: FakeHub, tmp_path: Path) -> None:
    of_a_model = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "adapter_model.safetensors",
        "adapter_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
    ]
    others = [
        "old/model.safetensors",
        "old/model.safetensors.index.json",
        "old/config.json",
        "checkpoint-5/adapter_model.safetensors",
        "tokenizer/vocab.json",
        "tokenizer/tokenizer.json",
        "tokenizer_usage.md",
        "tokenizers.txt",
        "pytorch_model/notes.bin",
        "onnx/model.onnx",
        "results.json",
        "modeling_mine.py",
        "LICENSE",
    ]
    template = "additional_chat_templates/tool_use.jinja"
    run = make_run(tmp_path)
    assert push(run)[0] == 0
    hub.repos["me/a"].branches["main"] |= dict.fromkeys([*of_a_model, *others, template], b"another's")
    status, output = push(run)
    assert status == 0
    assert received(hub) == files_below(run / "model") | dict.fromkeys([*others, template], b"another's")
    assert f"taken out of me/a: {', '.join(of_a_model)}\n" in output
    assert f"are loaded with this one: {template}\n" in output


def test_only_what_a_model_is_made_of_is_sent(hub: FakeHub, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    model = run / "model"
    before = files_below(model)
    others = [
        "checkpoint-5/model.safetensors",
        "checkpoint-5/trainer_state.json",
        "all_results.json",
        "data.json",
        "notes.txt",
        "trainer_state.json",
        "optimizer.pt",
        "additional_chat_templates/notes.txt",
        "modeling_mine.py",  # no auto_map names it
    ]
    parts = ["additional_chat_templates/tool_use.jinja", "qwen.tiktoken", "processor_config.json", "entity_vocab.json"]
    for name in [*others, *parts]:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    shutil.copy(model / "model.safetensors", model / "checkpoint-5")
    status, output = push(run)
    assert status == 0
    assert received(hub) == before | dict.fromkeys(parts, b"{}")
    assert f"not sent, no part of a model: {', '.join(sorted(others))}\n" in output


def test_code_is_sent_where_a_config_names_it_with_what_it_imports(hub: FakeHub, tmp_path: Path) -> None:
    model = make_run(tmp_path) / "model"
    sources = {
        "modeling_mine.py": "from .layers_mine import Layer\n",
        "layers_mine.py": "import torch\nfrom .sizes_mine import SIZE\n",
        "sizes_mine.py": "",
        "tokenization_mine.py": "",
    }
    for name, source in {**sources, "train.py": ""}.items():
        (model / name).write_text(source)
    named = {
        "config.json": {
            "AutoModel": "modeling_mine.Mine",
            "AutoConfig": "some-org/other--train.Other",  # in a repository of its own
            "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM",  # transformers has it
        },
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_mine.Mine", None]},
    }
    for name, classes in named.items():
        config = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(config | {"auto_map": classes}))
    status, output = push(model.parent)
    assert status == 0
    assert {name for name in received(hub) if name.endswith(".py")} == sources.keys()
    assert "not sent, no part of a model: train.py\n" in output


def test_every_vocabulary_of_transformers_is_sent() -> None:
    names = set()
    for file in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for block in re.findall(r"^VOCAB_FILES_NAMES = \{(.*?)\}", file.read_text(), re.MULTILINE | re.DOTALL):
            names |= set(re.findall(r':\s*"([^"]+)"', block))
    assert {"vocab.txt", "spiece.model", "bpe.codes"} < names
    assert [name for name in sorted(names) if not pushing.is_sent(name)] == []


@pytest.mark.parametrize("base", ["/home/me/base", "runs/sft/model", "HERE"])
def test_an_adapter_to_a_base_that_nobody_else_has_is_refused(base: str, hub: FakeHub, tmp_path: Path) -> None:
    run = make_run(tmp_path, base=str(tmp_path) if base == "HERE" else base)
    status, output = push(run, "--adapter")
    assert status == 2
    assert "--adapter: its base model is a folder of this machine" in output
    assert hub.requests == []
    assert push(run)[0] == 0  # merged it is whole


@pytest.mark.parametrize(
    ("files", "is_folder"),
    [
        ({"models/llama/config.json": "612:0f", "models/llama/model.safetensors": "9:0e"}, True),
        ({"models/llama": "240 files: 0f"}, True),  # many files are one line
        ({"models/llama": "5f0b02c75b57c5855da9ae460ce51323ea669d8a"}, False),  # the commit in the cache
        ({"models/llama-2/config.json": "612:0f", "models/llama/lora/adapter_config.json": "612:0f"}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("kind", ["sft", "tune"])
def test_what_was_a_folder_when_the_run_began_is_refused_wherever_it_is_pushed_from(
    files: dict[str, str], is_folder: bool, kind: str, hub: FakeHub, tmp_path: Path
) -> None:
    """As a hub's id it is well formed, and from here no such folder is seen."""
    run = make_run(tmp_path, base="models/llama", kind=kind, best="7", inputs={"model.path": files})
    if kind == "tune":  # a trial's own manifest has no inputs
        (run / "trials/7").mkdir(parents=True)
        shutil.move(run / "model", run / "trials/7/model")
    status, output = push(run, "--adapter")
    assert status == (2 if is_folder else 0)
    assert ("--adapter: its base model is a folder of this machine" in output) == is_folder
    assert (hub.requests == []) == is_folder


def test_the_card_names_no_place_of_this_machine(hub: FakeHub, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert str(tmp_path) in (run / "model/README.md").read_text()
    assert "of 5 local paths and addresses in README.md only the last part is sent" in push(run)[1]
    card = hub.repos["me/a"].branches["main"]["README.md"].decode()
    assert str(tmp_path) not in card
    assert "raytrl sft .../a.yaml data.train=.../x.jsonl" in card
    values = yaml.safe_load(card.partition("```yaml\n")[2].partition("\n```")[0])
    assert values["data"]["train"]["data_files"] == ".../train.jsonl"
    assert values["training"]["max_steps"] == 8


def test_who_sees_it(hub: FakeHub, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert push(run, "--public", repo="open")[0] == 0
    assert not hub.repos["someone/open"].private
    commits = len(hub.repos["someone/open"].messages)
    status, output = push(run, "--private", repo="someone/open")
    assert status == 2
    assert (
        "someone/open: a push does not change who sees a repository; found: it is public; expected: private" in output
    )
    assert len(hub.repos["someone/open"].messages) == commits
    status, output = push(run, "--private", "--revision", "new", repo="someone/open")
    assert status == 2 and "nothing was sent" in output
    assert list(hub.repos["someone/open"].branches) == ["main"]
    status, output = push(run, repo="someone/open")
    assert status == 0
    assert "someone/open is public, as it was before" in output
    assert not hub.repos["someone/open"].private


def test_a_branch_is_made_and_others_stay(hub: FakeHub, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for _ in range(2):
        assert push(run, "--revision", "second", "--message", "once more")[0] == 0
    assert received(hub, branch="second") == files_below(run / "model")
    assert received(hub) == {}
    assert hub.repos["me/a"].messages == ["once more"]


@pytest.mark.parametrize("by", ["variable", "file"])
def test_the_token_by_reference(by: str, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    reference = "MY_TOKEN" if by == "variable" else f"HUB={tmp_path}/token"
    status, output = push(run, "--token", reference)
    assert (status, TOKEN in output) == (0, False)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("hf_given-directly", "is not a reference"),
        ("hf_givenDirectly", "is not a reference"),
        ("HUB=hf_given", "is not a reference"),
        ("givenDirectly", "no such environment variable"),
        ("HUB=/given/nowhere", "cannot be read; found: /given/nowhere"),
        ("HUB=/dev/null", "the file is empty"),
    ],
)
def test_a_token_itself_is_refused_and_not_repeated(given: str, text: str, hub: FakeHub, tmp_path: Path) -> None:
    status, output = push(make_run(tmp_path), "--token", given)
    assert status == 2
    assert text in output and "NAME=/path/of/a/file" in output
    assert "/" in given or "given" not in output
    assert hub.requests == []


def test_no_token_at_all(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    status, output = push(make_run(tmp_path))
    assert (status, hub.requests) == (2, [])
    assert "no token of the hub" in output


@pytest.mark.parametrize(
    ("status", "reason", "exit_status", "text"),
    [
        (401, "Invalid credentials", 2, "me/a: the hub does not know the token; found: 401"),
        (403, "You don't have the rights", 2, "me/a: the token may not write there; found: 403"),
        (404, "Not found", 2, "me/a: no such account, or not for this token; found: 404"),
        (402, "Private storage is full", 1, "refused it; found: 402: "),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    status: int, reason: str, exit_status: int, text: str, hub: FakeHub, tmp_path: Path
) -> None:
    hub.refuse = lambda line: (status, f"{reason} ({TOKEN})")  # it would not, but it might
    found, output = push(make_run(tmp_path))
    assert found == exit_status
    last = output.splitlines()[-1]
    assert text in last and last.startswith("error: ")
    assert TOKEN not in output and "(the token)" in output
    assert hub.repos == {}


def test_a_wrong_token(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong-one")
    status, output = push(make_run(tmp_path), "--debug")
    assert status == 2
    assert "the hub does not know the token; found: 401" in output
    assert "hf_wrong-one" not in output


@pytest.mark.parametrize("at", ["POST /api/repos/create", "PUT /storage", "POST /api/models/me/a/commit"])
def test_a_hub_that_hangs_is_given_up_and_the_rest_sent_later(
    at: str, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    monkeypatch.setattr(pushing, "_CALL_S", 0.5)
    hub.hangs_at = re.compile(at)
    status, output = push(run)
    assert status == 1
    assert re.search(at, hub.requests[-1])
    # The client tries uploads again and again, until all of it has taken too long.
    assert re.search("stopped answering; found: ReadTimeout|gave no answer within", output)
    assert f"me/a: the hub at {hub.url} " in output and "the same command sends what is missing" in output
    hub.hangs_at = None
    for (
        thread
    ) in threading.enumerate():  # a push that was given up goes on until its process ends, which has no second one
        if thread.name == "within":
            thread.join(60)
            assert not thread.is_alive()
    monkeypatch.setattr(pushing, "_CALL_S", 30.0)
    there = len(hub.uploads)  # on a busy machine more than one: an answer that came too late was asked for again
    assert push(run)[0] == 0
    assert received(hub) == files_below(run / "model")
    assert len(hub.uploads) - there == (0 if there else 1)


def test_no_hub_there(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    status, output = push(make_run(tmp_path))
    assert status == 1
    assert "the hub at http://127.0.0.1:9 was not reached, or stopped answering; found: ConnectError" in output


def test_offline_is_told(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    status, output = push(make_run(tmp_path))
    assert (status, hub.requests) == (2, [])
    assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set" in output


def test_a_dry_run_sends_nothing_and_needs_no_token(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    run = make_run(tmp_path)
    (run / "model/training_args.bin").write_bytes(b"pickle")
    status, output = push(run, "--dry-run")
    assert (status, hub.requests) == (0, [])
    size = os.path.getsize(run / "model/model.safetensors")
    assert f"{size:,}  model.safetensors" in output
    assert "not sent, no part of a model: training_args.bin" in output
    assert "nothing was sent" in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("manifest", "text"),
    [
        ({"state": "running"}, "is not finished; found: state running"),
        ({"state": "failed"}, "is not finished; found: state failed"),
        ({"kind": "eval"}, "has no model; found: kind eval"),
        ({"kind": "tune", "best": "7"}, "found: no trials/7/model/"),
    ],
)
def test_a_run_without_a_finished_model_is_refused(
    manifest: dict[str, Any], text: str, hub: FakeHub, tmp_path: Path
) -> None:
    status, output = push(make_run(tmp_path, **manifest))
    assert (status, hub.requests) == (2, [])
    assert text in output


def test_a_sweep_pushes_its_best_trials_model(hub: FakeHub, tmp_path: Path) -> None:
    run = make_run(tmp_path, kind="tune", best="7")
    (run / "trials/7").mkdir(parents=True)
    shutil.move(run / "model", run / "trials/7/model")
    assert push(run)[0] == 0
    assert received(hub) == files_below(run / "trials/7/model")


def test_a_run_at_a_uri(hub: FakeHub, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert push(run.as_uri())[0] == 0
    assert received(hub) == files_below(run / "model")


def test_other_things_that_are_no_model(hub: FakeHub, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "no run; found: no manifest.json" in push(run / "model")[1]
    assert "--adapter: " in push(run, "--adapter")[1]
    assert "REPO: cannot be a repository of the hub; found: 'a/b/c'" in push(run, repo="a/b/c")[1]
    weights = run / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "model.safetensors: cannot be opened" in push(run)[1]
    (run / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    assert "is no whole model; found: no b.safetensors" in push(run)[1]
    assert hub.requests == []
