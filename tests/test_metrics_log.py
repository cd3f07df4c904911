"""The metrics of a run: JSON lines, table and TensorBoard events say the same."""

import csv
import json
import os
import sys
from pathlib import Path

import pytest

from ppo import PPOError, Report
from ppo.cli.metrics_log import MetricsLog, read_metrics
from ppo.rollout import Episode


def report(steps, episode_return=1.0, episodes=()):
    return Report(
        steps=steps,
        goal=1000,
        updates=steps // 10,
        metrics={"policy_loss": 0.1 * steps, "episode_return": episode_return},
        episodes=tuple(episodes),
    )


def table(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def no_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


pytestmark = pytest.mark.usefixtures("no_tensorboard")


def test_rows_are_on_the_disk_as_soon_as_they_are_written(tmp_path):
    log = MetricsLog(tmp_path)
    for count, steps in enumerate((10, 20), start=1):
        log.write(report(steps))
        assert len(read_metrics(tmp_path)) == len(table(tmp_path)) == count
    log.close()


def test_json_lines_and_table_say_the_same(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(report(10, episodes=[Episode(3.0, 4, 1)]))
    log.close()
    (row,), (line,) = read_metrics(tmp_path), table(tmp_path)
    assert row.pop("episodes") == [[3.0, 4, 1]]
    assert {name: float(value) for name, value in line.items()} == row


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_null_in_json_and_empty_in_the_table(tmp_path, value):
    log = MetricsLog(tmp_path)
    log.write(report(10, value))
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["episode_return"] is None
    assert table(tmp_path)[0]["episode_return"] == ""


def test_a_log_that_is_never_written_to_leaves_nothing(tmp_path):
    MetricsLog(tmp_path).close()
    assert not any(tmp_path.iterdir())
    assert read_metrics(tmp_path) == []


def test_a_row_that_was_cut_off_is_left_out_and_then_removed(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(report(10))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"steps": 20, "upd')
    assert [row["steps"] for row in read_metrics(tmp_path)] == [10]
    log = MetricsLog(tmp_path)
    log.rewind(1000)
    log.write(report(20))
    log.close()
    assert [row["steps"] for row in read_metrics(tmp_path)] == [10, 20]


JUNK = [
    b"",
    b"\n",
    b"null",
    b"3",
    b"[]",
    b"{}",
    b'{"steps": "many", "seconds": 1.0, "episodes": []}',
    b'{"steps": 20}',
    b'{"steps": 20, "seconds": null, "episodes": []}',
    b'{"steps": 20, "seconds": 1.0, "episodes": 3}',
    b"\x00" * 4096,
    b"\xff\xfe",
    b"[" * 100_000,
    b"9" * 10_000,
]


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_what_is_no_row_is_left_out_and_then_removed(tmp_path, junk):
    log = MetricsLog(tmp_path)
    log.write(report(10))
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(junk + b"\n")
    log = MetricsLog(tmp_path)
    assert [row["steps"] for row in read_metrics(tmp_path)] == [10]
    log.rewind(1000)
    log.write(report(30))
    log.close()
    assert [row["steps"] for row in read_metrics(tmp_path)] == [10, 30]
    assert [row["steps"] for row in table(tmp_path)] == ["10", "30"]
    assert len((tmp_path / "metrics.jsonl").read_bytes().split(b"\n")) == 3


def test_a_line_separator_inside_of_a_row_does_not_end_it(tmp_path):
    row = {"steps": 10, "seconds": 1.0, "note": "a\u2028b\x85c", "episodes": []}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert read_metrics(tmp_path) == [row]


def test_a_disk_that_refuses_is_named_and_closing_is_no_second_error(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path)
    log.write(report(10))

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, text):
            raise OSError(28, "No space left on device")

        flush = write

        def close(self):
            self.file.close()
            raise OSError(28, "No space left on device")

    log._json, log._csv = Full(log._json), Full(log._csv)
    with pytest.raises(PPOError, match=f"{tmp_path.name}.*No space left"):
        log.write(report(20))
    log.close()
    log.write(report(30))
    log.close()
    assert [row["steps"] for row in read_metrics(tmp_path)] == [10, 30]


def test_rows_are_synced_before_a_checkpoint_that_knows_of_them(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    log = MetricsLog(tmp_path)
    log.sync()
    assert synced == []
    log.write(report(10))
    log.sync()
    log.close()
    assert [Path(name).name for name in synced] == ["metrics.jsonl", "metrics.csv"]


def test_rewind_drops_exactly_the_rows_after_its_steps(tmp_path):
    log = MetricsLog(tmp_path)
    for steps in (10, 20, 30):
        log.write(report(steps))
    log.rewind(20)
    log.write(report(31))
    log.close()
    assert [row["steps"] for row in read_metrics(tmp_path)] == [10, 20, 31]
    assert [row["steps"] for row in table(tmp_path)] == ["10", "20", "31"]


def test_rewinding_to_the_start_leaves_an_empty_log_that_goes_on(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(report(10))
    log.rewind(0)
    assert read_metrics(tmp_path) == []
    log.write(report(10))
    log.close()
    assert len(read_metrics(tmp_path)) == len(table(tmp_path)) == 1


def test_seconds_go_on_where_an_earlier_log_left_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"steps": 10, "seconds": 1000.0, "episodes": []}\n')
    log = MetricsLog(tmp_path)
    log.write(report(20))
    log.close()
    assert log.seconds == read_metrics(tmp_path)[-1]["seconds"] >= 1000.0


def test_without_tensorboard_there_are_no_events(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(report(10))
    log.close()
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_events_hold_the_metrics(tmp_path, monkeypatch):
    monkeypatch.undo()
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path)
    log.write(report(10, float("nan")))
    log.write(report(20, 2.0))
    log.write(report(30, 3.0))
    log.rewind(20)
    log.write(report(31, 4.0))
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("ppo/episode_return")]
    assert scalars == [(20, 2.0), (31, 4.0)]
