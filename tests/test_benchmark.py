"""The benchmark of the warp: it agrees with what it is compared with, and its medians are those of its processes."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from minter_warp.ops import _C

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")


def benchmark(*flags, cwd, **environment):
    command = [sys.executable, ROOT / "benchmarks/warp.py", *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200,
                          env={**os.environ, **environment})


def test_what_several_processes_measure_is_put_together(tmp_path):
    flags = "--processes 3 --sizes 8 --batches 4 --threads 1 --repeats 1 --peers grid_sample pil".split()
    flags += ["--output", "runs.json"]
    done = benchmark(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "runs.json").read_text())
    assert record["processes"] == 3 and record["threads"] == 1 and record["command"].endswith(" ".join(flags))
    assert {row["library"] for row in record["agreement"]} == {"grid_sample", "pil"}
    assert all(row["largest"] <= row["limit"] for row in record["agreement"])
    peers = [row for row in record["rows"] if row["library"] in ("grid_sample", "pil") and row["n"] == 4]
    # warp: PIL takes uint8 and grid_sample float32; step: both, into float32 and into bfloat16
    assert sorted((row["setting"], row["library"]) for row in peers) == sorted([
        ("warp", "grid_sample"), ("warp", "pil"), ("step float32", "grid_sample"), ("step float32", "pil"),
        ("step bfloat16", "grid_sample"), ("step bfloat16", "pil")])
    for row in peers:
        each = row["ours_over_it_of_each"]
        assert len(each) == len(set(each)) == 3 and row["ours_over_it"] == statistics.median(each)
        assert row["ours_over_it_range"] == [min(each), max(each)]
        low, high = row["images_per_second_range"]
        assert 0 < low <= row["images_per_second"] <= high
        shown = f"{row['ours_over_it']:.1f} ({min(each):.1f} to {max(each):.1f})"
        assert shown in done.stdout
    assert done.stdout.count("process 2 of 3:") == 1


def test_a_process_that_fails_ends_it_with_what_it_said(tmp_path):
    wrong = tmp_path / "kornia/geometry/transform.py"
    wrong.parent.mkdir(parents=True)
    (tmp_path / "kornia/__init__.py").write_text("__version__ = '0'")
    wrong.write_text("def warp_perspective(images, *_, **__):\n    return images")
    done = benchmark("--processes", "2", "--sizes", "8", "--batches", "4", "--peers", "kornia", "--output", "runs.json",
                     cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "runs.json").exists()
    said, summary = done.stderr.strip().split("\n")[-2:]
    assert "differ by more grey levels than rounding explains: kornia" in said and "process 1 of 2 failed" in summary


def test_a_training_step_is_measured_beside_its_ceiling(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/train.py", "step", "--device", "cpu", "--scripts", "avt"]
    command += "--no-usual --steps 2 --batch-size 4 --image-size 8 --repeats 1 --output figures.json".split()
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300,
                            env={**os.environ, "MINTER_KEEP_MEMORY": "0"})
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["memory_kept"] is False and figures["cores"] == os.cpu_count()
    row, = figures["rows"]
    rate = row["images_per_second"]
    assert row["of_ceiling"] == pytest.approx(rate["full"] / rate["ceiling"]) and "usual" not in rate
    first_convolution = 2 * 8 * 8 * 3 * 25 * 192  # of x; t(x) and the backward pass have as much again
    assert row["gflop_per_image"] > 3 * first_convolution / 1e9
