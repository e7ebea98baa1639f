"""The shape of a model of a usual architecture, counted from its config.json alone.

To count on torch's meta device takes seconds of imports before a plan can be refused. Architectures and values that are
not known here are counted there; that both agree is what tests/unit/test_shapes.py holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytrl.config.runs.base import Head


@dataclass(frozen=True)
class Linear:
    """One linear layer below the output head, by its name in the model."""

    name: str
    num_in: int
    num_out: int


@dataclass(frozen=True)
class ModelShape:
    """What memory and arithmetic of a model follow from."""

    parameters: int  # shared ones counted once
    linears: tuple[Linear, ...]
    modules: Mapping[str, int]  # name of every module → parameters in it, for LoRA's `modules_to_save`
    hidden: int
    layers: int
    vocab: int
    kv_width: int  # numbers that a layer's cache holds for a token, keys and values together
    architecture: str
    file_size: int = 4  # bytes of one number in its weight files

    @property
    def linear_width(self) -> int:
        """Inputs and outputs of all linear layers, numbers a token."""
        return sum(linear.num_in + linear.num_out for linear in self.linears)

    @property
    def widest(self) -> int:
        return max((max(linear.num_in, linear.num_out) for linear in self.linears), default=self.hidden)


_LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
# What a file may leave out differs from architecture to architecture; with these there is nothing to guess.
_LLAMA_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "tie_word_embeddings"),
)
_GPT2_KEYS = ("n_embd", "n_layer", "n_head", "n_positions", "vocab_size")
_FILE_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
Parameters = list[tuple[str, int]]  # name, numbers in it


def shape_of_values(values: Mapping[str, Any], head: Head) -> ModelShape | None:
    """The shape, or None where this module does not know how to count."""
    family = values.get("model_type")
    if family in _LLAMAS and all(values.get(key) is not None for key in _LLAMA_KEYS):
        if family == "qwen3" and values.get("head_dim") is None:
            return None
        linears, parameters = _llama(values, family)
        prefix, embedding = "model", "model.embed_tokens"
        layers, heads, hidden = (values[key] for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
        kv_heads, tied = values["num_key_value_heads"], bool(values["tie_word_embeddings"])
    elif family == "gpt2" and all(values.get(key) is not None for key in _GPT2_KEYS):
        if values.get("add_cross_attention"):
            return None
        linears, parameters = _gpt2(values)
        prefix, embedding = "transformer", "transformer.wte"
        layers, heads, hidden = (values[key] for key in ("n_layer", "n_head", "n_embd"))
        kv_heads, tied = heads, bool(values.get("tie_word_embeddings", True))
    else:
        return None
    vocab = int(values["vocab_size"])
    counted = {f"{embedding}.weight": vocab * hidden}
    counted |= {f"{prefix}.{name}": size for name, size in parameters}
    last = {"lm_head.weight": vocab * hidden} if head == "causal" else {"score.weight": hidden}
    shared = sum(last.values()) if head == "causal" and tied else 0
    modules: dict[str, int] = {}
    for name, size in (counted | last).items():
        parts = name.split(".")[:-1]
        for depth in range(len(parts) + 1):
            place = ".".join(parts[:depth])
            modules[place] = modules.get(place, 0) + size
    modules[""] -= shared
    return ModelShape(
        parameters=modules[""],
        linears=tuple(Linear(f"{prefix}.{linear.name}", linear.num_in, linear.num_out) for linear in linears),
        modules=modules,
        hidden=int(hidden),
        layers=int(layers),
        vocab=vocab,
        kv_width=2 * int(kv_heads) * int(values.get("head_dim") or hidden // heads),
        architecture=str(family),
        file_size=_FILE_SIZES.get(str(values.get("dtype") or values.get("torch_dtype")), 4),
    )


def _llama(values: Mapping[str, Any], family: str) -> tuple[list[Linear], Parameters]:
    hidden, inner = int(values["hidden_size"]), int(values["intermediate_size"])
    heads, kv_heads = int(values["num_attention_heads"]), int(values["num_key_value_heads"])
    head = int(values.get("head_dim") or hidden // heads)
    bias = family == "qwen2" or bool(family != "mistral" and values.get("attention_bias"))
    with_bias = {"q_proj", "k_proj", "v_proj"} if bias else set()
    if bias and family != "qwen2":
        with_bias.add("o_proj")
    if family == "llama" and values.get("mlp_bias"):
        with_bias |= {"gate_proj", "up_proj", "down_proj"}
    of_a_layer = [
        Linear("self_attn.q_proj", hidden, heads * head),
        Linear("self_attn.k_proj", hidden, kv_heads * head),
        Linear("self_attn.v_proj", hidden, kv_heads * head),
        Linear("self_attn.o_proj", heads * head, hidden),
        Linear("mlp.gate_proj", hidden, inner),
        Linear("mlp.up_proj", hidden, inner),
        Linear("mlp.down_proj", inner, hidden),
    ]
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_norm": head, "self_attn.k_norm": head} if family == "qwen3" else {}
    linears, parameters = _stacked("layers", int(values["num_hidden_layers"]), of_a_layer, with_bias, norms)
    return linears, [*parameters, ("norm.weight", hidden)]


def _gpt2(values: Mapping[str, Any]) -> tuple[list[Linear], Parameters]:
    hidden = int(values["n_embd"])
    inner = int(values.get("n_inner") or 4 * hidden)
    of_a_layer = [
        Linear("attn.c_attn", hidden, 3 * hidden),
        Linear("attn.c_proj", hidden, hidden),
        Linear("mlp.c_fc", hidden, inner),
        Linear("mlp.c_proj", inner, hidden),
    ]
    with_bias, norms = {"c_attn", "c_proj", "c_fc"}, {"ln_1": 2 * hidden, "ln_2": 2 * hidden}
    linears, parameters = _stacked("h", int(values["n_layer"]), of_a_layer, with_bias, norms)
    positions = ("wpe.weight", int(values["n_positions"]) * hidden)
    return linears, [positions, *parameters, ("ln_f.weight", 2 * hidden)]


def _stacked(
    name: str, layers: int, linears: Sequence[Linear], with_bias: set[str], norms: Mapping[str, int]
) -> tuple[list[Linear], Parameters]:
    """All layers' linear layers and parameters; a module's bias is counted with its weight."""
    every, parameters = list[Linear](), list[tuple[str, int]]()
    for i in range(layers):
        for linear in linears:
            every.append(Linear(f"{name}.{i}.{linear.name}", linear.num_in, linear.num_out))
            bias = linear.num_out if linear.name.split(".")[-1] in with_bias else 0
            parameters.append((f"{name}.{i}.{linear.name}.weight", linear.num_in * linear.num_out + bias))
        parameters += [(f"{name}.{i}.{norm}.weight", size) for norm, size in norms.items()]
    return every, parameters
