#!/usr/bin/env python3
"""A training step of the same shape in plain PyTorch, as a yardstick for `train_step.py`.

pip install torch pyyaml && python benchmarks/torch_step.py --config mnist --batch_size 16
python benchmarks/torch_step.py --config cifar10 --precision mixed_bfloat16 --channels_last --compile

It runs on the GPU if there is one. With `--channels_last`, `--precision`, `--compile` and
`--cuda_graphs` it is the best that a user of PyTorch gets without rewriting the model.

Written from this project's description of the model, to cost what a straightforward PyTorch NVAE costs:
`res_mbconv` cells, weight normalisation in every call, KL balancing, the spectral term over stacked
kernels, PyTorch's own Adamax. It is a benchmark, not an implementation: it has no flows and no fine
points, and nothing is checked against the reference numbers. Prints one JSON line last.
"""

import argparse
import collections
import contextlib
import json
import math
import resource
import statistics
import sys
import time

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from torch import nn
from torch.utils.checkpoint import checkpoint

from nvae_tf import config as configuration

IMAGES = {
    "mnist": (1, 32), "digits": (1, 32), "photos": (3, 32), "cifar10": (3, 32), "imagenet_32": (3, 32),
    "celeba_64": (3, 64), "celeba_256": (3, 256), "ffhq": (3, 256),
}  # fmt: skip
HALF = {"mixed_bfloat16": torch.bfloat16, "mixed_float16": torch.float16}
WARM_UP_STEPS = 3  # before a CUDA graph is captured


class Conv(nn.Conv2d):
    """A convolution whose kernel is normalised in every call."""

    def __init__(self, inputs, outputs, size=1, stride=1, bias=True, **kwargs):
        super().__init__(inputs, outputs, size, stride, size // 2, bias=bias, **kwargs)
        self.log_norm = nn.Parameter(self.weight.detach().flatten(1).norm(dim=1).log())

    def effective(self):
        norm = self.weight.flatten(1).norm(dim=1) + 1e-5
        return self.weight * (self.log_norm.exp() / norm)[:, None, None, None]

    def forward(self, x):
        return F.conv2d(x, self.effective(), self.bias, self.stride, self.padding)


class Plain(nn.Conv2d):
    """A convolution of an inverted residual."""

    def __init__(self, inputs, outputs, size=1, groups=1):
        super().__init__(inputs, outputs, size, 1, size // 2, groups=groups, bias=False)

    def effective(self):
        return self.weight


def norm(channels):
    return nn.BatchNorm2d(channels, momentum=0.05)


class Squeeze(nn.Module):
    def __init__(self, channels):
        super().__init__()
        hidden = max(channels // 16, 4)
        self.gate = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x):
        return x * self.gate(x.mean([2, 3]))[:, :, None, None]


class SkipDown(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.parts = nn.ModuleList(Conv(inputs, outputs // 4, 1, 2) for _ in range(4))

    def forward(self, x):
        x = F.silu(x)
        views = x, x[:, :, 1:, 1:], x[:, :, :, 1:], x[:, :, 1:, :]
        return torch.cat([p(v) for p, v in zip(self.parts, views, strict=True)], 1)


class SkipUp(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = Conv(inputs, outputs, bias=False)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))


class Residual(nn.Module):
    """Skip and branch: two BN + swish + 3x3, or an inverted residual."""

    def __init__(self, inputs, outputs, expansion=0, stride=1, up=False):
        super().__init__()
        if expansion:
            hidden = inputs * expansion
            layers = [nn.UpsamplingNearest2d(scale_factor=2)] if up else []
            layers += [norm(inputs), Plain(inputs, hidden), norm(hidden), nn.SiLU()]
            layers += [Plain(hidden, hidden, 5, hidden), norm(hidden), nn.SiLU()]
            layers += [Plain(hidden, outputs), norm(outputs)]
        else:
            layers = [norm(inputs), nn.SiLU(), Conv(inputs, outputs, 3, stride)]
            layers += [norm(outputs), nn.SiLU(), Conv(outputs, outputs, 3)]
        self.branch = nn.Sequential(*layers, Squeeze(outputs))
        self.rematerialized = False
        self.skip = nn.Identity()
        if stride == 2:
            self.skip = SkipDown(inputs, outputs)
        if up:
            self.skip = SkipUp(inputs, outputs)

    def forward(self, x):
        if self.rematerialized:
            return checkpoint(self.run, x, use_reentrant=False)
        return self.run(x)

    def run(self, x):
        return self.skip(x) + 0.1 * self.branch(x)


class Group(nn.Module):
    """One latent group: cells, prior, posterior, combiner."""

    def __init__(self, config, enc, dec, first):
        super().__init__()
        latents, cells = config.num_latent_per_group, config.num_cell_per_cond_dec
        self.first = first
        self.cells = nn.Sequential(
            *([] if first else [Residual(dec, dec, 6) for _ in range(cells)])
        )
        if not first:
            self.prior = nn.Sequential(nn.ELU(), Conv(dec, 2 * latents))
            self.combine = Conv(dec, enc)
        self.posterior = Conv(enc, 2 * latents, 3)
        self.join = Conv(dec + latents, dec)

    def forward(self, s, encoded):
        s = self.cells(s)
        q = self.posterior(encoded if self.first else encoded + self.combine(s))
        p = torch.zeros_like(q) if self.first else self.prior(s)
        mean_p, log_p = (5.0 * torch.tanh(part / 5.0) for part in p.chunk(2, 1))
        mean_q, log_q = (5.0 * torch.tanh(part / 5.0) for part in (p + q).chunk(2, 1))
        sigma_p, sigma_q = log_p.exp() + 1e-2, log_q.exp() + 1e-2
        z = mean_q + sigma_q * torch.randn_like(mean_q)
        term = (mean_q - mean_p) / sigma_p
        ratio = sigma_q / sigma_p
        kl = 0.5 * (term * term + ratio * ratio) - 0.5 - torch.log(ratio)
        return self.join(torch.cat([s, z], 1)), kl.sum([1, 2, 3])


class NVAE(nn.Module):
    """The hierarchy of a recipe."""

    def __init__(self, config, channels, size):
        super().__init__()
        enc, dec, width = config.num_channels_enc, config.num_channels_dec, 1
        self.stem = Conv(channels, enc, 3)
        layers = []
        for _ in range(config.num_preprocess_blocks):
            layers += [
                Residual(enc * width, enc * width) for _ in range(config.num_preprocess_cells - 1)
            ]
            layers.append(Residual(enc * width, 2 * enc * width, stride=2))
            width *= 2
        self.preprocess = nn.Sequential(*layers)
        self.tower, self.decoder = nn.ModuleList(), nn.ModuleList()
        for scale, groups in enumerate(config.groups_per_scale):
            for group in range(groups):
                cells = []
                if scale > 0 and group == 0:
                    cells.append(Residual(enc * width, 2 * enc * width, stride=2))
                    width *= 2
                cells += [
                    Residual(enc * width, enc * width) for _ in range(config.num_cell_per_cond_enc)
                ]
                self.tower.append(nn.Sequential(*cells))
        self.encoder_top = Conv(enc * width, enc * width)
        self.top = nn.Parameter(torch.rand(1, dec * width, size // width, size // width))
        for scale, groups in enumerate(reversed(config.groups_per_scale)):
            if scale > 0:
                self.decoder.append(Residual(dec * width, dec * width // 2, 6, up=True))
                width //= 2
            for group in range(groups):
                self.decoder.append(
                    Group(config, enc * width, dec * width, scale == 0 and group == 0)
                )
        layers = []
        for _ in range(config.num_postprocess_blocks):
            layers.append(Residual(dec * width, dec * width // 2, 3, up=True))
            width //= 2
            layers += [
                Residual(dec * width, dec * width, 3)
                for _ in range(config.num_postprocess_cells - 1)
            ]
        outputs = channels if channels == 1 else 10 * config.num_mixture_dec
        self.postprocess = nn.Sequential(*layers, nn.ELU(), Conv(dec, outputs, 3))

    def forward(self, x):
        h, maps, kls = self.preprocess(self.stem(2.0 * x - 1.0)), [], []
        for cells in self.tower:
            h = cells(h)
            maps.append(h)
        maps[-1] = F.elu(self.encoder_top(F.elu(h)))
        s = self.top.expand(len(x), -1, -1, -1)
        for layer in self.decoder:
            if isinstance(layer, Group):
                s, kl = layer(s, maps.pop())
                kls.append(kl)
            else:
                s = layer(s)
        return self.postprocess(s), torch.stack(kls, 1)


def mixture_loss(parameters, x, mixtures, levels=255.0):
    """Discretised logistic mixture, as for colour images; nats of each image."""
    batch, _, height, width = x.shape
    x = (2.0 * x - 1.0)[:, :, None]
    logits, logistics = parameters[:, :mixtures], parameters[:, mixtures:]
    means, log_scales, mix = logistics.view(batch, 3, 3 * mixtures, height, width).chunk(3, 2)
    log_scales, mix = log_scales.clamp(min=-7.0), torch.tanh(mix)
    red = means[:, 0]
    green = means[:, 1] + mix[:, 0] * x[:, 0]
    blue = means[:, 2] + mix[:, 1] * x[:, 0] + mix[:, 2] * x[:, 1]
    centred = x - torch.stack([red, green, blue], 1)
    scale = torch.exp(-log_scales)
    plus, minus = scale * (centred + 1.0 / levels), scale * (centred - 1.0 / levels)
    mass = torch.sigmoid(plus) - torch.sigmoid(minus)
    middle = scale * centred
    density = middle - log_scales - 2.0 * F.softplus(middle) - math.log(levels / 2.0)
    inner = torch.where(mass > 1e-5, torch.log(mass.clamp(min=1e-10)), density)
    outer = torch.where(x > 0.99, -F.softplus(minus), inner)
    log_prob = torch.where(x < -0.999, plus - F.softplus(plus), outer)
    return -torch.logsumexp(log_prob.sum(1) + F.log_softmax(logits, 1), 1).sum([1, 2])


class Spectral:
    """Power iterations, kernels of one shape together."""

    def __init__(self, model, device):
        layers = [m for m in model.modules() if isinstance(m, (Conv, Plain))]
        self.groups = collections.defaultdict(list)
        for layer in layers:
            self.groups[tuple(layer.weight.shape)].append(layer)
        self.vectors = {}
        for shape, group in self.groups.items():
            outputs, rest = shape[0], math.prod(shape[1:])
            self.vectors[shape] = [
                F.normalize(torch.randn(len(group), size, device=device), dim=1)
                for size in (outputs, rest)
            ]

    def __call__(self):
        total = 0.0
        for shape, group in self.groups.items():
            weights = torch.stack([layer.effective().flatten(1) for layer in group])
            with torch.no_grad():
                u, v = self.vectors[shape]
                for _ in range(4):
                    v = F.normalize(torch.matmul(u[:, None], weights)[:, 0], dim=1, eps=1e-3)
                    u = F.normalize(torch.matmul(weights, v[:, :, None])[:, :, 0], dim=1, eps=1e-3)
                for vectors, value in zip(self.vectors[shape], (u, v), strict=True):
                    vectors.copy_(value)  # in place, which CUDA graphs need
            total = total + torch.sum(u * torch.matmul(weights, v[:, :, None])[:, :, 0])
        return total


class Training:
    """One training step, as fast as the chosen options make it.

    Args:
        config: The recipe.
        arguments: The command's flags.
    """

    def __init__(self, config, arguments):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if config.data.dataset not in IMAGES or config.data.channels:
            raise SystemExit(f"error: --config: expected a recipe of {', '.join(IMAGES)}")
        self.channels, size = IMAGES[config.data.dataset]
        self.config, self.batch = config, arguments.batch_size or config.data.batch_size
        layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
        self.model = NVAE(config.model, self.channels, size).to(self.device, memory_format=layout)
        for module in self.model.modules():
            if isinstance(module, Residual):
                module.rematerialized = arguments.gradient_checkpointing == "cells"
        self.half = HALF.get(arguments.precision)
        capturable = arguments.cuda_graphs and not arguments.compile
        self.optimizer = torch.optim.Adamax(
            self.model.parameters(), 1e-3, eps=1e-3, weight_decay=3e-4, capturable=capturable
        )
        self.scaler = None
        if arguments.precision == "mixed_float16":
            self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**10)
        self.spectral = Spectral(self.model, self.device)
        self.norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        images = torch.rand(self.batch, self.channels, size, size, device=self.device)
        images = images.round() if self.channels == 1 else images
        self.images = images.to(memory_format=layout)
        self.forward = self.loss
        if arguments.compile:
            mode = "reduce-overhead" if arguments.cuda_graphs else None
            self.forward = torch.compile(self.loss, mode=mode)

    def loss(self, images):
        half = (
            torch.autocast(self.device.type, self.half) if self.half else contextlib.nullcontext()
        )
        with half:
            parameters, kl = self.model(images)
        parameters, kl = parameters.float(), kl.float()
        if self.channels == 1:
            recon = F.binary_cross_entropy_with_logits(parameters, images, reduction="none")
            recon = recon.sum([1, 2, 3])
        else:
            recon = mixture_loss(parameters, images, self.config.model.num_mixture_dec)
        weights = (kl.detach().abs().mean(0) + 0.01) * kl.detach().mean(0).sum()
        loss = (recon + 0.5 * (kl * weights / weights.mean()).sum(1)).mean()
        penalty = sum(torch.max(torch.abs(layer.weight)) for layer in self.norms)
        return loss + 1e-2 * (self.spectral() + penalty)

    def step(self):
        self.optimizer.zero_grad()
        loss = self.forward(self.images)
        if self.scaler:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            loss.backward()
            self.optimizer.step()
        return loss.detach()

    def captured(self):
        """The step as a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.step()

        def replay():
            graph.replay()
            return loss.detach()

        return replay

    def peak_memory_gib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--channels_last", action="store_true", help="PyTorch's NHWC layout")
    parser.add_argument(
        "--precision", choices=("float32", *HALF), default="float32", help="half: with autocast"
    )
    parser.add_argument("--gradient_checkpointing", choices=("none", "cells"), default="none")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument(
        "--cuda_graphs", action="store_true", help="the step as a CUDA graph; needs a GPU"
    )
    arguments = parser.parse_args()
    if arguments.cuda_graphs and not torch.cuda.is_available():
        parser.error("--cuda_graphs needs a GPU")
    if arguments.cuda_graphs and not arguments.compile and arguments.precision == "mixed_float16":
        parser.error(
            "--cuda_graphs with mixed_float16 needs --compile: the loss scale is the host's"
        )
    return arguments


def measure(arguments) -> dict:
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32, which TensorFlow and JAX use, too
    torch.backends.cudnn.allow_tf32 = True
    begin = time.perf_counter()
    training = Training(configuration.load(arguments.config), arguments)
    graph = arguments.cuda_graphs and not arguments.compile
    step = training.captured() if graph else training.step

    def timed():
        start = time.perf_counter()
        loss = float(step())  # waits for the device
        return time.perf_counter() - start, loss

    first, *others = (timed() for _ in range(arguments.steps + 1))
    seconds, gpu = statistics.median(one for one, _ in others), training.device.type == "cuda"
    return {
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "first_step_seconds": round(time.perf_counter() - begin - sum(s for s, _ in others), 2),
        "step_seconds": round(seconds, 5),
        "images_per_second": round(training.batch / seconds, 4),
        "peak_memory_gib": round(training.peak_memory_gib(), 3),
        "loss": first[1],
        "batch_size": training.batch,
        "precision": arguments.precision,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "channels_last": arguments.channels_last,
        "compile": arguments.compile,
        "cuda_graphs": arguments.cuda_graphs,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "torch": torch.__version__,
    }


def main() -> int:
    """Prints one line of JSON last."""
    try:
        result = measure(parse())
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
