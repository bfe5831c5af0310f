"""Train with a class table that is sharded over the processes; on a CPU a minute.

    torchrun --nproc-per-node 2 examples/train_sharded.py --checkpoint out/sharded

The backbone trains under DistributedDataParallel; the matcher does without, for it averages its gradients itself. Run
again with more epochs it goes on from the checkpoint, on as many processes as you like.
"""

import argparse
import os
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from qaconv_triton import GraphSampler, QAConv, SoftmaxTripletLoss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", type=Path, help="a folder, to which every epoch adds one")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--classes", type=int, default=50)
options = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if device.type == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, ranks = distributed.get_rank(), distributed.get_world_size()

torch.manual_seed(0)
labels = torch.arange(options.classes).repeat_interleave(8)  # yours: images, and the class of each
images = torch.randn(options.classes, 3, 16, 16)[labels] + 0.5 * torch.randn(len(labels), 3, 16, 16)

mesh = init_device_mesh(device.type, (ranks,))
matcher = QAConv(32, 4, 4, options.classes, k_nearest=8, include_self=True, mesh=mesh)  # each process makes its rows
criterion = SoftmaxTripletLoss(matcher, background="ignore")
backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1)).to(device)
model = nn.ModuleDict({"backbone": backbone, "criterion": criterion})
trained = DistributedDataParallel(backbone)
optimizer = torch.optim.AdamW([{"params": backbone.parameters()}, *criterion.param_groups()], lr=2e-3)
sampler = GraphSampler(labels, matcher.compute_class_neighbors, batch_size=32 // ranks, num_instances=4)


BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)  # so that any number of processes can load it


def state() -> dict:
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=BY_NAME)}


saved = [int(path.parent.name) for path in options.checkpoint.glob("*/.metadata")] if options.checkpoint else []
if saved:
    loaded = state()
    checkpoint.load(loaded, checkpoint_id=options.checkpoint / str(max(saved)))
    model.load_state_dict(loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["optimizer"], options=BY_NAME)

for epoch in range(max(saved, default=0), options.epochs):
    sampler.set_epoch(epoch)
    total = torch.zeros((), device=device)
    loader = DataLoader(TensorDataset(images, labels), batch_sampler=sampler)
    for batch, target in loader:
        loss = criterion(trained(batch.to(device)), target.to(device))[2].sum() / max(len(target), 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() / len(loader)
    distributed.all_reduce(total)
    if rank == 0:
        print(f"epoch {epoch} loss {total.item() / ranks:.6f}", flush=True)
    if options.checkpoint:
        checkpoint.save(state(), checkpoint_id=options.checkpoint / str(epoch + 1))

distributed.barrier()
os._exit(0)  # gloo may abort if it is torn down after a checkpoint
