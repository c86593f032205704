"""Gradients of one batch, by one process or shared by several: python tests/two_processes.py FILE. Rank 0 saves.

Without batch normalisation, which takes each process's own statistics, they are the same."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import stl
import vte_infonce
from common import AlexNet, average, gather, init_distributed, rank, rows_of_this_rank, world_size

N, SIZE = 12, 32


def share(values):
    n = len(values) // world_size()
    return values[rank() * n : (rank() + 1) * n]


def gradients(make, loss_of, *inputs):
    """{name: gradient} of make() on this process's share of the inputs, and the loss."""
    torch.manual_seed(0)
    model = make()
    if world_size() > 1:
        model = nn.parallel.DistributedDataParallel(model)
    loss = loss_of(model(*map(share, inputs)))
    loss.backward()
    model = getattr(model, "module", model)
    return {**{name: parameter.grad for name, parameter in model.named_parameters()}, "loss": average(loss.detach())}


class Features(nn.Module):
    """Of two views, as STL's loss compares them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, view1, view2):
        return self.layers(view1), self.layers(view2)


def gather_with_own_gradients(rows):
    """The customary mistake: right values, but what the other ranks' losses ask of these rows is lost."""
    return gather(rows).detach().index_copy(0, rows_of_this_rank(len(rows), rows.device), rows)


def main():
    init_distributed(torch.device("cpu"))
    vte_infonce.reparameterize = lambda mu, logvar: mu + 0 * logvar  # noise is each process's own
    generator = torch.Generator().manual_seed(0)
    images, others = (torch.randn(N, 3, SIZE, SIZE, generator=generator) for _ in range(2))

    def infonce(critic):
        return gradients(lambda: vte_infonce.VTEInfoNCE(AlexNet(SIZE), AlexNet(SIZE), critic(), from_scratch=True),
                         lambda output: vte_infonce.vte_infonce_loss(*output)[0], images, others)

    def nt_xent():
        return gradients(Features, lambda output: stl.nt_xent(*output), images, others)

    results = {"separated": infonce(vte_infonce.SeparatedCritic), "nt_xent": nt_xent(),
               "concatenated": infonce(vte_infonce.ConcatenatedCritic)}
    vte_infonce.gather = stl.gather = gather_with_own_gradients
    results |= {"wrong separated": infonce(vte_infonce.SeparatedCritic), "wrong nt_xent": nt_xent()}
    if rank() == 0:
        torch.save(results, sys.argv[1])


if __name__ == "__main__":
    main()
