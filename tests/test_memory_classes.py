"""Which class and which layers a model's metadata imply, with dumps of each class built by hand."""

import pytest
import state_bytes as sb

from gguf_io import open_state, write_gguf
from gguf_io.memory_classes import CLASSES, NAMES, classes_of, same_bytes
from tbq import FileFormatError
from tools import state_options

BASE = {"block_count": 4, "embedding_length": 256, "attention.head_count": 4}
BASE |= {"attention.head_count_kv": 2, "attention.key_length": 64, "attention.value_length": 64}
LATENT = {"attention.key_length_mla": 96, "attention.value_length_mla": 32}
LATENT |= {"attention.head_count_kv": 1, "attention.key_length": 128}
WINDOW = {"attention.sliding_window": 32}
INDEXER = {"attention.indexer.key_length": 64, "attention.indexer.top_k": 16}
SOME = {"attention.head_count_kv": [0, 2, 0, 2]}


def kv(layers, values=True, cells=3, row=256):
    """Float16 keys of so many bytes per row, and values of two heads of 64."""
    return sb.kv(cells, ((1, row),) * layers, ((1, 256),) * layers if values else ())


def keys(layers, row=256):
    return kv(layers, False, row=row)


def rec(n, n_layer=4):
    return sb.rec(1, n_layer, (64,) * n, (128,) * n)


# architecture, keys, memory, class, names of the keys' tensors
MODELS = {
    "llama": (BASE, kv(4), "kv", [f"cache_k_l{i}" for i in range(4)]),
    "llama with layers that predict": (
        BASE | {"nextn_predict_layers": 1},
        kv(3),
        "kv",
        [f"cache_k_l{i}" for i in range(3)],
    ),
    "phi3": (BASE | WINDOW, kv(4) + sb.kv(3, ()), "iswa", [f"base.cache_k_l{i}" for i in range(4)]),
    "llama4": (BASE, kv(1) + kv(3), "iswa", ["base.cache_k_l3", "swa.cache_k_l0"]),
    "gemma3n": (
        BASE | WINDOW | {"attention.shared_kv_layers": 2},
        kv(0) + kv(2),
        "iswa",
        ["swa.cache_k_l0", "swa.cache_k_l1"],
    ),
    "jamba": (BASE | SOME, kv(2) + rec(2), "hybrid", ["cache_k_l1", "cache_k_l3"]),
    "falcon-h1": (BASE, kv(4) + rec(4), "hybrid", [f"cache_k_l{i}" for i in range(4)]),
    "nemotron_h": (
        BASE | {"attention.head_count_kv": [0, 2, 0, 0], "feed_forward_length": [0, 0, 9, 0]},
        kv(1) + rec(2),
        "hybrid",
        ["cache_k_l1"],
    ),
    "lfm2": (
        BASE | SOME | WINDOW,
        kv(0) + kv(2) + rec(2),
        "hybrid_iswa",
        ["swa.cache_k_l1", "swa.cache_k_l3"],
    ),
    "lfm2moe": (BASE | SOME | WINDOW, kv(2) + rec(2), "hybrid", ["cache_k_l1", "cache_k_l3"]),
    "minimax-01": (BASE | {"block_count": 8}, kv(1) + rec(7, 8), "hybrid", ["cache_k_l7"]),
    "glm5-next": (BASE | LATENT, keys(1) + rec(3), "hybrid", ["cache_k_l0"]),
    "mamba2": ({"block_count": 4, "embedding_length": 64}, rec(4), "recurrent", []),
    "rwkv7": (BASE, rec(4), "recurrent", []),
    "glm-dsa": (
        BASE | LATENT | INDEXER,
        keys(4) + keys(2, 128),
        "dsa",
        [*(f"mla.cache_k_l{i}" for i in range(4)), "lid.cache_k_l0", "lid.cache_k_l1"],
    ),
    "hy_v4": (BASE | LATENT | INDEXER, keys(4) + keys(1, 128), "dsa", ["mla.cache_k_l0"]),
    "hy_v4 without an indexer": (BASE | LATENT, keys(4), "kv", ["cache_k_l0"]),
    "dots3note": (
        BASE | LATENT | INDEXER | WINDOW
        | {"attention.sliding_window_pattern": [True, True, False, True]},
        keys(1) + keys(1, 128) + keys(3),
        "dsa_iswa",
        ["mla.cache_k_l2", "lid.cache_k_l0", "swa.cache_k_l0", "swa.cache_k_l1", "swa.cache_k_l3"],
    ),
    "somebody-new": (BASE, kv(4), "kv", ["cache_k_l0"]),
}  # fmt: skip


def write_model(folder, architecture, keys):
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    write_gguf(folder / "m.gguf", {"general.architecture": architecture} | metadata, [])
    return folder / "m.gguf"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("session", [False, True])
def test_models_and_their_dumps(tmp_path, name, session):
    keys, memory, expected, layers = MODELS[name]
    architecture = name.split()[0]
    path = tmp_path / "state.bin"
    data = sb.session(memory, architecture.encode(), version=10)
    path.write_bytes(data if session else sb.sequence(memory, version=3))
    with open_state(path, model=write_model(tmp_path, architecture, keys)) as s:
        assert s.layout.memory == expected
        assert s.class_candidates == ()
        found = [n for n, t in s.tensors.items() if t.kind == "K"]
        assert found[: len(layers)] == layers
        wide = {t.head_dim for n, t in s.tensors.items() if t.kind == "V"}
        assert wide <= {64}


def test_the_indexer_of_hy_v4_is_rotated_as_its_cache_decides(tmp_path):
    keys = MODELS["hy_v4"][0]
    for row, rotated in ((256, False), (136, True)):
        kind = 1 if row == 256 else 8
        part = sb.kv(3, ((kind, row),) * 4, ())
        (tmp_path / "state.bin").write_bytes(sb.session(part + part, b"hy_v4", version=10))
        with open_state(tmp_path / "state.bin", model=write_model(tmp_path, "hy_v4", keys)) as s:
            assert (s.tensors["lid.cache_k_l0"].rotation is not None) == rotated
            assert s.tensors["mla.cache_k_l0"].rotation is None


def test_another_class_than_the_architectures_is_refused(tmp_path):
    model = write_model(tmp_path, "minimax-m3", BASE | INDEXER)
    (tmp_path / "state.bin").write_bytes(sb.sequence(kv(4), version=3))
    with pytest.raises(FileFormatError, match="sections of kv, minimax-m3 writes msa"):
        open_state(tmp_path / "state.bin", model=model)


def test_an_architecture_nobody_knows_decides_nothing(tmp_path):
    """Not between dsa and iswa; values still tell an indexer."""
    path = tmp_path / "state.bin"
    for name, candidates in (("somebody-new", ("dsa", "iswa")), ("dflash", ())):
        path.write_bytes(sb.session(keys(2) * 2, name.encode(), version=11))
        with open_state(path) as s:
            assert s.class_candidates == candidates
    for fill, memory in ((b"\0", "msa"), (b"\1", "iswa")):
        part = sb.kv(3, ((1, 256),), ((1, 256),), fill=fill)
        path.write_bytes(sb.session(part * 2, b"somebody-new", version=11))
        with open_state(path) as s:
            assert (s.layout.memory, s.class_candidates) == (memory, ())


def test_classes_that_write_the_same():
    assert same_bytes("KK", True) == ("iswa", "msa")
    assert same_bytes("KK", False) == ("dsa", "iswa")
    assert same_bytes("KKK", True) == ()
    assert same_bytes("KRK", True) == same_bytes("KRK", False) == ("hybrid_idx",)
    assert classes_of("minimax-m3") == ("msa",)
    assert set(classes_of(None)) == {*CLASSES, "none"}
    assert set(state_options.MEMORY_CLASSES) == set(NAMES)
