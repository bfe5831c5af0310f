"""Train a matcher with graph sampling under Hugging Face Accelerate, on one process or several.

    python examples/train_accelerate.py
    accelerate launch --num_processes 2 examples/train_accelerate.py

`GraphSampler` deals the batches among the ranks itself: the loader is not given to `Accelerator.prepare`, which would
deal them again.
"""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qaconv_triton import GraphSampler, QAConv, SoftmaxTripletLoss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], default="no")
parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
options = parser.parse_args()


class Model(nn.Module):
    """A backbone and the losses on its feature maps."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1))
        self.criterion = SoftmaxTripletLoss(QAConv(32, 4, 4, num_classes, k_nearest=8, include_self=True))

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.criterion(self.backbone(images), labels)[2].mean()


accelerator = Accelerator(mixed_precision=options.mixed_precision, cpu=options.cpu, gradient_accumulation_steps=2)
torch.manual_seed(0)
labels = torch.arange(24).repeat_interleave(8)  # yours: images, and the class of each
images = torch.randn(24, 3, 16, 16)[labels] + 0.5 * torch.randn(len(labels), 3, 16, 16)
model = Model(num_classes=24)
matcher = model.criterion.matcher
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
sampler = GraphSampler(labels, matcher.compute_class_neighbors, batch_size=16, num_instances=4)  # a graph each epoch
loader = DataLoader(TensorDataset(images, labels), batch_sampler=sampler)

for epoch in range(options.epochs):
    for batch, target in loader:
        with accelerator.accumulate(model):
            loss = model(batch.to(accelerator.device), target.to(accelerator.device))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(f"epoch {epoch} loss {loss.item():.4f}", flush=True)
accelerator.end_training()
