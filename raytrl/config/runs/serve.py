"""The run file of `raytrl serve`: a finished model, and how it is served."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from raytrl.config.runs.base import ModelUse, Processes, Run, or_raise
from raytrl.config.sections.engines import Asked, chosen_engine, engine_problems, engine_words
from raytrl.config.sections.rollout import RolloutSection
from raytrl.config.sections.serve import ServeSection

# What is said of a run that samples, and where it stands here; longer ones first.
_KEYS = {
    "lora (the adapter is merged on the rollout side, or several are held with ppo.max_lag)": "serve.adapters",
    "seed (every response has a seed of its own)": "seed",
    "raytrl, which tokenizes itself": "raytrl",
    "rollout.versions": "serve.adapters",
    "rollout.actors": "serve.replicas",
    "lora.r": "serve.adapters",
    "model.path": "run",
    "model.tokenizer": "run",
    "model.dtype": "serve.dtype",
    "model.trust_remote_code": "raytrl: no code that comes with a model is run",
    "rollout.": "serve.",
}
_ONLY_FOR_POLICIES = ("engine", "engine_args", "adapters", "max_tokens", "max_n")


class ServeRun(Run):
    """A model that is finished, behind HTTP until it is stopped."""

    launcher: ClassVar[str] = "raytrl.launch.runs.serve:ServeKind"

    kind: Literal["serve"] = "serve"
    """A policy behind an API like OpenAI's, a reward model behind POST /score; which of them, the model says."""
    run: str
    """The run directory whose model is served, or the folder of a model."""
    name: str = ""
    """The run directory of the server is <output_dir>/<name>. Left out: serve-<run>, beside the run."""
    serve: ServeSection = ServeSection()
    """Its address, its limits, and who may ask."""

    @model_validator(mode="before")
    @classmethod
    def _named_like_its_run(cls, values: Any) -> Any:
        """Its own directory lies beside that of the run: serve-<run>."""
        if not isinstance(values, dict) or not isinstance(values.get("run"), str):
            return values
        folder = Path(values["run"])
        named = {"name": f"serve-{_name_of(folder)}"}
        if (folder / "manifest.json").is_file():
            named["output_dir"] = str(folder.parent)
        return named | {key: value for key, value in values.items() if value is not None or key not in named}

    @property
    def model_path(self) -> str:
        """The folder of the model."""
        return _model_in(Path(self.run))

    @property
    def scores(self) -> bool:
        """Whether it is a reward model, which scores; else it is a policy, which answers."""
        return _is_classifier(Path(self.model_path))

    @property
    def max_tokens(self) -> int | None:
        """Of a request and its response, by the model's config; None where that does not say."""
        try:
            config = json.loads((Path(self.model_path) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        found = (config.get("text_config") or config).get("max_position_embeddings") or config.get("n_positions")
        return found if isinstance(found, int) else None

    @property
    def served_name(self) -> str:
        """Of the model in requests, and of the application."""
        return self.serve.name or _name_of(Path(self.run))

    @property
    def sampling(self) -> RolloutSection:
        """What it asks of an engine, as a run that samples would say it."""
        serve = self.serve
        return RolloutSection(resources=serve.resources, engine=serve.engine, engine_args=serve.engine_args)

    @property
    def asked(self) -> Asked:
        return Asked(self.sampling, [self.model_path], elsewhere=self._elsewhere)

    @property
    def uses_gpu(self) -> bool:
        return self.serve.uses_gpu

    def processes(self) -> tuple[Processes, ...]:
        serve = self.serve
        return (Processes("serve.replicas", "server", serve, serve.replicas, serve.replicas),)

    def models(self) -> tuple[ModelUse, ...]:
        return (ModelUse("run", self.model_path, "score" if self.scores else "causal", ("serve.replicas",)),)

    def bf16_on_cpu(self) -> list[str]:
        return ["serve.dtype"] if self.serve.dtype == "bfloat16" and not self.uses_gpu else []

    def in_words(self, rows: Mapping[str, int], microbatch: int | None) -> list[tuple[str, str]]:
        serve = self.serve
        where = f"http://{serve.host}:{serve.port}{serve.route.removesuffix('/')}"
        what = "/score" if self.scores else "/v1 (completions, chat/completions, models)"
        words = [("serves", f"{self.served_name!r} at {where}{what}")]
        if not self.scores:
            words.append(("engine", _own_keys(engine_words(self.asked))))
        words += [("adapter", f"{name}: {folder}") for name, folder in serve.adapters.items()]
        open_to = (
            "this machine alone, without a key" if serve.api_key is None else f"who has the key in {serve.api_key}"
        )
        words.append(("open to", open_to))
        words.append(
            (
                "at a time",
                f"{serve.max_ongoing} requests a replica, {serve.max_queued} wait; each of {serve.max_body_bytes:,} bytes and "
                f"{serve.request_timeout_s:g} s at most",
            )
        )
        return words

    @model_validator(mode="after")
    def _agreement(self) -> "ServeRun":
        if problem := _why_not_served(self.run):
            raise ValueError(problem)
        serve, problems = self.serve, list[str]()
        if self.scores:
            fields = ServeSection.model_fields
            problems += [
                f"serve.{key}: does nothing for a reward model; found: {getattr(serve, key)!r}; leave it out"
                for key in _ONLY_FOR_POLICIES
                if getattr(serve, key) != fields[key].default
            ]
            if serve.gpus > 1:
                problems.append(
                    f"serve.resources.GPU: a reward model computes on one GPU; found: {serve.gpus:g}; expected: at most 1, and "
                    f"more serve.replicas"
                )
        else:
            # auto becomes a name here, so that the file in the run directory says what it was served with.
            self.__dict__["serve"] = serve.chosen(engine=chosen_engine(self.asked))
            problems += map(_own_keys, engine_problems(self.asked))
            if serve.label is not None:
                problems.append(f"serve.label: does nothing for a policy; found: {serve.label!r}; leave it out")
            if self.served_name in serve.adapters:
                problems.append(
                    f"serve.adapters.{self.served_name}: the model itself has that name; expected: another, or serve.name"
                )
        return or_raise(problems, self)


def _own_keys(line: str) -> str:
    """What is said of a run that samples, with the keys of this kind."""
    for theirs, ours in _KEYS.items():
        line = line.replace(theirs, ours)
    return line


def _name_of(folder: Path) -> str:
    """Of a run, or of a model; the model of a run is called after it."""
    absolute = folder.absolute()
    parts = [part for part in absolute.parts if part not in ("model", "merged")]
    return parts[-1] if parts else absolute.name


def _model_in(folder: Path) -> str:
    """A run directory's model, or the folder itself; of a LoRA run the merged model beside its adapter."""
    place = folder / "model" if (folder / "manifest.json").is_file() else folder
    if (place / "adapter_config.json").is_file() and not (place / "config.json").is_file():
        place = place / "merged"
    return str(place)


def _is_classifier(folder: Path) -> bool:
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return False
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def _why_not_served(run: str) -> str | None:
    """Why nothing can be served of a place; None: something can."""
    expected = "expected: the directory of a finished run, or the folder of a model"
    if "://" in run:
        return f"run: a model is served from a disk; found: {run!r}; {expected}; copy it to one that every node sees"
    folder = Path(run)
    if not folder.is_dir():
        return f"run: no such folder; found: {run!r}; {expected}"
    manifest = folder / "manifest.json"
    if manifest.is_file():
        try:
            said = json.loads(manifest.read_text(encoding="utf-8"))
            kind, state = said.get("kind"), said.get("state")
        except (OSError, ValueError, AttributeError) as error:
            return f"run: {str(manifest)!r} cannot be read: {error}; {expected}"
        if kind in ("eval", "serve"):
            return f"run: found: {run!r}, a run of kind {kind}, which has no model of its own; {expected}"
        if state != "done":
            return f"run: is not finished; found: {run!r}, in state {state!r}; {expected}"
    place = Path(_model_in(folder))
    if not (place / "config.json").is_file():
        return f"run: no model in it; found: no {str(place / 'config.json')!r}; {expected}"
    return None
