"""The doctor: what it prints, and with which code it leaves."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoint import write_exchange
from lit_gpt.config import Config
from lit_gpt.errors import run_command
from lit_gpt.kernels import doctor
from lit_gpt.kernels.choice import BACKENDS
from lit_gpt.model import InitialWeights
from tests.lit_gpt.test_kernel_backends import H100


def ask(capsys, *arguments: str) -> tuple[int, str, str]:
    code = run_command(lambda: doctor.main(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def configured(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_without_a_config_it_lists_every_backend_and_what_auto_takes(capsys):
    code, out, _ = ask(capsys)

    assert code == 0
    found = ("python 3.", f"torch {torch.__version__}", "cuDNN", "triton", "flash-attn", "xformers", "C++ compiler")
    assert all(each in out for each in found)
    for operation, backends in BACKENDS.items():
        assert f"\n{operation}: auto is " in out
        for name in backends:
            assert re.search(rf"\n  [* ] {name} +(ok|no: needs )", out), name
    assert "  * sdpa       ok\n" in out
    assert "cudnn      no: needs a CUDA device, this run is on cpu\n" in out
    assert out.endswith(
        "kernels: attention=sdpa norm=torch mlp=torch rope=torch loss=chunked; each agrees with its reference\n"
    )


def test_a_config_that_names_what_cannot_run_is_told_so_with_1(capsys, tmp_path):
    path = configured(tmp_path, "precision: bf16\ndevice: cpu\nkernels: {attention: fa3, loss: chunked}\n")
    code, out, _ = ask(capsys, "--config", path)
    assert code == 1
    assert "\non cpu in bf16, eager:\n" in out
    assert "kernels.attention='fa3' cannot be used: needs a CUDA device, this run is on cpu. Use kernels" in out


def test_a_config_whose_kernels_run_is_checked_and_fine(capsys, tmp_path):
    path = configured(tmp_path, "compile: block\nprecision: fp32\nkernels: {attention: math, norm: reference}\n")
    code, out, _ = ask(capsys, "--config", path)
    assert code == 0
    assert "\non cpu in fp32, compiled:\n" in out
    assert "kernels: attention=math norm=reference mlp=torch" in out


def test_it_asks_for_what_the_run_and_its_model_need(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton" or None)
    monkeypatch.setattr(importlib, "import_module", lambda name: name)
    monkeypatch.setattr(doctor.Situation, "on", lambda device, **known: dataclasses.replace(H100, **known))
    usual = {"precision": "bf16", "compile": "none"}

    def of(**model: object) -> str:
        situation = doctor.situation_of({**usual, "model": model}, torch.device("cuda"))
        return " ".join(doctor.auto(operation, situation) for operation in ("attention", "norm"))

    assert of() == of(name="2L64H") == "cudnn triton"
    assert of(name="2L512H", n_head=2) == "flash triton"  # heads of 256 channels
    assert of(name="1L16384H") == "cudnn torch"
    config = Config.from_name("1L64H", vocab_size=64, family="mistral", sliding_window=8)
    write_exchange(tmp_path / "mistral", config, InitialWeights(config, 0))
    settings = {**usual, "model": {"name": "init_from", "block_size": 32}, "init_from": str(tmp_path / "mistral")}
    assert doctor.situation_of(settings, torch.device("cuda")).masked


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("device: cuda", "device=cuda cannot be used: torch sees no CUDA device\n"),
        ("fp8: rowwise", "fp8=rowwise cannot be used: needs a CUDA device, this run is on cpu\n"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_what_a_config_names_beside_kernels_is_looked_for_too(capsys, tmp_path, text, message):
    code, out, _ = ask(capsys, "--config", configured(tmp_path, text))
    assert code == 1 and out.endswith(message)


def test_kernels_that_disagree_with_their_reference_are_unusable(capsys, monkeypatch):
    wrong = dataclasses.replace(BACKENDS["mlp"]["torch"], op=lambda gate, up, gelu: gate * up)
    monkeypatch.setitem(BACKENDS["mlp"], "torch", wrong)
    code, out, _ = ask(capsys)
    assert code == 1 and "kernels.mlp='torch' computes something else than the reference" in out
    assert "the table above lists them" in out and "kernels.doctor" not in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_doctor_does_not_send_to_the_doctor(capsys, tmp_path):
    code, out, _ = ask(capsys, "--config", configured(tmp_path, "kernels: {attention: flash}"))
    assert code == 1 and out.endswith("Use kernels.attention=auto; the table above says what can be used here\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernels: {attention: flesh}", "kernels.attention: unknown backend 'flesh'; did you mean 'flash'?"),
        ("kernels: {attention: quick}", "kernels.attention: unknown backend 'quick'; known: auto, "),
        ("kernels: {atention: sdpa}", "kernels: unknown key 'atention'; did you mean 'attention'?"),
        ("kernels: fast", "kernels='fast' must be a mapping"),
        ("model: 2L64H", "model='2L64H' must be a mapping"),
        ("model: {name: 2L64}", "unknown model name '2L64'"),
        ("model: {name: 2L64H, n_heads: 2}", "did you mean 'n_head'"),
    ],
)
def test_settings_that_are_no_kernels_are_bad_usage(capsys, tmp_path, text, message):
    code, _, errors = ask(capsys, "--config", configured(tmp_path, text))
    assert code == 2 and message in errors


def test_a_cudnn_that_shadows_torchs_own_is_warned_of():
    (warning,) = doctor.shadowed_cudnn("9.19.0.56", 90500)
    assert "torch's wheel brings cuDNN 9.19.0.56, but 9.5.0 is loaded" in warning and "LD_LIBRARY_PATH" in warning
    assert [*doctor.shadowed_cudnn("9.19.0.56", 91900)] == []
    assert [*doctor.shadowed_cudnn(None, 91900), *doctor.shadowed_cudnn("9.19.0.56", None)] == []


def test_torchs_own_order_is_told_by_name():
    assert {"flash_attention", "math", "cudnn_attention"} <= set(doctor.sdpa_order())


def test_on_a_gpu_the_table_gives_each_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton" or None)
    monkeypatch.setattr(importlib, "import_module", lambda name: name)
    lines = list(doctor.table(dataclasses.replace(H100, cudnn=90100)))
    assert "attention: auto is flash" in lines and "  * flash      ok" in lines
    assert "    cudnn      no: needs cuDNN 9.15.1 or newer, found 9.1.0; install a newer torch" in lines
    assert any(line.startswith("    fa3        no: needs the package flash_attn_interface") for line in lines)
    assert "  * triton     ok" in lines
