"""An experiment in one file is read; what would write elsewhere, or is none, is refused in a line."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from nni_plugins.experiment import archive
from nni_plugins.experiment.archive import is_archive, unpacked
from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.finish import look
from nni_plugins.experiment.reports import report_on
from nni_plugins.report import figures
from tests.experiment.stored import Job, recipe_job, store


@pytest.fixture(autouse=True)
def quick_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fonts for print take as long as all plots."""
    monkeypatch.setitem(figures.STYLE, "pdf.fonttype", 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An experiment's folder, alone in one."""
    found = store(tmp_path / "all" / "abcd", [recipe_job("a", 0.8), recipe_job("b", 0.7)], at=Path("/gone/abcd"))
    (found / "log").mkdir()
    (found / "log" / "nnimanager.log").write_text("much", encoding="utf-8")
    return found


@pytest.mark.parametrize("kind", ["gztar", "zip", "xztar"])
def test_an_archive_is_read_and_leaves_nothing(folder: Path, tmp_path: Path, kind: str) -> None:
    (folder / "test.json").write_text('{"trial": "a", "dense": 0.9, "compact": 0.79}', encoding="utf-8")
    packed = Path(shutil.make_archive(str(tmp_path / "packed"), kind, folder.parent))
    assert is_archive(packed)
    with unpacked(packed) as known:
        assert known.archive
        assert (known.id, known.name) == ("abcd", "stored")
        assert not (known.folder / "log").exists()  # not needed, not taken out
        place, findings = known.folder, look(known)
    assert not place.exists()
    assert findings.chosen == "a"
    assert findings.compact is not None
    assert findings.compact.test == 0.79
    assert len(findings.layers) == 2


def test_the_report_of_an_archive_has_its_model_and_no_place_of_ours(folder: Path, tmp_path: Path) -> None:
    packed = shutil.make_archive(str(tmp_path / "packed"), "gztar", folder.parent)
    findings, output = report_on(packed, None, tmp_path / "out", lambda line: None)
    assert (output / "best" / "compact.safetensors").is_file()
    assert findings.experiment == {"id": "abcd", "folder": "abcd", "started": "1970-01-01 00:00 UTC"}
    assert "/nni-plugins-" not in (output / "report.html").read_text(encoding="utf-8")


def test_of_the_experiments_folder_itself_packed_without_its_name(folder: Path, tmp_path: Path) -> None:
    with unpacked(Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folder))) as known:
        assert known.id == "abcd"  # NNI's own, from the database
        assert len(known.trials()) == 2


@pytest.mark.parametrize(
    "name", ["../metrics.json", "/tmp/metrics.json", "a/../../metrics.json", "a\\..\\..\\plan.json"]
)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_member_that_would_land_outside_refuses_the_archive(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / f"evil.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as file:
            info = tarfile.TarInfo(name)
            info.size = 1
            file.addfile(info, io.BytesIO(b"x"))
    else:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(name, "x")
    with pytest.raises(ExperimentError, match="would be written outside"), unpacked(path):
        pass


def test_links_are_left_behind(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret", encoding="utf-8")
    trial = folder / "environments" / "local-env" / "trials" / "a"
    (trial / "plan.json").unlink()
    (trial / "plan.json").symlink_to(secret)
    (trial / "masks.safetensors").hardlink_to(trial / "compact.safetensors")
    with unpacked(Path(shutil.make_archive(str(tmp_path / "packed"), "gztar", folder.parent))) as known:
        there = {path.name for path in known.folder.rglob("*") if "trials/a/" in path.as_posix()}
    assert "metrics.json" in there
    assert "plan.json" not in there


def test_trials_whose_paths_lead_elsewhere_have_no_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "metrics.json").write_text('{"default": 9}', encoding="utf-8")
    folder = store(tmp_path / "all" / "abcd", [Job("a", 0.5)])
    shutil.rmtree(folder / "environments")
    import sqlite3

    with sqlite3.connect(folder / "db" / "nni.sqlite") as database:
        database.execute("update TrialJobEvent set logPath=?", (str(outside),))
    with unpacked(Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folder.parent))) as known:
        (trial,) = known.trials()
    assert trial.folder is None
    assert trial.default == 0.5


def test_an_archive_that_is_none_is_one_line(tmp_path: Path) -> None:
    for name in ("a.zip", "a.tar.gz"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with (
            pytest.raises(ExperimentError, match=r"a\.(zip|tar\.gz): the archive cannot be read"),
            unpacked(tmp_path / name),
        ):
            pass
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "file.txt").write_text("x", encoding="utf-8")
    empty = Path(shutil.make_archive(str(tmp_path / "empty"), "zip", tmp_path / "some"))
    with pytest.raises(ExperimentError, match=r"no experiment of NNI's is in this archive"), unpacked(empty):
        pass


def test_two_experiments_in_one_archive_are_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, folder.parent / "efgh")
    packed = Path(shutil.make_archive(str(tmp_path / "packed"), "gztar", folder.parent))
    with pytest.raises(ExperimentError, match=r"2 experiments are in this archive \(abcd, efgh\)"), unpacked(packed):
        pass


def test_a_small_archive_of_much_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MOST_BYTES", 1000)
    packed = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folder.parent))
    with pytest.raises(ExperimentError, match="refused: it holds more than"), unpacked(packed):
        pass
