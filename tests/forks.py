"""Real processes without the seconds that importing torch takes: one that has imported everything, and has started no
threads, forks a child for each command. A child runs the script as __main__, in a folder and an environment of its
own, and can be killed like any other process. All of them on the CPU, also where there is a GPU.

There is one for all workers of pytest. conftest.py starts it; it imports when a worker first asks.
"""

import contextlib
import functools
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "MINTER_TEST_FORKS"  # of the process that forks, in the environment
ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": ""}  # where `--device auto` would take a GPU that is there


class Forks:
    """Talks to the process that forks. start() -> pid, wait(pid) -> exit code, negative where a signal ended it."""

    def __init__(self):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(os.environ[ADDRESS])
        self.server = connection.makefile("rw")

    def ask(self, **request):
        self.server.write(json.dumps(request) + "\n")
        self.server.flush()
        answer = self.server.readline()
        assert answer, "the process that forks has ended"
        return json.loads(answer)

    def start(self, *command, cwd, output=os.devnull, error=os.devnull, environment=None):
        return self.ask(start=[str(part) for part in command], cwd=str(cwd), output=str(output), error=str(error),
                        environment=environment or {})

    def wait(self, pid):
        return self.ask(wait=pid)

    def run(self, *command, cwd, environment=None):
        """As subprocess.run does: returncode, stdout, stderr."""
        output, error = (Path(cwd) / f".{name}-of-{time.monotonic_ns()}" for name in ("stdout", "stderr"))
        code = self.wait(self.start(*command, cwd=cwd, output=output, error=error, environment=environment))
        result = subprocess.CompletedProcess(command, code, output.read_text(), error.read_text())
        output.unlink(), error.unlink()
        return result


@functools.cache
def shared_forks():
    return Forks()


@contextlib.contextmanager
def serving():
    """In here the process that forks is there for this one and its children."""
    few = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # small problems, machines with other work
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # no one else's; such an address has some 100 bytes at most
        os.environ[ADDRESS] = f"{folder}/socket"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.environ[ADDRESS])
            listener.listen()
            server = subprocess.Popen([sys.executable, __file__, str(listener.fileno()), str(os.getpid())],
                                      pass_fds=[listener.fileno()], env={**os.environ, **few, **ON_THE_CPU})
        yield
        server.kill()
        server.wait()
    del os.environ[ADDRESS]


def child(request):
    os.chdir(request["cwd"])
    for name, descriptor in (("output", 1), ("error", 2)):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["environment"])
    script, *flags = request["start"]
    sys.argv = [script, *flags]
    path = script if os.path.isabs(script) else str(ROOT / script)
    sys.path.insert(0, str(Path(path).parent))
    code = 0
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def next_worker(listener, pytest):
    listener.settimeout(5)
    while os.getppid() == pytest:  # else it was killed
        with contextlib.suppress(TimeoutError):
            worker, _ = listener.accept()
            worker.setblocking(True)
            return worker
    sys.exit()


def serve(listener, pytest):
    worker = next_worker(listener, pytest)  # nothing is imported for tests that do not ask
    import matplotlib.pyplot  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import sklearn.neighbors  # noqa: F401
    import torch._dynamo  # noqa: F401  which every optimizer imports, in seconds
    import torch.distributed  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401

    sys.path.insert(0, str(ROOT))
    import common  # noqa: F401
    import minter_warp.views  # noqa: F401

    minter_warp.reference_errors()  # a second of every run of two scripts
    while True:
        if os.fork() == 0:
            answer_all(worker.makefile("rw"))
            os._exit(0)
        worker = next_worker(listener, pytest)


def answer_all(worker):
    """Starts processes for one worker of pytest, and waits for them."""
    for line in worker:
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if answer == 0:
                child(request)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        print(json.dumps(answer), file=worker, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
