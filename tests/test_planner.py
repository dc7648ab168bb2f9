"""Sizes of caches: what llama.cpp logged, and its rules where nothing was logged."""

import json
from dataclasses import replace

import pytest
from conftest import SAMPLES

import tbq
from gguf_io import write_gguf
from gguf_io.cache_shapes import KNOWN, cache_shapes
from gguf_io.planner import (
    Context,
    Types,
    boundary,
    by_layer,
    cache_types,
    largest_context,
    pairs,
    plan,
    refusal,
    row_bytes,
    uniform,
)
from gguf_io.types import resolve_type
from tbq import FileFormatError, InputError

FOLDER = SAMPLES / "planner"
MIB = 1 << 20


def logged(name):
    found = json.loads((FOLDER / name).read_text())["configurations"]
    return [{"arch": "gemma3-270m", "recurrent": [], **entry} for entry in found]


LOGGED = logged("kv-allocations.json") + logged("kv-allocations-architectures.json")


def mib(n_bytes):
    """Round as llama.cpp prints: two decimals."""
    return float(f"{n_bytes / MIB:.2f}")


def name_of(entry):
    sizes = f"c{entry['n_ctx']}-np{entry['n_parallel']}-ub{entry['n_ubatch']}"
    kind = ("-unified" if entry["kv_unified"] else "") + ("-full" if entry["swa_full"] else "")
    return f"{entry['arch']}-{sizes}{kind}-{entry['type_k']}-{entry['type_v']}"


@pytest.mark.parametrize("entry", LOGGED, ids=name_of)
def test_what_llama_cpp_logged(entry):
    shapes = cache_shapes(FOLDER / f"{entry['arch']}.metadata.gguf")
    keys = ("n_ctx", "n_parallel", "n_ubatch", "kv_unified", "swa_full")
    types = (resolve_type(entry[key], "pr21089") for key in ("type_k", "type_v"))
    found = plan(shapes, Context(**{key: entry[key] for key in keys}), uniform(*types))
    caches = [
        {
            "cells": cache.cells,
            "layers": len(cache.layers),
            "streams": cache.streams,
            "mib": mib(cache.n_bytes),
            "k_mib": mib(cache.k_bytes),
            "v_mib": mib(cache.v_bytes),
        }
        for cache in found.caches
    ]
    assert caches == [{k: v for k, v in c.items() if k != "seqs"} for c in entry["caches"]]
    states = [
        {
            "cells": part.cells,
            "layers": part.layers,
            "mib": mib(part.n_bytes),
            "r_mib": mib(part.r_bytes),
            "s_mib": mib(part.s_bytes),
        }
        for part in found.recurrent
    ]
    assert states == entry["recurrent"]


EVERY = json.loads((FOLDER / "kv-allocations-all-architectures.json").read_text())["models"]


def test_there_are_models_of_nearly_every_architecture():
    missing = KNOWN - {entry["arch"] for entry in EVERY}
    # drafts, which need the model they draft for; those that need more metadata, or are unfinished
    assert missing <= MADE_OF_MORE, missing
    assert sum(len(entry["configurations"]) for entry in EVERY) > 600


MADE_OF_MORE = {
    *("apertus", "bert", "eagle3", "gemma4-assistant", "gptj", "jina-bert-v2", "jina-bert-v3"),
    *("nomic-bert", "nomic-bert-moe", "wavtokenizer-dec"),
}


@pytest.mark.parametrize("entry", EVERY, ids=lambda entry: entry["arch"])
def test_what_llama_cpp_logged_of_every_architecture(entry):
    keys = {f"{entry['arch']}.{key}": value for key, value in entry["keys"].items()}
    shapes = cache_shapes({"general.architecture": entry["arch"]} | keys)
    for wanted in entry["configurations"]:
        names = ("n_ctx", "n_parallel", "n_ubatch", "kv_unified", "swa_full")
        types = (resolve_type(wanted[name]) for name in ("type_k", "type_v"))
        found = plan(shapes, Context(**{n: wanted[n] for n in names}), uniform(*types))
        assert [
            [c.cells, len(c.layers), c.streams, mib(c.k_bytes), mib(c.v_bytes)]
            for c in found.caches
        ] == wanted["caches"]
        assert [
            [r.cells, r.layers, mib(r.r_bytes), mib(r.s_bytes), mib(r.p_bytes)]
            for r in found.recurrent
        ] == wanted["recurrent"]


def test_all_configurations_are_there():
    assert len(LOGGED) == 120
    assert len({entry["arch"] for entry in LOGGED}) == 16


# --- architectures of which nothing was logged: the rules of llama.cpp's source, by hand ---------

COMMON = {"block_count": 4, "embedding_length": 256, "attention.head_count": 4}
HEADS = {"attention.head_count_kv": 2, "context_length": 4096}
SSM = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 512,
    "ssm.state_size": 16,
    "ssm.group_count": 2,
}
LATENT = {
    "attention.head_count_kv": 1,
    "attention.key_length": 576,
    "attention.value_length": 512,
    "attention.key_length_mla": 192,
    "attention.value_length_mla": 128,
    "attention.kv_lora_rank": 512,
}
INDEXER = {"attention.indexer.key_length": 128, "attention.indexer.top_k": 2048}
KDA = {"kda.head_dim": 32, "ssm.conv_kernel": 4}
SWA = {"attention.sliding_window": 32}
PATTERN = "attention.sliding_window_pattern"


@pytest.fixture
def model(tmp_path):
    def write(architecture, **keys):
        keys = COMMON | HEADS | keys
        metadata = {f"{architecture}.{k}": v for k, v in keys.items() if v is not None}
        path = tmp_path / "model.gguf"
        write_gguf(path, {"general.architecture": architecture} | metadata, [])
        return path

    return write


def layout(path):
    """Return {cache: layers}, {cache: (K, V) values per row}, and the recurrent layers."""
    shapes = cache_shapes(path)
    layers = {part.name: [x.number for x in part.layers] for part in shapes.parts}
    widths = {
        part.name: {(x.heads * x.head_k, x.heads * x.head_v) for x in part.layers}
        for part in shapes.parts
    }
    return layers, widths, list(shapes.recurrent.layers) if shapes.recurrent else None


@pytest.mark.parametrize(
    ("architecture", "keys", "layers", "recurrent"),
    [
        ("llama", {}, {"kv": [0, 1, 2, 3]}, None),
        ("bert", {}, {}, None),
        ("modern-bert", SWA, {}, None),
        ("phi3", SWA, {"kv": [0, 1, 2, 3]}, None),
        ("qwen3", SWA, {"kv": [0, 1, 2, 3]}, None),  # its loader reads no window
        ("cohere2", SWA, {"base": [3], "swa": [0, 1, 2]}, None),
        ("cohere2moe", SWA, {"base": [0], "swa": [1, 2, 3]}, None),
        ("gemma2", {}, {"base": [1, 3], "swa": [0, 2]}, None),
        ("llama4", {}, {"base": [3], "swa": [0, 1, 2]}, None),
        ("llama4", {"attention.sliding_window": 0}, {"kv": [0, 1, 2, 3]}, None),
        ("exaone4", SWA, {"kv": [0, 1, 2, 3]}, None),  # only that of 64 layers has one
        ("olmo2", SWA | {PATTERN: 2}, {"base": [1, 3], "swa": [0, 2]}, None),
        ("step35", SWA | {PATTERN: [1, 0, 0, 1]}, {"base": [1, 2], "swa": [0, 3]}, None),
        ("mimo2", SWA | {PATTERN: [True] * 3}, {"base": [3], "swa": [0, 1, 2]}, None),
        ("glm4moe", {"nextn_predict_layers": 1}, {"kv": [0, 1, 2]}, None),
        ("gemma4-assistant", SWA | {PATTERN: [1, 0, 1, 0]}, {"base": [], "swa": []}, None),
        ("graniteswitch", {}, {"kv": [0, 1, 2, 3, 4]}, None),
        ("nanbeige", {"num_loops": 2}, {"kv": [*range(8)]}, None),
        ("gemma3n", SWA | {"block_count": 22}, {"base": [4, 9, 14, 19]}, None),
        ("mamba2", SSM | {"attention.head_count": 0}, {}, [0, 1, 2, 3]),
        ("rwkv7", {"wkv.head_size": 64, "attention.head_count": 0}, {}, [0, 1, 2, 3]),
        ("falcon-h1", SSM, {"kv": [0, 1, 2, 3]}, [0, 1, 2, 3]),
        ("jamba", SSM | {"attention.head_count_kv": [0, 2, 0, 0]}, {"kv": [1]}, [0, 2, 3]),
        (
            "nemotron_h",
            SSM | {"attention.head_count_kv": [0, 0, 2, 2], "feed_forward_length": [0, 64, 0, 64]},
            {"kv": [2]},
            [0],
        ),
        ("qwen3next", SSM, {"kv": [3]}, [0, 1, 2]),
        ("qwen35moe", SSM | {"full_attention_interval": 2}, {"kv": [1, 3]}, [0, 2]),
        (
            "qwen35",
            SSM | {"attention.recurrent_layers": [0, 1, 1, 0], "nextn_predict_layers": 1},
            {"kv": [0]},
            [1, 2],
        ),
        ("minimax-01", {"block_count": 9}, {"kv": [7]}, [0, 1, 2, 3, 4, 5, 6, 8]),
        (
            "lfm2",
            SWA | {"attention.head_count_kv": [0, 2, 0, 2], "shortconv.l_cache": 3},
            {"base": [], "swa": [1, 3]},
            [0, 2],
        ),
        (
            "bailingmoe3",
            LATENT | KDA | {"attention.head_count_kv": [0, 0, 1, 1], "nextn_predict_layers": 1},
            {"kv": [2, 3]},  # the NextN layer too
            [0, 1],
        ),
        (
            "glm5-next",
            LATENT
            | INDEXER
            | KDA
            | {"attention.head_count_kv": [1, 0, 1, 1], "attention.indexer.types": [1, 1, 0, 1]},
            {"kv": [0, 2, 3], "indexer": [0, 3]},
            [1],
        ),
        (
            "glm-dsa",
            LATENT | INDEXER | {"attention.indexer.types": [1, 0, 0], "nextn_predict_layers": 1},
            {"mla": [0, 1, 2], "indexer": [0]},
            None,
        ),
        (
            "glm-dsa",
            LATENT | INDEXER | {"context_length": 1 << 20, "block_count": 8},
            {"mla": [*range(8)], "indexer": [0, 1, 2, 6]},
            None,
        ),
        (
            "hy_v4",
            LATENT | INDEXER | {"attention.indexer.types": [1, 0, 1, 0]},
            {"mla": [0, 1, 2, 3], "indexer": [0, 2]},
            None,
        ),
        ("hy_v4", LATENT, {"kv": [0, 1, 2, 3]}, None),
        (
            "dots3note",
            LATENT
            | INDEXER
            | SWA
            | {"attention.indexer.types": [1, 0, 1, 0], PATTERN: [0, 1, 0, 1]},
            {"mla": [0, 2], "indexer": [0, 2], "swa": [1, 3]},
            None,
        ),
        ("dflash", {}, {"kv": [0, 1, 2, 3]}, None),
        (
            "dflash",
            SWA | {"hyper_connection.count": 4},
            {"base": [], "swa": [0, 1, 2, 3]},
            None,
        ),
        ("never-heard-of", {}, {"kv": [0, 1, 2, 3]}, None),
    ],
)
def test_layers(model, architecture, keys, layers, recurrent):
    found, _, states = layout(model(architecture, **keys))
    assert {name: found.get(name) for name in layers} == layers
    assert set(found) == set(layers) | ({"swa"} if architecture == "gemma3n" else set())
    assert states == recurrent


def test_widths(model):
    def widths(*args, **keys):
        return layout(model(*args, **keys))[1]

    assert widths("llama") == {"kv": {(128, 128)}}
    assert widths("llama", **{"attention.head_count_kv": None}) == {"kv": {(256, 256)}}
    keys = {"attention.key_length": 192, "attention.value_length": 96}
    assert widths("llama", **keys) == {"kv": {(384, 192)}}
    own = {"attention.key_length_swa": 32, "attention.value_length_swa": 32}
    found = widths("gemma2", **keys, **own)
    assert found == {"base": {(384, 192)}, "swa": {(64, 64)}}
    assert widths("deci", **{"attention.head_count_kv": [0, 2, 1, 2]})["kv"] == {
        (0, 0),
        (64, 64),
        (128, 128),
    }
    assert widths("deepseek2", **LATENT) == {"kv": {(576, 0)}}
    assert widths("llama", **LATENT) == {"kv": {(576, 512)}}  # reads no keys of latent attention
    assert widths("glm-dsa", **LATENT, **INDEXER)["indexer"] == {(128, 0)}
    heads = {"attention.head_count_kv": [1, 1, 1, 0]}
    found = widths("glm5-next", **(LATENT | INDEXER | KDA | heads))
    assert found["indexer"] == {(384, 0)}  # key, gate and pooled key
    assert widths("graniteswitch")["kv"] == {(128, 128), (64, 64)}
    # minimax-m3's indexer has values, which stay zero
    assert widths("minimax-m3", **INDEXER)["indexer"] == {(128, 64)}
    swa = SWA | {PATTERN: [0, 1, 1, 1], "attention.indexer.types": [1, 0, 0, 0]}
    own = {"attention.key_length_swa": 288}
    found = widths("dots3note", **LATENT, **INDEXER, **swa, **own)
    assert found == {"mla": {(576, 0)}, "indexer": {(128, 0)}, "swa": {(288, 0)}}


@pytest.mark.parametrize(
    ("architecture", "keys", "r", "s"),
    [
        ("mamba", SSM, 3 * 512, 16 * 512),  # has no groups
        ("mamba2", SSM, 3 * (512 + 2 * 2 * 16), 16 * 512),
        ("rwkv6", {"wkv.head_size": 64}, 2 * 256, 256 * 64),
        ("rwkv6qwen2", {"wkv.head_size": 64, "token_shift_count": 1}, 256, 256 * 64),
        ("lfm2moe", {"shortconv.l_cache": 3, "attention.head_count_kv": [0] * 4}, 2 * 256, 0),
        (
            "kimi-k3",
            LATENT | KDA | {"attention.head_count_kv": [0] * 4},
            3 * 3 * 4 * 32,
            32 * 32 * 4,
        ),
        ("minimax-01", {"block_count": 5}, 0, 64 * 64 * 4),
    ],
)
def test_recurrent_states(model, architecture, keys, r, s):
    part = cache_shapes(model(architecture, **keys)).recurrent
    assert (part.r_values, part.s_values) == (r, s)


def test_every_architecture_can_be_planned(model):
    keys = SSM | LATENT | INDEXER | KDA | SWA
    keys |= {PATTERN: [0, 1, 0, 1], "attention.indexer.types": [1, 0, 1, 0], "wkv.head_size": 64}
    keys |= {"attention.compress_ratios": [0, 4, 4, 128], "shortconv.l_cache": 3}
    keys |= {"attention.head_count_kv": [1, 0, 1, 1], "attention.head_count": 4}
    f16 = resolve_type("f16")
    nothing = set()
    for architecture in sorted(KNOWN):
        shapes = cache_shapes(model(architecture, **keys))
        assert shapes.known
        if not plan(shapes, Context(1024), uniform(f16, f16)).n_bytes:
            nothing.add(architecture)
    without = {"bert", "dream", "eurobert", "llada", "llada-moe", "neo-bert", "nomic-bert", "rnd1"}
    without |= {"jina-bert-v2", "jina-bert-v3", "nomic-bert-moe", "gemma-embedding"}
    without |= {"modern-bert", "wavtokenizer-dec"}
    assert nothing == without | {"gemma4-assistant"}


# --- contexts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "cells"),
    [
        (Context(1), 256),
        (Context(1000, 3), 512),  # 1024 // 3, padded again
        (Context(1000, 3, kv_unified=True), 1024),
        (Context(4096, 4), 1024),
    ],
)
def test_cells_per_sequence(context, cells):
    assert context.n_ctx_seq == cells


def test_cells_of_windows():
    part = cache_shapes(FOLDER / "gemma3-270m.metadata.gguf").parts[1]
    assert Context(8192, n_ubatch=512).cells(part, 512) == 1024
    assert Context(8192, 4, kv_unified=True).cells(part, 512) == 2560
    assert Context(8192, 4).cells(part, 512) == 1024
    assert Context(8192, swa_full=True).cells(part, 512) == 8192
    assert Context(512).cells(part, 512) == 512


@pytest.mark.parametrize(
    "keys",
    [{"n_ctx": 0}, {"n_ctx": 1 << 32}, {"n_parallel": 0}, {"n_parallel": 257}, {"n_ubatch": 0}],
)
def test_impossible_contexts(keys):
    with pytest.raises(InputError, match=f"{[*keys][0]}: got"):
        Context(**({"n_ctx": 512} | keys))


def test_transposed_v_is_as_wide_in_every_layer():
    shapes = cache_shapes(FOLDER / "gemma4.metadata.gguf")  # heads of 128 and of 64
    f16 = resolve_type("f16")
    rows = plan(shapes, Context(256, flash_attn=False), uniform(f16, f16)).caches[1]
    assert {layer.k_bytes for layer in rows.layers} == {256 * 64 * 2}
    assert {layer.v_bytes for layer in rows.layers} == {256 * 128 * 2}


# --- types ---------------------------------------------------------------------------------------


def test_heads_are_padded_where_the_fork_does():
    turbo = tbq.get_format("thetom:turbo3")
    assert row_bytes(turbo, 4, 80, "K") == row_bytes(turbo, 4, 128, "K") == 4 * 50
    assert row_bytes(turbo, 1, 576, "K") == 5 * 50
    assert row_bytes(resolve_type("q8_0"), 1, 576, "K") == 18 * 34


def test_what_a_model_cannot_have(model):
    shapes = cache_shapes(model("llama", **{"attention.key_length": 80}))
    pr = tbq.get_format("pr21089:tbq4_0")
    assert refusal(pr, "K", shapes).startswith("rows of 160 values in the kv cache")
    assert refusal(pr, "V", shapes).startswith("rows of 128 values in the kv cache")
    # the fork takes groups that reach over heads: its dumps of heads of 128 have them
    assert refusal(pr, "K", cache_shapes(model("llama", **{"attention.key_length": 128}))) is None
    assert refusal(tbq.get_format("thetom:turbo3"), "K", shapes) is None
    assert refusal(tbq.get_format("ktq2_1"), "V", shapes) == "for K only"
    assert "borrow" in refusal(tbq.get_format("xktq2_1"), "K", shapes)
    q4 = resolve_type("q4_0")
    assert refusal(q4, "V", shapes) is None
    assert "flash attention" in refusal(q4, "V", shapes, flash_attn=False)
    assert "divide heads of 80" in refusal(q4, "K", shapes)
    assert refusal(q4, "K", shapes, flash_attn=False) is None  # rows of 160
    assert refusal(resolve_type("f16"), "V", shapes, flash_attn=False) is None


def test_an_indexer_needs_whole_blocks_too(model):
    keys = LATENT | INDEXER | {"attention.key_length": 512, "attention.indexer.key_length": 64}
    shapes = cache_shapes(model("deepseek32", **keys))
    reason = refusal(tbq.get_format("pr21089:tbq3_0"), "K", shapes)
    assert reason.startswith("rows of 64 values in the indexer cache")


def test_pairs(model):
    shapes = cache_shapes(model("llama", **{"attention.head_count": 1}))
    types = cache_types("pr21089")
    names = [fmt.name for fmt in types]
    assert names[:4] == ["f32", "f16", "bf16", "q8_0"]
    assert names[-2:] == ["tbq3_0", "tbq4_0"]
    assert len(list(pairs(shapes, types))) == len(types) ** 2
    latent = cache_shapes(model("deepseek2", **LATENT))
    assert all(k is v for k, v in pairs(latent, types))
    assert {fmt.name for fmt, _ in pairs(latent, types)} == {*names} - {"tbq3_0", "tbq4_0"}


def test_types_of_a_release():
    of = {name: {fmt.key for fmt in cache_types(name)} for name in ("thetom", "thetom@2026-03-28")}
    assert "thetom:turbo2" in of["thetom"]
    assert "thetom@2026-03-28:turbo2" in of["thetom@2026-03-28"]
    assert not of["thetom"] & {"thetom@2026-03-28:turbo2"}


def test_layers_of_their_own_types(model):
    shapes = cache_shapes(model("llama"))
    q8, q4 = resolve_type("q8_0"), resolve_type("q4_0")
    kept = boundary(shapes, 1, 1)
    assert kept == {0, 3}
    choice = by_layer(dict.fromkeys(kept, Types(q8, q8)), Types(q8, q4))
    (cache,) = plan(shapes, Context(256), choice).caches
    per_row = {"q8_0": 128 // 32 * 34, "q4_0": 128 // 32 * 18}
    assert [x.k_bytes // 256 for x in cache.layers] == [per_row["q8_0"]] * 4
    assert [x.v_bytes // 256 for x in cache.layers] == [
        per_row[name] for name in ("q8_0", "q4_0", "q4_0", "q8_0")
    ]
    assert boundary(shapes, 9, 9) == {0, 1, 2, 3}
    assert boundary(shapes, 0, 0) == set()


def test_a_fork_collects_rows_as_f16_first():
    shapes = cache_shapes(FOLDER / "llama.metadata.gguf")
    context = Context(1024)
    f16 = plan(shapes, context, uniform(resolve_type("f16"), resolve_type("f16")))
    both = uniform(tbq.get_format("ktq2_1"), tbq.get_format("vtq2_2"))
    found = plan(shapes, context, both)
    assert found.staging_bytes == f16.kv_bytes
    assert found.n_bytes == found.kv_bytes + f16.kv_bytes
    keys = uniform(tbq.get_format("ktq2_1"), tbq.get_format("vtq2_1"))
    assert plan(shapes, context, keys).staging_bytes == f16.kv_bytes // 2


def test_the_largest_context():
    shapes = cache_shapes(FOLDER / "llama.metadata.gguf")
    f16 = uniform(resolve_type("f16"), resolve_type("f16"))
    each = plan(shapes, Context(256), f16).n_bytes
    assert largest_context(shapes, Context(256), f16, 3 * each, 1 << 20) == 768
    assert largest_context(shapes, Context(256), f16, 3 * each - 1, 1 << 20) == 512
    assert largest_context(shapes, Context(256), f16, each - 1, 1 << 20) == 0
    assert largest_context(shapes, Context(256), f16, 100 * each, 1024) == 1024
    assert largest_context(shapes, Context(256, 2), f16, 3 * each, 1 << 20) == 512


@pytest.mark.parametrize("name", ["gemma3-270m", "granitehybrid", "deepseek4-i128", "llama"])
def test_the_largest_context_is_that_of_the_plan(name):
    shapes = cache_shapes(FOLDER / f"{name}.metadata.gguf")
    own = tbq.get_format("ktq2_1"), tbq.get_format("vtq2_1")
    types = own if not shapes.same_types else (resolve_type("q8_0"),) * 2
    for context in (Context(256, 2), Context(256, 2, kv_unified=True), Context(256, swa_full=True)):
        unit = 256 if context.kv_unified else 256 * context.n_parallel
        for budget in (1 << 20, 3 << 20, (5 << 20) + 12345):
            found = largest_context(shapes, context, uniform(*types), budget, 1 << 14)
            sizes = [
                plan(shapes, replace(context, n_ctx=n), uniform(*types)).n_bytes
                for n in range(unit, (1 << 14) + 1, unit)
            ]
            assert found == unit * sum(size <= budget for size in sizes)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "missing", "keys"),
    [
        ("llama", "llama.block_count", {"block_count": None}),
        ("llama", "llama.embedding_length", {"embedding_length": None}),
        ("llama", "llama.attention.head_count", {"attention.head_count": None}),
        ("gpt-oss", "gpt-oss.attention.sliding_window", {}),
        ("mamba", "mamba.ssm.conv_kernel", {}),
        ("never-heard-of", "never-heard-of.attention.sliding_window_pattern", SWA),
        ("deepseek4", "deepseek4.attention.compress_ratios", SWA | INDEXER),
        ("step35", "step35.attention.sliding_window_pattern", SWA),
        ("glm-dsa", "glm-dsa.attention.indexer.key_length", LATENT),
    ],
)
def test_missing_keys(model, architecture, missing, keys):
    with pytest.raises(FileFormatError) as caught:
        cache_shapes(model(architecture, **keys))
    assert f"metadata key {missing} is missing" in str(caught.value)
    assert f"--override-kv {missing}=int:N supplies" in str(caught.value)


def test_keys_can_be_supplied(model, tmp_path):
    path = model("llama", **{"attention.head_count": None})
    keys = {"llama.attention.head_count": 4}
    assert cache_shapes(path, keys).parts[0].layers[0].head_k == 64
    write_gguf(tmp_path / "bare.gguf", {}, [])
    with pytest.raises(FileFormatError, match="--override-kv general.architecture=str:NAME"):
        cache_shapes(tmp_path / "bare.gguf")


@pytest.mark.parametrize(
    "keys",
    [
        {"block_count": 0},
        {"block_count": 1 << 30},
        {"nextn_predict_layers": 9},
        {"attention.head_count_kv": [1, 2]},
        {"attention.head_count_kv": "two"},
        {"attention.key_length": -1},
    ],
)
def test_impossible_keys(model, keys):
    with pytest.raises(FileFormatError, match=r"metadata key llama\.\S+ is .*, need "):
        cache_shapes(model("llama", **keys))


ODD = [0, 1, (1 << 20) - 1, 1 << 40, -3, 0.5, "text", True, [1, 2], ["a"], [0.5] * 4, [1] * 4]
ODD_KEYS = [
    *(*COMMON, *HEADS, *SSM, *LATENT, *INDEXER, *KDA, *SWA, PATTERN),
    *("nextn_predict_layers", "attention.indexer.types", "attention.compress_ratios"),
    *("attention.recurrent_layers", "full_attention_interval", "ple.layers", "wkv.head_size"),
    *("attention.shared_kv_layers", "num_loops", "shortconv.l_cache", "feed_forward_length"),
]


@pytest.mark.parametrize("key", ODD_KEYS)
def test_odd_metadata_is_planned_or_refused(key):
    """Nothing but an error of ours, whatever a key holds."""
    f16 = uniform(resolve_type("f16"), resolve_type("f16"))
    plain = COMMON | HEADS | SSM | LATENT | INDEXER | KDA | SWA
    plain |= {PATTERN: [1, 0, 1, 0], "attention.indexer.types": [1, 0, 1, 0], "ple.layers": [0]}
    plain |= {"attention.compress_ratios": [0, 4, 4, 128], "shortconv.l_cache": 3}
    plain |= {"wkv.head_size": 64, "hyper_connection.count": 4}
    plain |= {"ple.ngram_size": 3, "ple.conv_kernel": 4}
    refused = 0
    for value in ODD:
        for name in sorted(KNOWN):
            keys = {f"{name}.{k}": v for k, v in (plain | {key: value}).items()}
            try:
                shapes = cache_shapes({"general.architecture": name} | keys)
                plan(shapes, Context(512), f16)
            except (FileFormatError, InputError):
                refused += 1
    assert refused < len(ODD) * len(KNOWN)


def test_metadata_alone(model):
    keys = SSM | {"attention.head_count_kv": [0, 2, 0, 0]}
    metadata = {f"jamba.{k}": v for k, v in (COMMON | HEADS | keys).items()}
    alone = cache_shapes({"general.architecture": "jamba"} | metadata)
    assert alone == cache_shapes(model("jamba", **keys))


def test_notes(model):
    assert "unknown here" in cache_shapes(model("never-heard-of")).notes[0]
    assert "no cache" in cache_shapes(model("bert")).notes[0]
    assert "NextN" in cache_shapes(model("glm4moe", nextn_predict_layers=1)).notes[0]
    assert cache_shapes(model("llama")).notes == ()
