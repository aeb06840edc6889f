"""What is said of an experiment counts since its last start; what an earlier run died of is over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nni_plugins.experiment.health import exhausted, lost_machines, why_ended, why_waiting
from nni_plugins.experiment.logs import tuner_error
from nni_plugins.experiment.trials import Trial

HEADER = "-----\nExperiment abcd1234 start: 2026-01-02 03:04:{:02d}.123456\n-----\n"
RUN = "[2026-01-02 03:04:{:02d}] INFO (nni.runtime/MainThread) Dispatcher started\n"
TRACEBACK = "Traceback (most recent call last):\n  File 'x.py', line 1, in f\nValueError: the surrogate is singular\n"
DIED = "ValueError: the surrogate is singular"


def note(experiment: Path, *events: dict[str, Any]) -> None:
    (experiment / "log").mkdir(exist_ok=True)
    with (experiment / "log" / "machines.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def test_why_it_waits_and_what_is_lost_is_of_the_last_start(tmp_path: Path) -> None:
    assert why_waiting(tmp_path) == ""
    lost = {"kind": "lost", "machine": "a:22"}
    note(tmp_path, {"kind": "begun"}, {"kind": "waiting", "reason": "no GPU is free"}, lost)
    assert why_waiting(tmp_path) == "no GPU is free"
    assert lost_machines(tmp_path) == ["a:22"]
    note(tmp_path, {"kind": "begun"})
    assert why_waiting(tmp_path) == ""
    assert lost_machines(tmp_path) == []


def test_a_tuner_has_no_more_to_try(tmp_path: Path) -> None:
    assert not exhausted(tmp_path)
    note(tmp_path, {"kind": "begun"}, {"kind": "running"}, {"kind": "exhausted"})
    assert exhausted(tmp_path)
    note(tmp_path, {"kind": "begun"}, {"kind": "running"})
    assert not exhausted(tmp_path)
    note(tmp_path, {"kind": "exhausted"}, {"kind": "running"})
    assert not exhausted(tmp_path)


def test_the_log_of_a_bare_nnictl_says_so_too(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    log = tmp_path / "log" / "nnimanager.log"
    line = "[2026-01-02 03:04:05] INFO (NNIManager) Change NNIManager status from: {} to: {}\n"
    text = line.format("RUNNING", "TUNER_NO_MORE_TRIAL")
    for more, expected in (("STOPPING", True), ("STOPPED", True), ("RUNNING", False), ("NO_MORE_TRIAL", False)):
        log.write_text(text, encoding="utf-8")
        assert exhausted(tmp_path)
        log.write_text(text + line.format("TUNER_NO_MORE_TRIAL", more), encoding="utf-8")
        assert exhausted(tmp_path) is expected


def test_the_tuner_of_this_run_has_not_died_of_the_error_of_the_last(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    said, own = log / "nnictl_stderr.log", log / "dispatcher.log"
    said.write_text(HEADER.format(5), encoding="utf-8")
    own.write_text(RUN.format(7) + TRACEBACK, encoding="utf-8")
    assert tuner_error(tmp_path) == DIED
    said.write_text(HEADER.format(5) + TRACEBACK + HEADER.format(30), encoding="utf-8")
    assert tuner_error(tmp_path) == ""  # resumed, and its tuner's process still starts
    own.write_text(own.read_text(encoding="utf-8") + RUN.format(32), encoding="utf-8")
    assert tuner_error(tmp_path) == ""
    own.write_text(own.read_text(encoding="utf-8") + TRACEBACK, encoding="utf-8")
    assert tuner_error(tmp_path) == DIED
    said.write_text(HEADER.format(5) + HEADER.format(40) + TRACEBACK, encoding="utf-8")
    assert tuner_error(tmp_path) == DIED  # it died before it could log


def test_half_a_line_is_not_taken_for_the_tuners_word(tmp_path: Path) -> None:
    own = tmp_path / "log" / "dispatcher.log"
    own.parent.mkdir()
    whole = RUN.format(7) + TRACEBACK
    for length in range(len(whole)):  # as far as the tuner's process has written
        own.write_text(whole[:length], encoding="utf-8")
        assert tuner_error(tmp_path) == ""
    own.write_text(whole, encoding="utf-8")
    assert tuner_error(tmp_path) == DIED


def test_a_tuner_that_lost_its_manager_has_not_died_of_itself(tmp_path: Path) -> None:
    own = tmp_path / "log" / "dispatcher.log"
    own.parent.mkdir()
    lost = "Traceback (most recent call last):\n  ...\nwebsockets.exceptions.ConnectionClosedError: received 4001\n"
    own.write_text(RUN.format(7) + lost, encoding="utf-8")
    assert tuner_error(tmp_path) == ""
    own.write_text(RUN.format(7) + TRACEBACK + lost, encoding="utf-8")
    assert tuner_error(tmp_path) == DIED


def test_why_a_trial_has_no_result() -> None:
    stopped = Trial("aa", 0, "EARLY_STOPPED", started=100.0, ended=112.4)
    assert why_ended(stopped, {}, "12s").startswith("stopped after 12 s: over the time limit")
    assert why_ended(stopped, {}, "1m") == ""
    assert why_ended(Trial("aa", 0, "SUCCEEDED"), {"aa": "it reported NaN"}, None) == "it reported NaN"
    assert why_ended(Trial("aa", 0, "SUCCEEDED", metrics={"default": 1.0}), {"aa": "it reported NaN"}, None) == ""


def test_an_error_of_the_connection_to_the_manager_is_none_of_the_tuners(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    lost = (
        "Traceback (most recent call last):\n"
        '  File "/v/{}.py", line 80, in send\n'
        "    _wait(self._ws.send(message))\n"
        "          ^^^^^^^^^^^^^\n"
        "{}\n"
    )
    for place, error in (
        ("websockets/protocol", "EOFError: unexpected end of stream"),
        ("nni/runtime/command_channel/websocket/channel", "AttributeError: 'NoneType' object has no attribute 'send'"),
    ):
        (log / "dispatcher.log").write_text(RUN.format(7) + lost.format(place, error), encoding="utf-8")
        assert tuner_error(tmp_path) == ""
        (log / "dispatcher.log").write_text(RUN.format(7) + TRACEBACK + lost.format(place, error), encoding="utf-8")
        assert tuner_error(tmp_path) == DIED
