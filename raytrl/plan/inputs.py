"""What a run is made from: fingerprints of its data, models and code, and what became of them since it was started.

Data are digested whole up to 4 GiB a file: another row anywhere is other data. Weights are digested by their size and 256
places: a model that was trained or made anew differs in all of them, and 16 GB are looked at in a moment. Times of change are
not looked at: `cp -p` and `rsync -t` keep them, `touch` and a clone change them.
"""

import ast
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import xxhash

from raytrl.config.runs.base import Run
from raytrl.config.sections.data import DataSource
from raytrl.data_places import folder_of, local_files

Inputs = dict[str, dict[str, str]]  # key of the run file → file → digest

_WHOLE_DATA, _WHOLE_WEIGHTS = 4 << 30, 64 << 20  # bytes: larger files are looked at in places
_PLACES, _BLOCK = 256, 64 << 10
_MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "*.py")
_MANY = 200  # files of one key that a manifest names one by one


def inputs_of(run: Run) -> Inputs:
    """Fingerprints of everything on this machine, or in its Hugging Face cache, that the run reads; the rest is left out."""
    found: Inputs = {}
    for key, source in run.data_sources().items():
        found[key] = dict(_data(source))
        if source.transform is not None:
            found[f"{key}.transform"] = _code(source.transform)
    for use in run.models():
        if use.path is not None:
            found[use.key] = _model(use.path, use.revision) | _base_of(use.path)
    found |= {key: _model(path, None) for key, path in run.tokenizers().items()}
    found |= {key: _code(place) for key, place in run.user_functions().items()}
    return {key: _few(files) for key, files in found.items() if files}


def digests(files: Sequence[str]) -> dict[str, str]:
    """Of files that are digested whole, as data are."""
    return _few({file: _digest(file, _WHOLE_DATA) for file in files})


def changes(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Key → what is not as it was, of keys that both have; `before` of an earlier version may lack them all."""
    found = {}
    for key, then in before.items():
        here = now.get(key, {})
        words = [f"{file} (gone)" for file in then if file not in here]
        words += [f"{file} (new)" for file in here if file not in then]
        words += [f"{file} (other content)" for file in then if file in here and here[file] != then[file]]
        if words:
            more = f" and {len(words) - 3} more" if len(words) > 3 else ""
            found[key] = f"{key}: {', '.join(words[:3])}{more}"
    return found


def is_code_of_rewards(key: str) -> bool:
    """Whether a run may go on with another: mending a reward function is why many a run is cut off."""
    return key.startswith("reward.") and key.endswith(".function")


def _data(source: DataSource) -> Iterator[tuple[str, str]]:
    if folder_of(source.path, source.data_dir) is None and (commit := _dataset_commit(source)):
        yield source.path, commit
    for file in local_files(source.path, source.data_dir, source.named_files):
        yield file, _digest(file, _WHOLE_DATA)


def _model(path: str, revision: str | None) -> dict[str, str]:
    if os.path.isfile(path):
        return {path: _digest(path, _WHOLE_WEIGHTS)}
    if os.path.isdir(path):
        files = [file for pattern in _MODEL_FILES for file in Path(path).glob(pattern) if file.is_file()]
        return {os.path.join(path, f.relative_to(path)): _digest(str(f), _WHOLE_WEIGHTS) for f in sorted(files)}
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, "config.json", revision=revision)
    except HFValidationError:  # a folder that is gone
        return {}
    return {path: os.path.basename(os.path.dirname(cached))} if isinstance(cached, str) else {}


def _base_of(path: str) -> dict[str, str]:
    """The model below an adapter, which its own files only name."""
    file = Path(path, "adapter_config.json")
    if not file.is_file():
        return {}
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):  # whoever loads it says so
        return {}
    return _model(base, None) if isinstance(base, str) else {}


def _dataset_commit(source: DataSource) -> str | None:
    """The commit that the cache has for a hub id."""
    from huggingface_hub.constants import HF_HUB_CACHE

    name = f"datasets--{source.path.replace('/', '--')}"
    ref = Path(HF_HUB_CACHE, name, "refs", source.revision or "main")
    return ref.read_text(encoding="utf-8").strip() if ref.is_file() else None


def _code(place: str) -> dict[str, str]:
    """Of a Python file what it says, whatever its comments and line breaks are; installed packages have versions."""
    module = place.rpartition(":")[0]
    path = Path(module if module.endswith(".py") else f"{module.replace('.', '/')}.py")
    if not path.is_file():
        return {}
    try:
        said = ast.dump(ast.parse(path.read_bytes()))
    except (SyntaxError, ValueError):  # whoever loads it says so
        return {str(path): _digest(str(path), _WHOLE_DATA)}
    return {str(path): xxhash.xxh3_128_hexdigest(said.encode())}


def _few(files: dict[str, str]) -> dict[str, str]:
    """The same in one line where there are many."""
    if len(files) <= _MANY:
        return files
    digest = xxhash.xxh3_128_hexdigest(repr(sorted(files.items())).encode())
    return {os.path.commonpath(files): f"{len(files)} files: {digest}"}


def _digest(path: str, whole: int) -> str:
    status = os.stat(path)
    return _digest_of(os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ino, whole)


@functools.lru_cache(maxsize=1024)
def _digest_of(path: str, size: int, mtime_ns: int, inode: int, whole: int) -> str:
    """`size:xxh3_128`; remembered within this process, where a sweep asks for one model many times."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        if size <= whole:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            for place in range(_PLACES):
                file.seek((size - _BLOCK) * place // (_PLACES - 1))
                digest.update(file.read(_BLOCK))
    return f"{size}:{digest.hexdigest()}"
