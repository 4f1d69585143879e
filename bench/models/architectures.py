"""Parameter lists of language models with their names, from the few numbers that describe a model.

Linear weights are `(out, in)`. Names are those of the model in transformers.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Shape = tuple[int, ...]
# What changes the parameter list of a llama-like model in a way that is not known here.
UNKNOWN = ("attention_bias", "mlp_bias", "num_local_experts", "num_experts", "n_routed_experts")
LLAMA_LIKE = ("llama", "mistral")


class Param(NamedTuple):
    """A parameter: its name in the model and its whole shape."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Model:
    """A parameter list; `heads`: in how many parts attention can be cut, where that is known."""

    name: str
    params: tuple[Param, ...]
    heads: int | None = None

    @property
    def count(self) -> int:
        return sum(math.prod(param.shape) for param in self.params)

    @property
    def facts(self) -> dict[str, Any]:
        """What results say of it."""
        return {"model": self.name, "params": self.count, "tensors": len(self.params)}


@dataclass(frozen=True)
class Llama:
    """The numbers of a llama-like model, as its config.json has them."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int = 128_256
    tied: bool = False
    head_size: int | None = None

    def layer(self, prefix: str = "") -> Iterator[Param]:
        """The nine parameters of a layer: q, k, v, o, gate, up, down and two norms."""
        size = self.head_size or self.hidden // self.heads
        queries, keys = self.heads * size, self.kv_heads * size
        hidden, intermediate = self.hidden, self.intermediate
        yield Param(f"{prefix}self_attn.q_proj.weight", (queries, hidden))
        yield Param(f"{prefix}self_attn.k_proj.weight", (keys, hidden))
        yield Param(f"{prefix}self_attn.v_proj.weight", (keys, hidden))
        yield Param(f"{prefix}self_attn.o_proj.weight", (hidden, queries))
        yield Param(f"{prefix}mlp.gate_proj.weight", (intermediate, hidden))
        yield Param(f"{prefix}mlp.up_proj.weight", (intermediate, hidden))
        yield Param(f"{prefix}mlp.down_proj.weight", (hidden, intermediate))
        yield Param(f"{prefix}input_layernorm.weight", (hidden,))
        yield Param(f"{prefix}post_attention_layernorm.weight", (hidden,))

    def params(self) -> Iterator[Param]:
        yield Param("model.embed_tokens.weight", (self.vocab, self.hidden))
        for i in range(self.layers):
            yield from self.layer(f"model.layers.{i}.")
        yield Param("model.norm.weight", (self.hidden,))
        if not self.tied:
            yield Param("lm_head.weight", (self.vocab, self.hidden))

    def model(self, name: str) -> Model:
        return Model(name, tuple(self.params()), math.gcd(self.heads, self.kv_heads))


LLAMAS = {
    "llama3-8b": Llama(4096, 32, 32, 8, 14_336),
    "llama3-70b": Llama(8192, 80, 64, 8, 28_672),
    "llama3-405b": Llama(16_384, 126, 128, 8, 53_248),
}
GPT2 = (12, 768, 50_257, 1024)
# A tensor of every row class that kernels/launch.py can choose; rows of 1023 elements are unaligned.
ROW_CLASSES: tuple[Shape, ...] = (
    *((65_536, 64), (16_384, 256), (4096, 1024), (1024, 4096), (512, 8192), (128, 32_768)),
    *((32, 131_072), (4096, 1023)),
)
NAMES = ("gpt2", *LLAMAS, "row-classes")


def gpt2(layers: int, width: int, vocab: int, context: int) -> Iterator[Param]:
    """GPT-2 with a tied head: two embeddings, `layers` blocks of twelve tensors, one norm."""
    yield Param("transformer.wte.weight", (vocab, width))
    yield Param("transformer.wpe.weight", (context, width))
    for i in range(layers):
        block = f"transformer.h.{i}."
        yield from _with_bias(f"{block}ln_1", (width,))
        yield from _with_bias(f"{block}attn.c_attn", (3 * width, width))
        yield from _with_bias(f"{block}attn.c_proj", (width, width))
        yield from _with_bias(f"{block}ln_2", (width,))
        yield from _with_bias(f"{block}mlp.c_fc", (4 * width, width))
        yield from _with_bias(f"{block}mlp.c_proj", (width, 4 * width))
    yield from _with_bias("transformer.ln_f", (width,))


def _with_bias(name: str, shape: Shape) -> tuple[Param, Param]:
    return Param(f"{name}.weight", shape), Param(f"{name}.bias", shape[:1])


def get(name: str) -> Model:
    """A model by its name."""
    if name == "gpt2":
        return Model(name, tuple(gpt2(*GPT2)))
    if name == "row-classes":
        rows = (Param(f"rows-of-{shape[1]}.weight", shape) for shape in ROW_CLASSES)
        return Model(name, (*rows, Param("bias", (4096,))))
    if name not in LLAMAS:
        raise ValueError(
            f"no model is named {name!r}; there are {', '.join(NAMES)}; others: --hf-config or --shapes"
        )
    return LLAMAS[name].model(name)


def from_config(path: Path) -> Model:
    """The model of a config.json of transformers, if it is like Llama."""
    config = _read(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a config.json: it holds a {type(config).__name__}, not an object")
    kind = config.get("model_type")
    if kind not in LLAMA_LIKE:
        raise ValueError(
            f"{path}: model_type {kind!r} is not known here, only {', '.join(LLAMA_LIKE)}; "
            'write its parameters as [{"name", "shape"}, ...] and use --shapes'
        )
    if odd := [key for key in UNKNOWN if config.get(key)]:
        raise ValueError(f"{path}: {', '.join(odd)} adds parameters that are not known here; use --shapes")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if absent := [key for key in names if not _counts(config.get(key))]:
        raise ValueError(f"{path}: {', '.join(absent)} must be a positive integer")
    hidden, layers, heads, intermediate, vocab = (config[key] for key in names)
    kv_heads = config.get("num_key_value_heads") or heads
    tied = bool(config.get("tie_word_embeddings", False))
    made = Llama(hidden, layers, heads, kv_heads, intermediate, vocab, tied, config.get("head_dim"))
    return made.model(path.parent.name or path.stem)


def from_shapes(path: Path) -> Model:
    """A list of parameters from a file: [{"name": "fc.weight", "shape": [10, 20]}, ...]."""
    entries = _read(path)
    form = 'expected [{"name": "fc.weight", "shape": [10, 20]}, ...]'
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} holds no list of parameters: {form}")
    params = []
    for index, entry in enumerate(entries):
        shape = entry.get("shape") if isinstance(entry, dict) else None
        named = isinstance(entry, dict) and isinstance(entry.get("name"), str)
        if not named or not isinstance(shape, list) or not all(map(_counts, shape)):
            raise ValueError(f"{path}: entry {index} is {json.dumps(entry)[:80]}; {form}")
        params.append(Param(entry["name"], tuple(shape)))
    return Model(path.stem, tuple(params))


def chosen(options: argparse.Namespace) -> Model:
    """The model that the arguments name."""
    if options.hf_config:
        return from_config(options.hf_config)
    if options.shapes:
        return from_shapes(options.shapes)
    return get(options.model)


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
