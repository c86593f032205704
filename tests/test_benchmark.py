"""The benchmarks: what differs from ours is not timed, and the figures follow from one another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minter_warp.ops import _C

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")


def benchmark(command, cwd, **environment):
    script, *flags = command.split()
    return subprocess.run([sys.executable, ROOT / "benchmarks" / script, *flags], cwd=cwd, capture_output=True,
                          text=True, timeout=200, env={**os.environ, **environment})


def test_the_warp_is_timed_beside_peers_that_agree(tmp_path):
    command = "warp.py --sizes 8 --batches 4 --threads 1 --repeats 1 --peers grid_sample pil ipp --output a.json"
    done = benchmark(command, tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["threads"] == 1 and record["command"].endswith(command.removeprefix("warp.py "))
    assert {"grid_sample", "pil"} <= set(record["versions"])
    assert ("ipp" in record["versions"]) != ("note: ipp is left out" in done.stdout)
    assert {row["library"] for row in record["agreement"]} == set(record["versions"])
    assert all(0 < row["largest"] <= row["limit"] for row in record["agreement"])
    rows = {(row["setting"], row["library"]): row for row in record["rows"]
            if not row["setting"].startswith("backward")}
    timed = [("warp float32", "grid_sample"), *((f"step {kind}", name) for kind in ("float32", "bfloat16")
                                                for name in ("grid_sample", "pil"))]
    # PIL would only convert arrays in a warp, and there is no grid_sample of bytes
    assert sorted(key for key in rows if key[1] in ("grid_sample", "pil")) == sorted(timed)
    for (setting, _), row in rows.items():
        assert row["measured_on"] == row["n"] == 4
        assert row["images_per_second"] == pytest.approx(row["measured_on"] / row["seconds"])
        ours = rows[setting, "ours"]["images_per_second"]
        assert row["ours_over_it"] == pytest.approx(ours / row["images_per_second"])
        assert f"{row['images_per_second']:,.0f}" in done.stdout


def test_a_peer_that_differs_ends_it_with_what_it_said(tmp_path):
    fake = tmp_path / "kornia/geometry/transform.py"
    fake.parent.mkdir(parents=True)
    (tmp_path / "kornia/__init__.py").write_text("__version__ = '0'")
    fake.write_text("def warp_perspective(images, *_, **__):\n    return images")
    done = benchmark("warp.py --sizes 8 --batches 4 --peers kornia --output a.json", tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "a.json").exists()
    assert "differ by more grey levels than rounding explains: kornia" in done.stderr.strip().split("\n")[-1]


def test_a_training_step_is_measured_beside_its_ceiling(tmp_path):
    done = benchmark("train.py --device cpu --scripts avt --no-usual --steps 2 --batch-size 4 --image-size 8 "
                     "--repeats 1 --output a.json", tmp_path, MINTER_KEEP_MEMORY="0")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["memory_kept"] is False and figures["cores"] == os.cpu_count()
    row, = figures["rows"]
    rate = row["images_per_second"]
    assert row["of_ceiling"] == pytest.approx(rate["full"] / rate["ceiling"]) and set(rate) == {"full", "ceiling"}
    assert min(row["mebibytes"].values()) > 100 and f"{rate['full']:,.0f}" in done.stdout
