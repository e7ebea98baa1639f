"""Whether the weights of a run's models are the ones that were meant: names and shapes alone, on torch's meta device."""

import os
from pathlib import Path

from raytrl.config.runs.base import ModelUse, Run
from raytrl.errors import ConfigError
from raytrl.plan.hub import cached_folder


def check_weights(run: Run) -> dict[str, int]:
    """Looks at every model that is a local folder; returns rows of embeddings by key of the run file.

    Raises:
        ConfigError: weights are missing, have another shape or belong to another network; or the model could not be saved.
    """
    rows: dict[str, int] = {}
    for use in run.models():
        if use.retrained and use.path is not None:
            check_generation_config(use.path, use.revision, use.key)
        place = _place(use)
        if place is None or not os.path.isdir(place) or "adapter_config.json" in os.listdir(place):
            continue
        if not _has_weights(place):
            raise ConfigError(
                f"{use.key}: {place!r}: a folder without weights; found: {', '.join(sorted(os.listdir(place))[:5])}; expected: "
                f"model.safetensors, its parts and their index, or pytorch_model.bin"
            )
        _refuse_pointers(place, use.key)
        from raytrl.roles.models.loading import look_at  # torch: 2 s

        try:
            found = look_at(
                place,
                use.head,
                use.key,
                new_head=use.new_head,
                trust_remote_code=use.trust_remote_code,
                **({"num_labels": 1} if use.new_head else {}),
            )
        except ConfigError:
            raise
        except Exception as error:  # of what is in somebody's file each library makes an error of its own
            reason = next(iter(str(error).splitlines()), "")
            raise ConfigError(f"{use.key}: {place!r}: cannot be loaded: {type(error).__name__}: {reason}") from None
        if found is not None:
            rows[use.key] = found
    return rows


def _has_weights(folder: str) -> bool:
    """Whether it holds a whole network's weights, not an adapter's alone or none yet."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return "adapter_config.json" not in names and any(
        name.startswith(("model", "pytorch_model")) and name.endswith((".safetensors", ".bin", ".index.json"))
        for name in names
    )


def _refuse_pointers(folder: str, key: str) -> None:
    """A clone without git-lfs has a line of text in place of each large file."""
    for file in sorted(Path(folder).iterdir()):
        if file.suffix in (".safetensors", ".bin", ".json", ".model") and file.is_file():
            with file.open("rb") as stream:
                if stream.read(len(_POINTER)) == _POINTER:
                    raise ConfigError(
                        f"{key}: {str(file)!r}: a pointer of git-lfs, not the file itself; expected: `git lfs pull` in that "
                        f"folder, or a download by `hf download`"
                    )


_POINTER = b"version https://git-lfs"


def check_generation_config(path: str, revision: str | None, key: str) -> None:
    """That a model trained in full can be saved: transformers writes no generation config that contradicts itself.

    It reads such a one, and writes it as long as nothing changed it; Trainer puts the tokenizer's special tokens into it.

    Raises:
        ConfigError: with all that transformers finds wrong.
    """
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(path, revision=revision)
    except OSError:  # it has none
        return
    try:
        config.validate(strict=True)
    except ValueError as error:
        wrong = [line.removeprefix("- ") for line in str(error).splitlines() if line.startswith("- ")] or [str(error)]
        raise ConfigError(
            f"{key}: {path!r}: its generation_config.json could not be saved again after the training; found: "
            f"{' '.join(wrong)}; expected: a folder whose generation_config.json does not contradict itself"
        ) from None


def _place(use: ModelUse) -> str | None:
    """The folder, or that of a hub id where the cache has its weights; where an adapter will do the merged model beside it."""
    if use.path is None:
        return None
    if not os.path.isdir(use.path):
        cached = cached_folder(use.path, use.revision)
        return cached if cached is not None and _has_weights(cached) else None
    if use.adapters and os.path.isfile(os.path.join(use.path, "adapter_config.json")):
        beside = (os.path.join(use.path, "merged"), os.path.join(os.path.dirname(use.path.rstrip("/")), "merged"))
        return next((place for place in beside if os.path.isdir(place)), None)
    return use.path


def check_vocabulary(tokenizer: object, rows: int | None, key: str) -> str:
    """The words about embeddings that belong to no token; empty where there are none.

    Raises:
        ConfigError: the tokenizer has ids that the model has no embeddings for.
    """
    if rows is None:
        return ""
    size = max(tokenizer.get_vocab().values()) + 1  # type: ignore[attr-defined]
    if size > rows:
        raise ConfigError(
            f"{key}: the tokenizer has ids that the model has no embeddings for; found: a vocabulary of {size} ids and "
            f"{rows} embeddings; expected: the model's own tokenizer, or embeddings resized to it"
        )
    return f"; {rows - size} of {rows} embeddings are no token, yet may be sampled" if size < rows else ""
