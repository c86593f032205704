"""The concatenated critic of vte_infonce.py against the naive form, which makes all N^2 pairs and puts them through one
MLP: time of forward + backward and peak memory, NIN's head, on the CPU.

    python benchmarks/critic.py --output results/critic-cpu.json

Each form is timed in alternation with the other, after a warm-up, and its median taken; peak memory is what the tensors
of one forward + backward hold at most beyond the inputs.
"""

import argparse
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
from vte_infonce import ConcatenatedCritic, vte_infonce_loss


def naive(critic, z_hat, z):
    n, features = z.shape
    pairs = torch.cat([z_hat[None].expand(n, n, features), z[:, None].expand(n, n, features)], 2)
    return critic.layers(pairs.view(n * n, 2 * features)).view(n, n)


def problem(n):
    torch.manual_seed(0)
    return ConcatenatedCritic(), torch.randn(n, 512, requires_grad=True), torch.randn(n, 512, requires_grad=True)


def step(form, critic, z_hat, z):
    scores = critic(z_hat, z) if form == "ours" else naive(critic, z_hat, z)
    gradients = torch.autograd.grad(vte_infonce_loss(scores, z, z)[0], [z_hat, z, *critic.parameters()])
    return scores.detach(), gradients


def peak_memory(form, n):
    """Mebibytes that the tensors of one step hold at most: a running sum over the profiler's record of every allocation
    and release."""
    inputs = problem(n)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(form, *inputs)
    events = profiler.profiler.kineto_results.events()
    held = itertools.accumulate(size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events
                                                            if e.name() == "[memory]"))
    return max(held) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args()

    inputs, times = problem(args.n), {"ours": [], "naive": []}
    results = {form: step(form, *inputs) for form in times}
    apart = max((a - b).abs().max().item() for a, b in zip(
        (results["ours"][0], *results["ours"][1]), (results["naive"][0], *results["naive"][1]), strict=True))
    for _ in range(args.repeats):
        for form, seconds in times.items():
            start = time.perf_counter()
            step(form, *inputs)
            seconds.append(time.perf_counter() - start)
    median = {form: statistics.median(seconds) for form, seconds in times.items()}
    memory = {form: peak_memory(form, args.n) for form in times}
    row = {
        "n": args.n, "largest_difference": apart, "seconds": median, "peak_mebibytes": memory,
        "times_faster": median["naive"] / median["ours"], "memory_share": memory["ours"] / memory["naive"],
        "peak_mebibytes_ours_at_n_1024": peak_memory("ours", 1024),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version(),
    }
    print(json.dumps(row, indent=1))
    if args.output:
        Path(args.output).write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
