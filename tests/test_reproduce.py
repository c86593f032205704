"""results/reproduce.py and results/tables.py: what is run, what is made again, and what the tables say."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import ON_THE_CPU

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "results"))
import reproduce
import tables

from common import NIN, UserError, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent

# Stands in for the training scripts and the probe: notes how it was called, and behaves as they do.
SCRIPT = """
import json, pathlib, shutil, signal, sys, time
flags = sys.argv[1:]
value = lambda name: flags[flags.index(name) + 1]
with open("calls", "a") as calls:
    calls.write(" ".join([pathlib.Path(__file__).stem, *flags]) + "\\n")
for line in pathlib.Path("behaviour").read_text().splitlines() if pathlib.Path("behaviour").exists() else []:
    script, act = line.split()
    if script == pathlib.Path(__file__).stem and act == "fails":
        sys.exit("the loss became nan in epoch 1: try a lower --lr")
    if script == pathlib.Path(__file__).stem and act == "waits":
        signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("saved").write_text("yes"), sys.exit(143)))
        time.sleep(60)
if "--output" in flags:
    output = pathlib.Path(value("--output"))
    shutil.copy("made.ckpt", output)
    row = {"epoch": 2, "loss": 1.0, "squared_error": 2.0, "logvar": -1.0, "seconds": 3.5}
    output.with_suffix(".jsonl").write_text(json.dumps(row) + "\\n" + json.dumps(row) + "\\n")
else:
    seed = int(value("--seed"))
    method = "random encoder (nin)" if value("--rows") == "baselines" else "x"
    if "--equivariance" in flags:
        rows = [{"measure": "MRR", "map": "ridge", "features": "mu", "transformations": "projective", "method": method,
                 "value": 0.25 + seed / 4}]
    else:
        rows = [{"features": "sample", "classifier": "knn", "train_size": 500, "method": method, "checkpoint": "x",
                 "error_mean": 0.5 + seed / 10, "error_std": 0.0}]
    pathlib.Path(value("--json")).write_text(json.dumps(rows))
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A folder in which reproduce.py finds scripts of the names it knows; run(...) runs it there."""
    for name in ("avt", "predictive_transform", "vte_ba", "vte_infonce", "stl", "probe"):
        (tmp_path / f"{name}.py").write_text(SCRIPT)
    (tmp_path / "results").mkdir()
    marks = "".join(f"# {name}\n<!-- {name} -->\n<!-- /{name} -->\nkept\n" for name in tables.STUDIES)
    (tmp_path / "RESULTS.md").write_text(marks)
    (tmp_path / "README.md").write_text("before\n<!-- main table -->\n<!-- /main table -->\nafter\n")
    model = torch.nn.Module()
    model.encoder = NIN()
    config = {"dataset": "cifar10", "encoder": "nin", "image_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3,
              "images": 128}
    optimizer = torch.optim.Adam(model.parameters())
    save_checkpoint(tmp_path / "made.ckpt", "predictive_transform", config, model, optimizer, 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "prepare_data", lambda args: None)

    def run(*flags, family="vte", methods=("pt", "vte_ba"), seeds=(0, 1), scale="small", code=0):
        command = ["reproduce.py", family, "--scale", scale, "--runs", "runs", "--pages", "."]
        command += ["--seeds", *map(str, seeds)]
        command += ["--methods", *methods] if methods else []
        monkeypatch.setattr(sys, "argv", [*command, *map(str, flags)])
        called = Path("calls").read_text().splitlines() if Path("calls").exists() else []
        if code:
            with pytest.raises(SystemExit) as left:
                reproduce.main()
            assert left.value.code == code
        else:
            reproduce.main()
        return Path("calls").read_text().splitlines()[len(called):]

    return SimpleNamespace(run=run, path=tmp_path, results=tmp_path / "runs/cifar10-small/results.json")


def scripts(calls):
    return [call.split()[0] for call in calls]


def test_each_part_is_made_once_and_after_what_it_needs(study):
    calls = study.run()
    assert len(calls) == len(set(calls)) == 2 * (2 + 2 * 3)  # trainings; labels and equivariance of both and baselines
    for number in (0, 1):
        own = [call for call in calls if f"seed{number}/" in call]
        trained = scripts(own).index("vte_ba")
        assert scripts(own).index("predictive_transform") < trained
        assert f"--pretrained runs/cifar10-small/seed{number}/pt.ckpt" in own[trained]
        assert all(f"--seed {number}" in call for call in own)
        probed = [position for position, call in enumerate(own) if call.startswith("probe") and "vte_ba.ckpt" in call]
        assert len(probed) == 2 and min(probed) > trained
    assert study.run() == []  # nothing is left to do


def test_a_method_of_the_other_family_is_refused(study, capsys):
    with pytest.raises(SystemExit) as left:
        study.run(methods=["stl"])
    assert left.value.code == 2 and "--methods stl is none of vte" in capsys.readouterr().err


def test_settings_are_those_of_the_scale(study):
    small = reproduce.SCALES["small"]
    calls = study.run(seeds=[0])
    predictors, phase_two, labels = (" ".join(small[name]) for name in ("predictors", "phase_two", "labels"))
    assert predictors in calls[0] and phase_two in calls[1] and predictors != phase_two
    assert all(labels in call for call in calls if call.startswith("probe") and "--equivariance" not in call)
    calls = study.run(seeds=[0], scale="full")
    given = {flag for call in calls for flag in call.split() if flag.startswith("--")}
    assert not given & {"--epochs", "--lr", "--limit", "--batch-size", "--train-sizes", "--passes"}
    assert sum("--classifiers mlp" in call for call in calls) == 3  # none of the evaluations is long


def test_a_checkpoint_is_kept_without_the_state_of_its_optimiser(study):
    study.run(seeds=[0])
    kept = torch.load("runs/cifar10-small/seed0/pt.ckpt", weights_only=True)
    made = torch.load("made.ckpt", weights_only=True)
    assert "optimizer" in made and kept.keys() == made.keys() - {"optimizer"}
    assert all(torch.equal(kept["encoder"][name], value) for name, value in made["encoder"].items())


def test_a_failure_stops_what_follows_from_it_and_nothing_else(study, capsys):
    Path("behaviour").write_text("predictive_transform fails\n")
    with pytest.raises(UserError, match="2 of them failed"):
        study.run(methods=["avt", "pt", "vte_ba"])
    calls = scripts(Path("calls").read_text().splitlines())
    assert calls.count("avt") == 2 and calls.count("predictive_transform") == 2 and "vte_ba" not in calls
    assert calls.count("probe") == 2 * 2  # AVT's
    assert "the loss became nan in epoch 1: try a lower --lr" in capsys.readouterr().out
    Path("behaviour").unlink()
    again = study.run(methods=["avt", "pt", "vte_ba"])
    assert "avt" not in scripts(again) and scripts(again).count("vte_ba") == 2


def test_at_the_time_limit_trainings_are_told_to_save(study):
    Path("behaviour").write_text("vte_ba waits\n")
    calls = study.run("--minutes", 0.02, seeds=[0], code=reproduce.NOT_FINISHED)
    assert "vte_ba" in scripts(calls) and Path("saved").exists()
    assert "0/pt" in json.loads(study.results.read_text())["parts"]
    Path("behaviour").unlink()
    again = study.run(seeds=[0])
    assert scripts(again)[0] == "vte_ba" and "--resume" in again[0] and "predictive_transform" not in scripts(again)


def test_a_signal_ends_it_as_the_time_limit_does(study):
    Path("behaviour").write_text("predictive_transform waits\n")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'results')!r}); import reproduce; "
               "from pathlib import Path; reproduce.ROOT = Path.cwd(); reproduce.prepare_data = lambda args: None; "
               "reproduce.run_command(reproduce.main)"]
    flags = ["vte", "--scale", "small", "--runs", "runs", "--pages", ".", "--methods", "pt"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True, cwd=study.path,
                               env={**os.environ, **ON_THE_CPU})
    while not Path("calls").exists():
        assert process.poll() is None
        time.sleep(0.05)
    second = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=study.path)
    assert second.returncode == 1 and "is running already" in second.stderr  # two would spoil each other's files
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in said
    assert Path("saved").exists() and scripts(Path("calls").read_text().splitlines()) == ["predictive_transform"]


def test_it_goes_on_elsewhere_from_results_and_what_checkpoints_are_needed(study, capsys):
    Path("behaviour").write_text("vte_ba fails\n")
    with pytest.raises(UserError, match="failed"):
        study.run()
    Path("behaviour").unlink()
    (study.path / "elsewhere").mkdir()
    for number in (0, 1):  # of seed 0 the checkpoint comes along, of seed 1 the results alone
        (study.path / f"elsewhere/cifar10-small/seed{number}").mkdir(parents=True)
    shutil.copy(study.results, "elsewhere/cifar10-small/results.json")
    shutil.copy("runs/cifar10-small/seed0/pt.ckpt", "elsewhere/cifar10-small/seed0/pt.ckpt")
    shutil.rmtree("runs")
    os.rename("elsewhere", "runs")
    calls = study.run()
    assert [call for call in calls if call.startswith("predictive") and "--seed 0" in call] == []
    assert len([call for call in calls if call.startswith("predictive") and "--seed 1" in call]) == 1
    assert "1/pt, 1/pt labels" in capsys.readouterr().out  # its results are of a training that is lost: made again
    assert len([call for call in calls if call.startswith("probe") and "seed0/pt.ckpt" in call
                and "--rows checkpoints" in call]) == 0
    results = json.loads(study.results.read_text())
    del results["parts"]["1/vte_ba labels"]  # and what that builds on has lost its checkpoint, too
    study.results.write_text(json.dumps(results))
    shutil.rmtree("runs/cifar10-small/seed1")
    calls = study.run()
    assert scripts(calls)[0] == "predictive_transform" and scripts(calls).count("vte_ba") == 1
    assert Path("runs/cifar10-small/results.json.before").exists()
    for number in (0, 1):  # and of a finished study no checkpoint is needed
        shutil.rmtree(f"runs/cifar10-small/seed{number}")
    assert study.run() == []


def test_other_settings_or_other_data_are_refused(study, monkeypatch):
    study.run(seeds=[0])
    small = {**reproduce.SCALES["small"], "phase_two": ["--epochs", "9"]}
    monkeypatch.setitem(reproduce.SCALES, "small", small)
    with pytest.raises(UserError, match="0/vte_ba was made with .*--epochs 8.* now to be made with .*--epochs 9"):
        study.run(seeds=[0])
    folder = study.path / "copied"
    for name in reproduce.CIFAR10_CLASSES:
        (folder / "train" / name).mkdir(parents=True)
        (folder / "train" / name / "0000.jpg").touch()
    with pytest.raises(UserError, match="on CIFAR-10, not cifar10-small on CIFAR-10, JPEG copy: give another"):
        study.run("--dataset", folder)


def test_what_the_data_is_called(tmp_path):
    assert reproduce.title_of("cifar10") == "CIFAR-10" and reproduce.title_of("stl10") == "STL-10"
    for name in reproduce.CIFAR10_CLASSES:
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.jpeg").touch()
    assert reproduce.title_of(str(tmp_path)) == "CIFAR-10, JPEG copy"
    (tmp_path / "train" / "cat" / "1.png").touch()
    assert reproduce.title_of(str(tmp_path)) == "CIFAR-10, copied to files"
    shutil.rmtree(tmp_path / "train" / "cat")
    with pytest.raises(UserError, match="is no copy of CIFAR-10"):
        reproduce.title_of(str(tmp_path))


WHOLE = {"study": "cifar10-small", "title": "CIFAR-10", "scale": "small", "pieces": [], "parts": {}}


@pytest.mark.parametrize("text", [
    '{"study": "cifar10-small", "parts": {', "[]", "{}", json.dumps({**WHOLE, "parts": []}),
    json.dumps({**WHOLE, "parts": {"0/pt": {"settings": [], "command": "", "seconds": 1}}}),
    json.dumps({**WHOLE, "pieces": [{"machine": None}]}),
])
@pytest.mark.parametrize("where", ["runs/cifar10-small/results.json", "results/cifar10-small.json"])
def test_a_broken_results_file_is_named_and_left_alone(study, where, text):
    Path(where).parent.mkdir(parents=True, exist_ok=True)
    Path(where).write_text(text)
    with pytest.raises(UserError, match=f"'{where}' does not hold the results of a study"):
        study.run()
    assert Path(where).read_text() == text


def test_pages(study):
    study.run()
    page = Path("RESULTS.md").read_text()
    small = page.split("<!-- cifar10-small -->")[1].split("<!-- /cifar10-small -->")[0]
    assert page.count("kept\n") == len(tables.STUDIES)  # what stands outside the marks
    # errors of .5 and .6 in seeds 0 and 1; VTE-BA's published error with k-NN at 500 labels is .578
    deviation = statistics.stdev([0.5, 0.6])
    assert f"0.550 ± {deviation:.3f} | 0.578 | -0.028 |" in small
    assert "| random encoder | z sampled |" in small
    assert "| AVT | z sampled | – |" in small  # not run, and told so
    assert f"| VTE-BA | 0.375 ± {statistics.stdev([.25, .5]):.3f} |" in small.split("Equivariance, projective")[1]
    assert "| predictive transformation | 2 x 128 | 0.1 | 2.000 |" in small  # 2 epochs of 3.5 s
    assert "python vte_ba.py --dataset cifar10" in small
    for name in tables.STUDIES.keys() - {"cifar10-small"}:
        assert "Not yet run" in page.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
    readme = Path("README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n")
    assert f"| .550 ± {deviation:.3f}<br>*.578* |".replace("0.", ".") in readme and "2 training seeds" in readme


def test_pages_keep_a_study_of_which_not_all_is_at_hand(study, capsys):
    study.run(seeds=[0])
    before = Path("results/cifar10-small.json").read_text()
    shutil.rmtree("runs")
    study.run(seeds=[1])  # as many parts, and others
    assert Path("results/cifar10-small.json").read_text() == before
    assert "is left as it is: it holds 8 parts" in capsys.readouterr().out
    calls = study.run("--finished", "results/cifar10-small.json")  # both together
    assert calls == []
    results = json.loads(Path("results/cifar10-small.json").read_text())
    assert len(results["parts"]) == 16 and results["parts"].keys() >= json.loads(before)["parts"].keys()
    assert "Seeds 0, 1; " in Path("RESULTS.md").read_text()
    with pytest.raises(UserError, match="holds a study named cifar10-small on CIFAR-10, not stl10-small on STL-10"):
        study.run("--finished", "results/cifar10-small.json", "--dataset", "stl10")


def test_a_complete_study_on_other_data_takes_the_place_of_one_which_is_moved_aside(study, monkeypatch, capsys):
    study.run()
    before = Path("results/cifar10-small.json").read_text()
    monkeypatch.setattr(reproduce, "title_of", lambda dataset: "CIFAR-10, JPEG copy")
    Path("behaviour").write_text("vte_ba waits\n")
    shutil.rmtree("runs")
    study.run("--minutes", 0.02, code=reproduce.NOT_FINISHED)
    assert Path("results/cifar10-small.json").read_text() == before  # by a part of one it is not
    Path("behaviour").unlink()
    study.run()
    assert Path("results/cifar10-small.before.json").read_text() == before
    assert "CIFAR-10, JPEG copy" in Path("README.md").read_text() and "is now in" in capsys.readouterr().out


def test_pages_are_not_emptied_by_a_study_just_begun(study):
    study.run()
    readme = Path("README.md").read_text()
    Path("behaviour").write_text("avt waits\npredictive_transform waits\n")
    study.run("--minutes", 0.01, scale="full", methods=[], code=reproduce.NOT_FINISHED)
    assert Path("README.md").read_text() == readme and not Path("results/cifar10.json").exists()


def test_what_cannot_be_written_is_told_before_the_work(study):
    Path("README.md").rename("README")
    with pytest.raises(UserError, match="which is to hold RESULTS.md, README.md and results/: .*README.md"):
        study.run()
    Path("README.md").write_text("no marks")
    with pytest.raises(UserError, match="lacks the lines <!-- main table -->"):
        study.run()
    shutil.copy("README", "README.md")
    Path("results").rmdir()
    with pytest.raises(UserError, match="which is to hold RESULTS.md, README.md and results/"):
        study.run()
    assert not Path("calls").exists()


def test_what_a_part_wrote_and_cannot_be_used_is_its_failure_alone(study, capsys):
    """As when a disk is full, or someone tidies up."""
    script = study.path / "vte_ba.py"
    script.write_text(SCRIPT + "output.with_suffix('.jsonl').unlink()\n")
    with pytest.raises(UserError, match="1 of them failed"):
        study.run(seeds=[0])
    assert "FAILED: 0/vte_ba: what it wrote cannot be used" in capsys.readouterr().out
    script.write_text(SCRIPT + "import os; os.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(UserError, match="1 of them failed"):
        study.run(seeds=[0])
    assert "FAILED: 0/vte_ba: ended by signal 9" in capsys.readouterr().out
    script.write_text(SCRIPT)
    assert scripts(study.run(seeds=[0])) == ["vte_ba", "probe", "probe"]


def test_it_can_be_called_from_any_folder(study, monkeypatch):
    (study.path / "inner").mkdir()
    for name in ("made.ckpt", "results", "RESULTS.md", "README.md"):
        (study.path / name).rename(study.path / "inner" / name)
    monkeypatch.chdir(study.path / "inner")
    calls = study.run(seeds=[0])
    assert len(calls) == 8 and Path("runs/cifar10-small/seed0/vte_ba.ckpt").exists()
    assert not (study.path / "runs").exists()


def test_published_numbers_are_those_of_the_papers():
    """VTE's own words on its Tables 1 to 4."""
    cifar10, stl10 = tables.PUBLISHED["cifar10"], tables.PUBLISHED["stl10"]

    def best(known, size):
        return min(known, key=lambda method: known[method][size])

    assert best(cifar10["mlp"], 50000) == "vte_ba" and cifar10["mlp"]["vte_ba"][50000] == .14
    assert best(cifar10["mlp"], 5000) == "vte_infonce1" and cifar10["mlp"]["vte_infonce1"][5000] == .31
    assert best(cifar10["mlp"], 500) == "vte_infonce2" and cifar10["mlp"]["vte_infonce2"][500] == .476
    assert max(cifar10["mlp"], key=lambda method: cifar10["mlp"][method][500]) == "avt"
    for classifier in ("knn", "logistic"):
        for size in (50000, 5000, 500):
            assert best(cifar10[classifier], size) == "vte_ba"
            assert max(cifar10[classifier], key=lambda method: cifar10[classifier][method][size]) == "avt"
    for known in stl10.values():
        assert best(known, 5000) == "vte_infonce2"


def test_order_of_the_methods():
    """The claims of the paper are counted seed by seed."""
    errors = {}
    for number, ranks in ((0, (5, 4, 1, 2, 3)), (1, (5, 4, 2, 1, 3))):  # of AVT, PT, BA, I1, I2
        for method, rank in zip(tables.PAPERS, ranks, strict=True):
            errors.setdefault((method, "mu", "knn", 500), tables.Measured()).of_seed[number] = rank / 10
    lines = tables.order_table("cifar10-small", errors)
    assert lines[2] == "| k-NN, 500 | mu | BA < I1 < I2 < PT < AVT | BA < I1 < I2 < PT < AVT | 1 of 2 | 2 of 2 |"
    del errors["vte_ba", "mu", "knn", 500].of_seed[0]  # what is not of the same seeds is not compared
    assert tables.order_table("cifar10-small", errors)[2].endswith("I1 < BA < I2 < PT < AVT | 0 of 1 | 1 of 1 |")


def test_a_real_study(tmp_path):
    """Phase one, phase two, and all their evaluations, by the real scripts."""
    for name, mark in (("RESULTS.md", None), ("README.md", "main table")):
        marks = [mark] if mark else tables.STUDIES
        (tmp_path / name).write_text("".join(f"<!-- {mark} -->\n<!-- /{mark} -->\n" for mark in marks))
    command = [sys.executable, ROOT / "results/reproduce.py", "vte", "--scale", "tiny", "--dataset", "digits"]
    command += ["--seeds", "3", "--methods", "vte_ba", "--runs", tmp_path / "runs", "--pages", tmp_path]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **ON_THE_CPU})
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((tmp_path / "runs/digits-tiny/results.json").read_text())
    errors, equivariance = tables.collect(results)
    for features in ("sample", "mu"):
        for method in ("pt", "vte_ba", "random encoder"):  # pt is what vte_ba builds on
            for classifier in ("mlp", "knn", "logistic"):
                for size in (100, 20):
                    assert 0 <= errors[method, features, classifier, size].of_seed["3"] <= 1
    assert errors["raw pixels", None, "knn", 100].of_seed["3"] < 0.5  # digits are easy
    chance = sum(1 / rank for rank in range(1, 13)) / 12  # exactly, as it predicts the same for all transformations
    own = equivariance["projective", "VTE-BA: its decoder, which never sees t", "mu", "MRR"]
    assert own.mean() == pytest.approx(chance, abs=1e-4)
    machine = results["pieces"][0]["machine"]
    assert torch.__version__.startswith(machine["torch"]) and machine["cores"] >= 1
    picture = tmp_path / "errors.png"
    command = [sys.executable, ROOT / "results/figures.py", "errors", tmp_path / "runs/digits-tiny/results.json",
               "--output", picture]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and picture.read_bytes().startswith(b"\x89PNG"), result.stderr
