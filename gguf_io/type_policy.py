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

from gguf_io.mixtures import Mixture
from gguf_io.reader import GgufFile, GgufTensor
from gguf_io.types import FLOAT_TYPES, PLAIN_TYPES, TensorType, can_quantize, known, resolve_type
from tbq import BackendError, Format, InputError, counterpart, repackable
from tbq.format import GGML
from tbq.registry import get_dialect

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

# What a type falls back to when its blocks do not divide the row; f16 if that does not fit either.
FALLBACK = {
    "tq1_0": "q4_0",
    "tq2_0": "q4_0",
    "q2_0": "q4_0",
    "q2_K": "q4_0",
    "q3_K": "q4_0",
    "q4_K": "q5_0",
    "q5_K": "q5_1",
    "q6_K": "q8_0",
}

# Names of llama.cpp's file types where they are not MOSTLY_ plus the name of the type.
FILE_TYPE_NAMES = {"f32": "ALL_F32", "mxfp4": "MOSTLY_MXFP4_MOE"} | {
    f"{name}_K": f"MOSTLY_{name.upper()}_K_M" for name in ("q3", "q4", "q5")
}


@dataclass(frozen=True)
class Options:
    """The flags of llama-quantize that choose types.

    Attributes:
        target: the TYPE argument; None if every tensor stays as it is.
        pure: give every tensor the target type.
        overrides: (pattern, type) pairs, searched in the tensor name; the first match wins.
        output_type, embedding_type: for output.weight and the token embeddings.
        leave_output: keep output.weight.
        include, exclude: patterns of which one, or none, must be found in a name.
        allow_requantize: allow quantised tensors to be quantised again.
        to: the dialect, `dialect[@release]`, whose formats tensors of other forks' are given.
        mixture: which of `gguf_io.mixtures` is meant where there are several of the target, such
            as "q4_k_s"; by default the one that llama-quantize calls so.
    """

    target: Format | None
    pure: bool = False
    overrides: Sequence[tuple[re.Pattern[str], Format]] = ()
    output_type: Format | None = None
    embedding_type: Format | None = None
    leave_output: bool = False
    include: Sequence[re.Pattern[str]] = ()
    exclude: Sequence[re.Pattern[str]] = ()
    allow_requantize: bool = False
    to: str | None = None
    mixture: str = ""


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
        FileFormatError: a mixture needs metadata that the file has not.
    """
    for kind in _asked_for(options):
        if kind.sibling:
            need = f"a format that stands alone: its codes live in a sibling {kind.sibling} row"
            raise InputError("TYPE", kind.label, need)
    mixture = Mixture(options.target.name, options.mixture, file) if options.target else None
    return [_choose(file, options, mixture, tensor) for tensor in order]


def file_type(target: Format, mixture: str = "") -> int | None:
    """Return llama.cpp's number for a file that is mostly of this type; None if it has none."""
    if not target.is_ggml:
        return get_dialect(target.dialect).file_type(target)
    name = FILE_TYPE_NAMES.get(target.name, f"MOSTLY_{target.name.upper()}")
    name = f"MOSTLY_{mixture.upper()}" if mixture else name
    number = getattr(gguf.LlamaFileType, name, None)
    return None if number is None else int(number)


def left_alone(tensor: GgufTensor, options: Options) -> str:
    """Return why llama-quantize, or a flag, leaves a tensor alone; empty if it does not."""
    name = tensor.name
    if all(n <= 1 for n in tensor.ggml_shape[1:]):
        return "fewer than two dimensions"
    if not tensor.n_values:
        return "no values"
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


def _choose(
    file: GgufFile, options: Options, mixture: Mixture | None, tensor: GgufTensor
) -> Choice:
    to = options.to if tensor.format.dialect not in (None, GGML) else None
    if to is not None and options.target is None:
        return _moved(tensor, to)
    if options.target is None or mixture is None or left_alone(tensor, options):
        return Choice(tensor, tensor.format) if to is None else _moved(tensor, to)
    if tensor.format.is_ggml and tensor.format.name in PLAIN_TYPES:
        return Choice(
            tensor, tensor.format, f"left alone: {tensor.format.name} is no weight's type"
        )
    choice = _target(file, options, mixture, tensor)
    if not choice.converts:
        return choice
    if not can_quantize(choice.type):
        raise BackendError("gguf-py", f"cannot quantise to {choice.type.name} ({tensor.name})")
    kind = known(choice.type)
    if tensor.row_values % kind.group_values:
        got = f"rows of {tensor.row_values} values"
        need = f"a multiple of {kind.group_values} for {kind.name}"
        hint = "; without --pure it falls back to another type" if options.pure else ""
        raise InputError(f"tensor {tensor.name!r}", got, need + hint)
    tensor.require_decodable()  # fails here, before anything is written, if it cannot be done
    requantizes = tensor.format.is_quantized and kind.is_quantized
    if requantizes and to is not None or repackable(known(tensor.format), kind):
        return choice
    if requantizes and not options.allow_requantize:
        got = f"{tensor.format.name}, which is quantised already"
        need = f"--allow-requantize to quantise it again, to {choice.type.name}"
        raise InputError(f"tensor {tensor.name!r}", got, need)
    return choice


def _moved(tensor: GgufTensor, to: str) -> Choice:
    """Give a tensor the format of another dialect that holds the same, or has the same name."""
    kind = counterpart(known(tensor.format), to)
    if kind is None:
        need = f"a type of {to} that it is to become; none holds the same or has its name"
        raise InputError(f"tensor {tensor.name!r}", tensor.format.label, need)
    if tensor.row_values % kind.group_values:
        need = f"rows of a multiple of {kind.group_values} values for {kind.label}"
        raise InputError(f"tensor {tensor.name!r}", f"rows of {tensor.row_values}", need)
    tensor.require_decodable()
    note = (
        ""
        if repackable(known(tensor.format), kind)
        else f"{tensor.format.label} is quantised again"
    )
    return Choice(tensor, kind, note)


def _asked_for(options: Options) -> list[Format]:
    """Return the types that the user named, as opposed to those of a mixture."""
    named = [options.target, options.output_type, options.embedding_type]
    return [kind for kind in (*named, *(kind for _, kind in options.overrides)) if kind]


def _target(file: GgufFile, options: Options, mixture: Mixture, tensor: GgufTensor) -> Choice:
    if tensor.name in TOKEN_EMBEDDINGS and options.embedding_type is not None:
        return Choice(tensor, options.embedding_type)
    if tensor.name == OUTPUT and options.output_type is not None:
        return Choice(tensor, options.output_type)
    target = options.target
    assert target is not None, "what has no target is left alone"
    if options.pure or not target.is_quantized:
        return Choice(tensor, target)
    for pattern, kind in options.overrides:
        if pattern.search(tensor.name):
            note = f"manual override: {target.name} -> {kind.name}"
            return _fitting(tensor, kind, note if kind != target else "")
    return _fitting(tensor, _mixed(file, options, target, mixture, tensor), "")


def _mixed(
    file: GgufFile, options: Options, target: Format, mixture: Mixture, tensor: GgufTensor
) -> Format:
    """The type that the target's mixture has for a tensor, before its shape is looked at."""
    name = tensor.name
    tied = OUTPUT not in file.tensors
    if name == OUTPUT or (tied and name in TOKEN_EMBEDDINGS):
        if options.output_type is not None:
            return options.output_type
        fits = tensor.row_values % target.group_values == 0
        if target.name in ("q8_0", "mxfp4") or file.architecture == "falcon" or not fits:
            return resolve_type("q8_0")
        return resolve_type("q6_K")
    if target.name == "mxfp4":
        experts = len(tensor.ggml_shape) > 2 and tensor.ggml_shape[2] > 1
        return target if experts else resolve_type("q8_0")
    if name in TOKEN_EMBEDDINGS:
        as_tbq = not target.is_ggml or target.name in ("tq1_0", "tq2_0", "q2_0")
        return resolve_type("q4_K") if as_tbq else target
    kind = mixture.type_of(name)
    return target if kind == target.name else resolve_type(kind)


def _fitting(tensor: GgufTensor, kind: Format, note: str) -> Choice:
    """Fall back to a smaller block where the type's does not divide the row."""
    columns = tensor.row_values
    if columns % kind.group_values == 0:
        return Choice(tensor, kind, note)
    smaller = "q4_0" if not kind.is_ggml else FALLBACK.get(kind.name)
    if smaller is None:
        got = f"rows of {columns} values"
        need = f"a multiple of {kind.group_values} for {kind.name}, which has no fallback"
        raise InputError(f"tensor {tensor.name!r}", got, need)
    replacement = resolve_type(smaller)
    if columns % replacement.block_values:
        replacement = resolve_type(FLOAT_TYPES[1])
    note = (
        f"{columns} columns are not divisible by {kind.group_values}, required for {kind.name}; "
        f"falling back to {replacement.name}"
    )
    return Choice(tensor, replacement, note, fallback=True)
