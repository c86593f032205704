"""A ResNet-18 of torchvision's trained on labels, the supervised row of EQUIVARIANCE.md.

    python study/supervised.py --dataset cifar10 --output resnet18.pt
    python equivariance.py torchvision:resnet18 resnet18.pt --dataset cifar10 --image-size 32 \\
        --mean .491 .482 .447 --std .202 .199 .201

SGD with one cycle of the learning rate, on random crops and flips.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.models import resnet18

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Parser, choose_device, image_statistics, keep_freed_memory, load_images, positive_int, run_command
from minter_warp import normalization, sample_crops, warp_batch

BATCH = 256


def parse_args():
    parser = Parser(description="A ResNet-18 of torchvision's, trained on labels.",
                    epilog="example:\n  python study/supervised.py --dataset cifar10 --output resnet18.pt")
    parser.add_argument("--dataset", default="cifar10", help="digits, cifar10, stl10, or a folder with classes")
    parser.add_argument("--data-dir", default="data", help="for what is downloaded, and for decoded folders")
    parser.add_argument("--image-size", type=positive_int, default=32)
    parser.add_argument("--limit", type=positive_int, help="train on the first so many images")
    parser.add_argument("--epochs", type=positive_int, default=4)
    parser.add_argument("--output", default="resnet18.pt", help="a state dict")
    return parser.parse_args()


def main():
    args, device = parse_args(), choose_device("auto")
    keep_freed_memory()
    train = load_images(args.dataset, "train", args.data_dir, args.image_size, args.limit)
    test = load_images(args.dataset, "test", args.data_dir, args.image_size)
    normal = normalization(*image_statistics(args.dataset, train.images), device)
    images, labels = train.images.to(device), train.labels.to(device)
    torch.manual_seed(0)
    generator = torch.Generator(device).manual_seed(0)
    model = resnet18(num_classes=len(train.classes)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, args.epochs * steps)
    for epoch in range(args.epochs):
        for index in torch.randperm(len(images), generator=generator, device=device)[: steps * BATCH].split(BATCH):
            batch = warp_batch(images, index, sample_crops(BATCH, args.image_size, generator), None, *normal)
            loss = F.cross_entropy(model(batch), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{args.epochs}  loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        predicted = [model(warp_batch(test.images.to(device), index, None, None, *normal)).argmax(1).cpu()
                     for index in torch.arange(len(test.images), device=device).split(500)]
    print(f"error on test images: {(torch.cat(predicted) != test.labels).float().mean():.3f}")
    torch.save(model.state_dict(), args.output)


if __name__ == "__main__":
    run_command(main)
