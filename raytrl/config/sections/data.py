"""`data`: where the rows come from."""

import re
from typing import Any

from pydantic import ConfigDict, model_validator

from raytrl.config.foreign.native import (
    DATASET_BUILDERS,
    is_word_for_bool,
    native_fields,
)
from raytrl.config.renamed import unknown_key
from raytrl.config.sections.base import Section

LOAD_DATASET_KEYS = ("path", "name", "data_dir", "data_files", "split", "revision")
_BUILDERS = {
    "json": "json",
    "jsonl": "json",
    "ndjson": "json",
    "csv": "csv",
    "tsv": "csv",
    "parquet": "parquet",
    "txt": "text",
}


class DataSource(Section):
    """Arguments of `datasets.load_dataset`, and optionally a function that reshapes the rows."""

    model_config = ConfigDict(extra="allow")

    path: str
    """A builder (json, csv, parquet, text), the folder of a saved dataset, or a hub id."""
    name: str | None = None
    """The configuration of a hub dataset that has several. null: its default one."""
    data_dir: str | None = None
    """A folder that the builder reads, or a folder of the hub dataset. null: none."""
    data_files: str | list[str] | None = None
    """The files that the builder reads: paths, patterns such as data/*.jsonl, or URLs. null: none are named."""
    split: str = "train"
    """Which split is taken, also a part of one such as train[:1000]. Files without splits of their own are train."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset. null: its main branch."""
    transform: str | None = None
    """file.py:function or module:function that is given the Dataset and returns the one to use. null: as it is."""

    @property
    def named_files(self) -> list[str]:
        """`data_files` as a list; empty where none are named."""
        return [self.data_files] if isinstance(self.data_files, str) else list(self.data_files or [])

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = re.search(r"\.(\w+?)(?:\.(?:gz|bz2|xz|zst|lz4))?$", value.lower())
        if found is None or found[1] not in _BUILDERS:
            return {"path": value}
        return {"path": _BUILDERS[found[1]], "data_files": value} | ({"sep": "\t"} if found[1] == "tsv" else {})

    @model_validator(mode="after")
    def _builder_options(self) -> "DataSource":
        known = native_fields(DATASET_BUILDERS[self.path]) if self.path in DATASET_BUILDERS else {}
        names = [*LOAD_DATASET_KEYS, "transform", *known]
        unknown = [unknown_key("", key, names) for key in (self.model_extra or {}) if key not in known]
        if unknown:
            raise ValueError("; ".join(unknown))
        for key, value in (self.model_extra or {}).items():
            if is_word_for_bool(known[key].type, value):
                raise ValueError(f"{key}: found: {value!r}; expected: true or false")
        if self.path in DATASET_BUILDERS and self.data_files is None and self.data_dir is None:
            raise ValueError(f"data_files: missing; the {self.path} builder reads files")
        if self.transform is not None and not re.fullmatch(r"[^:]+:\w+", self.transform):
            raise ValueError(f"transform: found: {self.transform!r}; expected: file.py:function or module:function")
        return self


class DataSection(Section):
    """What is trained on, and what is evaluated on."""

    train: DataSource
    """The rows to train on: arguments of datasets.load_dataset, or one string, a file or a hub id."""
    eval: DataSource | None = None
    """The rows to evaluate on, likewise. null: no evaluation."""
