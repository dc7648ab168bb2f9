"""What other programs write under the same magics, built by hand: no file of theirs is at hand."""

import hashlib
import json
import struct

import numpy as np
import pytest
import state_bytes as sb
from conftest import MODELS

import gguf_io
from gguf_io import open_state, plan_conversion, write_gguf, write_state
from gguf_io.slot_tokens import slot_tokens
from gguf_io.state_buun import fnv1a64, stored_objects
from gguf_io.state_origin import origin
from tbq import AmbiguousTypeError, FileFormatError, InputError, TbqError


@pytest.fixture
def state_file(tmp_path):
    def write(data):
        path = tmp_path / "state.bin"
        path.write_bytes(data)
        return path

    return write


def written(state, tmp_path):
    """Write a state file as it is; return its bytes."""
    write_state(tmp_path / "copy", state)
    return (tmp_path / "copy").read_bytes()


# --- llama-server's packed tokens -----------------------------------------------------------------


@pytest.mark.parametrize("media", [(), ((2, b"picture!"), (7, b"x")), ((0, b""),)])
def test_packed_tokens_are_decoded_and_packed_again(state_file, tmp_path, media):
    tokens = (5, 6, -1, -1, 8, 9, 10, -1)
    words = sb.packed_tokens(tokens, media)
    data = sb.sequence(sb.kv(2), tokens=words, version=3)
    with open_state(state_file(data)) as s:
        slot = s.container.slot
        assert slot.tokens.tolist() == s.container.token_list.tolist() == list(tokens)
        assert [(m.start, m.data.tobytes()) for m in slot.media] == list(media)
        assert slot.words() == struct.pack(f"<{len(words)}i", *words)
        assert s.has_server_tokens
        assert written(s, tmp_path) == data


@pytest.mark.parametrize(
    "words",
    [
        (-1, 1, 3, 4),  # fewer tokens than it says
        (-1, 1, 1, 4),  # no number of media
        (-1, 2, 0, 0),  # another version
        (-1, 1, 0, 1, 0),  # a medium without its size
        (-1, 1, 0, 1, 0, 5, 0),  # a medium that is cut
        (-1, 1, 0, 0, 0),  # a word too much
        (-1, 1, 0, 1, 0, 1, 0x0101),  # padding that is not zero
        (-1, 1, -5, 0),
        (-1,),
        (),
        (4, 1, 0, 0),
    ],
)
def test_what_is_no_packed_list(words):
    assert slot_tokens(np.array(words, "<i4")) is None


def test_the_report_counts_tokens_not_words(inspect, state_file):
    words = sb.packed_tokens((5, 6, -1), [(2, b"pixels")])
    path = state_file(sb.sequence(sb.kv(2), tokens=words, version=3))
    state = json.loads(inspect("--json", path)[1])["state"]
    assert (state["tokens"], state["server_tokens"]) == (3, True)
    assert state["slot"] == {"version": 1, "media": [{"start": 2, "bytes": 6}]}
    assert "at token 2 one of 6 bytes" in inspect(path)[1]


# --- what follows the memory ----------------------------------------------------------------------


def test_checkpoints_after_the_memory_are_named_and_kept(inspect, state_file, tmp_path):
    appendix = sb.checkpoints((b"target", b"", b"s"), (b"SCKP by chance", b"draft", b""))
    data = sb.sequence(sb.kv(3), version=3) + appendix
    path = state_file(data)
    with open_state(path) as s:
        assert s.container.appendix.n_bytes == len(appendix)
        assert len(s.container.appendix.checkpoints) == 2
        assert s.container.appendix.checkpoints[0] == (252, 0, 251, 16 + 24 + 7)
        assert written(s, tmp_path) == data
        write_state(tmp_path / "f32", plan_conversion(s, lambda t: gguf_io.resolve_type("f32")))
        assert (tmp_path / "f32").read_bytes().endswith(appendix)
        with pytest.raises(InputError, match="appendix"):
            plan_conversion(s, version=9)
    assert "SCKP" in inspect(path)[1]
    for n in range(1, len(appendix)):  # nothing less than the whole of it is one
        with pytest.raises(FileFormatError):
            open_state(state_file(data[:-n]))


def test_unexplained_bytes_are_kept_if_asked(state_file, tmp_path):
    data = sb.sequence(sb.kv(3) + sb.rec(), version=3) + b"whatever this is"
    path = state_file(data)
    with pytest.raises(FileFormatError, match="no memory layout fits"):
        open_state(path)
    with open_state(path, trailing=True) as s:
        assert s.container.appendix.name == "bytes that nothing explains"
        assert written(s, tmp_path) == data
    with pytest.raises(FileFormatError):  # llama.cpp checks sessions
        open_state(state_file(sb.session(sb.kv(3)) + b"tail"), trailing=True)


# --- axes of the layout ---------------------------------------------------------------------------


def text_record(i):
    return (i, i, 40 + i)


def test_cells_of_twelve_bytes(state_file, tmp_path):
    memory = sb.kv_of(sb.mrope_cells(4, text_record), 4, ((1, 64),), ((1, 64),))
    data = sb.sequence(memory, version=3)
    with open_state(state_file(data)) as s:
        (cells,) = s.cells(0)
        assert s.layout.cell_bytes == 12
        assert cells.tokens.tolist() == [40, 41, 42, 43]
        assert cells.coordinates.tolist() == [[i, i] for i in range(4)]
        assert written(s, tmp_path) == data


def test_the_bytes_and_not_the_version_tell_the_record(state_file):
    """Whoever patches the number of an old file gets an old file."""
    memory = sb.kv_of(sb.mrope_cells(4, lambda i: (i, i)), 4, ((1, 64),), ((1, 64),))
    with open_state(state_file(sb.sequence(memory, version=3))) as s:
        assert s.layout.cell_bytes == 8
        assert any("although the version is another" in r for r in origin(s).reasons)
        assert not any(loads.loads for loads in origin(s).loads)


@pytest.mark.parametrize("sizes", [(0, 0), (64, 64), (128, 64), (0, 64)])
def test_rotation_sizes_that_the_file_states(state_file, tmp_path, sizes):
    rows = ((8, 136),) * 2
    data = sb.sequence(sb.kv_of(sb.cells(3), 3, rows, rows, rotation=sizes), version=4)
    with open_state(state_file(data)) as s:
        assert s.layout.rotation_words
        assert s.container.newer
        for t in s.tensors.values():
            want = sizes["KV".index(t.kind)]
            usual = 128 if t.kind == "K" else 64
            assert (t.rotation.size if t.rotation else 0) == (want if want == usual else 0)
        assert "states" in s.rotation.reason
        assert written(s, tmp_path) == data
        write_state(tmp_path / "f16", plan_conversion(s, lambda t: gguf_io.resolve_type("f16")))
    with open_state(tmp_path / "f16") as f16:
        assert f16.memories[0].streams[0].rotation == (0, 0)


def test_memories_without_a_number_of_streams(state_file, tmp_path):
    memory = sb.kv_of(sb.cells(3), 3, ((1, 64),), ((1, 64),), streams=False)
    data = sb.sequence(memory, version=2)
    with open_state(state_file(data)) as s:
        assert not s.layout.streams
        assert written(s, tmp_path) == data


def test_states_of_no_cells_may_be_wider_than_the_file(inspect, state_file, tmp_path):
    """A session that is saved before anything was decoded."""
    for memory in (sb.kv(0) + sb.rec(0, r=(20480,) * 2, s=(65536,) * 2), sb.dsv4(0, (0, 0, 0))):
        data = sb.session(memory, b"qwen35", version=10)
        with open_state(state_file(data)) as s:
            assert written(s, tmp_path) == data
        assert inspect(state_file(data))[0] == 0


def test_no_memory(state_file):
    with open_state(state_file(sb.session(b"", version=10))) as s:
        assert s.layout.memory == "none"
        assert "shares another's cells" in s.layout_reason


def test_caches_without_layers(state_file, tmp_path):
    base = sb.kv_of(sb.cells(4), 4, (), ())
    for memory, name in ((base, "kv"), (base + sb.kv(2), "iswa"), (base + sb.rec(), "hybrid")):
        data = sb.session(memory, version=10)
        with open_state(state_file(data)) as s:
            assert s.layout.memory == name
            assert len(s.cells(0)[0]) == 4
            assert not any(t.memory == 0 for t in s.tensors.values())
            assert written(s, tmp_path) == data


def test_ple_rows_and_an_indexer(state_file, tmp_path):
    cells = sb.mrope_cells(3, text_record)
    ple = struct.pack("<Q", 24) + bytes(24)
    rec = sb.cells(1) + sb.u32(0, 4) + sb.rows(0, 64, 1) + ple + sb.rows(0, 64, 1)
    rec += sb.rows(0, 128, 1) * 2
    for idx in (cells, sb.cells(3)):  # an indexer's cells need not have the record
        memory = sb.kv_of(cells, 3, ((1, 64),), ((1, 64),)) + rec + sb.kv_of(idx, 3, ((1, 32),), ())
        data = sb.sequence(memory, version=3)
        with open_state(state_file(data)) as s:
            assert (s.layout.memory, s.layout.recurrent_layers) == ("hybrid_idx", 2)
            assert s.tensors["cache_p_l0"].row_bytes == 24
            assert s.tensors["cache_idx_k_l0"].head_dim == 16
            assert written(s, tmp_path) == data
            with pytest.raises(InputError, match="hybrid_idx"):
                plan_conversion(s, version=9)


def test_dsa_iswa(state_file, tmp_path):
    part = sb.kv(3, ((8, 136),), ())
    data = sb.session(part * 3, b"dots3note", version=10)
    with open_state(state_file(data)) as s:
        assert s.layout.memory == "dsa_iswa"
        assert s.memory_names == ("mla", "lid", "swa")
        rotated = [n for n, t in s.tensors.items() if t.rotation]
        assert rotated == ["lid.cache_k_l0"]
        assert written(s, tmp_path) == data


@pytest.mark.parametrize("mode", [0, 1])
def test_deepseek4(state_file, tmp_path, mode):
    data = sb.sequence(sb.dsv4(mode=mode), version=3)
    with open_state(state_file(data)) as s:
        assert (s.layout.memory, s.layout.partial) == ("dsv4", mode == 1)
        assert ("csa.cache_k_l2" in s.tensors) == (mode == 0)
        assert s.tensors["csa.state_kv_l2"].format.name == "f32"
        assert written(s, tmp_path) == data
    bad = bytearray(data)
    bad[bad.index(b"DSV4") + 4] = 2
    with pytest.raises(FileFormatError):
        open_state(state_file(bytes(bad)))


def test_deepseek4_of_heads_as_wide_as_the_indexers(tmp_path, state_file):
    keys = {"block_count": 4, "embedding_length": 512, "attention.head_count": 8}
    keys |= {"attention.head_count_kv": 1, "attention.key_length": 64}
    keys |= {"attention.sliding_window": 32, "attention.indexer.key_length": 64}
    metadata = {f"deepseek4.{key}": value for key, value in keys.items()}
    write_gguf(tmp_path / "m.gguf", {"general.architecture": "deepseek4"} | metadata, [])
    path = state_file(sb.sequence(sb.dsv4(indexer=64, layers=4), version=3))
    with open_state(path, model=tmp_path / "m.gguf") as s:  # f16, rotated all the same
        assert all(t.rotation.size == 64 for t in s.tensors.values() if t.kind == "K")
    with open_state(path) as s:  # the rows show it too
        assert all(t.rotation for t in s.tensors.values() if t.kind == "K")
    with open_state(state_file(sb.sequence(sb.dsv4(), version=3))) as s:
        assert {n for n, t in s.tensors.items() if t.rotation} == {"lid.cache_k_l2"}


# --- versions that nobody looked at ---------------------------------------------------------------


def test_newer_versions_are_read_and_said_to_be_newer(inspect, state_file):
    for data in (sb.session(sb.kv(2), version=11), sb.sequence(sb.kv(2), version=4)):
        code, text, _ = inspect(state_file(data))
        assert code == 0
        assert "newer than what was checked" in " ".join(text.split())
    with pytest.raises(FileFormatError, match="no memory layout fits"):
        open_state(state_file(sb.session(sb.kv(2) + b"\0\0\0", version=11)))


# --- ik_llama.cpp ---------------------------------------------------------------------------------

IK_FILES = {
    "sequence": sb.sequence(sb.ik(), version=4),
    "session": sb.ik_session(sb.ik(sequences=(0, 2))),
    "transposed": sb.ik_session(sb.ik(v_state=1)),
    "no values": sb.sequence(sb.ik(v_state=2), version=4),
    "a window": sb.sequence(sb.ik(window=(8, 3, 5, 2)), version=4),
    "recurrent": sb.sequence(sb.ik(linear=((0, 64, 2), None, (0, 64, 1))), version=4),
    "indexer": sb.sequence(sb.ik(indexer=((1, 32), (1, 32))), version=4),
    "embeddings": sb.ik_session(sb.ik(), logits=(), embeddings=(1.0, 2.0, 3.0), outputs=()),
}


@pytest.mark.parametrize("name", IK_FILES)
def test_ik_llama_is_read_and_comes_back(inspect, state_file, tmp_path, name):
    data = IK_FILES[name]
    path = state_file(data)
    with open_state(path) as s:
        assert s.layout.program == "ik_llama"
        assert [t.layer for t in s.tensors.values() if t.kind == "K"][:2] == [0, 2]
        assert s.layout.values == (name != "no values")
        assert s.rotation.keys is None
        assert origin(s).program == "ik_llama.cpp"
        assert not any(loads.loads for loads in origin(s).loads)
        assert written(s, tmp_path) == data
        with pytest.raises(InputError, match="ik_llama"):
            plan_conversion(s, version=10)
    code, text, _ = inspect(path)
    assert code == 0
    assert "as ik_llama.cpp writes it" in text


def test_ik_llama_details(state_file):
    with open_state(state_file(IK_FILES["session"])) as s:
        assert (s.reading.lead.rng, s.reading.lead.outputs, s.reading.lead.logits) == (
            "17 42 99",
            1,
            2,
        )
        assert s.cells(0)[0].sequences.tolist() == [0, 2] * 3
    with open_state(state_file(IK_FILES["recurrent"])) as s:
        assert s.layout.recurrent_layers == 2
        assert s.tensors["cache_s_l0"].n_cells == 2
    with open_state(state_file(IK_FILES["indexer"])) as s:
        assert s.tensors["idx.cache_k_l2"].n_embd == 16
    with open_state(state_file(IK_FILES["a window"])) as s:
        assert s.memories[0].window[1:] == (8, 3, 5, 2)


def test_ik_llamas_whole_row_type(state_file, tmp_path):
    """q8_KV: one scale for all heads of a token, id 151; 8 bytes and a byte per value."""
    data = sb.sequence(sb.ik(keys=((151, 136),), values=((133, 52),)), version=4)
    with open_state(state_file(data)) as s:
        assert s.dialect == "ik_llama"
        k, v = s.tensors["cache_k_l0"], s.tensors["cache_v_l0"]
        assert (k.format.name, k.n_embd, v.format.name, v.n_embd) == ("q8_KV", 128, "q6_0", 64)
        assert written(s, tmp_path) == data
        plan = plan_conversion(s, lambda t: gguf_io.resolve_type("f32"))
        write_state(tmp_path / "f32", plan)
        with open_state(tmp_path / "f32") as f32:
            for name, t in s.tensors.items():
                assert np.array_equal(f32.tensors[name].values(), t.values())


def test_ik_llama_rotates_only_if_it_is_told_to(state_file, tmp_path):
    """-khad and -vhad, off by default: a Hadamard matrix as wide as the head."""
    path = state_file(sb.sequence(sb.ik(keys=((8, 136),), values=((8, 136),)), version=4))
    with open_state(path) as s:
        assert not any(t.rotation for t in s.tensors.values())
        assert "told to" in s.rotation.reason
    with open_state(path, rotation="on") as s:
        assert [t.rotation.size for t in s.tensors.values()] == [128, 128]
    path = state_file(sb.sequence(sb.ik(keys=((0, 512),), values=((0, 512),)), version=4))
    with open_state(path) as s:
        write_state(tmp_path / "q8", plan_conversion(s, lambda t: gguf_io.resolve_type("q8_0")))
        with open_state(tmp_path / "q8") as q8:
            for name, t in s.tensors.items():
                assert (
                    np.abs(q8.tensors[name].values() - t.values()).max()
                    <= 0.01 * np.abs(t.values()).max() + 1e-6
                )


def test_a_layout_decides_where_magic_and_version_are_the_same(state_file):
    """GGSN 10 and GGSQ 4 are llama.cpp's or ik_llama.cpp's."""
    for data, program in (
        (sb.session(sb.kv(2), version=10), "llama.cpp"),
        (IK_FILES["session"], "ik_llama"),
        (sb.sequence(sb.kv(2), version=4), "llama.cpp"),
        (IK_FILES["sequence"], "ik_llama"),
    ):
        with open_state(state_file(data)) as s:
            assert s.layout.program == program


def test_cut_ik_llama_files_are_refused(state_file):
    data = IK_FILES["session"]
    for n in range(len(data) - len(sb.ik(sequences=(0, 2))), len(data)):
        with pytest.raises(TbqError):
            open_state(state_file(data[:n]))


# --- buun -----------------------------------------------------------------------------------------


def test_fnv1a64():
    """Known answers of the hash's authors."""
    assert fnv1a64(b"") == 0xCBF29CE484222325
    assert fnv1a64(b"a") == 0xAF63DC4C8601EC8C
    assert fnv1a64(b"foobar") == 0x85944171F73967E8
    assert fnv1a64(b"bar", fnv1a64(b"foo")) == 0x85944171F73967E8


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        ((1, 2, 3), [1, 2, 3]),
        (sb.packed_tokens((4, 5)), [4, 5]),
        (sb.envelope((5, 6, 7)), [5, 6, 7]),
        (sb.envelope((5, 6), logits=(0.25, 1.0)), [5, 6]),
    ],
)
def test_buuns_header_is_read_and_written(inspect, state_file, tmp_path, words, tokens):
    data = sb.buun(sb.kv(3), words)
    path = state_file(data)
    with open_state(path) as s:
        assert s.container.long_header
        assert s.container.token_list.tolist() == tokens
        assert origin(s).program.startswith("buun")
        assert written(s, tmp_path) == data
        write_state(tmp_path / "f32", plan_conversion(s, lambda t: gguf_io.resolve_type("f32")))
        with pytest.raises(InputError, match="buun"):
            plan_conversion(s, version=9)
    with open_state(tmp_path / "f32") as f32:  # which has another size and checksum
        assert f32.container.long_header
        assert {t.format.name for t in f32.tensors.values()} == {"f32"}
    assert inspect(path)[0] == 0


def test_buuns_envelope(inspect, state_file):
    logits = struct.pack("<2f", 0.25, 1.0)
    path = state_file(sb.buun(sb.kv(3), sb.envelope((5, 6), logits=(0.25, 1.0))))
    with open_state(path) as s:
        e = s.container.envelope
        assert (e.version, e.flags, e.logits) == (2, 1, 2)
        assert e.checks == {"packed tokens": "right", "logits": "right"}
        assert e.digests["logits"] == hashlib.sha256(logits).hexdigest()
        assert e.digests["runtime"] == bytes(range(32)).hex()
    assert "SHA-256 of the logits right" in " ".join(inspect(path)[1].split())
    wrong = sb.envelope((5, 6), logits=(0.25, 1.0), digests={184: b"\1" * 32})
    with pytest.raises(FileFormatError, match="SHA-256 of the logits"):
        open_state(state_file(sb.buun(sb.kv(3), wrong)))
    unset = sb.envelope((5, 6), digests={152: bytes(32)})
    with open_state(state_file(sb.buun(sb.kv(3), unset))) as s:
        assert s.container.envelope.checks["packed tokens"] == "not set"


def test_buuns_checksum_is_compared(state_file):
    data = bytearray(sb.buun(sb.kv(3)))
    data[-1] ^= 1
    with pytest.raises(FileFormatError, match="the checksum of what follows is"):
        open_state(state_file(bytes(data)))
    for n in range(len(data)):  # a size that is not the file's makes it another header
        with pytest.raises(FileFormatError):
            open_state(state_file(bytes(data[:n])))


def test_buuns_footer(state_file, tmp_path):
    memory = sb.kv(3, ((46, 52),), ((46, 52),)) + sb.u32(0x54514346, 7)
    data = sb.buun(memory)
    with open_state(state_file(data)) as s:
        assert s.memories[0].streams[0].fingerprint == 7
        assert written(s, tmp_path) == data


def resume_object(kind, payload, first=0, last=0):
    head = b"BUUNRSMO" + sb.u32(1, 64, kind, 0) + struct.pack("<QQ", len(payload), 0)
    return head + sb.u32(first, last) + struct.pack("<QQ", 3, 0) + payload


def test_objects_of_a_resume_store_are_listed(inspect, state_file):
    objects = resume_object(1, b"gqsr BUUNRSMO", 0, 4096) + resume_object(9, b"", 5, 6)
    path = state_file(b"BUUNRSME" + bytes(8) + objects + resume_object(2, b"cut")[:-1])
    found = stored_objects(path)
    assert [(o.kind, o.first, o.last, o.complete) for o in found] == [
        ("chunk", 0, 4096, True),
        ("kind 9", 5, 6, True),
        ("tail", 0, 0, False),
    ]
    code, text, _ = inspect(path)
    assert code == 0
    assert "chunk" in text
    assert len(json.loads(inspect("--json", path)[1])["objects"]) == 3
    assert inspect("--reference", path, path)[0] == 2
    with pytest.raises(FileFormatError, match="resume store"):
        open_state(path)


# --- under another version ------------------------------------------------------------------------


def mrope_file(version, cells, tokens, session=False):
    memory = sb.kv_of(cells, 4, ((1, 64),), ((1, 64),))
    wrap = sb.session if session else sb.sequence
    return wrap(memory, tokens=tokens, version=version)


@pytest.mark.parametrize("session", [False, True])
def test_versions_are_converted_there_and_back(quantize, state_file, tmp_path, session):
    old, new = (9, 10) if session else (2, 3)
    up, down = tmp_path / "up.bin", tmp_path / "down.bin"
    tokens = (70, 71, 72, 73)
    cells = {8: lambda i: (i, i), 12: lambda i: (i, i, 70 + i)}
    data = mrope_file(old, sb.mrope_cells(4, cells[8]), tokens, session)
    want = mrope_file(new, sb.mrope_cells(4, cells[12]), tokens, session)
    code, _, err = quantize("--state-version", 10, "--verify", state_file(data), up, "COPY")
    assert code == 0
    assert "the tokens of 4 M-RoPE cells are those of the file's list" in err
    assert up.read_bytes() == want
    code, _, err = quantize("--state-version", 9, up, down)  # COPY goes without saying
    assert code == 0
    assert "dropped" in err
    assert down.read_bytes() == data


def test_cells_of_images_and_of_other_sequences_have_no_token(state_file, tmp_path):
    records = {0: (0, 0), 1: (1, 1), 2: (2, 1), 3: (4, 4)}
    positions = (0, 1, 1, 3)
    cells = sb.u32(4)
    for i, at in enumerate(positions):
        cells += struct.pack("<iIiii", at, 1, *records[i], 0)
    with open_state(state_file(mrope_file(2, cells, (70, -1, -1, 73)))) as s:
        plan = plan_conversion(s, version=10)
        assert "2 get -1" in plan.version.notes[0]
        write_state(tmp_path / "up", plan)
    with open_state(tmp_path / "up") as up:
        assert up.cells(0)[0].tokens.tolist() == [70, -1, -1, 73]
        assert up.container.version == 3
    other = sb.u32(2) + struct.pack("<iIiii", 0, 1, 0, 0, 4) + struct.pack("<iIiii", 1, 1, 1, 1, 6)
    memory = sb.kv_of(other, 2, ((1, 64),), ((1, 64),))
    with open_state(state_file(sb.session(memory, tokens=(7, 8)))) as s:
        write_state(tmp_path / "up", plan_conversion(s, version=10))
    with open_state(tmp_path / "up") as up:
        assert up.cells(0)[0].tokens.tolist() == [7, -1]


@pytest.mark.parametrize(
    ("data", "version", "words"),
    [
        (sb.sequence(sb.kv(2, deferred=0)), 10, "deferred-state byte"),
        (sb.sequence(sb.dsv4(), version=3), 9, "a dump of dsv4"),
        (
            sb.sequence(sb.kv(2), tokens=sb.packed_tokens((1, -1), [(1, b"p")]), version=3),
            9,
            "1 media among its tokens",
        ),
    ],
)
def test_what_cannot_be_carried_is_refused(state_file, data, version, words):
    with open_state(state_file(data)) as s, pytest.raises(InputError, match=words):
        plan_conversion(s, version=version)


def test_a_class_that_is_not_known_is_asked_for(state_file):
    path = state_file(sb.sequence(sb.kv(2, ((8, 136),), ()) * 2, version=3))
    with open_state(path) as s, pytest.raises(AmbiguousTypeError, match="dsa, iswa"):
        plan_conversion(s, version=9)
    with open_state(path, memory="iswa") as s:
        assert plan_conversion(s, version=9).version.number == 2


def test_packed_tokens_become_plain_for_an_old_server(state_file, tmp_path):
    words = sb.packed_tokens((5, 6, 7))
    with open_state(state_file(sb.sequence(sb.kv(2), tokens=words, version=3))) as s:
        write_state(tmp_path / "old", plan_conversion(s, version=9))
    assert (tmp_path / "old").read_bytes() == sb.sequence(sb.kv(2), tokens=(5, 6, 7), version=2)


def test_types_and_version_change_together(quantize, state_file, tmp_path):
    path, out = state_file(sb.session(sb.kv(3))), tmp_path / "out.bin"
    code, _, err = quantize("--state-version", 10, "--model", MODELS / "llama.metadata.gguf", path)
    assert code == 2  # no OUTPUT
    assert quantize("--state-version", 10, path, out, "q8_0")[0] == 0
    with open_state(out) as s:
        assert s.container.version == 10
        assert {t.format.name for t in s.tensors.values()} == {"q8_0"}
    assert quantize("--state-version", 11, path, out, "q8_0")[0] == 2
