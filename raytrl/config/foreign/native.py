"""What another library's own config class accepts, read from its installed source without importing it.

`training:` is TRL's config class and `lora:` is PEFT's; importing either costs 6 to 30 s, so a misspelt key would
be answered after that long. Their fields, annotations and defaults stand in plain dataclass bodies, which `ast`
reads in milliseconds. The classes themselves check the values once more when the worker builds them.
"""

import ast
import functools
import importlib.util
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from raytrl.errors import ConfigError


@dataclass(frozen=True)
class NativeField:
    """One field of a foreign config class; `default` is source text, None where the field has none."""

    name: str
    type: Any
    default: str | None
    help: str


@dataclass(frozen=True)
class NativeClass:
    """A config class of another library: where it stands and what it is called there."""

    package: str
    file: str
    name: str

    def __str__(self) -> str:
        return f"{self.package}.{self.name}"


LORA_CLASS = NativeClass("peft", "tuners/lora/config.py", "LoraConfig")
ZERO_CLASS = NativeClass("deepspeed", "runtime/zero/config.py", "DeepSpeedZeroConfig")
DEEPSPEED_SECTIONS = {
    "bf16": NativeClass("deepspeed", "runtime/precision_config.py", "DeepSpeedBF16Config"),
    "fp16": NativeClass("deepspeed", "runtime/precision_config.py", "DeepSpeedFP16Config"),
    "zero_optimization.offload_optimizer": NativeClass(
        "deepspeed", "runtime/zero/offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig"
    ),
    "zero_optimization.offload_param": NativeClass(
        "deepspeed", "runtime/zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig"
    ),
}
DATASET_BUILDERS = {
    "json": NativeClass("datasets", "packaged_modules/json/json.py", "JsonConfig"),
    "csv": NativeClass("datasets", "packaged_modules/csv/csv.py", "CsvConfig"),
    "parquet": NativeClass("datasets", "packaged_modules/parquet/parquet.py", "ParquetConfig"),
    "text": NativeClass("datasets", "packaged_modules/text/text.py", "TextConfig"),
}
# Base classes that a file imports from a package's top level, whose lazy __init__ does not say where they stand.
_TOP_LEVEL = {"TrainingArguments": "training_args.py", "PeftConfig": "config.py"}
_TYPING_NAMES: dict[str, Any] = {
    **{t.__name__: t for t in (int, float, str, bool, list, dict, tuple)},
    **{name: getattr(typing, name) for name in ("Any", "Literal", "Optional", "Union", "List", "Dict")},
    "IntervalStrategy": str,
    "SaveStrategy": str,
    "SchedulerType": str,
    "OptimizerNames": str,
    "HubStrategy": str,
    "None": None,
}


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{package}: not installed in this Python environment; install raytrl with its dependencies")
    return Path(spec.origin).parent


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def native_fields(native: NativeClass) -> dict[str, NativeField]:
    """Fields of a foreign dataclass or pydantic model, its bases' first, by name."""
    root = package_folder(native.package)
    return _fields_in(root, root / native.file, native.name)


def native_default(native: NativeClass, name: str) -> Any:
    """The default of a field where it is a literal, else None."""
    try:
        return ast.literal_eval(native_fields(native)[name].default or "None")
    except ValueError:
        return None


def _fields_in(root: Path, path: Path, class_name: str) -> dict[str, NativeField]:
    module = _parse(path)
    definition = next((n for n in module.body if isinstance(n, ast.ClassDef) and n.name == class_name), None)
    if definition is None:
        raise ConfigError(f"{path}: class {class_name} not found; this version of the library is not supported")
    fields: dict[str, NativeField] = {}
    for base in definition.bases:
        if isinstance(base, ast.Name) and (location := _locate(root, path, module, base.id)):
            fields |= _fields_in(*location, base.id)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            field = _field(node.target.id, node)
            if not field.name.startswith("_"):
                fields[field.name] = field
    return fields


def _locate(root: Path, path: Path, module: ast.Module, name: str) -> tuple[Path, Path] | None:
    """(package folder, file) of a base class, or None where it has no config fields of its own."""
    if any(isinstance(n, ast.ClassDef) and n.name == name for n in module.body):
        return root, path
    for node in ast.walk(module):
        if not isinstance(node, ast.ImportFrom) or name not in {alias.name for alias in node.names}:
            continue
        if node.level:
            folder = path.parent
            for _ in range(node.level - 1):
                folder = folder.parent
        else:
            package, _, rest = (node.module or "").partition(".")
            if package not in ("trl", "transformers", "peft", "deepspeed"):
                return None
            root = folder = package_folder(package)
            node = ast.ImportFrom(module=rest or None, names=node.names, level=0)
        file = folder.joinpath(*(node.module or "").split(".")).with_suffix(".py") if node.module else folder
        if not file.is_file() and name in _TOP_LEVEL:
            file = root / _TOP_LEVEL[name]
        return (root, file) if file.is_file() else None
    return None


def _field(name: str, node: ast.AnnAssign) -> NativeField:
    default: str | None = None
    text = ""
    value = node.value
    if isinstance(value, ast.Call) and getattr(value.func, "id", "") in ("field", "Field"):
        for keyword in value.keywords:
            if keyword.arg == "default":
                default = ast.unparse(keyword.value)
            elif keyword.arg == "default_factory":
                default = f"{ast.unparse(keyword.value)}()"
            elif keyword.arg == "metadata":
                text = _help(keyword.value)
        if value.args and default is None:
            default = ast.unparse(value.args[0])
    elif value is not None:
        default = ast.unparse(value)
    return NativeField(name, _type(node.annotation), default, text)


def _help(metadata: ast.expr) -> str:
    try:
        return str(ast.literal_eval(metadata).get("help", ""))
    except ValueError:
        return ""


def _type(annotation: ast.expr) -> Any:
    """The annotation as a type; Any where it names classes that only the library knows."""
    source = annotation.value if isinstance(annotation, ast.Constant) and annotation.value else ast.unparse(annotation)
    try:
        found = eval(str(source), {"__builtins__": {}}, dict(_TYPING_NAMES))  # noqa: S307 (installed library source)
    except (NameError, AttributeError, TypeError, SyntaxError):
        return Any
    return type(None) if found is None else found


def is_word_for_bool(kind: Any, value: Any) -> bool:
    """Whether a word such as `yes`, or a number in quotes, stands where a type has true and false and no words.

    pydantic takes these for booleans, the libraries themselves take every word for true.
    """
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    words = {"yes", "no", "on", "off", "y", "n", "t", "f", "1", "0"}
    return bool in kinds and str not in kinds and isinstance(value, str) and value.lower() in words


def words_for_bools(where: str, values: Mapping[str, Any]) -> list[str]:
    """The same of values whose types only the library knows, one line each: none of them takes `yes` or `off` as a word."""
    hint = "expected: true or false, or a number without quotes"
    return [f"{where}{key}: found: {v!r}; {hint}" for key, v in values.items() if is_word_for_bool(bool, v)]


def check_values(where: str, native: NativeClass, values: dict[str, Any]) -> list[str]:
    """Problems of the values given for known fields, one line each; YAML text such as '1e-5' is coerced, in place."""
    problems = []
    for key, field in native_fields(native).items():
        if key not in values or field.type is Any:
            continue
        if is_word_for_bool(field.type, values[key]):
            problems.append(f"{where}.{key}: found: {values[key]!r}; expected: true or false ({native})")
            continue
        try:
            coerced = TypeAdapter(field.type).validate_python(values[key])
        except ValidationError as error:
            problems.append(
                f"{where}.{key}: {error.errors()[0]['msg'].lower()}; found: {values[key]!r}; "
                f"expected: {type_name(field.type)} ({native})"
            )
        else:
            # A number stays what it was written as: 3 for a float field is 3, not 3.0, in the resolved file.
            # But 1e3 for a count, which is a float to YAML, is the count 1000.
            if isinstance(values[key], str) or isinstance(coerced, bool | int):
                values[key] = coerced
    return problems


def type_name(kind: Any) -> str:
    """`int | None` rather than `typing.Optional[int]`."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join(type_name(a) for a in typing.get_args(kind))
    if kind is type(None):
        return "null"
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")
