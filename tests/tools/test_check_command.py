"""`fusedreg check` as a command: its options, its file, and what it cannot do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedreg.check
from fusedreg.__main__ import main
from fusedreg.check import installation, report
from fusedreg.check.accuracy import Place

from cases import CASES

CPU = torch.device("cpu")


def test_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("fusedreg.check")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(fusedreg, "check")
    assert main(["check"]) == 2
    assert capsys.readouterr().err == (
        "fusedreg check: rich is missing, install it with: pip install rich\n"
    )


def test_another_missing_module_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("fusedreg.check")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fusedreg.machine", None)
    monkeypatch.delattr(fusedreg, "check")
    with pytest.raises(ModuleNotFoundError, match=r"fusedreg\.machine"):
        main(["check"])


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--device", "cuda:77"]) == 2
    assert "fusedreg check: --device cuda:77: here are cpu" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An NVIDIA driver is loaded, and torch is built for the CPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(fusedreg.check, "devices", lambda: [CPU])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(installation, "NVIDIA", tmp_path)
    assert main(["check", "--device", "cuda"]) == 2
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == "fusedreg check: --device cuda: here are cpu"
    assert second.startswith("note: an NVIDIA driver is loaded, but torch")
    assert "built without CUDA, sees no GPU. Install the torch that" in second


def test_a_device_without_an_index_is_all_of_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    seen: list[Any] = []
    monkeypatch.setattr(fusedreg.check, "devices", lambda: [CPU, *gpus])
    monkeypatch.setattr(fusedreg.check, "run", lambda *args: seen.append(args[0]) or 0)
    for options in ([], ["--device=cuda"], ["--device=cuda:1", "--device=cuda"]):
        assert main(["check", *options]) == 0
    assert seen == [[CPU, *gpus], gpus, [gpus[1], gpus[0]]]


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--json", str(tmp_path / "missing" / "file.json")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["check", "--json", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
def test_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    """What ran is shown, but a program that waits for the file is told."""
    arguments = ["--device=cpu", "--case=sgd-none", "--dtype=float32", "--json=/dev/full"]
    assert main(["check", *arguments]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("sgd ") for line in lines)
    assert "PASS" not in lines[-1]
    assert lines[-1].startswith("BROKEN: --json /dev/full: No space left on device; all ")


def test_no_older_result_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a run that dies, or takes no step."""

    def dies(*args: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "check.json"
    out.write_text('{"verdict": "pass"}', encoding="utf-8")
    assert main(["check", "--device=cuda:77", "--json", str(out)]) == 2
    assert out.read_text(encoding="utf-8") == ""
    out.write_text('{"verdict": "pass"}', encoding="utf-8")
    monkeypatch.setattr(fusedreg.check, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        main(["check", "--json", str(out)])
    assert out.read_text(encoding="utf-8") == ""


def test_the_file_is_written_before_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*args: Any) -> None:
        raise BrokenPipeError  # as of a pager that was left

    monkeypatch.setattr(report, "show", dies)
    out = tmp_path / "check.json"
    arguments = ["--device=cpu", "--case=sgd-none", "--dtype=float32", f"--json={out}"]
    with pytest.raises(BrokenPipeError):
        main(["check", *arguments])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["verdict"] == "pass"


def test_nothing_to_step_is_no_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Place, "takes", lambda self, step: False)
    out = tmp_path / "check.json"
    assert main(["check", "--device=cpu", "--case=sgd-none", f"--json={out}"]) == 2
    assert json.loads(out.read_text(encoding="utf-8"))["verdict"] == "broken"
    assert "no step was taken (no device has the dtypes)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--device", "quark", "'quark' is no device of torch"),
        ("--dtype", "int8", "none of float64, float32, bfloat16, float16"),
        ("--case", "adam", f"'adam' is none of {CASES[0].id} to {CASES[-1].id}"),
    ],
)
def test_wrong_arguments(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["check", option, value])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise OSError('no libcuda.so')", "triton cannot be imported (OSError: no libcuda.so)"),
        ("", "what is imported as triton is another module, without a version"),
    ],
)
def test_a_triton_with_which_torch_makes_no_optimizer(code: str, said: str, tmp_path: Path) -> None:
    """In a process of its own, since torch imports triton once, for its first optimizer."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "fusedreg", "check", "--device=cpu", "--case=sgd-none"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (2, "")
    printed = " ".join(done.stdout.split())
    assert "BROKEN: torch makes no optimizer, not even its own (" in printed
    assert f"note: {said}" in printed
    assert printed.endswith("BROKEN: no step was taken (torch)")


def test_module_runs() -> None:
    command = [sys.executable, "-m", "fusedreg", "check", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--device" in done.stdout
