"""How much memory is available, according to the system and to a container's limit."""

import os
import sys
from pathlib import Path

import pytest

from tpx_runtime.memory import available_bytes


def test_available_bytes_reads_meminfo_and_the_cgroup_limit(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert available_bytes(tmp_path) == 4000 << 10
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, text in (("max", "max"), ("current", "3000"), ("stat", "anon 7\ninactive_file 500\n")):
        (group / f"memory.{name}").write_text(text)
    assert available_bytes(tmp_path) == 4000 << 10
    (group / "memory.max").write_text("5000\n")
    assert available_bytes(tmp_path) == 2500


def test_available_bytes_is_negative_in_a_container_over_its_limit(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable:    4000 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, text in (("max", "5000"), ("current", "6000"), ("stat", "anon 7\n")):
        (group / f"memory.{name}").write_text(text)
    assert available_bytes(tmp_path) == -1000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says how much memory there is")
def test_available_bytes_of_this_machine_is_less_than_its_memory() -> None:
    found = available_bytes()
    assert found is not None and found < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
