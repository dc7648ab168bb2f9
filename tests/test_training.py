"""tbq-plan train: what is trained, what it takes, and where llama.cpp has no backward."""

import json
import re

import numpy as np
import pytest

import tbq
from gguf_io import OutputTensor, open_gguf, write_gguf
from gguf_io.training import BUILDS, graph, plan_training
from tbq import FileFormatError, InputError
from tools import tbq_plan

ATTENTION = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
DENSE = ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
EXPERTS = ("ffn_norm", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
MAMBA = ("attn_norm", "ssm_in", "ssm_conv1d", "ssm_x", "ssm_dt", "ssm_a", "ssm_out")
DELTA = ("attn_norm", "attn_qkv", "attn_gate", "ssm_conv1d", "ssm_beta", "ssm_norm", "ssm_out")
WIDTH = 8


@pytest.fixture
def model(tmp_path):
    """Write a model of float32 tensors, WIDTH values each; `packed` names those of q8_0."""

    def write(*layers, architecture="llama", packed="^$", **keys):
        names = ["token_embd.weight", "output_norm.weight", "output.weight"]
        names += [f"blk.{il}.{name}.weight" for il, layer in enumerate(layers) for name in layer]
        tensors = []
        for name in names:
            if re.search(packed, name):
                rows = tbq.quantize(np.zeros((1, 32), np.float32), "q8_0")
                tensors.append(OutputTensor.from_packed(name, rows, tbq.get_format("q8_0")))
            else:
                tensors.append(OutputTensor.from_array(name, np.zeros(WIDTH, np.float32)))
        metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
        path = tmp_path / "model.gguf"
        write_gguf(path, {"general.architecture": architecture} | metadata, tensors)
        return path

    return write


def trained(path, skip=None, optimizer="adamw"):
    with open_gguf(path) as file:
        return plan_training(file, skip and re.compile(skip), optimizer)


def test_what_is_trained(model):
    path = model((*ATTENTION, *DENSE), packed=r"attn_[qkv]|ffn_(gate|up|down)")
    found = trained(path)
    assert [*found.trained] == [
        "output_norm.weight",
        "output.weight",
        "blk.0.attn_norm.weight",
        "blk.0.attn_output.weight",
        "blk.0.ffn_norm.weight",
    ]
    assert found.skipped == {"never trained": 1, "not float32": 6, "named by the regex": 0}
    assert (found.parameters, found.gradient_bytes) == (5 * WIDTH, 5 * WIDTH * 4)
    assert found.optimizer_bytes == 2 * found.gradient_bytes
    assert trained(path, optimizer="sgd").optimizer_bytes == 0
    found = trained(path, r"blk\.")
    assert [*found.trained] == ["output_norm.weight", "output.weight"]
    assert found.skipped["named by the regex"] == 3


def test_a_plain_model_can_be_trained(model):
    found = trained(model((*ATTENTION, *DENSE), (*ATTENTION, *DENSE)))
    assert found.backward[0].name == "norm"
    assert found.backward[0].layer == 0
    assert not any(found.missing(build) for build in BUILDS)


def test_gradients_reach_what_is_behind_the_first_trained_tensor(model):
    path = model((*ATTENTION, *EXPERTS), (*ATTENTION, *DENSE))
    every = trained(path)
    assert set(every.missing("llama.cpp")) == {"MUL_MAT_ID"}
    assert every.missing("llama.cpp")["MUL_MAT_ID"].layer == 0
    assert not every.missing("llama-tq")
    behind = trained(path, r"blk\.0\.")
    assert {step.layer for step in behind.backward} == {1, None}
    assert not behind.missing("llama.cpp")
    # layer 0 is before the experts of layer 1
    path = model((*ATTENTION, *DENSE), (*ATTENTION, *EXPERTS))
    assert trained(path, r"blk\.1\.").missing("llama.cpp")["MUL_MAT_ID"].layer == 1
    last = trained(path, r"blk\.|output_norm")
    assert [step.name for step in last.backward] == ["output", "loss"]


def test_the_first_step_is_that_of_the_tensor(model):
    path = model((*ATTENTION, *DENSE))
    found = trained(path, r"blk\.0\.(attn_(norm|q|k|v)|ffn)")
    assert found.backward[0].name == "attention's output"
    assert "SOFT_MAX" not in {op for step in found.backward for op in step.operations}
    found = trained(model((*ATTENTION, *DENSE, "strange")), "attn|ffn")
    assert (found.backward[0].layer, found.backward[0].name) == (0, "norm")


@pytest.mark.parametrize(
    ("layer", "keys", "missing"),
    [
        ((*MAMBA,), {"architecture": "mamba"}, {"SSM_SCAN", "SSM_CONV", "CONCAT"}),
        (
            (*DELTA, *DENSE),
            {"architecture": "qwen35"},
            {"GATED_DELTA_NET", "SIGMOID", "L2_NORM", "SSM_CONV", "CONCAT"},
        ),
        ((*ATTENTION, *DENSE), {"architecture": "qwen35"}, {"SIGMOID"}),
        ((*ATTENTION, *DENSE), {"architecture": "gemma3"}, {"GEGLU"}),
        (
            (*ATTENTION, *DENSE),
            {"architecture": "falcon", "attention.layer_norm_epsilon": 1e-5},
            {"NORM"},
        ),
        ((*ATTENTION, "ffn_norm", "ffn_up", "ffn_down"), {}, {"GELU or RELU"}),
        (
            (*ATTENTION, *EXPERTS),
            {"expert_gating_func": 2, "expert_weights_norm": True},
            {"MUL_MAT_ID", "SIGMOID", "CLAMP"},
        ),
        ((*ATTENTION, *DENSE), {"final_logit_softcapping": 30.0}, {"TANH"}),
        (("attn_norm", "shortconv", *DENSE), {"architecture": "lfm2"}, {"SSM_CONV", "CONCAT"}),
        (("attn_norm", "attn_kv_a_mqa", "attn_output", *DENSE), {}, {"CONCAT"}),
    ],
)
def test_operations_without_a_backward(model, layer, keys, missing):
    found = trained(model(layer, **keys))
    assert set(found.missing("llama.cpp")) == missing
    assert set(found.missing("llama-tq")) == missing - {"SIGMOID", "MUL_MAT_ID"}
    newest = missing - {"SIGMOID", "MUL_MAT_ID", "TANH", "CONCAT", "SSM_CONV", "GATED_DELTA_NET"}
    assert set(found.missing("llama-tq since 2026-10-07")) == newest


def test_every_tensor_of_a_layer_has_a_step(model):
    for layer in ((*ATTENTION, *DENSE), (*ATTENTION, *EXPERTS), (*MAMBA,), (*DELTA, *DENSE)):
        architecture = "qwen35" if layer[1] == "attn_qkv" else "llama"
        with open_gguf(model(layer, architecture=architecture)) as file:
            placed = [name for step in graph(file) for name in step.tensors]
            assert sorted(placed) == sorted(file.tensors)


def test_nothing_to_train(model, tmp_path):
    with pytest.raises(InputError, match="trained tensors: got none"):
        trained(model(ATTENTION), ".")
    write_gguf(tmp_path / "bare.gguf", {"general.architecture": "llama"}, [])
    with pytest.raises(FileFormatError, match="has no tensors"):
        trained(tmp_path / "bare.gguf")


def run(capsys, *args):
    code = tbq_plan.main(["train", *map(str, args)])
    return code, *capsys.readouterr()


def test_program(model, capsys):
    path = model((*ATTENTION, *EXPERTS))
    code, out, err = run(capsys, path)
    assert (code, err) == (0, "")
    assert "llama.cpp: aborts at MUL_MAT_ID in layer 0 (experts)" in out
    assert re.search(r"MUL_MAT_ID +1 +none +yes +yes", out)
    assert "only if -ub is as large as -c" in out
    code, out, _ = run(capsys, path, "--train-skip-regex", r"blk\.", "--optimizer", "sgd")
    assert code == 0
    assert "llama.cpp: works" in out
    assert "only if -ub" not in out
    code, out, _ = run(capsys, path, "--json", "--train-skip-regex", r"blk\.[[:digit:]]+\.ffn")
    found = json.loads(out)
    assert [t["name"] for t in found["trained"]][-1] == "blk.0.attn_output.weight"
    assert [build["works"] for build in found["builds"]] == [False, True, True]
    assert [build["can_skip"] for build in found["builds"]] == [False, True, True]
    assert found["total_bytes"] == 3 * found["gradient_bytes"] == 3 * 4 * found["parameters"]


def test_activations_abort_in_any_case(model, capsys):
    path = model((*ATTENTION, *DENSE), architecture="gemma3")
    out = run(capsys, path)[1]
    assert "llama-tq: aborts at GEGLU in layer 0" in out
    assert "SKIP_INPLACE" not in out
    scan = run(capsys, model(MAMBA, architecture="mamba"))[1]
    assert "GGML_BACKWARD_SKIP_INPLACE=1" in scan


def test_bad_regex(model, capsys):
    code, _, err = run(capsys, model(ATTENTION), "--train-skip-regex", "(")
    assert code == 2
    assert "--train-skip-regex" in err
