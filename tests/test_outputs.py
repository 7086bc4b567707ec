import errno
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quiesce.errors import OutputError
from quiesce.outputs import RESULT_FILES, check_free, output_folder, write_text


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def write_results(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in RESULT_FILES:
        (folder / name).write_text("old")


def test_becomes_the_folder_with_usual_permissions(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with output_folder(out, force=False) as folder:
        (folder / "result.json").write_text("new")
        assert not out.exists() and folder.parent == out.parent
    assert (out / "result.json").read_text() == "new"
    assert leftovers(tmp_path / "a") == ["b"]
    (tmp_path / "usual").mkdir()
    assert out.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with output_folder(tmp_path / "out", force=False) as folder:
        (folder / "x").write_text("new")
    assert leftovers(tmp_path / "out") == ["x"] and leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), output_folder(tmp_path / "a" / "b", force=False) as folder:
        (folder / "x").write_text("half")
        raise error
    assert leftovers(tmp_path) == []


def test_other_results_are_kept_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_results(out)
    with pytest.raises(OutputError, match="holds other results; choose another folder, or --force"):
        check_free(out, force=False)
    with pytest.raises(OutputError, match="holds other results"), output_folder(out, force=False):
        pass
    assert (out / "result.json").read_text() == "old"
    with output_folder(out, force=True) as folder:
        (folder / "result.json").write_text("new")
        assert (out / "result.json").read_text() == "old"
    assert leftovers(out) == ["result.json"] and leftovers(tmp_path) == ["out"]


def test_forced_results_survive_an_error(tmp_path: Path) -> None:
    write_results(tmp_path / "out")
    with pytest.raises(RuntimeError), output_folder(tmp_path / "out", force=True):
        raise RuntimeError
    assert set(leftovers(tmp_path / "out")) == RESULT_FILES and leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("names", [["letters.txt"], ["result.json", "letters.txt"], ["report.html"]])
def test_force_never_removes_what_is_not_a_result(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "home").mkdir()
    for name in names:
        (tmp_path / "home" / name).write_text("precious")
    with pytest.raises(OutputError, match="holds more than earlier results"):
        check_free(tmp_path / "home", force=True)
    with pytest.raises(OutputError), output_folder(tmp_path / "home", force=True):
        pass
    assert leftovers(tmp_path / "home") == sorted(names)


def test_a_link_keeps_pointing_to_the_results(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with output_folder(tmp_path / "link", force=False) as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "link").is_symlink() and leftovers(tmp_path / "real") == ["x"]


def test_places_that_can_not_become_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file is a file; choose a folder"):
        check_free(tmp_path / "file", force=True)
    with pytest.raises(OutputError, match=r"file is a file, so .* can't be made"):
        check_free(tmp_path / "file" / "out", force=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="is the working folder or a mount point"):
        check_free(Path(), force=True)
    with pytest.raises(OutputError, match="is the working folder or a mount point"):
        check_free(Path("/"), force=True)


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(OutputError, match="can't be written to; choose another folder"):
        check_free(tmp_path / "out", force=False)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    expected = r"out can't be written \(No space left on device\); free space"
    with pytest.raises(OutputError, match=expected), output_folder(tmp_path / "runs" / "out", force=False) as folder:
        (folder / "x").write_text("half")
        raise full
    assert leftovers(tmp_path) == []


def test_an_error_from_inside_names_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught, output_folder(tmp_path / "out", force=False) as folder:
        raise OutputError(f"report {folder / 'report.html'} can't be written")
    assert str(caught.value) == f"report {tmp_path / 'out' / 'report.html'} can't be written"


@pytest.fixture
def small_files() -> object:
    """Let the system refuse files above 10,000 bytes, which is as real as a full disk without being root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_real_write_errors(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File too large"), output_folder(tmp_path / "out", force=False) as folder:
        (folder / "x").write_text("x" * 100_000)
    with pytest.raises(OutputError, match="File too large"), output_folder(tmp_path / "out", force=False) as folder:
        save_file({"w": torch.zeros(100_000)}, folder / "quantized.safetensors")
    with pytest.raises(OutputError, match="File too large"):
        write_text(tmp_path / "y", "y" * 100_000)
    assert leftovers(tmp_path) == []


def test_the_earlier_results_come_back_if_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(tmp_path / "out")
    rename = Path.rename

    def fails_for_the_new_one(self: Path, target: Path) -> Path:
        if "partial" in self.name and not self.name.endswith("-old"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(OutputError, match="Input/output error"), output_folder(tmp_path / "out", force=True):
        pass
    assert set(leftovers(tmp_path / "out")) == RESULT_FILES and leftovers(tmp_path) == ["out"]


def test_what_is_renamed_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power may fail at any moment: the content is forced to the disk, then the name, then nothing else counts."""
    done: list[str] = []
    sync, replace, rename = os.fsync, Path.replace, Path.rename

    def forced(opened: int) -> None:
        name = Path(f"/proc/self/fd/{opened}").readlink().name
        done.append(f"sync {re.sub('partial-[0-9a-f]{8}', 'partial', name)}")
        sync(opened)

    def named(self: Path, target: Path, change: Callable[..., Path]) -> Path:
        done.append(f"name {target.name}")
        return change(self, target)

    monkeypatch.setattr(os, "fsync", forced)
    monkeypatch.setattr(Path, "replace", lambda self, target: named(self, target, replace))
    monkeypatch.setattr(Path, "rename", lambda self, target: named(self, target, rename))
    write_text(tmp_path / "x", "one")
    assert done == ["sync .x.partial", "name x", f"sync {tmp_path.name}"]
    done.clear()
    with output_folder(tmp_path / "out", force=False) as folder:
        (folder / "result.json").write_text("new")
    assert done == ["sync result.json", "sync .out.partial", "name out", f"sync {tmp_path.name}"]


def test_write_text_replaces_whole_files(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "one")
    write_text(tmp_path / "x", "two")
    assert (tmp_path / "x").read_text() == "two" and leftovers(tmp_path) == ["x"]
    with pytest.raises(OutputError, match="x/y can't be written"):
        write_text(tmp_path / "x" / "y", "three")
