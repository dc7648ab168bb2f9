"""Real dumps of session 10 and sequence 3, of every memory class there is one of."""

import numpy as np
import pytest
from conftest import STATES_V3

import gguf_io
import tbq
from gguf_io import open_state, plan_conversion, write_state
from tbq import AmbiguousTypeError, FileFormatError, InputError

# model: memory class, bytes of the record in cells, whether there are V rows, recurrent layers
MODELS = {
    "deepseek2": ("kv", 0, False, 0),
    "deepseek32": ("dsa", 0, False, 0),
    "deepseek4-i128": ("dsv4", 0, False, 0),
    "gemma3": ("iswa", 0, True, 0),
    "gemma4": ("iswa", 0, True, 0),
    "gpt-oss": ("iswa", 0, True, 0),
    "granitehybrid": ("hybrid", 0, True, 2),
    "kimi-linear": ("hybrid", 0, False, 3),
    "lfm2": ("hybrid", 0, True, 2),
    "llama": ("kv", 0, True, 0),
    "mamba": ("recurrent", 0, True, 2),
    "minimax-m3": ("msa", 0, True, 0),
    "qwen2vl": ("kv", 12, True, 0),
    "qwen35": ("hybrid", 12, True, 3),
    "qwen4exp": ("hybrid_idx", 12, True, 3),
    "v9.deepseek2-hd128": ("kv", 0, False, 0),
    "v9.gemma4": ("iswa", 0, True, 0),
    "v9.lfm2-swa": ("hybrid_iswa", 0, True, 2),
}
# What PARTIAL_ONLY leaves, read without and with the model.
PARTIAL = {"gemma3": ("kv", "iswa"), "qwen35": ("recurrent", "hybrid")}
DUMPS = sorted(path.stem for path in STATES_V3.glob("*.bin"))
ROWS = sorted(path.name.removesuffix(".rows.npz") for path in STATES_V3.glob("*.npz"))
# Relative squared error of a type on the first attention layer, where both graphs got the same.
ERROR = {"q8_0": 5e-5, "q4_0": 1.2e-2, "f16": 1e-6, "f32": 0}


def dump(name):
    return STATES_V3 / f"{name}.bin"


def model_of(name):
    return max((m for m in MODELS if name.startswith(m + ".")), key=len)


def metadata(name):
    return STATES_V3 / f"{model_of(name)}.metadata.gguf"


def relative_error(a, b):
    a, b = (x.astype(np.float64) for x in (a, b))
    return ((a - b) ** 2).sum() / max((b**2).sum(), 1e-30)


def test_every_model_has_a_dump_and_every_dump_a_model():
    assert {model_of(name) for name in DUMPS} == set(MODELS)


@pytest.mark.parametrize("name", DUMPS)
@pytest.mark.parametrize("with_model", [False, True])
def test_dumps_open_without_flags_and_come_back(name, with_model, tmp_path):
    memory, cell_bytes, values, recurrent = MODELS[model_of(name)]
    partial = "partial" in name
    if partial:
        memory = PARTIAL[model_of(name)][with_model]
        cell_bytes, values = 0, True
    with open_state(dump(name), model=metadata(name) if with_model else None) as s:
        assert s.layout.memory == memory
        assert s.layout.partial == (partial and with_model)
        assert (s.layout.cell_bytes, s.layout.values) == (cell_bytes, values)
        assert s.layout.recurrent_layers == recurrent
        alone = name.startswith("deepseek32") and "session" not in name and not with_model
        assert s.class_candidates == (("dsa", "iswa") if alone else ())
        for t in s.tensors.values():
            assert np.isfinite(t.values()).all()
        write_state(tmp_path / "copy", s)
    assert (tmp_path / "copy").read_bytes() == dump(name).read_bytes()


LAYERS = {
    "deepseek32.q8_0.seq": ["mla.cache_k_l0", "mla.cache_k_l1", "lid.cache_k_l0", "lid.cache_k_l1"],
    "gemma4.q8_0.session": ["base.cache_k_l3", *(f"swa.cache_k_l{i}" for i in range(3))],
    "minimax-m3.q8_0.seq": [*(f"base.cache_k_l{i}" for i in range(3)), "idx.cache_k_l1"],
    "qwen4exp.q8_0.seq": ["cache_k_l3", "cache_idx_k_l3"],
    "kimi-linear.q8_0.seq": ["cache_k_l3"],
    "v9.lfm2-swa.q8_0.session": ["swa.cache_k_l1", "swa.cache_k_l3"],
    "gemma3.f16.raw.partial": [f"swa.cache_k_l{i}" for i in range(5)],
    "deepseek4-i128.q8_0.seq": [
        *(f"swa.cache_k_l{i}" for i in range(4)),
        *("csa.cache_k_l2", "hca.cache_k_l3", "lid.cache_k_l2"),
    ],
}


@pytest.mark.parametrize("name", LAYERS)
def test_models_number_the_layers_of_each_cache(name):
    with open_state(dump(name), model=metadata(name)) as s:
        found = [n for n, t in s.tensors.items() if t.kind == "K"]
        assert found[: len(LAYERS[name])] == LAYERS[name]
        assert len(set(found)) == len(found)


def test_cells_of_images():
    with open_state(dump("qwen2vl.q8_0.img.seq")) as s:
        (cells,) = s.cells(0)
        image = cells.positions == 20
        assert image.sum() == 12
        assert (cells.tokens[image] == -1).all()
        assert cells.coordinates[image].tolist() == [[20 + i % 4, 20 + i // 4] for i in range(12)]
        assert np.array_equal(cells.tokens, s.container.tokens)
        assert cells.positions[-3:].tolist() == [24, 25, 26]


def test_states_of_recurrent_layers():
    with open_state(dump("qwen4exp.q8_0.seq"), model=metadata("qwen4exp.q8_0.seq")) as s:
        ple = s.tensors["cache_p_l0"]
        assert (ple.kind, ple.row_bytes, ple.format.name) == ("P", 3 * 3 * 4 * 128 * 4, "f32")
        assert [n for n, t in s.tensors.items() if t.kind == "P"] == ["cache_p_l0"]
        assert ple.values().shape == (1, 1, ple.n_embd)
        assert s.memory_names == ("kv", "recurrent", "idx")


def test_compressed_caches():
    name = "deepseek4-i128.q8_0.seq"
    with open_state(dump(name), model=metadata(name)) as s:
        assert s.memory_names[:5] == ("base", "swa", "csa", "hca", "lid")
        assert [len(c) for c in s.cells(0)] == [140]
        assert [len(c) for c in s.cells(1)] == [32]  # what the window hides is left out
        assert s.cells(2) == []
        assert s.tensors["csa.cache_k_l2"].n_cells == 140 // 4
        assert s.tensors["lid.state_score_l2"].format.name == "f32"


# --- bytes: what the cache stored is what the CPU's quantiser makes of the rows it got ------------


@pytest.mark.parametrize("name", ROWS)
def test_stored_bytes_are_the_quantised_rows(name):
    path = next(p for end in ("seq", "session") if (p := dump(f"{name}.{end}")).exists())
    with (
        np.load(STATES_V3 / f"{name}.rows.npz") as given,
        open_state(path, model=metadata(f"{name}.seq")) as s,
    ):
        for key in given:
            t = s.tensors[key]
            assert t.format.name == "q8_0"
            x = np.ascontiguousarray(given[key], np.float32)
            assert np.array_equal(t.rows(), tbq.quantize(x, "ggml-cpu:q8_0")), key


# --- rotation: what is undone is what the unquantised twin has ------------------------------------

TWINS = {
    "deepseek2.q8_0.seq": "deepseek2.f32.seq",
    "deepseek32.q8_0.seq": "deepseek32.f16.seq",
    "deepseek32.q8_0.norot.seq": "deepseek32.f16.seq",
    "kimi-linear.q8_0.seq": "kimi-linear.f32.seq",
    "llama.q8_0.seq": "llama.f32.seq",
    "llama.q4_0.seq": "llama.f32.seq",
    "llama.q8_0.norot.seq": "llama.f32.seq",
    "llama.f16.vtrans.seq": "llama.f32.seq",
    "minimax-m3.q8_0.seq": "minimax-m3.f16.seq",
    "qwen35.q8_0.seq": "qwen35.f32.seq",
    "qwen4exp.q8_0.seq": "qwen4exp.f32.seq",
    "v9.deepseek2-hd128.q8_0.seq": "v9.deepseek2-hd128.f32.seq",
    "v9.gemma4.q8_0.seq": "v9.gemma4.f32.seq",
}


@pytest.mark.parametrize("name", TWINS)
def test_values_are_those_of_the_unquantised_twin(name):
    rotation = "off" if "norot" in name else "auto"
    with (
        open_state(dump(name), model=metadata(name), rotation=rotation) as s,
        open_state(dump(TWINS[name]), model=metadata(name)) as twin,
    ):
        compared = set()
        for t in s.tensors.values():
            if t.kind in "KV" and (t.memory, t.kind) not in compared:
                compared.add((t.memory, t.kind))
                want = twin.tensors[t.name].values()
                error = relative_error(t.values(), want.reshape(t.values().shape))
                # what a later layer is given has the errors of those before it already
                later = t.layer > min(t.layer for t in s.tensors.values() if t.kind == "K")
                assert error <= (1e-2 if later else ERROR[t.format.name]), t.name
        assert compared


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_gemma4_is_rotated_by_the_heads_of_each_cache(mode):
    name = "v9.gemma4.q8_0.seq"
    with open_state(dump(name), model=metadata(name), rotation=mode) as s:
        assert s.tensors["base.cache_k_l3"].rotation.size == 128
        assert s.tensors["swa.cache_k_l0"].rotation.size == 64
        assert {t.rotation.size for t in s.tensors.values() if t.kind == "V"} == {64}


def test_the_graph_does_not_carry_out_what_the_log_says():
    for name in ("v9.lfm2-swa.q8_0.session", "v9.deepseek2-hd128.q8_0.seq", "deepseek2.q8_0.seq"):
        with open_state(dump(name), model=metadata(name)) as s:
            assert not any(t.rotation for t in s.tensors.values())
            assert "whatever the log says" in s.rotation.reason
        with pytest.raises(InputError, match="rotation"):
            open_state(dump(name), model=metadata(name), rotation="on")
    for name in ("deepseek32.f16.seq", "deepseek32.q8_0.norot.seq"):  # forced, env or not
        with open_state(dump(name), model=metadata(name), rotation="off") as s:
            assert s.tensors["lid.cache_k_l0"].rotation.kind == "hadamard"
            assert s.tensors["mla.cache_k_l0"].rotation is None
    with open_state(dump("minimax-m3.q8_0.seq")) as s:
        assert s.tensors["base.cache_k_l0"].rotation
        assert not any(t.rotation for n, t in s.tensors.items() if n.startswith("idx."))
    with open_state(dump("qwen4exp.q8_0.seq")) as s:
        assert s.rotation.kind("K", 0) == "hadamard"
        assert s.rotation.kind("K", 2) is None


# --- classes that write the same bytes ------------------------------------------------------------


def test_the_file_alone_does_not_decide_between_dsa_and_iswa(tmp_path):
    path = dump("deepseek32.q8_0.seq")
    with open_state(path) as s:
        assert "only layout" not in s.layout_reason
        assert "dsa and iswa write the same sections" in s.layout_reason
        assert s.rotation.unclear
        with pytest.raises(AmbiguousTypeError, match="dsa, iswa; pass memory= or model="):
            plan_conversion(s, lambda t: gguf_io.resolve_type("f32"))
        write_state(tmp_path / "copy", s)  # as it is, nothing depends on it
    for how in ({"memory": "dsa"}, {"model": metadata("deepseek32.q8_0.seq")}):
        with open_state(path, **how) as s:
            assert (s.layout.memory, s.class_candidates) == ("dsa", ())
            plan_conversion(s, lambda t: gguf_io.resolve_type("f32"))
    with open_state(path, memory="iswa") as s:
        assert s.memory_names == ("base", "swa")
        assert s.tensors["base.cache_k_l0"].rotation
    with open_state(dump("deepseek32.q8_0.session")) as s:
        assert s.layout.memory == "dsa"
        assert "deepseek32 is of dsa" in s.layout_reason


def test_zero_values_are_an_indexers():
    with open_state(dump("minimax-m3.q8_0.seq")) as s:
        assert s.memory_names == ("base", "idx")
        assert "all zero, which only an indexer's are" in s.layout_reason
    with open_state(dump("gpt-oss.q8_0.seq")) as s:
        assert s.memory_names == ("base", "swa")
        assert "the second cache has other cells than the first" in s.layout_reason
    with open_state(dump("gemma3.f16.raw.rawstate")) as s:  # everything is within the window
        assert s.memory_names == ("base", "swa")
        assert "only layout" not in s.layout_reason


@pytest.mark.parametrize(
    ("name", "model", "words"),
    [
        ("gpt-oss.q8_0.seq", "minimax-m3", "holds|have|needs|not"),
        ("llama.q8_0.seq", "deepseek2", "has V rows, deepseek2 needs none"),
        ("deepseek2.q8_0.seq", "deepseek32", "sections of kv, deepseek32 writes dsa"),
        ("qwen35.q8_0.seq", "lfm2", "M-RoPE coordinates, lfm2 has none"),
        ("mamba.f16.seq", "qwen35", "counts 2 layers, not 4"),
    ],
)
def test_another_model_is_refused(name, model, words):
    with pytest.raises(FileFormatError, match=words):
        open_state(dump(name), model=STATES_V3 / f"{model}.metadata.gguf")


# --- converted ------------------------------------------------------------------------------------

CONVERTED = [
    *("deepseek2.f32.seq", "kimi-linear.f32.seq", "llama.f32.seq", "qwen35.f32.seq"),
    *("qwen4exp.f32.seq", "minimax-m3.f16.seq", "deepseek32.f16.seq"),
]


@pytest.mark.parametrize("name", CONVERTED)
def test_first_layers_convert_to_what_the_cache_holds(name, tmp_path):
    """An f32 dump converted to q8_0 decodes to what the program's own q8_0 dump does."""
    model, out = metadata(name), tmp_path / "out.bin"
    with open_state(dump(name), model=model) as s:
        write_state(out, plan_conversion(s, lambda t: gguf_io.resolve_type("q8_0")))
    own = f"{model_of(name)}.q8_0.seq"
    with open_state(out, model=model) as made, open_state(dump(own), model=model) as real:
        assert made.rotation.caches == real.rotation.caches
        done = set()
        for n, t in made.tensors.items():
            if t.kind in "KV" and (t.memory, t.kind) not in done:
                done.add((t.memory, t.kind))
                same = (t.rows() == real.tensors[n].rows()).mean()
                assert same > (0.98 if "f32" in name else 0.7), n
        assert done


def test_a_compressed_cache_is_converted(tmp_path):
    name, out = "deepseek4-i128.q8_0.seq", tmp_path / "out.bin"
    with open_state(dump(name), model=metadata(name)) as s:
        write_state(out, plan_conversion(s, lambda t: gguf_io.resolve_type("f32")))
        with open_state(out, model=metadata(name)) as f32:
            assert f32.tensors["csa.cache_k_l2"].rotation is None
            assert f32.tensors["lid.cache_k_l2"].rotation is not None
            for n, t in s.tensors.items():
                assert relative_error(f32.tensors[n].values(), t.values()) < 1e-12
    with open_state(out, model=metadata(name)) as f32:
        write_state(tmp_path / "back", plan_conversion(f32, lambda t: tbq.get_format("q8_0")))
    with open_state(tmp_path / "back", model=metadata(name)) as back:
        assert back.tensors["csa.cache_k_l2"].rotation.size == 64


def cut_and_read(data, path, step):
    """Cut a file everywhere; returns the layouts of what still opened."""
    opened = set()
    for n in range(0, len(data), step):
        path.write_bytes(data[:n])
        try:
            with open_state(path) as s:
                opened.add(str(s.layout))
        except tbq.TbqError:
            pass
    return opened


@pytest.mark.parametrize(
    "name", ["llama.q8_0.raw.raw", "deepseek2.q8_0.seq", "qwen2vl.q8_0.img.seq"]
)
def test_cut_files_are_refused(name, tmp_path):
    data = dump(name).read_bytes()
    assert cut_and_read(data, tmp_path / "cut", 41) <= {"none"}
    structure = 600
    assert cut_and_read(data[:structure], tmp_path / "cut", 1) == {"none"}  # a header alone
