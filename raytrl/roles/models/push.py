"""A finished run's model to the Hugging Face Hub: what is sent, and how it gets there."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrl.errors import ConfigError, RaytrlError, RunError
from raytrl.roles.models.card import for_others
from raytrl.rundir import RunDirectory, is_disk_full
from raytrl.versions import versions
from raytrl.within import NotInTimeError, within

# Whole names at the top of a folder, where transformers and PEFT look for a model. They are sent, and of an earlier model
# nothing of this may stay in the repository: an adapter's config beside a whole model, or an old chat template, would be
# loaded with the new one.
_OF_A_MODEL = (
    r"(adapter_)?model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|"
    r"((adapter|generation|tokenizer|processor|(video_)?preprocessor)_)?config\.json|chat_template\.(jinja|json)|"
    r"tokenizer\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r"(spiece|spm|sentencepiece(\.bpe)?)\.model"
)
# Sent besides: vocabularies of rarer tokenizers, whose names may be somebody's own for something else, and chat templates
# beside the first, which have a folder.
_TEMPLATES = "additional_chat_templates/"
_SENT = re.compile(
    rf"{_OF_A_MODEL}|[^/]+\.(model|spm|tiktoken|codes|tokenizer)|dict\.txt|"
    r"(tekken|emoji|entity_vocab|normalizer|word_shape|word_pronunciation|byte_maps|target_vocab|vocab-src|vocab-tgt)\.json|"
    rf"{_TEMPLATES}[^/]+\.jinja"
)
# Taken out besides: weights by other names and of other formats. vLLM loads every file of safetensors that is there.
_STALE = re.compile(
    rf"{_OF_A_MODEL}|[^/]+\.safetensors|[^/]+\.(safetensors|bin)\.index\.json|(pytorch|adapter)_model[^/]*\.bin"
)
_CALL_S = 120.0  # the longest that one request goes without a byte
_SLOWEST = 50_000  # bytes a second; a push that is slower is given up
_WITH_MODEL = ("sft", "reward", "dpo", "ppo", "tune")


@dataclass(frozen=True)
class Package:
    """What goes into the repository."""

    run: str
    files: dict[str, str | bytes]  # by name in the repository: a local file, or the content
    left_out: list[str]
    shortened: int  # how many paths and addresses of this machine the card had

    def sizes(self) -> dict[str, int]:
        """Bytes by name."""
        return {
            name: len(file) if isinstance(file, bytes) else os.path.getsize(file) for name, file in self.files.items()
        }


@dataclass(frozen=True)
class Destination:
    repo: str
    private: bool | None = None  # None: a new repository is private, one that exists stays as it is
    revision: str | None = None
    message: str | None = None


@contextmanager
def package_of(run_dir: RunDirectory, adapter: bool) -> Iterator[Package]:
    """The files of a finished run's model; where the run is stored at a URI they are downloaded for the time of the block.

    Args:
        adapter: of a LoRA run the adapter alone, else the merged model.

    Raises:
        ConfigError: there is no finished run with a whole model, or its adapter belongs to a base that nobody else has.
    """
    manifest = run_dir.manifest()
    name = _model_of(run_dir, manifest)
    with run_dir.local_copy(name) as whole:
        has_adapter = os.path.exists(os.path.join(whole, "adapter_config.json"))
        if adapter and not has_adapter:
            raise ConfigError(
                f"--adapter: {run_dir} has no adapter; found: a run without lora; expected: a LoRA run, or no --adapter"
            )
        folder = os.path.join(whole, "merged") if has_adapter and not adapter else whole
        if adapter:
            _check_base(folder, manifest.get("inputs", {}))
        _check_weights(folder, f"{run_dir}/{name}{'/merged' if folder != whole else ''}")
        files, left_out = _files_of(folder)
        shortened = 0
        card = Path(whole) / "README.md"  # of a LoRA run there is one, beside the adapter
        if card.exists():
            text, shortened = for_others(card.read_text(encoding="utf-8"), "peft" if adapter else "transformers")
            files["README.md"] = text.encode()
        yield Package(f"{os.path.basename(run_dir.path)} ({manifest['kind']})", files, left_out, shortened)


def _model_of(run_dir: RunDirectory, manifest: dict[str, Any]) -> str:
    """The name of the model folder within the run directory."""
    if not manifest:
        raise ConfigError(f"{run_dir}: no run; found: no manifest.json; expected: the directory of a run")
    if manifest["kind"] not in _WITH_MODEL:
        raise ConfigError(
            f"{run_dir}: has no model; found: kind {manifest['kind']}; expected: a run of kind {', '.join(_WITH_MODEL)}"
        )
    if manifest["state"] != "done":
        raise ConfigError(
            f"{run_dir}: is not finished; found: state {manifest['state']}; expected: done; its command goes on with it: "
            f"{manifest['command']}"
        )
    name = f"trials/{manifest['best']}/model" if manifest["kind"] == "tune" else "model"
    if not run_dir.exists(name):
        raise ConfigError(f"{run_dir}: has no model; found: no {name}/; expected: a finished run, whole")
    return name


def _check_base(folder: str, inputs: Mapping[str, Mapping[str, str]]) -> None:
    """
    Args:
        inputs: of the run's manifest. A relative folder looks like an id of the hub wherever it is not there; of an id the
            manifest has the commit alone, of a folder its files with `size:digest`, or all in one line.
    """
    base = str(json.loads(Path(folder, "adapter_config.json").read_text()).get("base_model_name_or_path"))
    was_folder = any(
        os.path.dirname(file) == base or (file == base and ":" in digest)
        for files in inputs.values()
        for file, digest in files.items()
    )
    if was_folder or os.path.exists(base) or not _is_repo(base):
        raise ConfigError(
            f"--adapter: its base model is a folder of this machine, which nobody else has; found: {base}; expected: a base "
            f"from the hub; or without --adapter: then the merged model is sent"
        )


def _check_weights(folder: str, where: str) -> None:
    """Refuses a folder that could not be loaded. Opening a file of weights compares its header with its length."""
    from safetensors import SafetensorError, safe_open

    weights = sorted(Path(folder).glob("*.safetensors"))
    config = "adapter_config.json" if any(file.name.startswith("adapter_") for file in weights) else "config.json"
    there = {file.name for file in weights}
    wanted = {
        file
        for index in Path(folder).glob("*.index.json")
        for file in json.loads(index.read_text())["weight_map"].values()
    }
    if not weights or not Path(folder, config).exists() or wanted - there:
        lacks = sorted(wanted - there) or (["weights (*.safetensors)"] if not weights else [config])
        raise ConfigError(
            f"{where}: is no whole model; found: no {', '.join(lacks)}; expected: what the run stored there"
        )
    for file in weights:
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{where}/{file.name}: cannot be opened; found: {error}; expected: a whole file, as the run stored it"
            ) from None


def is_sent(name: str) -> bool:
    """Whether a file of a model's folder is part of a model, by its name within it; code of its own is not known by its name."""
    return _SENT.fullmatch(name) is not None


def _files_of(folder: str) -> tuple[dict[str, str | bytes], list[str]]:
    """What is sent of a folder, and what is not; the card comes from elsewhere."""
    found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    names = {str(path.relative_to(folder).as_posix()): path for path in found}
    names = {name: path for name, path in names.items() if not name.startswith("merged/") and name != "README.md"}
    code = _code_of(folder)
    sent = {name: str(path) for name, path in names.items() if is_sent(name) or name in code}
    return dict(sent), [name for name in names if name not in sent]


def _code_of(folder: str) -> set[str]:
    """The files of what configs name as the model's or tokenizer's own code, with what these import beside them.

    A class that transformers has, too, may be named by a config that has kept it, without a file.
    """
    classes: list[str | None] = []
    for config in (Path(folder, name) for name in ("config.json", "tokenizer_config.json")):
        auto_map = json.loads(config.read_text(encoding="utf-8")).get("auto_map") if config.exists() else None
        for named in (auto_map or {}).values():
            classes += [named] if isinstance(named, str) else named  # of a tokenizer two, of which one may be null
    modules = [named.partition(".")[0] for named in classes if named and "--" not in named]  # --: in another repository
    if not modules:
        return set()
    from transformers.dynamic_module_utils import get_relative_imports

    found: set[str] = set()
    while modules:
        file = f"{modules.pop()}.py"
        path = os.path.join(folder, file)
        if file not in found and os.path.isfile(path):
            found.add(file)
            modules += get_relative_imports(path)
    return found


def check_repo(repo: str) -> None:
    """Refuses what cannot be a repository of the hub.

    Raises:
        ConfigError: without a request.
    """
    if not _is_repo(repo):
        raise ConfigError(
            f"REPO: cannot be a repository of the hub; found: {repo!r}; expected: owner/name, or name alone for your own "
            f"account"
        )


def _is_repo(repo: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported lazily

    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return True


def token_of(reference: str | None) -> str:
    """The token, by reference alone: a value given on a command line is kept by shells and shown to other users.

    Args:
        reference: the name of an environment variable, or `NAME=/path/of/a/file`; None: where huggingface_hub looks.

    Raises:
        ConfigError: there is none; what was given is not repeated, since it may be a token.
    """
    from huggingface_hub import get_token

    expected = (
        "expected: --token NAME, an environment variable, or --token NAME=/path/of/a/file; never the token itself"
    )
    if reference is None:
        if found := get_token():
            return found
        raise ConfigError(
            "no token of the hub; found: neither HF_TOKEN nor a login (`hf auth login`) on this machine; expected: one of "
            "them, or --token NAME or NAME=/path/of/a/file"
        )
    name, has_path, path = reference.partition("=")
    if name.startswith("hf_") or not name.isidentifier() or (has_path and not path.startswith(("/", "~/", "./"))):
        raise ConfigError(f"--token: is not a reference; found: (not shown); {expected}")
    if not has_path:
        if found := os.environ.get(name, "").strip():
            return found
        raise ConfigError(f"--token: no such environment variable, or an empty one; found: (not shown); {expected}")
    try:
        found = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token: the file cannot be read; found: {path}: {error}; {expected}") from None
    if not found:
        raise ConfigError(f"--token: the file is empty; found: {path}; {expected}")
    return found


def send(package: Package, to: Destination, token: str, tell: Callable[[str], None]) -> str:
    """Makes the repository where there is none, and one commit of all files; returns the commit's address.

    Args:
        tell: called with what the user should know before anything is sent.

    Raises:
        ConfigError: the hub does not let this token do that, or the repository is not as private as was asked.
        RunError: the hub was not reached, or stopped answering; repeated, only what is missing is sent.
    """
    from huggingface_hub import constants, get_session, is_offline_mode, set_client_factory
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # exported lazily

    if is_offline_mode():
        raise ConfigError(
            "the hub cannot be reached; found: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; expected: neither for a push"
        )
    if not sys.stderr.isatty():
        disable_progress_bars()
    client = type(get_session())
    set_client_factory(lambda: client(follow_redirects=True, timeout=_CALL_S))  # by itself it waits for ever
    limit_s = 10 * _CALL_S + sum(package.sizes().values()) // _SLOWEST
    try:
        return within(limit_s, lambda: _committed(package, to, token, tell))
    except RaytrlError:
        raise
    except NotInTimeError as error:
        raise RunError(f"{to.repo}: the hub at {constants.ENDPOINT} {error}; {_AGAIN}") from None
    except Exception as error:  # of the client, of Xet and of the network, other classes in other versions
        raise _in_words(error, to.repo, constants.ENDPOINT, token) from None


def _committed(package: Package, to: Destination, token: str, tell: Callable[[str], None]) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token, library_name="raytrl", library_version=versions()["raytrl"])
    repo = api.create_repo(to.repo, private=to.private is not False, exist_ok=True).repo_id
    info = api.model_info(repo)
    is_private = {True: "private", False: "public"}
    if to.private is not None and info.private is not None and info.private != to.private:
        raise ConfigError(
            f"{repo}: a push does not change who sees a repository; found: it is {is_private[info.private]}; expected: "
            f"{is_private[to.private]}; change that on its page, or name another repository; nothing was sent"
        )
    if info.private is False and to.private is None:
        tell(f"{repo} is public, as it was before")
    if to.revision is not None:
        api.create_branch(repo, branch=to.revision, exist_ok=True)
        info = api.model_info(repo, revision=to.revision)
    there = [sibling.rfilename for sibling in info.siblings or [] if sibling.rfilename not in package.files]
    if templates := [file for file in there if file.startswith(_TEMPLATES)]:
        tell(f"chat templates that stay in {repo} and are loaded with this one: {', '.join(templates)}")
    stale = [file for file in there if _STALE.fullmatch(file)]
    if stale:
        tell(f"of the model that was there, taken out of {repo}: {', '.join(stale)}")
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in package.files.items()]
    commit = api.create_commit(
        repo,
        [*operations, *(CommitOperationDelete(path_in_repo=file) for file in stale)],
        commit_message=to.message or f"{package.run}, by raytrl {versions()['raytrl']}",
        revision=to.revision,
    )
    return str(commit.commit_url)


_AGAIN = "the same command sends what is missing"
_DENIED = {
    401: (
        "the hub does not know the token",
        "one that is valid and may write: HF_TOKEN, `hf auth login`, or --token NAME or NAME=/path/of/a/file",
    ),
    403: (
        "the token may not write there",
        "an account or organisation of your own, and a token with write access to it",
    ),
    404: ("no such account, or not for this token", "an owner that exists, and a token with write access there"),
}


def _in_words(error: BaseException, repo: str, endpoint: str, token: str) -> RaytrlError:
    """One line that says what to do; the cause is below where the client wrapped it."""
    cause = error
    while getattr(cause, "response", None) is None and cause.__cause__ is not None:
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    said = getattr(cause, "server_message", None) or str(cause)
    line = next((line.strip() for line in said.splitlines() if line.strip()), "").replace(token, "(the token)")
    if status in _DENIED:
        what, expected = _DENIED[status]
        return ConfigError(f"{repo}: {what}; found: {status}: {line}; expected: {expected}")
    if status is not None:
        return RunError(f"{repo}: the hub at {endpoint} refused it; found: {status}: {line}; {_AGAIN}")
    if is_disk_full(error):
        return RunError(
            f"{repo}: no room on a disk of this machine; found: {line}; expected: room in HF_HOME; {_AGAIN}"
        )
    return RunError(
        f"{repo}: the hub at {endpoint} was not reached, or stopped answering; found: {type(cause).__name__}: {line}; "
        f"expected: a network, or HF_ENDPOINT of a hub that this machine reaches; {_AGAIN}"
    )
