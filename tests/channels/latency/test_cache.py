"""Times are kept by machine: safe under several processes, and against a damaged file."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nni_plugins.channels.latency.cache import Cache, cache_folder, machine

CPU = torch.device("cpu")


def test_what_is_put_is_found_by_the_next(tmp_path: Path) -> None:
    first = Cache(tmp_path, machine(CPU, 1))
    first.put("a", 1.5)
    first.put("failed", None)
    first.put("run", [3.0, 1.0, 2.0])
    first.save()
    second = Cache(tmp_path, machine(CPU, 1))
    assert second.taken == 0
    assert "a" in second
    assert "failed" in second
    assert (second.get("a"), second.get("failed"), second.get("b")) == (1.5, None, None)
    assert second.get_list("run", 3) == [3.0, 1.0, 2.0]
    assert second.get_list("run", 4) is None
    assert "b" not in second


def test_each_machine_and_thread_count_has_its_own_file(tmp_path: Path) -> None:
    one, two = Cache(tmp_path, machine(CPU, 1)), Cache(tmp_path, machine(CPU, 2))
    one.put("a", 1.0)
    one.save()
    assert one.path != two.path
    assert "a" not in Cache(tmp_path, machine(CPU, 2))
    assert {"processor", "torch", "threads", "device", "cores"} <= set(machine(CPU, 1))


def test_the_folder_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NNI_PLUGINS_CACHE", str(tmp_path / "there"))
    assert cache_folder() == tmp_path / "there"
    monkeypatch.delenv("NNI_PLUGINS_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "nni-plugins"


def test_what_others_wrote_meanwhile_stays(tmp_path: Path) -> None:
    first, second = (Cache(tmp_path, machine(CPU, 1)) for _ in range(2))
    first.put("both", 1.0)
    first.put("first", 1.0)
    second.put("both", 2.0)
    second.put("second", 2.0)
    first.save()
    second.save()
    found = Cache(tmp_path, machine(CPU, 1))
    assert [found.get(key) for key in ("both", "first", "second")] == [1.0, 1.0, 2.0]
    fresh = Cache(tmp_path, machine(CPU, 1), fresh=True)
    assert "both" not in fresh
    fresh.put("both", 3.0)
    fresh.save()
    assert [Cache(tmp_path, machine(CPU, 1)).get(key) for key in ("both", "first")] == [3.0, 1.0]


def test_two_processes_lose_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from nni_plugins.channels.latency.cache import Cache\n"
        "for index in range(30):\n"
        "    cache = Cache(Path(sys.argv[1]), {'machine': 'm'})\n"
        "    cache.put(f'{sys.argv[2]} {index}', float(index))\n"
        "    cache.save()\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in ("x", "y")]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    found = Cache(tmp_path, {"machine": "m"})
    assert len(found) == 60
    assert all(found.get(f"{name} {index}") == index for name in "xy" for index in range(30))
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"machine": {}, "milliseconds": {"a": 1.0}}',
        '{"milliseconds": 3}',
        "\x00\xff",
    ],
)
def test_a_damaged_file_is_one_warning_and_is_replaced(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = Cache(tmp_path, machine(CPU, 1)).path
    assert path is not None
    path.write_text(content, encoding="latin-1")
    with caplog.at_level(logging.WARNING):
        damaged = Cache(tmp_path, machine(CPU, 1))
        assert "a" not in damaged
        damaged.put("b", 2.0)
        damaged.save()
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    assert Cache(tmp_path, machine(CPU, 1)).get("b") == 2.0
    assert json.loads(path.read_text(encoding="utf-8"))["milliseconds"] == {"b": 2.0}


def test_a_time_that_is_none_is_not_believed(tmp_path: Path) -> None:
    cache = Cache(tmp_path, {"m": 1})
    assert cache.path is not None
    times = {"a": -1.0, "b": "x", "c": 2.0, "d": [1.0, -2.0], "e": float("inf"), "f": True}
    cache.path.write_text(json.dumps({"machine": {"m": 1}, "milliseconds": times}), encoding="utf-8")
    found = Cache(tmp_path, {"m": 1})
    assert len(found) == 1
    assert found.get("c") == 2.0


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    cache = Cache(tmp_path / "file" / "folder", machine(CPU, 1))
    cache.put("a", 1.0)
    with caplog.at_level(logging.WARNING):
        cache.save()
    assert "cannot be kept" in caplog.text
    assert cache.get("a") == 1.0
    nowhere = Cache(None, machine(CPU, 1))
    nowhere.put("a", 1.0)
    nowhere.save()
    assert nowhere.get("a") == 1.0
