"""Train a matcher with graph sampling in a plain loop, on one process or several; interrupted, it goes on where it was.

python examples/train_loop.py --checkpoint out/loop.pt
torchrun --nproc-per-node 2 examples/train_loop.py --checkpoint out/loop.pt
"""

import argparse
import os
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from qaconv_triton import GraphSampler, QAConv, SoftmaxTripletLoss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", type=Path, default=Path("out/loop.pt"), help="written after every step")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--stop-after", type=int, help="steps, as if the process were killed then")
options = parser.parse_args()

rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
if ranks > 1:
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


class Model(nn.Module):
    """A backbone and the losses on its feature maps: one module, as DistributedDataParallel needs it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1))
        self.criterion = SoftmaxTripletLoss(QAConv(32, 4, 4, num_classes, k_nearest=8, include_self=True))

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.criterion(self.backbone(images), labels)[2].mean()


torch.manual_seed(0)
labels = torch.arange(24).repeat_interleave(8)  # yours: images, and the class of each
images = torch.randn(24, 3, 16, 16)[labels] + 0.5 * torch.randn(len(labels), 3, 16, 16)
model = Model(num_classes=24).to(device)
matcher = model.criterion.matcher
trained = DistributedDataParallel(model) if ranks > 1 else model
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def graph() -> torch.Tensor:
    return matcher.compute_class_neighbors() if matcher.class_neighbors is None else matcher.class_neighbors


sampler = GraphSampler(labels, graph, batch_size=32 // ranks, num_instances=4)  # each rank takes its part
if options.checkpoint.exists():
    saved = torch.load(options.checkpoint, map_location=device)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    sampler.load_state_dict(saved["sampler"])
    matcher.class_neighbors = saved["graph"]  # that of the epoch that goes on

if rank == 0 and sampler.epoch >= options.epochs:
    print(f"{options.checkpoint} has all {options.epochs} epochs: remove it to train again")
step = 0
while sampler.epoch < options.epochs:
    for batch, target in DataLoader(TensorDataset(images, labels), batch_sampler=sampler):
        loss = trained(batch.to(device), target.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"epoch {sampler.state_dict()['epoch']} loss {loss.item():.6f}", flush=True)
            options.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "graph": matcher.class_neighbors}
            torch.save(state | {"sampler": sampler.state_dict()}, f"{options.checkpoint}.new")
            os.replace(f"{options.checkpoint}.new", options.checkpoint)  # a kill leaves the one or the other
        step += 1
        if step == options.stop_after:
            os._exit(0)
    matcher.reset_class_neighbors()  # the next epoch has a graph of its own
if ranks > 1:
    distributed.destroy_process_group()
