"""Object code on disk: what is taken from it, what is not, and that nothing else depends on it."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedreg

from cases import program

compiler: Any = importlib.import_module("fusedreg.kernels.cpu.compiler")
loops: Any = importlib.import_module("fusedreg.kernels.cpu.loops")
store: Any = importlib.import_module("fusedreg.kernels.cpu.store")
language: Any = importlib.import_module("fusedreg.kernels.device.language")
rules: Any = importlib.import_module("fusedreg.kernels.device.rules")

POSIX = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no such permissions")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files go in a test, which is not there yet."""
    monkeypatch.setenv("FUSEDREG_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def compiles(source: str = "source", code: bytes = b"code") -> bool:
    """Whether `source` is compiled, and not read from disk; its code is `code` either way."""
    calls: list[bytes] = []

    def compiled() -> bytes:
        calls.append(code)
        return code

    assert store.stored(source, compiled) == code
    return bool(calls)


def only(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


# ---- what is kept --------------------------------------------------------------------------------


def test_code_is_compiled_once(folder: Path) -> None:
    assert compiles()
    assert not compiles()
    assert compiles("another", b"other code")
    assert not compiles("another", b"other code")
    assert not compiles()
    assert len(list(folder.iterdir())) == 2


@POSIX
def test_files_are_private_whatever_the_umask_says(folder: Path) -> None:
    before = os.umask(0)
    try:
        compiles()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert only(folder).stat().st_mode & 0o777 == 0o600


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut off in the seal": lambda content: content[:10],
    "without code": lambda content: content[:32],
    "cut off": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "a bit of the code": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "a bit of the seal": lambda content: bytes([content[0] ^ 1]) + content[1:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_compiled_anew(damage: str, folder: Path) -> None:
    compiles()
    file = only(folder)
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[damage](whole))
    assert compiles()
    assert file.read_bytes() == whole
    assert not compiles()


def test_a_file_of_another_name_is_not_believed(folder: Path) -> None:
    compiles("source")
    (first,) = folder.iterdir()
    compiles("another", b"other code")
    (second,) = set(folder.iterdir()) - {first}
    second.write_bytes(first.read_bytes())
    assert compiles("another", b"other code")


@POSIX
@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_what_others_can_write_is_not_used(what: str, mode: int, folder: Path) -> None:
    compiles()
    changed = folder if what == "folder" else only(folder)
    changed.chmod(mode)
    assert compiles()
    # A file is replaced by a private one; in a folder of others nothing is written.
    assert compiles() == (what == "folder")


@POSIX
def test_what_another_user_owns_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiles()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert compiles()
    assert compiles()


@POSIX
def test_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    compiles()
    file = only(folder)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert compiles()
    assert not file.is_symlink()


def test_the_oldest_files_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only files of the cache."""
    monkeypatch.setattr(store, "LIMIT", 3)
    folder.mkdir(mode=0o700)
    (folder / "notes.txt").touch()
    for age, name in enumerate("abcde"):
        before = set(folder.iterdir())
        compiles(name)
        for file in set(folder.iterdir()) - before:
            os.utime(file, (age, age))
    assert len(list(folder.iterdir())) == 3 + 1
    assert (folder / "notes.txt").exists()
    assert [compiles(name) for name in "edc"] == [False] * 3
    assert compiles("a")


# ---- where ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", ["", "0"])
def test_it_can_be_turned_off(off: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FUSEDREG_CACHE", off)
    assert compiles()
    assert compiles()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("linux", {}, "home/.cache/fusedreg"),
        ("linux", {"XDG_CACHE_HOME": "/tmp/elsewhere"}, "/tmp/elsewhere/fusedreg"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "home/.cache/fusedreg"),
        ("darwin", {}, "home/Library/Caches/fusedreg"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/fusedreg"),
        ("win32", {}, None),
        ("linux", {"HOME": "relative"}, None),
        ("linux", {"FUSEDREG_CACHE": "/tmp/mine"}, "/tmp/mine"),
    ],
)
@POSIX
def test_where_it_is(
    system: str,
    variables: dict[str, str],
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("FUSEDREG_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert store._folder() == (None if expected is None else tmp_path / expected)


def test_where_nothing_can_be_written_all_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("FUSEDREG_CACHE", str(folder))
        assert compiles()
        assert compiles()


class Full:
    """A file on a disk without space."""

    def __init__(self, handle: int, mode: str) -> None:
        os.close(handle)

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store, "open", Full, raising=False)
        assert compiles()
    assert not list(folder.iterdir())
    assert compiles()
    assert not compiles()


# ---- kernels -------------------------------------------------------------------------------------


def sources(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
    """All that the code of one loop follows from, where some of it is something else."""
    found: list[str] = []

    def keep(source: str, compiled: Callable[[], bytes]) -> bytes:
        found.append(source)
        return compiled()

    with monkeypatch.context() as patch:
        patch.setattr(compiler, "stored", keep)
        for name, value in changes.items():
            module, _, attribute = name.partition("__")
            patch.setattr(
                {"compiler": compiler, "llvmlite": compiler.llvmlite}[module], attribute, value
            )
        loops.norm_loop.__wrapped__(torch.float32)
    return found[0]


def test_another_compiler_or_cpu_means_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    name, features = compiler._processor()
    others = [
        sources(monkeypatch),
        sources(monkeypatch, compiler__FORMAT=compiler.FORMAT + 1),
        sources(monkeypatch, llvmlite____version__="0.0.0"),
        sources(monkeypatch, compiler___processor=lambda: (name, features + ",-avx512f")),
        sources(monkeypatch, compiler___processor=lambda: ("generic", features)),
    ]
    assert sources(monkeypatch) == others[0]
    assert len(set(others)) == len(others)


@language.triton.jit
def halved(g, states, scalars):
    return 0.5 * g, 1.0, states


def test_another_rule_means_another_file(folder: Path) -> None:
    """Also one of the same name, as after an edit."""

    @language.triton.jit
    def edited(g, states, scalars):
        return 0.25 * g, 1.0, states

    edited.fn.__name__ = halved.fn.__name__
    for files, tile in ((1, halved), (1, halved), (2, edited)):
        rule = rules.Rule(rules.sgd_scalars, tile, 0)
        loops.step_loop.__wrapped__(program(rule, torch.float32), scaled=False)
        assert len(list(folder.iterdir())) == files


STEP = """
import sys, torch, fusedreg
from fusedreg.kernels.cpu import compiler
compiled = 0
optimised = compiler.optimised
def counting(text, machine):
    global compiled
    compiled += 1
    return optimised(text, machine)
compiler.optimised = counting
torch.manual_seed(0)
w = torch.nn.Parameter(torch.randn(1000)); w.grad = torch.randn(1000)
optimizer = fusedreg.AdamW([w], lr=0.1, l1=0.1, max_grad_norm=1.0)
optimizer.step()
assert optimizer.backend == "llvm"
print(compiled, w.detach().numpy().tobytes().hex())
"""


def processes(how_many: int) -> list[list[str]]:
    """What as many processes print, all at once: how often they compiled, and the weights."""
    command = [sys.executable, "-c", STEP]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(how_many)]
    printed = [process.communicate()[0].decode().split() for process in running]
    assert [process.returncode for process in running] == [0] * how_many
    return printed


def test_the_second_process_compiles_nothing(folder: Path) -> None:
    """Nor does one that comes while another writes fail; all get the same bits."""
    first = processes(2)
    assert {int(compiled) for compiled, _ in first} <= {0, 1, 2, 3}
    assert max(int(compiled) for compiled, _ in first) > 0
    assert len(list(folder.iterdir())) == 3  # norms, rows and step; no temporary file is left
    ((compiled, weights),) = processes(1)
    assert compiled == "0"
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    ((again, same),) = processes(1)
    assert again == "3"
    assert {weights, same, *(weights for _, weights in first)} == {weights}


def test_nothing_is_written_before_a_step(folder: Path) -> None:
    fusedreg.SGD([torch.ones(1)])
    assert not folder.exists()
