"""The benchmarks run, at a minimal size, and their comparison says what got slower."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ppo

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture
def run(tmp_path):
    """Run a benchmark script in a folder of its own."""

    def run(script, *arguments):
        return subprocess.run(
            [sys.executable, str(BENCHMARKS / script), *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(Path(ppo.__file__).parents[1])},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def measure(run, tmp_path):
    """Run a benchmark and return its document and its tables."""

    def measure(script, *arguments):
        done = run(script, "--quick", "--out", tmp_path / "result.json", *arguments)
        assert done.returncode == 0, done.stderr
        document = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
        return document, (tmp_path / "result.md").read_text(encoding="utf-8")

    return measure


def test_throughput_measures_each_library_once_per_repetition(measure):
    sizes = ["--updates", "1", "--skip", "1", "--workloads", "cartpole"]
    document, tables = measure("throughput.py", "--ours=ppo", "--peers=plain-torch", *sizes)
    rows = document["rows"]
    assert document["benchmark"] == "throughput"
    assert {"cores", "python", "torch", "date"} <= set(document["machine"])
    assert [(row["table"], row["name"]) for row in rows] == [
        ("cartpole", "ppo"),
        ("cartpole", "plain-torch"),
    ]
    assert all(len(row["values"]) == 1 and row["values"][0] > 0 and row["higher"] for row in rows)
    assert "| cartpole | steps/s |" in tables
    assert "| plain-torch |" in tables


def test_wall_clock_ends_with_the_score_of_the_trained_agent(measure):
    sizes = ["--updates", "1", "--workloads", "cartpole-whole"]
    document, _ = measure(
        "throughput.py", "--wall", "--ours=ppo-own-module", "--peers=plain-torch", *sizes
    )
    assert [row["name"] for row in document["rows"]] == ["ppo-own-module", "plain-torch"]
    for row in document["rows"]:
        assert (row["unit"], row["higher"]) == ("s", False)
        assert row["values"][0] > 0
        assert row["more"]["mean return"] >= 1  # an episode pays 1 per step


def test_a_peer_that_cannot_do_it_is_skipped_with_a_word(measure):
    # Either it is not installed, or it has no schedule of the clip range.
    sizes = ["--updates", "1", "--workloads", "cartpole-whole"]
    document, tables = measure("throughput.py", "--wall", "--ours=", "--peers=torchrl", *sizes)
    (row,) = document["rows"]
    assert row["values"] == []
    assert row["skipped"]
    assert f"({row['skipped']})" in tables


def test_micro_relates_every_part_to_something_else(measure):
    sizes = ["--sizes", "1,2", "--device", "cpu", "--minibatches", "4,512"]
    document, _ = measure("micro.py", "--envs", "CartPole-v1", *sizes)
    ratios = {}
    for row in document["rows"]:
        assert len(row["values"]) == 1
        assert row["values"][0] > 0
        ratios.setdefault(row["table"], {})[row["name"]] = row["ratios"]
    assert set(ratios) == {"update", "acting", "gae", "collecting", "scaling", "start", "gpu"}
    for way in ("plain torch", "eager", "recorded"):
        assert len(ratios["update"][f"Gaussian, 64 rows, {way}"]) == 1
    assert ratios["collecting"]["CartPole-v1, 2 processes without a policy"] == [1.0]
    assert len(ratios["scaling"]["2 environments"]) == 1
    assert ratios["start"]["import torch"] == [1.0]
    assert len(ratios["gae"]) == 2 * 4
    assert list(ratios["gpu"]) == [
        "MLP, 4 rows, cpu",
        "MLP, 512 rows, cpu",
        "NatureCNN, 4 rows, cpu",  # and not as many as take seconds
    ]


def test_micro_says_that_there_is_no_gpu(measure, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    document, tables = measure("micro.py", "--tables", "gpu")
    (row,) = document["rows"]
    assert row["values"] == []
    assert "(there is no GPU)" in tables


def result(path, *, values, ratios=(), higher=True, benchmark="throughput"):
    """A file with one row."""
    row = {
        "table": "cartpole",
        "name": "ppo",
        "unit": "steps/s",
        "higher": higher,
        "values": list(values),
        "ratios": list(ratios),
        "ratio_to": "sb3" if ratios else "",
        "skipped": "",
        "more": {},
    }
    path.write_text(json.dumps({"benchmark": benchmark, "rows": [row]}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("old", "new", "higher", "status"),
    [
        ([100, 101, 102], [80, 81, 82], True, 1),
        ([100, 101, 102], [120, 121, 122], True, 0),
        ([100, 101, 102], [120, 121, 122], False, 1),
        ([100, 101, 102], [80, 81, 82], False, 0),
        ([100, 101, 102], [98, 98.5, 99], True, 0),  # all worse, but within the threshold
        ([100, 120, 140], [90, 105, 125], True, 0),  # beyond it, but within the spread
    ],
)
def test_compare_reports_what_is_slower_beyond_threshold_and_spread(
    run, tmp_path, old, new, higher, status
):
    files = [
        result(tmp_path / f"{name}.json", values=values, higher=higher)
        for name, values in (("old", old), ("new", new))
    ]
    done = run("compare.py", *files)
    assert done.returncode == status, done.stderr
    assert ("- cartpole: ppo" in done.stdout) == bool(status)


def test_compare_goes_by_ratios_unless_told_otherwise(run, tmp_path):
    old = result(tmp_path / "old.json", values=[100, 101], ratios=[5.0, 5.1])
    new = result(tmp_path / "new.json", values=[50, 51], ratios=[5.0, 5.1])
    assert run("compare.py", old, new).returncode == 0
    assert run("compare.py", old, new, "--values").returncode == 1


def test_compare_refuses_results_of_different_benchmarks(run, tmp_path):
    old = result(tmp_path / "old.json", values=[1])
    new = result(tmp_path / "new.json", values=[1], benchmark="micro")
    done = run("compare.py", old, new)
    assert done.returncode == 2
    assert "is a result of throughput" in done.stderr


def test_samples_of_a_profile_are_counted_by_the_part_they_lie_in(run, tmp_path):
    lines = ["main (x.py:1);step (gymnasium/core.py:3) 3", "main (x.py:1);other (y.py:2) 1", " 9"]
    (tmp_path / "stacks.txt").write_text("\n".join(lines), encoding="utf-8")
    done = run("profiles.py", "--stacks", "stacks.txt")
    assert done.returncode == 0, done.stderr
    shares = [line.split()[-2] for line in done.stdout.splitlines()]
    assert shares == ["75.0", "25.0"]
