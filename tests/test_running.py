"""Runs that are interrupted, killed and resumed, and runs shared by several processes."""

import json
import math
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from forks import shared_forks

import predictive_transform
from common import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
FEW = ["--dataset", "digits", "--image-size", "8", "--limit", "104", "--batch-size", "32", "--lr", "1e-4"]
STEPS = 4  # of an epoch; the last batch is smaller
SCRIPTS = {
    "pt": ["predictive_transform.py", *FEW, "--epochs", "4"],
    "avt": ["avt.py", *FEW, "--epochs", "4", "--recipe", "fast"],
    "ba": ["vte_ba.py", *FEW, "--epochs", "4", "--pretrained", "pt.ckpt"],
    "infonce": ["vte_infonce.py", *FEW, "--epochs", "4", "--pretrained", "pt.ckpt"],
    "stl": ["stl.py", *FEW, "--epochs", "3", "--encoder", "nin", "--equi", "0"],  # whose network alone takes 270 MB
}

WRAPPER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch, common, minter_warp

def after_steps(count, action):
    step, done = common.Run.step, [0]
    def counted(self, *args):
        done[0] += 1
        if done[0] == count:
            action()
        step(self, *args)
    common.Run.step = counted

def while_saving(which, action):
    save, done = torch.save, [0]
    def counted(value, file, *args, **options):
        done[0] += 1
        if done[0] == which:
            file.write(b"PK half a checkpoint")
            file.flush()
            action()
        save(value, file, *args, **options)
    torch.save = counted

{what}
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(os.path.join({root!r}, sys.argv[0]), run_name="__main__")
"""


def wrapper(folder, what=""):
    """A script that runs another and has something happen in it."""
    path = folder / f"wrapper-{abs(hash(what))}.py"
    path.write_text(WRAPPER.format(root=str(ROOT), what=what))
    return path


@pytest.fixture(scope="module")
def forks():
    return shared_forks()


@pytest.fixture(scope="module")
def whole_runs(forks, module_folder):
    """A folder with an uninterrupted run of each script, and the seconds that each took."""
    folder, seconds = module_folder, {}
    forks.run(wrapper(folder), "avt.py", "--help", cwd=folder)  # the first command waits for the imports
    for name, script in SCRIPTS.items():
        start = time.monotonic()
        result = forks.run(wrapper(folder), *script, "--output", f"{name}.ckpt", cwd=folder)
        assert result.returncode == 0, result.stderr
        seconds[name] = time.monotonic() - start
    return folder, seconds


@pytest.fixture
def whole(whole_runs):
    """The same for one test, which may write there; what it adds is removed."""
    folder, seconds = whole_runs
    before = set(folder.rglob("*"))
    yield folder, seconds
    for path in set(folder.rglob("*")) - before:
        if path.is_file():
            path.unlink()


def rows_of(path):
    """A log without what the clock says."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def leaves(value, path=""):
    if isinstance(value, dict):
        for name, part in value.items():
            yield from leaves(part, f"{path}/{name}")
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from leaves(part, f"{path}/{i}")
    else:
        yield path, value


def assert_same_run(one, other):
    """Weights and optimiser, its learning rate too, bit for bit; the log but for its times."""
    a, b = (load_checkpoint(path) for path in (one, other))
    for part in ("epoch", "encoder", "model", "optimizer"):
        expected, found = dict(leaves(a[part])), dict(leaves(b[part]))
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == found[name].dtype and torch.equal(value, found[name]), f"{part}{name}"
            else:
                assert value == found[name], f"{part}{name}"
    assert rows_of(one.with_suffix(".jsonl")) == rows_of(other.with_suffix(".jsonl"))


@pytest.mark.parametrize("name", ["pt", "avt", "stl"])  # both recipes, and a schedule of epochs
def test_killed_at_random_moments_and_resumed_a_run_ends_with_the_same_bits(name, whole, forks):
    """Three kills of each. A run that ends before its kill is begun anew, and given less time."""
    folder, seconds = whole
    command = [wrapper(folder), *SCRIPTS[name], "--output", f"killed-{name}.ckpt", "--resume"]
    moments, longest, kills = random.Random(f"{name} moments"), 0.7 * seconds[name], 0
    while kills < 3:
        pid = forks.start(*command, cwd=folder)
        time.sleep(moments.uniform(0.1, 1) * longest)
        os.kill(pid, signal.SIGKILL)
        if forks.wait(pid) == -signal.SIGKILL:
            kills += 1
            log = folder / f"killed-{name}.jsonl"
            assert not log.exists() or len(rows_of(log)) <= 4  # whole lines, whenever it is read
        else:
            longest *= 0.7
            for path in folder.glob(f"killed-{name}.*"):
                path.unlink()
    result = forks.run(*command, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert_same_run(folder / f"{name}.ckpt", folder / f"killed-{name}.ckpt")
    assert not list(folder.glob("*.tmp"))


def test_one_run_at_a_time_writes_an_output_and_a_killed_one_stands_in_no_ones_way(whole, forks):
    folder, _ = whole
    command = [wrapper(folder), *SCRIPTS["avt"], "--output", "locked.ckpt", "--resume"]
    first, lock = forks.start(*command, "--epochs", "1000", cwd=folder), folder / "locked.jsonl.lock"
    until = time.monotonic() + 60
    while not (lock.exists() and lock.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    second = forks.run(*command, cwd=folder)
    assert second.returncode == 1
    assert f"'locked.ckpt' is being written by process {first} on " in second.stderr and lock.exists()
    os.kill(first, signal.SIGKILL)
    assert forks.wait(first) == -signal.SIGKILL and lock.exists()
    for path in folder.glob("locked.[cj]*[tl]"):
        path.unlink()
    third = forks.run(*command, cwd=folder)
    assert third.returncode == 0, third.stderr
    assert_same_run(folder / "avt.ckpt", folder / "locked.ckpt")
    assert not lock.exists()


@pytest.mark.parametrize("resume, says", [([], "'late.ckpt' exists already"), (["--resume"], "another run just now")])
def test_a_run_does_not_write_over_one_that_ended_while_it_loaded_its_data(resume, says, whole, forks):
    folder, _ = whole
    other = wrapper(folder, """
import common, shutil
load = common.load_images
common.load_images = lambda *rest: (shutil.copy("avt.ckpt", "late.ckpt"), load(*rest))[1]
""")
    result = forks.run(other, *SCRIPTS["avt"], "--output", "late.ckpt", *resume, cwd=folder)
    assert result.returncode and says in result.stderr and "Traceback" not in result.stderr
    assert (folder / "late.ckpt").read_bytes() == (folder / "avt.ckpt").read_bytes()
    assert not (folder / "late.jsonl.lock").exists()


def test_a_part_of_a_line_at_the_end_of_the_log_does_not_stop_a_resumed_run(whole, forks):
    """What a full disk, or a kill at the wrong moment, leaves."""
    folder, _ = whole
    command = [wrapper(folder), *SCRIPTS["ba"], "--output", "part.ckpt"]
    assert forks.run(*command, "--epochs", "2", cwd=folder).returncode == 0
    with open(folder / "part.jsonl", "ab") as log:
        log.write(b'{"epoch": 3, "lo')
    result = forks.run(*command, "--resume", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert_same_run(folder / "ba.ckpt", folder / "part.ckpt")


def test_a_lock_that_cannot_be_opened_is_one_sentence(whole, forks):
    folder, _ = whole
    (folder / "closed.jsonl.lock").mkdir()  # also root, which reads every file, cannot open a folder to write
    result = forks.run(wrapper(folder), *SCRIPTS["avt"], "--output", "closed.ckpt", cwd=folder)
    (folder / "closed.jsonl.lock").rmdir()
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "cannot write 'closed.ckpt'" in result.stderr and "closed.jsonl.lock" in result.stderr


def test_without_a_terminal_for_errors_a_run_ends_as_any_other(whole, forks):
    """`2>&-`, which some launchers do: Python has no sys.stderr then."""
    folder, _ = whole
    closing = wrapper(folder, "os.close(2)\nsys.stderr = None")
    result = forks.run(closing, *SCRIPTS["avt"], "--epochs", 1, "--output", "quiet.ckpt", cwd=folder)
    assert result.returncode == 0 and "wrote quiet.ckpt" in result.stdout


def test_killed_while_a_checkpoint_is_written_the_one_before_is_whole(whole, forks):
    folder, _ = whole
    killing = wrapper(folder, "while_saving(3, lambda: os.kill(os.getpid(), signal.SIGKILL))")
    command = [*SCRIPTS["ba"], "--output", "saving.ckpt"]
    assert forks.run(killing, *command, cwd=folder).returncode == -signal.SIGKILL
    assert load_checkpoint(folder / "saving.ckpt")["epoch"] == 2
    assert len(rows_of(folder / "saving.jsonl")) == 3  # the log is ahead of it by an epoch
    assert list(folder.glob("saving.ckpt.*.tmp"))
    assert forks.run(*command, "--resume", cwd=folder).returncode == 0
    assert_same_run(folder / "ba.ckpt", folder / "saving.ckpt")
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("name, steps, number", [
    ("pt", 7, signal.SIGTERM), ("ba", 1, signal.SIGTERM), ("infonce", 8, signal.SIGINT)])
def test_a_signal_ends_the_run_after_its_step_and_resumed_it_ends_with_the_same_bits(name, steps, number, whole, forks):
    folder, _ = whole
    signalled = wrapper(folder, f"after_steps({steps}, lambda: os.kill(os.getpid(), {int(number)}))")
    command = [*SCRIPTS[name], "--output", f"signalled {name}.ckpt"]
    result = forks.run(signalled, *command, cwd=folder)
    finished = (steps - 1) // STEPS
    assert result.returncode == 128 + number
    before, says = result.stderr.strip().split(": python ")
    assert before == f"stopped in epoch {finished + 1}; to go on after epoch {finished}"
    assert (folder / f"signalled {name}.ckpt").exists() == (finished > 0)
    result = forks.run(wrapper(folder), *shlex.split(says), cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\nepoch ") == 4 - finished
    assert_same_run(folder / f"{name}.ckpt", folder / f"signalled {name}.ckpt")


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_run_at_once(first, whole, forks):
    folder, _ = whole
    twice = wrapper(folder, f"""
def signals():
    for _ in range(2):
        os.kill(os.getpid(), {int(first)})
    raise RuntimeError("still there")
after_steps(3, signals)""")
    result = forks.run(twice, *SCRIPTS["ba"], "--output", "twice.ckpt", cwd=folder)
    assert result.returncode == -first and result.stderr == ""


def parsed(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["predictive_transform.py", *map(str, flags)])
    return predictive_transform.parse_args()


def test_the_fast_recipe_is_one_cycle_over_all_steps_and_begins_with_little_noise(tmp_path, monkeypatch):
    """Beside torch's own schedule; the paper's recipe stays at its rate. An odd image at an epoch's end is no step."""
    rates, sigmas, with_muon = [], [], []

    class Watched(predictive_transform.Run):
        def epochs(self, model, optimizer, schedule=None):
            self.optimizer = optimizer
            names = {weights: name for name, weights in model.named_parameters()}
            with_muon.extend(names[weights] for group in optimizer.param_groups[1:] for weights in group["params"])
            yield from super().epochs(model, optimizer, schedule)

        def step(self, loss, metrics, count):
            rates.append(self.optimizer.param_groups[0]["lr"])
            sigmas.append(math.exp(metrics["logvar"].item() / 2))
            super().step(loss, metrics, count)

    monkeypatch.setattr(predictive_transform, "Run", Watched)
    few = ["--dataset", "digits", "--image-size", 8, "--limit", 33, "--batch-size", 8]
    predictive_transform.train(parsed(monkeypatch, *few, "--recipe", "fast", "--epochs", 2, "--lr", 0.01,
                                      "--output", tmp_path / "fast.ckpt"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=10, cycle_momentum=False)
    expected = []
    for _ in range(10):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert rates == pytest.approx(expected[:5] + expected[6:9]) and max(rates) == pytest.approx(0.01)
    assert sigmas[0] == pytest.approx(math.exp(-4), rel=0.3)
    assert len(with_muon) == 7 and "encoder.mu.weight" in with_muon and "encoder.logvar.weight" not in with_muon
    rates.clear(), sigmas.clear()
    predictive_transform.train(parsed(monkeypatch, *few, "--epochs", 1, "--output", tmp_path / "paper.ckpt"))
    assert rates == [1e-4] * 4 and sigmas[0] == pytest.approx(1, rel=0.3)


def test_a_library_may_train_twice_also_in_a_thread_and_keeps_its_signal_handlers(tmp_path, monkeypatch, capsys):
    few = ["--dataset", "digits", "--image-size", 8, "--limit", 16, "--batch-size", 8, "--epochs", 2, "--lr", 1e-4]
    numbers = signal.SIGINT, signal.SIGTERM

    def mine(number, frame):
        pass

    before = [signal.signal(number, mine) for number in numbers]
    try:
        predictive_transform.train(parsed(monkeypatch, *few, "--output", tmp_path / "one.ckpt"))
        arguments = parsed(monkeypatch, *few, "--output", tmp_path / "two.ckpt")
        thread = threading.Thread(target=predictive_transform.train, args=(arguments,))
        thread.start(), thread.join()
        assert [signal.getsignal(number) for number in numbers] == [mine, mine]
        assert_same_run(tmp_path / "one.ckpt", tmp_path / "two.ckpt")

        class Stops(predictive_transform.Run):
            def step(self, *args):
                os.kill(os.getpid(), signal.SIGTERM)
                super().step(*args)

        monkeypatch.setattr(predictive_transform, "Run", Stops)
        try:
            predictive_transform.train(parsed(monkeypatch, *few, "--output", tmp_path / "three.ckpt"))
        except SystemExit as ended:
            assert ended.code == 128 + signal.SIGTERM
        assert [signal.getsignal(number) for number in numbers] == [mine, mine]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_a_finished_run_is_left_alone(whole, forks):
    folder, _ = whole
    before = (folder / "ba.ckpt").read_bytes(), (folder / "ba.jsonl").read_bytes()
    result = forks.run(*SCRIPTS["ba"], "--output", "ba.ckpt", "--resume", cwd=folder)
    assert result.returncode == 0 and "has 4 epochs already, and --epochs is 4" in result.stdout
    assert before == ((folder / "ba.ckpt").read_bytes(), (folder / "ba.jsonl").read_bytes())


def test_a_run_of_the_code_before_is_resumed_and_built_upon(whole, forks):
    """Its checkpoints have `position`, which is None between epochs, no `made_with`, and settings since gone."""
    folder, _ = whole
    command = [wrapper(folder), "predictive_transform.py", *FEW, "--output", "old.ckpt"]
    assert forks.run(*command, "--epochs", 2, cwd=folder).returncode == 0
    checkpoint = torch.load(folder / "old.ckpt")
    checkpoint = {**checkpoint, "config": {**checkpoint["config"], "data_on": "auto", "compile": "auto"},
                  "position": None}
    del checkpoint["made_with"]
    torch.save(checkpoint, folder / "old.ckpt")
    result = forks.run("vte_ba.py", *FEW, "--epochs", 1, "--pretrained", "old.ckpt", "--output", "on-old.ckpt",
                       cwd=folder)
    assert result.returncode == 0, result.stderr
    assert forks.run(*command, "--epochs", 4, "--resume", cwd=folder).returncode == 0
    assert_same_run(folder / "pt.ckpt", folder / "old.ckpt")


@pytest.mark.parametrize("command, code, says", [
    ([*SCRIPTS["ba"], "--seed", "1", "--output", "ba.ckpt"], 2, "trained with seed 0, not 1"),
    ([*SCRIPTS["ba"], "--limit", "100", "--output", "ba.ckpt"], 2, "trained with limit 104, not 100"),
    ([*SCRIPTS["stl"], "--epochs", "5", "--output", "stl.ckpt"], 2, "with epochs 3, not 5"),
    ([*SCRIPTS["ba"], "--output", "pt.ckpt"], 1, "is a checkpoint of predictive_transform"),
    ([*SCRIPTS["ba"], "--output", "half.ckpt"], 1, "is no checkpoint of minTER"),
])
def test_another_run_is_not_resumed(command, code, says, whole, forks):
    folder, _ = whole
    (folder / "half.ckpt").write_bytes((folder / "ba.ckpt").read_bytes()[:100_000])
    before = {path: path.read_bytes() for path in folder.glob("*.ckpt")}
    result = forks.run(*command, "--resume", cwd=folder)
    assert result.returncode == code and says in result.stderr and len(result.stderr.splitlines()) == 1
    assert before == {path: path.read_bytes() for path in folder.glob("*.ckpt")}


@pytest.mark.parametrize("optimizer", [None, {"state": {}, "param_groups": [{"lr": "1"}]}])
def test_a_state_that_does_not_fit_is_not_resumed(optimizer, whole, forks):
    folder, _ = whole
    checkpoint = torch.load(folder / "ba.ckpt")
    torch.save({**checkpoint, "epoch": 3, "optimizer": optimizer}, folder / "harmed.ckpt")
    result = forks.run(*SCRIPTS["ba"], "--output", "harmed.ckpt", "--resume", cwd=folder)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "the optimizer's state in 'harmed.ckpt' does not fit" in result.stderr


def test_more_epochs_and_fewer_checkpoints(whole, forks):
    folder, _ = whole
    command = ["vte_ba.py", "--pretrained", "pt.ckpt", *FEW, "--output", "longer.ckpt", "--save-every", 3]
    assert forks.run(*command, "--epochs", 2, cwd=folder).returncode == 0  # the last epoch is always saved
    killing = wrapper(folder, f"after_steps({STEPS + 2}, lambda: os.kill(os.getpid(), signal.SIGKILL))")
    assert forks.run(killing, *command, "--epochs", 4, "--resume", cwd=folder).returncode == -signal.SIGKILL
    assert load_checkpoint(folder / "longer.ckpt")["epoch"] == 3 and len(rows_of(folder / "longer.jsonl")) == 3
    assert forks.run(*command, "--epochs", 4, "--resume", cwd=folder).returncode == 0
    assert_same_run(folder / "ba.ckpt", folder / "longer.ckpt")


def test_a_disk_that_is_full_loses_nothing(whole, forks):
    folder, _ = whole
    command = [*SCRIPTS["ba"], "--output", "full.ckpt"]
    filling = wrapper(folder, f"import resource\nafter_steps({2 * STEPS + 1}, lambda: "  # files of 1 MiB at most
                              "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)))")
    result = forks.run(filling, *command, cwd=folder)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert "cannot write 'full.ckpt' ([Errno 27] File too large); what was saved before it is kept" in result.stderr
    assert load_checkpoint(folder / "full.ckpt")["epoch"] == 2 and not list(folder.glob("*.tmp"))
    assert forks.run(*command, "--resume", cwd=folder).returncode == 0
    assert_same_run(folder / "ba.ckpt", folder / "full.ckpt")


@pytest.mark.parametrize("number, code", [("EINVAL", 0), ("EIO", 1)])
def test_a_file_system_without_fsync_ends_no_run(number, code, whole, forks):
    folder, _ = whole
    failing = wrapper(folder, f"import errno\ndef fsync(descriptor):\n    raise OSError(errno.{number}, 'fsync failed')"
                              "\nos.fsync = fsync")
    result = forks.run(failing, *SCRIPTS["ba"], "--epochs", 1, "--output", "fsync.ckpt", cwd=folder)
    assert result.returncode == code, result.stderr
    assert (folder / "fsync.ckpt").exists() == (code == 0) and not list(folder.glob("*.tmp"))
    if code:
        assert len(result.stderr.splitlines()) == 1 and "cannot write 'fsync.ckpt' ([Errno 5]" in result.stderr


# ------------------------------------------------------------------------------------------------ several processes


def environments(count):
    """What torchrun tells its processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"} for rank in range(count)]


def run_together(forks, *command, cwd, count=2):
    """(exit codes, standard outputs, standard errors) of the processes."""
    names = [(f"out{rank}-{time.monotonic_ns()}", f"err{rank}-{time.monotonic_ns()}") for rank in range(count)]
    pids = [forks.start(*command, cwd=cwd, output=cwd / output, error=cwd / error, environment=environment)
            for (output, error), environment in zip(names, environments(count), strict=True)]
    codes = [forks.wait(pid) for pid in pids]
    return codes, *([(cwd / name).read_text() for name in column] for column in zip(*names, strict=True))


def test_two_processes_with_half_the_batch_give_the_gradients_of_one_with_the_whole(forks, tmp_path):
    script = ROOT / "tests" / "two_processes.py"
    result = forks.run(script, "one.pt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    codes, _, errors = run_together(forks, script, "two.pt", cwd=tmp_path)
    assert codes == [0, 0], errors
    one, two = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    assert one.keys() == two.keys() and sum(kind.startswith("wrong") for kind in one) == 2
    for kind, expected in one.items():
        found = two[kind]
        assert expected.keys() == found.keys()
        size = {name: value.double().norm().item() for name, value in expected.items()}
        shown = [name for name in expected if size[name] > 1e-6 * max(size.values())]  # the others ought to be 0
        apart = {name: (found[name].double() - expected[name].double()).norm().item() / size[name] for name in shown}
        if kind.startswith("wrong"):
            assert max(apart.values()) > 0.1  # the comparison can tell
        else:
            assert len(apart) >= {"nt_xent": 5, "separated": 31, "concatenated": 28}[kind]
            assert max(apart.values()) < 1e-3, max(apart.items(), key=lambda item: item[1])


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_train_together_with_one_log_and_one_checkpoint(name, whole, forks):
    folder, _ = whole
    command = [wrapper(folder), *SCRIPTS[name], "--epochs", 2, "--output", f"together-{name}.ckpt"]
    codes, outputs, errors = run_together(forks, *command, cwd=folder)
    assert codes == [0, 0] and errors == ["", ""], errors
    assert "cpu x 2" in outputs[0] and outputs[0].count("epoch ") == 2 and outputs[1] == ""
    together, alone = rows_of(folder / f"together-{name}.jsonl"), rows_of(folder / f"{name}.jsonl")
    assert [row["epoch"] for row in together] == [1, 2]
    assert together[0]["loss"] == pytest.approx(alone[0]["loss"], rel=0.05)  # the same images; the noise differs
    assert load_checkpoint(folder / f"together-{name}.ckpt")["epoch"] == 2


def test_torchrun(whole, forks):
    folder, _ = whole
    result = forks.run(torch.distributed.run.__file__, "--nproc_per_node=2", ROOT / "vte_infonce.py", "--pretrained",
                       "pt.ckpt", *FEW, "--epochs", 1, "--output", "torchrun.ckpt", cwd=folder)
    assert result.returncode == 0, result.stderr
    (row,) = rows_of(folder / "torchrun.jsonl")
    assert row["ceiling"] == pytest.approx(3.4657, abs=1e-3)  # log 32
    assert result.stdout.count("epoch 1/1") == 1


@pytest.mark.parametrize("script, flags, says", [
    ("vte_ba.py", ["--from-scratch", "--batch-size", "33"], "a multiple of their number, 2"),
    ("vte_ba.py", ["--from-scratch", "--batch-size", "2"], "2 does not fit: give 2 or more for each process"),
    ("stl.py", ["--encoder", "nin", "--batch-size", "30"], "in pairs: give a multiple of 4")])
def test_batches_that_two_processes_cannot_share(script, flags, says, forks, tmp_path):
    codes, _, errors = run_together(forks, script, *FEW, *flags, "--output", "no.ckpt", cwd=tmp_path)
    assert codes == [2, 2] and all(says in error for error in errors)


# ----------------------------------------------------------------------------------------------------------- on a GPU

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = ["--device", "cuda", "--precision", "fp32"]


def run_on_gpu(*command, cwd, code=0):
    result = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=400)
    assert result.returncode == code, result.stderr
    return result


@on_a_gpu
@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_waits_for_the_gpu_between_the_batches_of_an_epoch(name, whole, tmp_path):
    script = wrapper(tmp_path, """
whole = common.Run.batches
def watched(self, *samplers, **options):
    for batch in whole(self, *samplers, **options):
        torch.cuda.set_sync_debug_mode("error")
        yield batch
    torch.cuda.set_sync_debug_mode("default")
common.Run.batches = watched
""")
    (tmp_path / "pt.ckpt").write_bytes((whole[0] / "pt.ckpt").read_bytes())
    run_on_gpu(script, *SCRIPTS[name], *CUDA, "--output", "a.ckpt", cwd=tmp_path)


@on_a_gpu
def test_on_a_gpu_a_deterministic_run_that_is_killed_ends_with_the_same_bits(whole, tmp_path):
    command = [*SCRIPTS["avt"], *CUDA, "--deterministic"]
    run_on_gpu(ROOT / command[0], *command[1:], "--output", "one.ckpt", cwd=tmp_path)
    killing = wrapper(tmp_path, "after_steps(9, lambda: os.kill(os.getpid(), signal.SIGKILL))")
    run_on_gpu(killing, *command, "--output", "two.ckpt", cwd=tmp_path, code=-signal.SIGKILL)
    run_on_gpu(ROOT / command[0], *command[1:], "--output", "two.ckpt", "--resume", cwd=tmp_path)
    assert_same_run(tmp_path / "one.ckpt", tmp_path / "two.ckpt")


@on_a_gpu
@pytest.mark.parametrize("flags", [["--compile", "inductor"], ["--compile", "cudagraphs"], ["--precision", "bf16"]])
def test_on_a_gpu_every_way_to_run_gives_the_same_losses(flags, whole, tmp_path):
    command = [ROOT / "avt.py", "--epochs", 2, *FEW, *CUDA]
    run_on_gpu(*command, "--output", "one.ckpt", cwd=tmp_path)
    run_on_gpu(*command, *flags, "--output", "two.ckpt", cwd=tmp_path)
    one, two = rows_of(tmp_path / "one.jsonl"), rows_of(tmp_path / "two.jsonl")
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.1)  # compiled, the noise is drawn otherwise
