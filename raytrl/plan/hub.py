"""Whether a model that is no local folder is to be had: from the Hugging Face cache, or from the hub."""

import os

from raytrl.errors import ConfigError, NotHadError


def cached_folder(path: str, revision: str | None) -> str | None:
    """The local folder that holds what the cache has of a hub id; None where it has nothing, or it is no hub id."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, "config.json", revision=revision)
    except HFValidationError:
        return None
    return os.path.dirname(cached) if isinstance(cached, str) else None


def hub_folder(path: str, key: str, revision: str | None) -> str:
    """The local folder that holds config.json of a hub id; downloaded where the cache does not have it.

    Args:
        key: of the run file, for messages.

    Raises:
        ConfigError: it is no hub id.
        NotHadError: neither cache nor hub has it, or the hub was not asked.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(cached := try_to_load_from_cache(path, "config.json", revision=revision), str):
            return os.path.dirname(cached)
        get_hf_file_metadata(hf_hub_url(path, "config.json", revision=revision), timeout=3)  # the download would retry
        return os.path.dirname(hf_hub_download(path, "config.json", revision=revision))
    except HFValidationError:
        raise ConfigError(
            f"{key}: no such folder; found: {path!r}, which cannot be a hub id either; expected: a model folder; where "
            f"another run makes it, that run comes first"
        ) from None
    except Exception as error:  # offline, gated, missing: each has its own class in each version of the client
        raise NotHadError(
            f"{key}: {path!r}: no config.json on this machine (no such folder, nothing in the cache), and not had from the "
            f"hub: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None
