"""The mixtures of K-quants: which tensors of which models get more bits."""

import pytest

import gguf_io
import tbq
from gguf_io.type_policy import Options, choose_types
from tools import quantize_arguments

KINDS = ("attn_v", "attn_k", "attn_q", "attn_output", "ffn_down", "ffn_gate", "ffn_up")


@pytest.fixture
def chosen(tmp_path):
    """Return the types that a mixture gives a model of some layers: by kind, one letter a layer."""

    def choose(name, layers=32, architecture="llama", heads=(32, 8), kinds=KINDS, **keys):
        keys = {"block_count": layers} | keys
        keys |= {"attention.head_count": heads[0], "attention.head_count_kv": heads[1]}
        metadata = [(f"{architecture}.{key}", value) for key, value in keys.items()]
        path = tmp_path / "m.gguf"
        names = [f"blk.{i}.{kind}.weight" for i in range(layers) for kind in kinds]
        write(path, architecture, metadata, [*names, "output.weight", "token_embd.weight"])
        target = quantize_arguments.target_type(name)
        options = Options(target, mixture=quantize_arguments.mixture(name))
        with gguf_io.open_gguf(path) as file:
            order = gguf_io.convert.llama_quantize_order(file)
            found = {c.tensor.name: c.type.name for c in choose_types(file, options, order)}
        return {
            kind: "".join(short(found[f"blk.{i}.{kind}.weight"]) for i in range(layers))
            for kind in kinds
        } | {name: found[f"{name}.weight"] for name in ("output", "token_embd")}

    return choose


def write(path, architecture, metadata, names):
    numbers = {key: gguf_io.Field.of(value) for key, value in metadata}
    fields = {"general.architecture": architecture} | numbers
    f32, row = gguf_io.resolve_type("f32"), bytes(2 * 256 * 4)
    tensors = [gguf_io.OutputTensor(name, (2, 256), f32, len(row), lambda: [row]) for name in names]
    gguf_io.write_gguf(path, fields, tensors)


def short(name):
    return {"q8_0": "8"}.get(name, name[1])


# As every published file of a model of 32 layers has it: the first and the last four, and every
# third one between them.
MORE = "6666446446446446446446446446" + "6666"


def test_q4_k_m(chosen):
    found = chosen("Q4_K_M")
    assert found["attn_v"] == found["ffn_down"] == MORE
    assert {found[kind] for kind in KINDS if kind not in ("attn_v", "ffn_down")} == {"4" * 32}
    assert (found["output"], found["token_embd"]) == ("q6_K", "q4_K")
    assert chosen("q4_k") == chosen("15") == found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Q2_K", {"attn_v": "4" * 32, "attn_output": "3" * 32, "ffn_down": "3" * 32}),
        ("Q3_K_S", {}),
        (
            "Q3_K_M",
            {
                "attn_v": "55" + "4" * 30,
                "attn_output": "4" * 32,
                "ffn_down": "55" + "4" * 30,
            },
        ),
        ("Q3_K_L", {"attn_v": "5" * 32, "attn_output": "5" * 32, "ffn_down": "5" * 32}),
        ("Q4_K_S", {"attn_v": "5555" + "4" * 28, "ffn_down": "5555" + "4" * 28}),
        ("Q5_K_S", {}),
        ("Q5_K_M", {"attn_v": MORE.replace("4", "5"), "ffn_down": MORE.replace("4", "5")}),
        ("Q6_K", {}),
    ],
)
def test_what_gets_more_bits(chosen, name, expected):
    found = chosen(name)
    rest = dict.fromkeys(KINDS, name[1] * 32)
    assert found == rest | expected | {"output": "q6_K", "token_embd": f"q{name[1]}_K"}


def test_what_depends_on_the_model(chosen):
    assert chosen("Q2_K", heads=(32, 32))["attn_v"] == "3" * 32
    few = {"kinds": ("attn_v", "ffn_down", "attn_output")}
    assert chosen("Q4_K_S", 80, heads=(64, 8), **few)["attn_v"] == "5" * 80  # what it calls 70B
    assert chosen("Q4_K_S", 80, heads=(64, 64), **few)["attn_v"] == "5555" + "4" * 76
    falcon = chosen("Q4_K_M", architecture="falcon", **few)
    assert falcon["ffn_down"] == "66" + MORE[2:].replace("6", "5")
    assert falcon["output"] == "q8_0"
    assert chosen("Q3_K_M", architecture="falcon", **few)["attn_output"] == "3" * 32
    eight = chosen("Q4_K_M", expert_count=8)
    assert eight["attn_v"] == eight["attn_k"] == "8" * 32
    assert (eight["attn_output"], eight["ffn_down"]) == ("5" * 32, MORE)
    fused = chosen("Q5_K_M", kinds=("attn_qkv", "ffn_up_exps"))
    assert fused["attn_qkv"] == MORE.replace("4", "5")
    assert fused["ffn_up_exps"] == "5" * 32


def test_the_layer_of_experts_is_that_of_the_name(tmp_path):
    """They need not come in order; without experts the tensors are counted."""
    names = [f"blk.{i}.ffn_down_exps.weight" for i in (30, 5)]
    for experts, expected in ((4, ["q4_K", "q6_K"]), (0, ["q6_K", "q6_K"])):
        path = tmp_path / f"{experts}.gguf"
        keys = [("llama.block_count", 32), ("llama.expert_count", experts)]
        write(path, "llama", keys, names)
        with gguf_io.open_gguf(path) as file:
            choices = choose_types(file, Options(tbq.get_format("q4_K")), file.tensors.values())
            found = {c.tensor.name: c.type.name for c in choices}
        assert [found[name] for name in sorted(names)[::-1]] == expected


def test_what_a_mixture_needs_to_know(tmp_path):
    options = Options(tbq.get_format("q4_K"))
    path = tmp_path / "m.gguf"
    write(path, "llama", [], ["blk.0.ffn_down.weight"])
    with (
        gguf_io.open_gguf(path) as file,
        pytest.raises(tbq.FileFormatError, match="llama.block_count is missing"),
    ):
        choose_types(file, options, file.tensors.values())
    keys = [("llama.block_count", 2), ("llama.expert_count", 2)]
    for name in ("ffn_down.weight", "blk.2.ffn_down.weight"):
        write(path, "llama", keys, [name])
        with (
            gguf_io.open_gguf(path) as file,
            pytest.raises(tbq.InputError, match=r"blk\.0\. to blk\.1\. in front"),
        ):
            choose_types(file, options, file.tensors.values())
