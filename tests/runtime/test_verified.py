"""A bundle's files are hashed again only when one of them has changed."""

import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from tpx_runtime import bundle as bundle_module
from tpx_runtime import cli, verified
from tpx_runtime.bundle import Bundle
from tpx_runtime.errors import BadInput, BundleInvalid
from tpx_runtime.generator import Generator
from tpx_runtime.verified import RECORD, verify_once

WEIGHTS = "transformer/weights.data"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed."""
    names: list[str] = []
    hash_file = bundle_module.hash_file

    def record(path: Path) -> str:
        names.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(bundle_module, "hash_file", record)
    return names


@pytest.fixture
def opened(fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle whose files were written long ago."""
    monkeypatch.setattr(time, "time_ns", lambda: 4_000_000_000 * 10**9)
    return Bundle.open(fake_bundle, verify=False)


def record_of(bundle: Bundle) -> Path:
    return bundle.root.with_name(f"{bundle.root.name}.engines") / RECORD


def test_files_are_hashed_once(opened: Bundle, hashed: list[str]) -> None:
    verify_once(opened)
    assert len(hashed) == len(opened.manifest.files)
    verify_once(Bundle.open(opened.root, verify=False))
    assert len(hashed) == len(opened.manifest.files)


def test_only_hashing_a_large_bundle_is_announced(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    verify_once(opened, lines.append)
    assert not lines
    record_of(opened).unlink()
    monkeypatch.setattr(verified, "LARGE_BYTES", 1000)
    for _ in range(2):
        result = CliRunner().invoke(
            cli.run, ["red cube", "--bundle", str(opened.root), "--engine", "onnxruntime"]
        )
        lines.append(result.stderr.splitlines()[0])
    assert lines[0] == "checking 0.0 GB of files; later runs skip it" and lines[1] != lines[0]


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_changed_file_is_noticed_even_with_its_old_times(opened: Bundle, keep_times: bool) -> None:
    verify_once(opened)
    path = opened.root / WEIGHTS
    before, content = path.stat(), path.read_bytes()
    time.sleep(0.05)  # the file system's clock is coarse, and this bundle only seems to be old
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleInvalid, match=f"{WEIGHTS}: expected SHA-256"):
        verify_once(opened)


def test_a_damaged_bundle_is_not_remembered(opened: Bundle) -> None:
    (opened.root / WEIGHTS).write_bytes(bytes(len((opened.root / WEIGHTS).read_bytes())))
    for _ in range(2):
        with pytest.raises(BundleInvalid):
            verify_once(opened)
    assert not record_of(opened).exists()


def test_files_that_changed_just_now_are_not_remembered(fake_bundle: Path, hashed: list[str]) -> None:
    """Within the resolution of the file system's clock, the next change would not be noticed."""
    fresh = Bundle.open(fake_bundle, verify=False)
    (fake_bundle / WEIGHTS).touch()
    for count in (1, 2):
        verify_once(fresh)
        assert len(hashed) == count * len(fresh.manifest.files)


@pytest.mark.parametrize("content", [b"", b"[", b"{}", b"[" * 10**5, b"\xff"])
def test_a_damaged_record_is_replaced(opened: Bundle, hashed: list[str], content: bytes) -> None:
    verify_once(opened)
    sound = record_of(opened).read_bytes()
    record_of(opened).write_bytes(content)
    verify_once(opened)
    assert len(hashed) == 2 * len(opened.manifest.files)
    assert record_of(opened).read_bytes() == sound


def test_a_place_that_is_not_writable_is_no_error(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(verified, "atomic_file", fail)
    verify_once(opened)
    assert not record_of(opened).exists()


def test_the_folder_of_several_bundles_is_created(
    opened: Bundle, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPX_ENGINES", str(tmp_path / "new/all"))
    for _ in range(2):
        verify_once(opened)
    assert len(hashed) == len(opened.manifest.files)
    assert (tmp_path / "new/all" / opened.root.name / RECORD).is_file()


def test_a_record_inside_the_bundle_is_refused(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPX_ENGINES", str(opened.root))
    with pytest.raises(BadInput, match="expected a folder of engines outside the bundle"):
        verify_once(opened)


def test_generators_and_tpx_run_use_the_record_and_tpx_verify_does_not(
    opened: Bundle, hashed: list[str]
) -> None:
    with pytest.raises(BadInput, match="expected an engine of auto"):
        Generator.load(opened.root, engine="onnxruntme")
    assert hashed == []
    for _ in range(2):
        Generator.load(opened.root, engine="onnxruntime")
        assert len(hashed) == len(opened.manifest.files)
    arguments = ["zebra", "--bundle", str(opened.root), "--engine", "onnxruntime"]
    assert "found 'zebra'" in CliRunner().invoke(cli.run, arguments).stderr
    assert len(hashed) == len(opened.manifest.files)
    CliRunner().invoke(cli.verify, [str(opened.root), "--engine", "onnxruntime"])
    assert len(hashed) == 2 * len(opened.manifest.files)
    Generator.load(opened.root, engine="onnxruntime", verify=False)
    assert len(hashed) == 2 * len(opened.manifest.files)


@pytest.mark.parametrize("times", [(0, 4_000_000_000 * 10**9), (4_000_000_000 * 10**9, 0)])
def test_a_file_with_either_time_of_just_now_is_hashed_again(
    opened: Bundle, hashed: list[str], times: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows, the time of a status change is that of the creation."""
    facts = verified._facts(opened)
    facts["files"][WEIGHTS][1:] = times
    monkeypatch.setattr(verified, "_facts", lambda bundle: facts)
    for _ in range(2):
        verify_once(opened)
    assert len(hashed) == 2 * len(opened.manifest.files)
