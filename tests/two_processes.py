"""Gradients of one batch, by one process or shared by several: python tests/two_processes.py FILE. Rank 0 saves."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import stl
import vte_infonce
from common import NIN, join_processes, processes, synchronise_batch_norm

N, SIZE = 12, 8


def share(values):
    rank, count = processes()
    n = len(values) // count
    return values[rank * n : (rank + 1) * n]


def gradients(make, loss_of, *inputs, synchronised=True):
    """{name: gradient} and running statistics of make() on this process's share of the inputs."""
    torch.manual_seed(0)
    model = make()
    if processes()[1] > 1:
        if synchronised:
            model = synchronise_batch_norm(model, torch.device("cpu"))
        model = torch.nn.parallel.DistributedDataParallel(model)
    loss = loss_of(model(*map(share, inputs)))
    loss.backward()
    model = getattr(model, "module", model)
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {**found, **dict(model.named_buffers()), "loss": common.average(loss.detach())}


def main():
    join_processes(torch.device("cpu"))
    vte_infonce.reparameterize = lambda mu, logvar: mu + 0 * logvar  # noise is each process's own
    generator = torch.Generator().manual_seed(0)
    images, others = (torch.randn(N, 3, SIZE, SIZE, generator=generator) for _ in range(2))
    results = {}
    for critic in (vte_infonce.SeparatedCritic, vte_infonce.ConcatenatedCritic):
        for deep in (False, True):
            results[f"{critic.__name__} {deep}"] = gradients(
                lambda critic=critic, deep=deep: vte_infonce.VTEInfoNCE(NIN(SIZE), NIN(SIZE), critic(deep), True),
                lambda output: vte_infonce.vte_infonce_loss(*output)[0], images, others)
    results["stl"] = gradients(
        lambda: stl.STL(NIN(SIZE, probabilistic=False)),
        lambda output: stl.stl_loss(output, {"inv": 1.0, "equi": 1.0, "trans": 0.5})[0], images, others)
    results["own batch norm"] = gradients(
        lambda: vte_infonce.VTEInfoNCE(NIN(SIZE), NIN(SIZE), vte_infonce.SeparatedCritic(), from_scratch=True),
        lambda output: vte_infonce.vte_infonce_loss(*output)[0], images, others, synchronised=False)
    if processes()[0] == 0:
        torch.save(results, sys.argv[1])


if __name__ == "__main__":
    main()
