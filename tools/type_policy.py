"""Which type llama-quantize gives each tensor.

The rules are those of llama.cpp pull request 21089 at f112d6de7, src/llama-quant.cpp, reduced to
the file types that this program can write. A format that no llama.cpp file type stands for is
treated as pull request 21089 treats its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import gguf

from gguf_io import GgmlType, GgufFile, GgufTensor, TensorType, resolve_type
from gguf_io.types import FLOAT_TYPES, can_quantize
from tbq import BackendError, Format, InputError

# Two-dimensional weights that are left alone wherever these stand in the name.
LEFT_ALONE = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
LEFT_ALONE_NAMES = ("position_embd.weight", "token_types.weight")
OUTPUT = "output.weight"
TOKEN_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
ATTENTION_V = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")
ATTENTION_K = "attn_k.weight"

# What a type falls back to when its blocks do not divide the row; f16 if that does not fit either.
FALLBACK = {"tq1_0": "q4_0", "tq2_0": "q4_0", "q4_K": "q5_0", "q6_K": "q8_0"}

# Names of llama.cpp's file types where they are not MOSTLY_ plus the name of the type.
FILE_TYPE_NAMES = {"f32": "ALL_F32", "mxfp4": "MOSTLY_MXFP4_MOE"}


@dataclass(frozen=True)
class Options:
    """The flags of llama-quantize that choose types.

    Attributes:
        target: the TYPE argument.
        pure: give every tensor the target type.
        overrides: (pattern, type) pairs, searched in the tensor name; the first match wins.
        output_type, embedding_type: for output.weight and the token embeddings.
        leave_output: keep output.weight.
        include, exclude: patterns of which one, or none, must be found in a name.
        allow_requantize: allow quantised tensors to be quantised again.
    """

    target: Format | GgmlType
    pure: bool = False
    overrides: Sequence[tuple[re.Pattern, Format | GgmlType]] = ()
    output_type: Format | GgmlType | None = None
    embedding_type: Format | GgmlType | None = None
    leave_output: bool = False
    include: Sequence[re.Pattern] = ()
    exclude: Sequence[re.Pattern] = ()
    allow_requantize: bool = False


@dataclass(frozen=True)
class Choice:
    """The type a tensor gets, with a note for the user where it is not the obvious one."""

    tensor: GgufTensor
    type: TensorType
    note: str = ""
    fallback: bool = False

    @property
    def converts(self) -> bool:
        """Whether the data has to be decoded and encoded."""
        return self.type != self.tensor.format


def choose_types(file: GgufFile, options: Options, order: Iterable[GgufTensor]) -> list[Choice]:
    """Choose the type of every tensor, in the given order.

    Raises:
        InputError: a type does not fit a row and nothing may replace it, a quantised tensor would
            be quantised again, or a tensor that has to be converted cannot be decoded.
        BackendError: gguf-py cannot produce a type that was asked for.
    """
    for kind in _asked_for(options):
        if isinstance(kind, Format) and kind.sibling:
            need = f"a format that stands alone: its codes live in a sibling {kind.sibling} row"
            raise InputError("TYPE", kind.key, need)
    return [_choose(file, options, tensor) for tensor in order]


def file_type(target: Format | GgmlType) -> int | None:
    """Return llama.cpp's number for a file that is mostly of this type; None if it has none."""
    if isinstance(target, Format):
        return target.ftype
    name = FILE_TYPE_NAMES.get(target.name, f"MOSTLY_{target.name.upper()}")
    number = getattr(gguf.LlamaFileType, name, None)
    return None if number is None else int(number)


def is_quantized(kind: TensorType) -> bool:
    """Tell whether values share blocks."""
    return isinstance(kind, Format) or (isinstance(kind, GgmlType) and kind.is_quantized)


def left_alone(tensor: GgufTensor, options: Options) -> str:
    """Return why llama-quantize, or a flag, leaves a tensor alone; empty if it does not."""
    name = tensor.name
    if all(n == 1 for n in tensor.ggml_shape[1:]):
        return "fewer than two dimensions"
    # As llama.cpp compares it; like there, a name of five bytes passes too.
    if name.rfind("weight") != len(name) - 6:
        return "not a weight"
    if name in LEFT_ALONE_NAMES or any(part in name for part in LEFT_ALONE):
        return "of a kind that is never quantised"
    if name == OUTPUT and options.leave_output:
        return "--leave-output-tensor"
    if options.include and not any(p.search(name) for p in options.include):
        return "not matched by --include"
    if any(p.search(name) for p in options.exclude):
        return "matched by --exclude"
    return ""


def _choose(file: GgufFile, options: Options, tensor: GgufTensor) -> Choice:
    reason = left_alone(tensor, options)
    if reason:
        return Choice(tensor, tensor.format)
    choice = _target(file, options, tensor)
    if not choice.converts:
        return choice
    if not can_quantize(choice.type):
        if choice.type in _asked_for(options):
            raise BackendError("gguf-py", f"cannot quantise to {choice.type.name} ({tensor.name})")
        note = f"llama-quantize would choose {choice.type.name}, which gguf-py cannot produce"
        return Choice(tensor, tensor.format, f"{note}; kept as {tensor.format.name}")
    if tensor.ggml_shape[0] % choice.type.block_values:
        got = f"rows of {tensor.ggml_shape[0]} values"
        need = f"a multiple of {choice.type.block_values} for {choice.type.name}"
        hint = "; without --pure it falls back to another type" if options.pure else ""
        raise InputError(f"tensor {tensor.name!r}", got, need + hint)
    requantizes = is_quantized(tensor.format) and is_quantized(choice.type)
    if requantizes and not options.allow_requantize:
        got = f"{tensor.format.name}, which is quantised already"
        need = f"--allow-requantize to quantise it again, to {choice.type.name}"
        raise InputError(f"tensor {tensor.name!r}", got, need)
    tensor.dequantize_rows(0, 1)  # fails here, before anything is written, if it cannot be done
    return choice


def _asked_for(options: Options) -> list[TensorType]:
    """Return the types that the user named, as opposed to those of a mixture."""
    named = [options.target, options.output_type, options.embedding_type]
    return [kind for kind in (*named, *(kind for _, kind in options.overrides)) if kind]


def _target(file: GgufFile, options: Options, tensor: GgufTensor) -> Choice:
    if tensor.name in TOKEN_EMBEDDINGS and options.embedding_type is not None:
        return Choice(tensor, options.embedding_type)
    if tensor.name == OUTPUT and options.output_type is not None:
        return Choice(tensor, options.output_type)
    if options.pure or not is_quantized(options.target):
        return Choice(tensor, options.target)
    for pattern, kind in options.overrides:
        if pattern.search(tensor.name):
            note = f"manual override: {options.target.name} -> {kind.name}"
            return _fitting(tensor, kind, note if kind != options.target else "")
    return _fitting(tensor, _mixture(file, options, tensor), "")


def _mixture(file: GgufFile, options: Options, tensor: GgufTensor) -> TensorType:
    """The type that the target's mixture has for a tensor, before its shape is looked at."""
    target, name = options.target, tensor.name
    architecture = file.metadata.get("general.architecture")
    eight_experts = file.metadata.get(f"{architecture}.expert_count") == 8
    tied = OUTPUT not in file.tensors
    if name == OUTPUT or (tied and name in TOKEN_EMBEDDINGS):
        if options.output_type is not None:
            return options.output_type
        fits = tensor.ggml_shape[0] % target.block_values == 0
        if target.name in ("q8_0", "mxfp4") or architecture == "falcon" or not fits:
            return resolve_type("q8_0")
        return resolve_type("q6_K")
    if target.name == "mxfp4":
        experts = len(tensor.ggml_shape) > 2 and tensor.ggml_shape[2] > 1
        return target if experts else resolve_type("q8_0")
    if name in TOKEN_EMBEDDINGS:
        as_tbq = isinstance(target, Format) or target.name in ("tq1_0", "tq2_0")
        return resolve_type("q4_K") if as_tbq else target
    if eight_experts and any(part in name for part in (*ATTENTION_V, ATTENTION_K)):
        return resolve_type("q8_0")
    return target


def _fitting(tensor: GgufTensor, kind: TensorType, note: str) -> Choice:
    """Fall back to a smaller block where the type's does not divide the row."""
    columns = tensor.ggml_shape[0]
    if columns % kind.block_values == 0:
        return Choice(tensor, kind, note)
    smaller = "q4_0" if isinstance(kind, Format) else FALLBACK.get(kind.name)
    if smaller is None:
        got = f"rows of {columns} values"
        need = f"a multiple of {kind.block_values} for {kind.name}, which has no fallback"
        raise InputError(f"tensor {tensor.name!r}", got, need)
    replacement = resolve_type(smaller)
    if columns % replacement.block_values:
        replacement = resolve_type(FLOAT_TYPES[1])
    note = (
        f"{columns} columns are not divisible by {kind.block_values}, required for {kind.name}; "
        f"falling back to {replacement.name}"
    )
    return Choice(tensor, replacement, note, fallback=True)
