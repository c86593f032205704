"""Two computations that avoid a large tensor, each against its literal form: time of forward + backward, peak memory,
on the CPU.

    python benchmarks/forms.py critic --output results/critic-cpu.json
    python benchmarks/forms.py hypernetwork --output results/hypernetwork-cpu.json

critic: the concatenated critic of vte_infonce.py (NIN's head) against all N^2 pairs put through one MLP. hypernetwork:
that of stl.py against W(t) generated for each of N images. The two forms are timed in alternation, after a warm-up, and
the median taken; peak memory is what the tensors of one forward + backward hold at most beyond the inputs.
"""

import copy
import itertools
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's own messages
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from warp import processor

from common import Parser, file_path, positive, run_command
from stl import Hypernetwork
from vte_infonce import ConcatenatedCritic, vte_infonce_loss


def all_pairs(critic, z_hat, z):
    n, features = z.shape
    pairs = torch.cat([z_hat[None].expand(n, n, features), z[:, None].expand(n, n, features)], 2)
    return critic.layers(pairs.view(n * n, 2 * features)).view(n, n)


def generated(hypernetwork, codes, y):
    return torch.bmm(hypernetwork.matrices(codes), y[:, :, None])[:, :, 0]


def normal(*shape):
    return torch.randn(*shape, requires_grad=True)


# for each: the module and its inputs at N, the literal form, the loss of the output
PROBLEMS = {
    "critic": (lambda n: (ConcatenatedCritic(), normal(n, 512), normal(n, 512)), all_pairs,
               lambda scores: vte_infonce_loss(scores, torch.zeros(2, 2), torch.zeros(2, 2))[0]),
    "hypernetwork": (lambda n: (Hypernetwork(), normal(n, 128), normal(n, 512)), generated,
                     lambda output: output.square().mean()),
}


def step(form, loss, module, *inputs):
    output = form(module, *inputs)
    return output.detach(), *torch.autograd.grad(loss(output), [*inputs, *module.parameters()])


def difference(found, exact):
    """Relative, in the Euclidean norm over all of the tensors."""
    apart = sum((a.double() - b).square().sum() for a, b in zip(found, exact, strict=True))
    return (apart / sum(b.square().sum() for b in exact)).sqrt().item()


def peak_memory(*arguments):
    """Mebibytes that the tensors of one step hold at most: a running sum over the profiler's record of every allocation
    and release."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(*arguments)
    events = profiler.profiler.kineto_results.events()
    held = itertools.accumulate(size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events
                                                            if e.name() == "[memory]"))
    return max(held) / 2**20


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("what", choices=PROBLEMS)
    parser.add_argument("--n", type=positive(int), default=256)
    parser.add_argument("--repeats", type=positive(int), default=7)
    parser.add_argument("--output", type=file_path, help="JSON file for the figures")
    args = parser.parse_args()

    torch.manual_seed(0)
    problem, literal, loss = PROBLEMS[args.what]
    inputs = problem(args.n)
    forms = {"ours": lambda module, *inputs: module(*inputs), "literal": literal}
    results = {name: step(form, loss, *inputs) for name, form in forms.items()}
    exact = step(literal, loss, *(value.double() for value in copy.deepcopy(inputs)))
    apart = {name: {"output": difference(found[:1], exact[:1]), "gradients": difference(found[1:], exact[1:])}
             for name, found in results.items()}
    times = {name: [] for name in forms}
    for _ in range(args.repeats):
        for name, form in forms.items():
            start = time.perf_counter()
            step(form, loss, *inputs)
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    memory = {name: peak_memory(form, loss, *inputs) for name, form in forms.items()}
    row = {
        "what": args.what, "n": args.n, "difference_from_float64": apart, "seconds": median,
        "peak_mebibytes": memory, "times_faster": median["literal"] / median["ours"],
        "memory_share": memory["ours"] / memory["literal"],
        "peak_mebibytes_ours_at_n_1024": peak_memory(forms["ours"], loss, *problem(1024)),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "processor": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version(),
    }
    print(json.dumps(row, indent=1))
    if args.output:
        Path(args.output).write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
