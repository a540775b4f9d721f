"""Files that are written atomically: completely or not at all."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tpx_runtime.errors import BadInput
from tpx_runtime.files import atomic_file, check_free_space, check_writable, make_folder, read_small_file


def test_replaces_an_existing_file(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 251 + ".png")  # the longest name allowed
    for content in (b"one", b"two"):
        with atomic_file(path) as part:
            part.write_bytes(content)
            assert not path.exists() or path.read_bytes() == b"one"
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")

    def write() -> None:
        with atomic_file(path) as part:
            part.write_bytes(b"ha")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_has_the_permissions_of_a_new_file_however_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    with atomic_file(tmp_path / "a") as part:
        part.unlink()
        part.touch(mode=0o600)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_path_without_a_name_is_an_error() -> None:
    with pytest.raises(IsADirectoryError), atomic_file(Path()):
        pass


def test_two_writers_at_once_do_not_interfere(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_file(path) as first, atomic_file(path) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first"  # the block that ended last
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_as_target_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    def write() -> None:
        with atomic_file(tmp_path / "a") as part:
            part.touch()

    with pytest.raises(OSError, match="directory"):
        write()
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


@pytest.mark.parametrize("links", [True, False])
def test_without_replace_a_file_created_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", fail)
    path = tmp_path / "a"

    def write(content: bytes, meanwhile: bytes | None = None) -> None:
        with atomic_file(path, replace=False) as part:
            part.write_bytes(content)
            if meanwhile:
                path.write_bytes(meanwhile)

    with pytest.raises(FileExistsError):
        write(b"mine", meanwhile=b"another's")
    assert path.read_bytes() == b"another's"
    path.unlink()
    write(b"mine")
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EACCES, "choose another"),
        (errno.ENOSPC, "free some space or choose another"),
        (errno.EDQUOT, "free some space or choose another"),
    ],
)
@pytest.mark.parametrize("check", [lambda path: check_writable(path / "file"), make_folder])
def test_a_place_is_tried_once_and_left_empty(
    check: Callable[[Path], None], code: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows, os.access says that every folder can be written, and `tempfile` tries again for hours."""
    check(tmp_path)
    assert list(tmp_path.iterdir()) == []
    tried: list[str] = []

    def deny(path: Path, *_: object, **__: object) -> None:
        tried.append(path.name)
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "touch", deny)
    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(BadInput, match=f"found: {os.strerror(code)}; {advice}$"):
        check(tmp_path)
    assert len(tried) == 1


def test_free_space_is_that_of_the_disk_of_a_folder_to_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(path: Path) -> SimpleNamespace:
        assert path == tmp_path
        return SimpleNamespace(total=total, free=2_340_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    total = 10**12
    check_free_space(tmp_path / "new/er", 2_340_000_000)
    with pytest.raises(BadInput) as caught:
        check_free_space(new := tmp_path / "new/er", 9_870_000_000)
    assert str(caught.value) == (
        f"expected 9.87 GB or more of free space for {new}, found 2.34 GB; free some or choose another folder"
    )
    total = 0  # as some network drives say
    check_free_space(tmp_path / "new/er", 9_870_000_000)
    check_free_space(Path("n" * 300), 9_870_000_000)


def test_a_small_file_is_regular_and_not_larger_than_allowed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_small_file(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="not a file of at most 4 bytes"):
        read_small_file(tmp_path / "a", 4)
    (tmp_path / "link").symlink_to("a")
    assert read_small_file(tmp_path / "link") == b"12345"


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a device that never ends")
def test_a_link_to_a_device_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "endless").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="not a file of at most"):
        read_small_file(tmp_path / "endless")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_without_a_writer_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a file of at most"):
        read_small_file(tmp_path / "pipe")
