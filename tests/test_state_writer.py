"""State files written: the same bytes if unchanged, else the bytes that the fork writes."""

import numpy as np
import pytest
import state_bytes as sb
from conftest import STATES

import tbq
import tbq.quality
from gguf_io import open_state, plan_conversion, resolve_type, write_gguf, write_state
from gguf_io.state_writer import CACHE_TYPES
from tbq import InputError


def sample(name):
    return STATES / f"{name}.bin"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.bin"


def types(k, v):
    """Return a choice of one type for all K and one for all V; None keeps a side."""
    chosen = {"K": k and resolve_type(k), "V": v and resolve_type(v)}
    return lambda tensor: chosen[tensor.kind]


def convert(source, out, k, v, *, rotation="auto", **kwargs):
    with open_state(source, rotation=rotation) as s:
        write_state(out, plan_conversion(s, types(k, v), **kwargs))
    return out.read_bytes()


@pytest.mark.parametrize("path", sorted(STATES.glob("*.bin")), ids=lambda path: path.stem)
def test_samples_come_back_byte_for_byte(path, out):
    with open_state(path) as s:
        write_state(out, s)
    assert out.read_bytes() == path.read_bytes()


def test_files_that_no_sample_covers_come_back(tmp_path, out):
    lists = [(0,), (3, 7), (1, 2, 3)]
    files = [
        sb.sequence(sb.kv(3, mrope=True, sequences=lists)),
        sb.session(sb.kv(3, sequences=lists) + sb.kv(0) + sb.rec(3, sequences=[(), (2,), ()])),
        sb.u32(0xAF143CD8, 2) + sb.kv(2, ((1, 1152),), ()),
        sb.session(b""),
    ]
    source = tmp_path / "in.bin"
    for data in files:
        source.write_bytes(data)
        with open_state(source) as s:
            write_state(out, s)
        assert out.read_bytes() == data


@pytest.mark.parametrize(
    ("k", "v", "name"),
    [
        ("ktq2_1", "vtq2_2", "llama-tq.k_ktq2_1_v_vtq2_2.assembled.seq0"),
        ("ktq4_1", "vtq4_1", "llama-tq.k_ktq4_1_v_vtq4_1.assembled.seq0"),
    ],
)
def test_a_dump_becomes_another_forks_to_the_last_byte(k, v, name, out):
    assert convert(sample("pr21089.f32.seq0"), out, k, v) == sample(name).read_bytes()


@pytest.mark.parametrize(
    ("k", "v", "name"),
    [
        ("tbq4_0", "tbq3_0", "pr21089.k_tbq4_0_v_tbq3_0.seq0"),
        ("tbq3_0", "tbq3_0", "pr21089.tbq3_0.seq0"),
        ("q8_0", "tbq4_0", "pr21089.k_q8_0_v_tbq4_0.seq0"),
    ],
)
def test_layer_0_is_what_the_fork_wrote(k, v, name, out):
    written, forks = convert(sample("pr21089.f32.seq0"), out, k, v), sample(name).read_bytes()
    assert len(written) == len(forks)
    with open_state(out) as a, open_state(sample(name)) as b:
        assert np.array_equal(a.cells(0)[0].positions, b.cells(0)[0].positions)
        for t in ("cache_k_l0", "cache_v_l0"):
            assert a.tensors[t].format == b.tensors[t].format
            assert np.array_equal(a.tensors[t].rows(), b.tensors[t].rows())


def test_streams_are_converted_each(out):
    source = sample("pr21089.llama.nonunified.session")
    convert(source, out, "f32", "f32")
    with open_state(source) as s, open_state(out) as f32:
        assert [len(c) for c in f32.cells(0)] == [94, 30]
        for name, t in s.tensors.items():
            assert f32.tensors[name].format.name == "f32"
            assert np.array_equal(f32.tensors[name].values(), t.values())
    hybrid = sample("pr21089.lfm2-hybrid.nonunified.session")
    convert(hybrid, out, "f16", None)
    with open_state(hybrid) as s, open_state(out) as f16:
        assert f16.rotation.keys is None
        for name, t in s.tensors.items():
            same = np.array_equal(f16.tensors[name].rows(), t.rows())
            assert same == (t.kind != "K")


def test_transposed_values_stay_transposed(out):
    source = sample("pr21089.f16_vtrans.seq0")
    convert(source, out, None, "f32")
    with open_state(source) as s, open_state(out) as f32:
        v = f32.tensors["cache_v_l1"]
        assert v.transposed
        assert v.format.name == "f32"
        assert np.array_equal(v.values(), s.tensors["cache_v_l1"].values())
    with pytest.raises(InputError, match="V is stored transposed"):
        convert(source, out, None, "q8_0")


def test_staged_rows(out):
    source = sample("llama-tq.ktq2-staging-as-f16.seq0")
    with pytest.raises(InputError, match="rotation= stated when the file is opened"):
        convert(source, out, "ktq2_1", None)
    with pytest.raises(InputError, match="its rows are staged"):
        convert(source, out, "ktq2_1", None, rotation="on")
    convert(source, out, "ktq2_1", None, rotation="k")
    with open_state(source, rotation="off") as s, open_state(out) as done:
        assert done.deferred_state == "done"
        k = done.tensors["cache_k_l0"]
        stored = s.tensors["cache_k_l0"].values()
        again = k.rotation.forward(k.rotation.inverse(stored)).reshape(90, 256)
        assert np.array_equal(k.rows(), tbq.quantize(again, "ktq2_1"))
        v = "cache_v_l0"
        assert np.array_equal(done.tensors[v].rows(), s.tensors[v].rows())
    convert(source, out, "f16", None, rotation="k")
    with open_state(out) as plain:
        assert (plain.deferred_state, plain.rotation.keys) == ("off", None)


def test_policy_by_layer(out):
    source = sample("pr21089.f32.seq0")
    names = {"cache_v_l0": resolve_type("vtq2_2")}
    with open_state(source) as s:
        plan = plan_conversion(s, names)
        write_state(out, plan)
        # the graph rotates all values of the cache, so the f32 layer is rotated too
        assert [c.converts for c in plan.conversions.values()] == [False, False, True, True]
    with open_state(out) as mixed, open_state(source) as s:
        assert mixed.rotation.values == "dhd64"
        v = mixed.tensors["cache_v_l1"]
        assert v.format.name == "f32"
        assert np.allclose(v.values(), s.tensors["cache_v_l1"].values(), atol=1e-5)
        assert not np.allclose(v.stored(), s.tensors["cache_v_l1"].stored(), atol=1)
    with open_state(source) as s, pytest.raises(InputError, match="one type for all V, as pr21089"):
        plan_conversion(s, {"cache_v_l0": resolve_type("tbq3_0")})
    with open_state(source) as s:
        assert plan_conversion(s, {"cache_v_l0": resolve_type("tbq3_0")}, allow_mixed=True).changes
        with pytest.raises(InputError, match="names of K and V tensors"):
            plan_conversion(s, {"cache_k_l7": resolve_type("q8_0")})


def test_borrowed_codes(out):
    source = sample("pr21089.f32.seq0")
    with open_state(source) as s:
        types = {"cache_k_l0": resolve_type("ktq2_1"), "cache_k_l1": resolve_type("xktq2_1")}
        write_state(out, plan_conversion(s, types))
        with pytest.raises(InputError, match="before it, whose codes it borrows"):
            plan_conversion(s, {"cache_k_l0": resolve_type("xktq2_1")})
    with open_state(out) as x, open_state(source) as s:
        k0, k1 = x.tensors["cache_k_l0"], x.tensors["cache_k_l1"]
        rotated = k1.rotation.forward(s.tensors["cache_k_l1"].values()).reshape(44, 256)
        assert np.array_equal(k1.rows(), tbq.quantize_paired(rotated, k0.rows()))
        assert np.isfinite(k1.values()).all()


def test_block_index_of_the_cuda_dialect_runs_on(out):
    convert(sample("pr21089.f32.seq0"), out, "llama-tq-cuda:ktq2_1", None)
    with open_state(out, "llama-tq-cuda") as x, open_state(sample("pr21089.f32.seq0")) as s:
        k = x.tensors["cache_k_l0"]
        rotated = k.rotation.forward(s.tensors["cache_k_l0"].values()).reshape(44, 256)
        assert np.array_equal(k.rows(), tbq.quantize(rotated, "llama-tq-cuda:ktq2_1"))


def test_rotation_can_be_left_out(out):
    twin = sample("pr21089.f16-same-prompt-as-q8_0.seq0")
    convert(twin, out, "q8_0", "q8_0", rotate=False)
    with (
        open_state(out, rotation="off") as mine,
        open_state(sample("pr21089.q8_0-rotation-disabled.seq0"), rotation="off") as forks,
    ):
        name = "cache_v_l0"  # layer 0 saw the same input in both runs
        a, b = mine.tensors[name].values(), forks.tensors[name].values()
        assert np.abs(a - b).max() < 0.04


@pytest.mark.parametrize(
    ("source", "k", "v", "words"),
    [
        ("pr21089.f32.seq0", "tbq3_0", "vtq2_2", "one dialect per file"),
        ("pr21089.f32.seq0", None, "ktq2_1", "a type for V; this one is for K"),
        ("pr21089.f32.seq0", "tq2_0", None, "a type that caches take"),
        ("pr21089.q8_0.seq0", "q4_0", None, "allow_requantize"),
        ("llama-tq.k_ktq2_1_v_vtq2_2.assembled.seq0", "tbq3_0", None, "one dialect per file"),
    ],
)
def test_what_the_fork_would_refuse(source, k, v, words, out):
    with pytest.raises(InputError, match=words):
        convert(sample(source), out, k, v)
    assert not out.exists()


def test_blocks_that_do_not_divide_the_row(tmp_path, out):
    source = tmp_path / "in.bin"
    source.write_bytes(sb.sequence(sb.kv(2, ((1, 160),))))
    with pytest.raises(InputError, match="type of cache_k_l0: got 80 values, need .* 256"):
        convert(source, out, "tbq3_0", None)


def test_the_source_is_never_overwritten(tmp_path):
    path = tmp_path / "in.bin"
    path.write_bytes(sample("pr21089.tbq3_0.seq0").read_bytes())
    with open_state(path) as s, pytest.raises(InputError, match="that is not read"):
        write_state(path, s)


@pytest.mark.parametrize("kind", CACHE_TYPES)
def test_every_cache_type_goes_there_and_back(kind, out, tmp_path):
    source = sample("pr21089.f32.seq0")
    convert(source, out, kind, kind)
    back = tmp_path / "back.bin"
    convert(out, back, "f32", "f32")
    with open_state(source) as a, open_state(back) as b:
        for name, t in a.tensors.items():
            d = tbq.quality.Distortion()
            d.add(t.values(), b.tensors[name].values())
            assert d.relative_mse < 0.02


# --- caches of one model that differ ---


@pytest.fixture
def window_state(tmp_path, rng):
    """Make float32 dumps of a model whose window layers have other heads."""

    def make(full, window):
        model, path = tmp_path / "gemma4.gguf", tmp_path / "f32.bin"
        keys = {
            "block_count": 3,
            "embedding_length": 1024,
            "attention.head_count": 4,
            "attention.head_count_kv": [1, 512 // window, 512 // window],
            "attention.key_length": full,
            "attention.value_length": full,
            "attention.key_length_swa": window,
            "attention.value_length_swa": window,
            "attention.sliding_window": 1024,
            "attention.sliding_window_pattern": [False, True, True],
        }
        metadata = {f"gemma4.{key}": value for key, value in keys.items()}
        write_gguf(model, {"general.architecture": "gemma4"} | metadata, [])
        memories = sb.kv(4, ((0, 4 * full),)), sb.kv(4, ((0, 2048),) * 2)
        data = bytearray(sb.sequence(b"".join(memories)))
        path.write_bytes(data)
        with open_state(path, model=model) as s:
            for part in (part for t in s.tensors.values() for part in t.parts):
                x = rng.standard_normal((part.end - part.data) // 4).astype("<f4")
                data[part.data : part.end] = x.tobytes()
        path.write_bytes(data)
        return path, model

    return make


@pytest.mark.parametrize(
    ("full", "window", "rotated"),
    [(512, 256, ("base", "swa")), (96, 128, ()), (256, 32, ("base",)), (96, 32, ())],
)
def test_each_cache_is_rotated_by_its_own_heads(window_state, out, full, window, rotated):
    """Gemma 4: 512 values in full layers, 256 in window layers; both caches are rotated.

    Neither is if the first layer's heads, here those of the base cache, cannot be.
    """
    path, model = window_state(full, window)
    with open_state(path, model=model) as s:
        write_state(out, plan_conversion(s, types("q8_0", "q8_0")))
        with open_state(out, model=model) as done:
            for name, t in s.tensors.items():
                assert t.head_dim == (full if name.startswith("base") else window)
                x = t.values()
                if name.startswith(rotated):
                    kind = "hadamard" if t.kind == "K" else "hadamard64"
                    x = tbq.rotation(kind, t.head_dim).forward(x)
                    assert done.tensors[name].rotation.kind == kind
                want = tbq.quantize(x.reshape(len(x), -1), "q8_0")
                assert np.array_equal(done.tensors[name].rows(), want)
            assert ("no multiple of 64" in done.rotation.reason) == (len(rotated) < 2)


def test_an_unchanged_file_keeps_the_ids_of_a_dialect_that_has_anothers_types(tmp_path, out):
    """dusterbloom's 41 is buun's turbo3, which buun itself numbers otherwise today."""
    data = sb.session(sb.kv(3, ((41, 56),), ((8, 136),)))
    (tmp_path / "state.bin").write_bytes(data)
    with open_state(tmp_path / "state.bin", dialect="dusterbloom") as s:
        write_state(out, s)
    assert out.read_bytes() == data
