"""The engine cache loads only undamaged engines of the requested key, and reports why others do not match."""

import errno
import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from tpx_engines.cache import EngineCache, Key, Stale
from tpx_runtime.bundle import Bundle
from tpx_runtime.engine import engine_file as module
from tpx_runtime.errors import BadInput

KEY = Key(
    bundle="ab" * 32,
    graph="transformer depth 2",
    precision="fp16",
    batch=(1, 4),
    engine="tensorrt-rtx",
    version="1.7.1.116",
    capability="sm89",
    gpu="NVIDIA L4",
    driver="580.65.06",
    plugin="0123456789abcdef",
)
OTHER: dict[str, Any] = {
    "bundle": "cd" * 32,
    "graph": "vae_decoder",
    "precision": "fp32",
    "batch": (1, 8),
    "engine": "tensorrt",
    "version": "1.7.1.117",
    "capability": "sm120",
    "gpu": "NVIDIA L40",
    "driver": "590.10",
    "plugin": "fedcba9876543210",
}
ENGINE = bytes(range(256)) * 3


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    engine_cache = EngineCache(tmp_path / "tiny.engines")
    engine_cache.prepare()
    return engine_cache


def test_other_has_a_different_value_for_every_field() -> None:
    assert OTHER.keys() == {field.name for field in fields(Key)}


def test_stores_and_loads_an_engine(cache: EngineCache) -> None:
    assert cache.load(KEY) is None
    path = cache.store(KEY, ENGINE)
    assert path.name == "transformer-depth-2.fp16.b1-4.tensorrt-rtx.sm89.engine"
    assert cache.load(KEY) == ENGINE
    assert [entry.name for entry in cache.folder.iterdir()] == [path.name]


@pytest.mark.parametrize("field", OTHER)
def test_reports_the_field_that_differs(cache: EngineCache, field: str) -> None:
    other = replace(KEY, **{field: OTHER[field]})
    cache.store(KEY, ENGINE).replace(cache.path(other))
    with pytest.raises(Stale) as caught:
        cache.load(other)
    message = str(caught.value)
    assert message.count("expected") == 1
    expected, found = (key.to_json()[field] for key in (other, KEY))
    for prefix, value in (("expected " + field, expected), ("found", found)):
        assert f"{prefix} {value!r}"[:30] in message


def test_reports_all_fields_that_differ(cache: EngineCache) -> None:
    cache.store(KEY, ENGINE).replace(cache.path(Key(**OTHER)))
    with pytest.raises(Stale) as caught:
        cache.load(Key(**OTHER))
    assert str(caught.value).count("expected") == len(fields(Key))


@pytest.mark.parametrize("field", ["bundle", "version", "gpu", "driver", "plugin"])
def test_another_bundle_version_gpu_driver_or_plugin_replaces_the_file(
    cache: EngineCache, field: str
) -> None:
    other = replace(KEY, **{field: OTHER[field]})
    assert cache.store(KEY, ENGINE) == cache.store(other, ENGINE)
    assert cache.load(other) == ENGINE


@pytest.mark.parametrize("field", ["graph", "precision", "batch", "engine", "capability"])
def test_other_keys_have_their_own_file(cache: EngineCache, field: str) -> None:
    other = replace(KEY, **{field: OTHER[field]})
    cache.store(KEY, ENGINE)
    cache.store(other, b"other")
    assert (cache.load(KEY), cache.load(other)) == (ENGINE, b"other")


def test_an_engine_built_without_a_gpu_loads_on_any_of_its_capability(cache: EngineCache) -> None:
    key_without_gpu = replace(KEY, gpu=None, driver=None)
    cache.store(key_without_gpu, ENGINE)
    assert cache.load(KEY) == ENGINE
    cache.store(KEY, ENGINE)
    assert cache.load(key_without_gpu) == ENGINE


def test_a_key_whose_plugin_is_none_matches_any_plugin(cache: EngineCache) -> None:
    cache.store(KEY, ENGINE)
    assert cache.load(replace(KEY, plugin=None)) == ENGINE
    with pytest.raises(Stale, match="expected plugin '', found '0123456789abcdef'"):
        cache.load(replace(KEY, plugin=""))


def test_a_new_engine_removes_the_old_kernels(cache: EngineCache) -> None:
    cache.store(KEY, ENGINE)
    kernels = cache.folder / KEY.runtime_cache_name
    kernels.write_bytes(b"of the engine before")
    cache.store(KEY, ENGINE + b"2")
    assert not kernels.exists()


@pytest.mark.parametrize("flip", [0x01, 0x20])
def test_detects_every_flipped_byte(cache: EngineCache, flip: int) -> None:
    path = cache.store(KEY, ENGINE[:64])
    contents = path.read_bytes()
    for index in range(len(contents)):
        damaged = bytearray(contents)
        damaged[index] ^= flip
        path.write_bytes(damaged)
        with pytest.raises(Stale, match=r"\.engine: expected .*, found "):
            cache.load(KEY)


def test_detects_every_wrong_length(cache: EngineCache) -> None:
    path = cache.store(KEY, ENGINE[:64])
    contents = path.read_bytes()
    for length in range(len(contents)):
        path.write_bytes(contents[:length])
        with pytest.raises(Stale, match=r"\.engine: expected .*, found "):
            cache.load(KEY)
    path.write_bytes(contents + b"\0")
    with pytest.raises(Stale, match="expected an engine of 64 bytes, found 65"):
        cache.load(KEY)


def _file(version: int = module.VERSION, header: object = None, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return module.PREFIX.pack(module.MAGIC, version, len(text) if length is None else length) + text


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "expected an engine file of tpx, found another file"),
        (_file(version=1), f"expected an engine file of version {module.VERSION}, found 1"),
        (_file(length=2**31), "expected a header of at most 65536 bytes, found 2147483648"),
        (_file(header=[]), "expected a header of JSON with key, bytes and sha256, found none"),
        (_file(header={"key": {}, "bytes": 0}), "expected a header of JSON with key, bytes and sha256"),
        (
            _file(header={"key": [], "bytes": 0, "sha256": ""}),
            "expected a key of bundle, graph, .*found \\[\\]",
        ),
        (_file(header={"key": KEY.to_json(), "bytes": "x", "sha256": 1}), "an engine of 'x' bytes, found 0"),
        (_file(header={"key": KEY.to_json(), "bytes": 0, "sha256": 1}), "expected SHA-256 1, found 'e3b0"),
    ],
)
def test_rejects_invalid_files(cache: EngineCache, contents: bytes, message: str) -> None:
    cache.path(KEY).write_bytes(contents)
    with pytest.raises(Stale, match=message):
        cache.load(KEY)


def test_rejects_an_unreadable_file(cache: EngineCache) -> None:
    cache.path(KEY).mkdir()
    with pytest.raises(Stale, match="expected a file to read, found: Is a directory"):
        cache.load(KEY)
    with pytest.raises(
        BadInput, match=r"expected a writable folder for engines at .*, found: Is a directory"
    ):
        cache.store(KEY, ENGINE)
    assert list(cache.folder.iterdir()) == [cache.path(KEY)]


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            OSError(errno.ENOSPC, "Full"),
            BadInput,
            "found: Full; free some space or choose another with --cache",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)
def test_a_failed_write_leaves_no_partial_file(
    cache: EngineCache,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
    message: str,
) -> None:
    cache.store(KEY, ENGINE)

    def fail(file: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(raised, match=message):
        cache.store(KEY, b"half")
    assert cache.load(KEY) == ENGINE
    assert list(cache.folder.iterdir()) == [cache.path(KEY)]


def test_timing_caches_are_per_version_capability_engine_and_plugin(cache: EngineCache) -> None:
    assert cache.read_timing_cache(KEY) == b""
    cache.store_timing_cache(KEY, b"times")
    assert cache.read_timing_cache(replace(KEY, graph="vae_decoder", batch=(1, 8))) == b"times"
    for field in ("version", "capability", "engine", "plugin"):
        assert cache.read_timing_cache(replace(KEY, **{field: OTHER[field]})) == b""
    assert [entry.name for entry in cache.folder.iterdir()] == [
        "tensorrt-rtx.1.7.1.116.sm89.0123456789ab.timings"
    ]


def test_rejects_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        BadInput, match=r"expected a writable folder for engines at .*file, found: File exists; choose"
    ):
        EngineCache(tmp_path / "file").prepare()


def test_rejects_a_folder_that_cannot_be_written_before_a_build(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", deny)  # root, which often runs the tests, may write anywhere
    with pytest.raises(BadInput, match="found: Permission denied"):
        cache.prepare()


def test_the_cache_is_beside_the_bundle_and_never_inside_it(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle, verify=False)
    assert EngineCache.for_bundle(bundle).folder == tiny_bundle.parent / "tiny.engines"
    assert EngineCache.for_bundle(bundle, tmp_path).folder == tmp_path / "tiny"
    (tmp_path / "link").symlink_to(tiny_bundle)
    for inside in (tiny_bundle, tiny_bundle / "engines", tmp_path / "link" / "x"):
        with pytest.raises(BadInput, match="expected a folder of engines outside the bundle"):
            EngineCache.for_bundle(bundle, inside)
        monkeypatch.setenv("TPX_ENGINES", str(inside))
        with pytest.raises(BadInput, match="leave out --cache and TPX_ENGINES to use one next to the bundle"):
            EngineCache.for_bundle(bundle)
    monkeypatch.setenv("TPX_ENGINES", str(tmp_path / "all"))
    assert EngineCache.for_bundle(bundle).folder == tmp_path / "all/tiny"
    monkeypatch.delenv("TPX_ENGINES")
    monkeypatch.chdir(tiny_bundle)
    assert (
        EngineCache.for_bundle(Bundle.open(".", verify=False)).folder == tiny_bundle.parent / "tiny.engines"
    )


def test_the_header_is_plain_json(cache: EngineCache) -> None:
    contents = cache.store(KEY, ENGINE).read_bytes()
    header = json.loads(contents[16 : 16 + int.from_bytes(contents[12:16], "little")])
    assert header["key"] == {**asdict(KEY), "batch": [1, 4]}
    assert header["bytes"] == len(ENGINE)
