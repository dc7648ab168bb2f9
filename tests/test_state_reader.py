"""State files: every sample opens with the right answer, and no bytes crash the reader."""

import tracemalloc

import numpy as np
import pytest
import state_bytes as sb
from conftest import MODELS, STATES, VECTORS

import tbq
from gguf_io import open_state, write_gguf
from tbq import AmbiguousTypeError, FileFormatError, InputError, TbqError, UnknownFormatError

PR = "pr21089"
TQ = "llama-tq"
# name: (layout, dialect, deferred state, cells per memory and stream, K types, V types)
SAMPLES = {
    "llama-tq.f16.seq0": ("kv", TQ, "off", [[44]], "f16", "f16"),
    "llama-tq.f16.session": ("kv", TQ, "off", [[57]], "f16", "f16"),
    "llama-tq.k_ktq2_1_v_vtq2_2.assembled.seq0": ("kv", TQ, "done", [[44]], "ktq2_1", "vtq2_2"),
    "llama-tq.k_ktq4_1_v_vtq4_1.assembled.seq0": ("kv", TQ, "done", [[44]], "ktq4_1", "vtq4_1"),
    "llama-tq.ktq2-staging-as-f16.seq0": ("kv", TQ, "staging", [[90]], "f16", "f16"),
    "pr21089.f16-same-prompt-as-q8_0.seq0": ("kv", None, None, [[94]], "f16", "f16"),
    "pr21089.f16.seq0": ("kv", None, None, [[44]], "f16", "f16"),
    "pr21089.f16.session": ("kv", None, None, [[57]], "f16", "f16"),
    "pr21089.f16_vtrans.seq0": ("kv", None, None, [[44]], "f16", "f16"),
    "pr21089.f32.seq0": ("kv", None, None, [[44]], "f32", "f32"),
    "pr21089.gemma3-iswa.k_tbq4_0_v_tbq3_0.seq0": (
        "iswa",
        PR,
        None,
        [[204], [204]],
        "tbq4_0",
        "tbq3_0",
    ),
    "pr21089.k_q8_0_v_tbq4_0.seq0": ("kv", PR, None, [[44]], "q8_0", "tbq4_0"),
    "pr21089.k_q8_0_v_tbq4_0.session": ("kv", PR, None, [[57]], "q8_0", "tbq4_0"),
    "pr21089.k_tbq4_0_v_tbq3_0.seq0": ("kv", PR, None, [[44]], "tbq4_0", "tbq3_0"),
    "pr21089.k_tbq4_0_v_tbq3_0.session": ("kv", PR, None, [[57]], "tbq4_0", "tbq3_0"),
    "pr21089.lfm2-hybrid.nonunified.session": (
        "hybrid, 3 recurrent layers",
        PR,
        None,
        [[94, 30], [2]],
        "tbq4_0",
        "tbq3_0",
    ),
    "pr21089.llama.nonunified.session": ("kv", PR, None, [[94, 30]], "tbq4_0", "tbq3_0"),
    "pr21089.mamba-recurrent.seq0": (
        "recurrent, 3 recurrent layers",
        None,
        None,
        [[1]],
        None,
        None,
    ),
    "pr21089.q8_0-rotation-disabled.seq0": ("kv", None, None, [[94]], "q8_0", "q8_0"),
    "pr21089.q8_0.seq0": ("kv", None, None, [[94]], "q8_0", "q8_0"),
    "pr21089.qwen2vl-mrope.seq0": ("kv, M-RoPE cells", PR, None, [[94]], "tbq4_0", "tbq3_0"),
    "pr21089.tbq3_0.seq0": ("kv", PR, None, [[44]], "tbq3_0", "tbq3_0"),
    "pr21089.tbq3_0.session": ("kv", PR, None, [[57]], "tbq3_0", "tbq3_0"),
}


def sample(name):
    return STATES / f"{name}.bin"


@pytest.fixture
def state_file(tmp_path):
    def write(data):
        path = tmp_path / "state.bin"
        path.write_bytes(data)
        return path

    return write


def test_every_sample_is_in_the_table():
    assert sorted(path.stem for path in STATES.glob("*.bin")) == sorted(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_open_without_flags(name):
    layout, dialect, deferred, cells, k_type, v_type = SAMPLES[name]
    with open_state(sample(name)) as s:
        assert str(s.layout) == layout + (", with the deferred-state byte" if deferred else "")
        assert (s.dialect, s.deferred_state) == (dialect, deferred)
        assert [[len(c) for c in s.cells(m)] for m in range(len(s.memories))] == cells
        assert {t.format.name for t in s.tensors.values() if t.kind == "K"} == {k_type} - {None}
        assert {t.format.name for t in s.tensors.values() if t.kind == "V"} == {v_type} - {None}
        assert s.container.kind == ("session" if "session" in name else "sequence")
        assert s.container.architecture == (
            {"lfm2-hybrid": "lfm2"}.get(name.split(".")[1], "llama") if "session" in name else None
        )
        assert len(s.container.tokens) in (40, 90, 200)
        for t in s.tensors.values():
            values = t.values()
            assert values.shape == (t.n_cells, *values.shape[1:])
            assert np.isfinite(values).all()
            assert t.kind in "RS" or values.shape[1:] == (2, 128)


def test_positions_and_sequences():
    with open_state(sample("pr21089.tbq3_0.session")) as s:
        (cells,) = s.cells(0)
        ids = {i for i in cells.sequences.tolist()}
        assert ids == {0, 1}
        assert cells.positions.min() == 0
        assert cells.positions.max() == 43
    with open_state(sample("pr21089.qwen2vl-mrope.seq0")) as s:
        (cells,) = s.cells(0)
        assert cells.coordinates.shape == (94, 2)
        assert set(cells.sequences.tolist()) == {0}


def test_models_give_layer_numbers_and_heads():
    pairs = {
        "gemma3": "pr21089.gemma3-iswa.k_tbq4_0_v_tbq3_0.seq0",
        "lfm2": "pr21089.lfm2-hybrid.nonunified.session",
        "llama": "pr21089.q8_0.seq0",
        "mamba": "pr21089.mamba-recurrent.seq0",
        "qwen2vl": "pr21089.qwen2vl-mrope.seq0",
    }
    names = {}
    for model, name in pairs.items():
        with open_state(sample(name), model=MODELS / f"{model}.metadata.gguf") as s:
            names[model] = [n for n, t in s.tensors.items() if t.kind in "KR"]
            assert all(
                t.head_dim == 128 and t.n_head == 2 for t in s.tensors.values() if t.kind == "K"
            )
    assert names["gemma3"] == ["base.cache_k_l5", *(f"swa.cache_k_l{i}" for i in range(5))]
    assert names["lfm2"] == ["cache_k_l1", "cache_k_l3", *(f"cache_r_l{i}" for i in (0, 2, 4))]
    assert names["llama"] == names["qwen2vl"] == [f"cache_k_l{i}" for i in range(3)]
    assert names["mamba"] == [f"cache_r_l{i}" for i in range(3)]


def test_a_latent_attention_model_has_no_values(tmp_path, state_file):
    write_gguf(
        tmp_path / "mla.gguf",
        {
            "general.architecture": "deepseek2",
            "deepseek2.block_count": 2,
            "deepseek2.attention.head_count": 16,
            "deepseek2.attention.head_count_kv": 1,
            "deepseek2.attention.key_length": 576,
            "deepseek2.attention.key_length_mla": 192,
            "deepseek2.attention.value_length_mla": 128,
        },
        [],
    )
    path = state_file(sb.sequence(sb.kv(5, ((1, 1152),) * 2, ())))
    with open_state(path, model=tmp_path / "mla.gguf") as s:
        assert s.tensors["cache_k_l1"].head_dim == 576
    path = state_file(sb.sequence(sb.kv(5, ((1, 1152),) * 2)))
    with pytest.raises(FileFormatError, match="kv has V rows, deepseek2 needs none"):
        open_state(path, model=tmp_path / "mla.gguf")


@pytest.mark.parametrize(
    ("model", "name", "words"),
    [
        ("gemma3", "pr21089.q8_0.seq0", "kv holds 3 layers, gemma3 has 6"),
        ("llama", "pr21089.qwen2vl-mrope.seq0", "M-RoPE"),
        ("mamba", "pr21089.lfm2-hybrid.nonunified.session", "kv holds 2 layers, mamba has 0"),
        ("lfm2", "pr21089.mamba-recurrent.seq0", "counts 3 layers, not 5"),
    ],
)
def test_another_model_is_refused(model, name, words):
    with pytest.raises(FileFormatError, match=words):
        open_state(sample(name), model=MODELS / f"{model}.metadata.gguf")


def test_rotated_rows_are_the_quantised_rows_of_the_unquantised_dump():
    with (
        open_state(sample("pr21089.f32.seq0")) as f32,
        open_state(sample("pr21089.tbq3_0.seq0")) as q,
    ):
        for name in ("cache_k_l0", "cache_v_l0"):
            t = q.tensors[name]
            rotated = t.rotation.forward(f32.tensors[name].values()).reshape(44, 256)
            assert np.array_equal(t.rows(), tbq.quantize(rotated, t.format))


@pytest.mark.parametrize("types", ["k_ktq2_1_v_vtq2_2", "k_ktq4_1_v_vtq4_1"])
def test_assembled_rows_are_the_quantised_rows_of_the_unquantised_dump(types):
    path = sample(f"llama-tq.{types}.assembled.seq0")
    with open_state(sample("pr21089.f32.seq0")) as f32, open_state(path) as q:
        assert len(q.tensors) == 4
        for name, t in q.tensors.items():
            rotated = t.rotation.forward(f32.tensors[name].values()).reshape(44, 256)
            assert np.array_equal(t.rows(), tbq.quantize(rotated, t.format))


def relative_error(a, b):
    return float(((a - b) ** 2).sum() / (b**2).sum())


def test_staged_rows_come_back_unrotated():
    path = sample("llama-tq.ktq2-staging-as-f16.seq0")
    with (
        open_state(sample("pr21089.f16-same-prompt-as-q8_0.seq0")) as plain,
        open_state(path) as staged,
        open_state(path, rotation="on") as both,
        open_state(path, rotation="off") as none,
    ):
        # the keys wait for ktq2_1, the values are to stay f16; the file cannot tell
        assert (staged.rotation.keys, staged.rotation.values) == ("hadamard", None)
        assert staged.rotation.unclear
        assert (both.rotation.keys, both.rotation.values) == ("hadamard", "dhd64")
        for name, t in staged.tensors.items():
            want = plain.tensors[name].values(0, 90)  # the other was saved four tokens later
            assert relative_error(t.values(), want) < 1e-6
            assert relative_error(both.tensors[name].values(), want) < 1e-6 or t.kind == "V"
            assert relative_error(none.tensors[name].values(), want) > 1 or t.kind == "V"


def test_staged_rows_beside_quantised_ones_are_no_riddle(state_file):
    f16, vtq2_1, ktq2_1 = (1, 512), (47, 80), (42, 112)
    with open_state(state_file(sb.sequence(sb.kv(2, (f16,), (vtq2_1,), deferred=1)))) as s:
        assert (s.rotation.keys, s.rotation.values) == ("hadamard", "dhd64")
        assert not s.rotation.unclear
    with open_state(state_file(sb.sequence(sb.kv(2, (ktq2_1,), (f16,), deferred=1)))) as s:
        assert (s.rotation.keys, s.rotation.values) == ("hadamard", "dhd64")


def test_rotation_is_an_assumption_that_can_be_overruled():
    twin = sample("pr21089.f16-same-prompt-as-q8_0.seq0")
    on, off = sample("pr21089.q8_0.seq0"), sample("pr21089.q8_0-rotation-disabled.seq0")
    for path, right, wrong in ((on, "auto", "off"), (on, "on", "k"), (off, "off", "auto")):
        with (
            open_state(twin) as plain,
            open_state(path, rotation=right) as q,
            open_state(path, rotation=wrong) as bad,
        ):
            want = plain.tensors["cache_v_l0"].values()
            assert relative_error(q.tensors["cache_v_l0"].values(), want) < 1e-4
            assert relative_error(bad.tensors["cache_v_l0"].values(), want) > 1
    with open_state(on, rotation="v") as s:
        assert (s.rotation.keys, s.rotation.values) == (None, "hadamard64")
    with pytest.raises(InputError, match="auto, on, off"):
        open_state(on, rotation="maybe")
    with pytest.raises(InputError, match="rotated, not 32 values wide"):
        open_state(on, rotation="on", head_dim=32)
    with open_state(on, head_dim=32) as s:
        assert (s.rotation.keys, s.rotation.values) == (None, None)
    with pytest.raises(InputError, match="a divisor of the 256 values"):
        open_state(on, head_dim=100)


def test_transposed_values_read_like_the_others():
    with (
        open_state(sample("pr21089.f16_vtrans.seq0")) as t,
        open_state(sample("pr21089.f16.seq0")) as s,
    ):
        v = t.tensors["cache_v_l0"]
        assert v.transposed
        assert v.raw().shape == (256, 88)
        assert relative_error(v.values(), s.tensors["cache_v_l0"].values()) < 1e-5
        assert np.array_equal(v.rows(3, 9), v.rows()[3:9])
        assert np.array_equal(v.stored(3, 9), v.stored()[3:9])


def test_rows_run_through_all_streams():
    with open_state(sample("pr21089.llama.nonunified.session")) as s:
        t = s.tensors["cache_k_l1"]
        both = np.concatenate([t.raw(0), t.raw(1)])
        assert np.array_equal(t.rows(), both)
        for start, stop in ((0, 94), (90, 100), (94, 124), (100, 500), (5, 5)):
            assert np.array_equal(t.rows(start, stop), both[start:stop])
            assert np.array_equal(t.values(start, stop), t.values()[start:stop])
        assert t.blocks().dtype == t.format.block
        assert np.array_equal(t.blocks()["d"], both.view(t.format.block)["d"])


# --- what no sample covers ---


def test_multi_head_latent_attention_has_no_values(state_file):
    with open_state(state_file(sb.sequence(sb.kv(5, ((1, 1152),) * 3, ())))) as s:
        assert not s.layout.values
        assert [t.kind for t in s.tensors.values()] == ["K"] * 3
        assert s.tensors["cache_k_l0"].values().shape == (5, 1, 576)


@pytest.mark.parametrize("deferred", [None, 3])
def test_hybrid_iswa(state_file, deferred):
    memory = sb.kv(4, deferred=deferred) + sb.kv(2, ((1, 128),) * 3, deferred=deferred) + sb.rec()
    with open_state(state_file(sb.session(memory))) as s:
        assert s.layout.memory == "hybrid_iswa"
        assert s.memory_names == ("base", "swa", "recurrent")
        assert s.layout.recurrent_layers == 2
        assert [len(s.cells(m)[0]) for m in range(3)] == [4, 2, 1]


def test_cells_of_several_sequences(state_file):
    sequences = [(0,), (0, 1, 2), (5,)]
    with open_state(state_file(sb.session(sb.kv(3, mrope=True, sequences=sequences)))) as s:
        (cells,) = s.cells(0)
        assert s.layout.mrope
        assert cells.sequence_counts.tolist() == [1, 3, 1]
        assert cells.sequences.tolist() == [0, 0, 1, 2, 5]
        assert cells.coordinates.tolist() == [[3, 4]] * 3


@pytest.mark.parametrize("prefix", [b"", sb.u32(0xAF143CD8, 1), sb.u32(5) + b"llama"])
def test_blobs(state_file, prefix):
    with open_state(state_file(prefix + sb.kv(3))) as s:
        c = s.container
        assert c.kind == ("state blob" if b"llama" in prefix else "sequence blob")
        assert c.sequence_id == (1 if len(prefix) == 8 else None)
        assert c.architecture == ("llama" if b"llama" in prefix else None)
        assert c.tokens is None
        assert len(s.tensors) == 4


def test_empty_caches_and_no_memory(state_file):
    with open_state(state_file(sb.session(b""))) as s:
        assert (s.layout.memory, s.tensors) == ("none", {})
    with open_state(state_file(sb.session(sb.kv(0)))) as s:
        assert (s.layout.memory, s.tensors) == ("kv", {})
    with open_state(state_file(sb.session(sb.kv(0, deferred=0)))) as s:
        assert (s.layout.deferred, s.dialect) == (True, TQ)


def test_borrowed_codes(state_file):
    z = np.load(VECTORS / TQ / "xktq2_1_paired.npz")
    n = len(z["x"])
    lender = (42, z["sibling_packed"].shape[1])
    borrower = (57, z["packed"].shape[1])
    memory = sb.u32(1) + b"\3" + sb.cells(n) + sb.u32(0, 2)
    memory += sb.rows(*lender, n, z["sibling_packed"].tobytes())
    memory += sb.rows(*borrower, n, z["packed"].tobytes())
    memory += sb.rows(1, 64, n) * 2
    with open_state(state_file(sb.sequence(memory))) as s:
        t = s.tensors["cache_k_l1"]
        assert t.sibling.name == "cache_k_l0"
        assert t.sibling.rotation is s.tensors["cache_k_l0"].rotation
        assert np.array_equal(t.stored(), z["y"], equal_nan=True)
    alone = sb.kv(2, ((57, 64),), ((1, 512),), deferred=3)
    with (
        open_state(state_file(sb.sequence(alone))) as s,
        pytest.raises(InputError, match="before it"),
    ):
        s.tensors["cache_k_l0"].stored()


def test_fork_types_without_a_dialect_stay_raw(state_file):
    with open_state(state_file(sb.sequence(sb.kv(2, ((60, 100),) * 2)))) as s:
        t = s.tensors["cache_k_l0"]
        assert s.dialect is None
        assert (t.n_embd, t.head_dim, t.rows().shape) == (None, None, (2, 100))
        with pytest.raises(InputError, match="none of the registered dialects"):
            t.values()


def test_the_same_type_with_its_fields_the_other_way_round_is_told_apart(tmp_path):
    """AmesianX has pr21089's id, name and size, with d in front."""
    data = bytearray(sample("pr21089.tbq3_0.seq0").read_bytes())
    with open_state(sample("pr21089.tbq3_0.seq0")) as s:
        for t in s.tensors.values():
            (part,) = t.parts
            rows = np.roll(t.rows(), 2, axis=1)
            data[part.data : part.end] = rows.tobytes()
    path = tmp_path / "other.bin"
    path.write_bytes(data)
    with open_state(path) as s:
        assert (s.dialect, s.dialect_guessed) == ("amesianx", True)
        assert s.tensors["cache_k_l0"].format.key == "amesianx:tbq3_0"
    with pytest.raises(FileFormatError, match="negative scales where pr21089:tbq3_0 keeps"):
        open_state(path, dialect=PR)


def test_server_tokens_are_recognised(state_file):
    with open_state(state_file(sb.sequence(sb.kv(2), tokens=(-1, 1, 3, 4)))) as s:
        assert s.has_server_tokens


@pytest.mark.parametrize(
    ("architecture", "layers", "numbers"),
    [
        ("llama4", (2, 6), [3, 7, 0, 1, 2, 4, 5, 6]),
        ("smallthinker", (2, 6), [0, 4, 1, 2, 3, 5, 6, 7]),
        ("plamo3", (2, 6), None),  # not as the architecture usually has it
        ("cohere2moe", (2, 6), [0, 4, 1, 2, 3, 5, 6, 7]),
    ],
)
def test_layers_of_window_caches_are_numbered_or_said_to_be_counted(
    tmp_path, state_file, architecture, layers, numbers
):
    keys = {"block_count": 8, "embedding_length": 512, "attention.head_count": 4}
    keys |= {"attention.head_count_kv": 2}
    if architecture != "llama4":
        keys |= {"attention.sliding_window": 512}
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    model = tmp_path / "model.gguf"
    write_gguf(model, {"general.architecture": architecture} | metadata, [])
    state = sb.sequence(b"".join(sb.kv(4, ((1, 512),) * n) for n in layers))
    with open_state(state_file(state), model=model) as s:
        found = [t.layer for t in s.tensors.values() if t.kind == "K"]
        assert ("counted from 0" in s.head_dim_reason) == (numbers is None)
        assert found == (numbers or [*range(layers[0]), *range(layers[1])])
        assert all((t.n_head, t.head_dim) == (2, 128) for t in s.tensors.values())
    state = sb.sequence(b"".join(sb.kv(4, ((1, 512),) * n) for n in (layers[0], layers[1] + 1)))
    with pytest.raises(FileFormatError, match="hold 9 layers"):
        open_state(state_file(state), model=model)


# --- what is refused ---


def test_ambiguous_files_name_the_flags_that_decide(state_file):
    # The V record of type f16 and 40 bytes is also a recurrent memory of one cell at position 40.
    state = sb.u32(0, 4) + sb.rows(0, 4, 1) * 2
    v = sb.u32(1, 40, 0) + state
    memory = sb.u32(1) + sb.cells(1) + sb.u32(0, 1) + sb.rows(1, 80, 1) + v
    path = state_file(sb.sequence(memory))
    with pytest.raises(AmbiguousTypeError) as caught:
        open_state(path)
    assert len(caught.value.candidates) == 2
    for words in ("[kv]", "[hybrid, no V, 1 recurrent layers]", "memory= or values= or recurrent"):
        assert words in str(caught.value)
    for kwargs, memory in (
        ({"memory": "hybrid"}, "hybrid"),
        ({"values": True}, "kv"),
        ({"recurrent_layers": 1}, "hybrid"),
    ):
        with open_state(path, **kwargs) as s:
            assert s.layout.memory == memory
            assert "of 2 layouts" in s.layout_reason


def test_wrong_arguments(state_file):
    path = sample("pr21089.q8_0.seq0")
    for kwargs, words in (
        ({"memory": "iswa"}, "the file holds kv; memory='iswa' was asked for"),
        ({"mrope": True}, "mrope=True"),
        ({"values": False}, "values=False"),
        ({"dialect": TQ}, "with the deferred-state byte was asked for"),
    ):
        with pytest.raises(FileFormatError, match=words):
            open_state(path, **kwargs)
    with pytest.raises(FileFormatError, match="without the deferred-state byte"):
        open_state(sample("llama-tq.f16.seq0"), dialect=PR)
    with pytest.raises(InputError, match="one of kv"):
        open_state(path, memory="cache")
    with pytest.raises(UnknownFormatError):
        open_state(path, dialect="nope")
    with pytest.raises(InputError, match="a positive number"):
        open_state(path, head_dim=0)


def test_versions_are_hints(state_file):
    """Nothing is refused by its number; those that nobody looked at are said to be newer."""
    for version, session in (
        (10, True),
        (3, False),
        (11, True),
        (4, False),
        (77, True),
        (1, False),
    ):
        wrap = sb.session if session else sb.sequence
        path = state_file(wrap(sb.kv(2), version=version))
        with open_state(path) as s:
            assert s.container.version == version
            assert s.container.newer == (version > (10 if session else 3))
        if version not in (10, 3):
            with pytest.raises(FileFormatError, match=f"version {version} was not looked at"):
                open_state(path, any_version=False)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGUF" + bytes(40), "use open_gguf"),
        (b"ggsn" + bytes(40), "big-endian"),
        (b"\0", "magic needs 4 bytes"),
        (b"qsgg", "version needs 4 bytes"),
        (sb.sequence(b"", tokens=range(9))[:30], "tokens needs 36 bytes"),
        (sb.session(b"", b"\xff\xfe"), "not printable"),
        (sb.sequence(sb.kv(3)) + b"tail", "1 complete KV memory before this"),
        (sb.sequence(sb.kv(3, ((0, 1022),))), "not a multiple of 4 bytes of f32"),
        (sb.sequence(sb.kv(3, ((24, 1024),))), "type 24 is none that K rows can have"),
        (sb.sequence(sb.u32(1, 1 << 31)), "cells do not fit"),
    ],
)
def test_bad_files_are_named(state_file, data, words):
    with pytest.raises(FileFormatError, match=words):
        open_state(state_file(data))


def read_everything(path):
    """Open and decode; returns whether it could be."""
    try:
        with open_state(path) as s:
            for t in s.tensors.values():
                assert t.rows().nbytes == t.n_bytes
                t.values()
        return True
    except TbqError:
        return False


CUT = (
    "pr21089.tbq3_0.session",
    "llama-tq.k_ktq2_1_v_vtq2_2.assembled.seq0",
    "pr21089.lfm2-hybrid.nonunified.session",
)


@pytest.mark.parametrize("name", CUT)
def test_every_97th_truncation_is_refused(state_file, name):
    data = sample(name).read_bytes()
    for n in range(0, len(data), 97):
        with pytest.raises(FileFormatError):
            open_state(state_file(data[:n]))


@pytest.mark.parametrize("name", CUT)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_corrupt_bytes_end_in_our_error_or_a_parse(state_file, rng, name):
    data = bytearray(sample(name).read_bytes())
    structure = 1000  # half of the hits go where the structure is
    parsed = 0
    for i in range(667):
        at = int(rng.integers(structure if i % 2 else len(data)))
        kept, data[at] = data[at], data[at] ^ int(rng.integers(1, 256))
        parsed += read_everything(state_file(bytes(data)))
        data[at] = kept
    assert 100 < parsed < 667


def allocated_by_opening(path):
    """Return the most bytes that all threads held at once meanwhile."""
    tracemalloc.start()
    try:
        open_state(path).close()
    except TbqError:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("name", CUT)
def test_opening_allocates_less_than_the_file(state_file, name):
    data = bytearray(sample(name).read_bytes())
    open_state(sample(name)).close()  # what is imported or compiled once is no part of a file
    for at in range(4, 200):
        kept, data[at] = data[at], 0xFF
        path = state_file(bytes(data))
        # three times if need be: the test runner has a thread, which may receive something
        assert any(allocated_by_opening(path) < len(data) + 100_000 for _ in range(3))
        data[at] = kept
