"""What a process that was killed while it compiled leaves behind."""

import os
import time
from pathlib import Path

import pytest

from cpt.trainers.deepspeed import COMPILING, drop_stale_locks


def test_an_old_lock_is_removed_and_a_fresh_one_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("py311_cpu/old", "py311_cpu/new", "direct"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "lock").touch()
    long_ago = time.time() - COMPILING - 1
    for name in ("py311_cpu/old", "direct"):
        os.utime(tmp_path / name / "lock", (long_ago, long_ago))
    drop_stale_locks()
    assert [file.parent.name for file in tmp_path.rglob("lock")] == ["new"]
    drop_stale_locks()
