"""Command lines that llama-quantize takes: the same, or refused with the reason."""

import numpy as np
import pytest
from conftest import SAMPLES

import gguf_io
import tbq
from gguf_io import OutputTensor
from tools.quantize_arguments import target_type

F32 = SAMPLES / "small.f32.gguf"
PURE = SAMPLES / "small.tbq3_0.pure.gguf"


@pytest.fixture
def source(tmp_path):
    """A model of one weight, with a file type."""
    path = tmp_path / "in.gguf"
    x = np.random.default_rng(3).standard_normal((4, 256)).astype(np.float32)
    metadata = {"general.architecture": "llama", "general.file_type": 0, "llama.block_count": 1}
    gguf_io.write_gguf(path, metadata, [OutputTensor.from_array("blk.0.ffn_up.weight", x)])
    return path


def written(path):
    with gguf_io.open_gguf(path) as f:
        return f.tensors["blk.0.ffn_up.weight"].format.name, dict(f.metadata)


@pytest.mark.parametrize(
    ("words", "kind", "file_type"),
    [
        (["OUT", "q8_0", "2"], "q8_0", 7),
        (["OUT", "7"], "q8_0", 7),
        (["OUT", "7", "2"], "q8_0", 7),
        (["OUT", "41"], "tbq3_0", 41),
        (["OUT", "Q8_0"], "q8_0", 7),
        (["OUT", "copy"], "f32", 0),
        (["OUT", "0"], "f32", 0),
        (["OUT", "MXFP4_MOE"], "q8_0", 38),
        (["OUT", "Q4_K_M"], "q4_K", 15),
        (["OUT", "14", "2"], "q4_K", 14),
        (["OUT", "Q5_K"], "q5_K", 17),
    ],
)
def test_types_and_threads(source, tmp_path, quantize, words, kind, file_type):
    out = tmp_path / "out.gguf"
    code, _, err = quantize(source, *(out if word == "OUT" else word for word in words))
    assert (code, "error" in err) == (0, False)
    name, metadata = written(out)
    assert (name, metadata["general.file_type"]) == (kind, file_type)


@pytest.mark.parametrize("threads", [[], ["3"]])
def test_a_second_argument_that_is_a_type_leaves_no_output(source, quantize, threads):
    assert quantize(source, "q8_0", *threads)[0] == 0
    assert written(source.with_name("ggml-model-Q8_0.gguf"))[0] == "q8_0"


def test_copy_keeps_every_tensor(tmp_path, quantize):
    """Tensors of a quantised model too, without --allow-requantize; only the order changes."""
    out = tmp_path / "out.gguf"
    assert quantize(PURE, out, "COPY")[0] == 0
    with gguf_io.open_gguf(PURE) as a, gguf_io.open_gguf(out) as b:
        assert a.metadata["general.file_type"] == b.metadata["general.file_type"]
        for name, t in a.tensors.items():
            assert t.format == b.tensors[name].format
            assert np.array_equal(t.raw, b.tensors[name].raw)


def test_overridden_metadata_has_the_types_that_llama_quantize_gives_it(source, tmp_path, quantize):
    out = tmp_path / "out.gguf"
    given = [
        "a.i=int:-7",
        "a.f=float:0.5",
        "a.b=bool:true",
        "a.s=str:x=y",
        "llama.block_count=int:9",
    ]
    flags = [word for text in given for word in ("--override-kv", text)]
    assert quantize(*flags, source, out, "q8_0")[0] == 0
    with gguf_io.open_gguf(out) as f:
        found = {key: (field.type.name, field.value) for key, field in f.metadata.fields.items()}
    assert found["a.i"] == ("UINT32", 7)
    assert found["a.f"] == ("FLOAT32", 0.5)
    assert found["a.b"] == ("BOOL", True)
    assert found["a.s"] == ("STRING", "x=y")
    assert found["llama.block_count"] == ("UINT32", 9)


def test_a_file_of_tensor_types(source, tmp_path, quantize):
    out, patterns = tmp_path / "out.gguf", tmp_path / "types.txt"
    patterns.write_text("attn_v=q4_0\n  ffn_up=q5_1 ffn_down=q4_0\n", encoding="utf-8")
    assert quantize("--tensor-type-file", patterns, source, out, "q8_0")[0] == 0
    assert written(out)[0] == "q5_1"
    flags = ("--tensor-type", "ffn_up=q4_1", "--tensor-type-file", patterns)
    assert quantize(*flags, source, out, "q8_0")[0] == 0
    assert written(out)[0] == "q4_1"  # the first match wins, the flag's come first
    before = patterns.read_bytes()
    code, _, err = quantize("--tensor-type-file", patterns, source, patterns, "q8_0")
    assert (code, patterns.read_bytes()) == (2, before)
    assert "types.txt" in err


def test_flags_about_importance_data_are_taken_and_said_to_be_idle(source, tmp_path, quantize):
    out = tmp_path / "out.gguf"
    code, _, err = quantize("--include-weights", "ffn_up", source, out, "q8_0")
    assert code == 0
    assert "choose importance data; none is used" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["OUT", "IQ3_M"], 4, "cannot produce IQ3_M, whose types"),
        (["OUT", "27"], 4, "of mixtures there are Q3_K_S, Q3_K_M"),
        (["OUT", "Q2_K_S"], 4, "cannot produce Q2_K_S, whose types, or weights of errors"),
        (["OUT", "iq3_s"], 4, "cannot quantise to iq3_s"),
        (["OUT", "9999"], 2, "no format is called '9999'"),
        (["OUT", "q8_0", "x"], 2, "need INPUT [OUTPUT] TYPE [NTHREADS]"),
        (["OUT", "q8_0", "0"], 2, "at least 1"),
        (["--threads", "2", "OUT", "q8_0", "3"], 2, "the same as --threads 2"),
        (["--imatrix", "x", "OUT", "q8_0"], 2, "encoded with the weights of an importance matrix"),
        (["--prune-layers", "1", "OUT", "q8_0"], 2, "left out by llama-quantize only"),
        (["--tensor-type-file", "gone", "OUT", "q8_0"], 3, "gone"),
        (["--override-kv", "a=int:x", "OUT", "q8_0"], 2, "a number of 32 bits"),
        (["--override-kv", "a=int:4294967296", "OUT", "q8_0"], 2, "a number of 32 bits"),
        (["--override-kv", "a=word:x", "OUT", "q8_0"], 2, "KEY=TYPE:VALUE"),
        (["--override-kv", "a=bool:1", "OUT", "q8_0"], 2, "true or false"),
        (["--override-kv", f"a=str:{'x' * 128}", "OUT", "q8_0"], 2, "at most 127 bytes"),
    ],
)
def test_what_cannot_be_done_is_refused(source, tmp_path, quantize, words, code, message):
    out = tmp_path / "out.gguf"
    flags = words[: words.index("OUT")]
    rest = [out if word == "OUT" else word for word in words[words.index("OUT") :]]
    found, _, err = quantize(*flags, source, *rest)
    assert (found, out.exists()) == (code, False)
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "wanted", ["q4_k_x", "q8_1x", "iq2xs", "xktq2", "tq2", "8_0", "turbo5", "bf61"]
)
def test_what_is_offered_instead_can_be_written(wanted):
    with pytest.raises(tbq.UnknownFormatError) as caught:
        target_type(wanted)
    for name in caught.value.near:
        fmt = gguf_io.resolve_type(name)
        assert gguf_io.types.can_quantize(fmt)
        assert not fmt.sibling


def test_models_have_llama_quantizes_iq4_nl(quantize, tmp_path):
    out = tmp_path / "o.gguf"
    for mixed in ([], ["--pure"]):
        code, _, err = quantize(*mixed, SAMPLES / "small.f32.gguf", out, "iq4_nl")
        assert code == 0, err
        with gguf_io.open_gguf(SAMPLES / "small.f32.gguf") as a, gguf_io.open_gguf(out) as b:
            assert "tbq.dialect" not in b.metadata
            mine = [t for t in b.tensors.values() if t.format.name == "iq4_nl"]
            assert len(mine) >= 2
            for t in mine:
                x = a.tensors[t.name].dequantize()
                packed = tbq.quantize(x, "llama-quantize:iq4_nl")
                assert packed.tobytes() == t.raw.tobytes()
