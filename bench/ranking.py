"""Seconds of `rank_gallery`, of all pairs and with a prefilter, and the recall that the prefilter costs.

    python -m bench ranking                                   synthetic maps: 3,368 queries, 15,913 gallery maps, C = 64
    python -m bench ranking --features query.safetensors gallery.safetensors --weights nearest.pt     of images.py

All pairs are scored for the first `--queries` only; the seconds are those of these, not scaled up. Recall is that of
their ten best. Made-up maps are smooth, of 750 identities, shifted by up to a location each way, with noise: their
recall shows that the command works, and is no figure of real features.
"""

import argparse
from time import perf_counter, process_time

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from qaconv_triton import QAConv
from qaconv_triton.evaluation import load_features, rank_gallery
from qaconv_triton.functional import topk_cosine
from qaconv_triton.report import load_matcher

TOP = 10
IDENTITIES = 750


def make_maps(count: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Smooth maps `[count, C, H, W]` fp16 of identities, each shifted and with noise of its own."""
    generator, of_identity = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    channels, height, width = shape
    coarse = torch.randn(IDENTITIES, channels, max(height // 4, 1), max(width // 4, 1), generator=of_identity)
    maps = []
    for ids in torch.randint(IDENTITIES, (count,), generator=generator).split(512):
        smooth = interpolate(coarse[ids], (height + 2, width + 2), mode="bilinear")
        rows, columns = torch.randint(3, (2, len(ids)), generator=generator).tolist()
        shifted = [each[:, r : r + height, c : c + width] for each, r, c in zip(smooth, rows, columns, strict=True)]
        maps.append((torch.stack(shifted) + torch.randn(len(ids), *shape, generator=generator)).half())
    return torch.cat(maps)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m bench ranking", description=__doc__.partition("\n")[0])
    parser.add_argument("--case", default="3368x15913x64x24x8", help="queries, gallery, C, H, W of synthetic maps")
    parser.add_argument("--features", nargs=2, metavar="FILE", help="of save_features: queries and gallery")
    parser.add_argument("--weights", help="the matcher of --features")
    parser.add_argument("--queries", type=int, default=16, help="whose whole gallery is scored (16)")
    parser.add_argument("--prefilter", type=int, nargs="+", default=[100], help="(100)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.features:
        query, gallery = (load_features(path).maps for path in options.features)
    else:
        queries, items, *sizes = map(int, options.case.split("x"))
        query, gallery = make_maps(queries, tuple(sizes), 1), make_maps(items, tuple(sizes), 2)
    shape = tuple(gallery.shape[1:])
    matcher = (load_matcher(options.weights, *shape) if options.weights else QAConv(*shape)).to(options.device)
    count, locations = min(options.queries, len(query)), shape[1] * shape[2]
    flops = 2 * locations**2 * shape[0] * len(query) * len(gallery)
    print(f"{len(query):,} queries, {len(gallery):,} gallery maps {list(shape)} {gallery.dtype} on {options.device},")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}. All pairs: {flops:.2e} FLOPs of products.\n")
    columns = f"recall of the {TOP} best | recall if pooled maps select"
    print(f"| scored | queries | pairs | seconds | processor seconds | {columns} |")
    print("|---|---|---|---|---|---|---|")
    rank_gallery(matcher, query[:2], gallery[:4], 1)  # loads what the first call loads
    best = torch.empty(0)
    for prefilter in [None, *options.prefilter]:
        used = query[:count] if prefilter is None else query
        started, processor = perf_counter(), process_time()
        indices = rank_gallery(matcher, used, gallery, TOP, prefilter=prefilter)[1].cpu()
        seconds, processor = perf_counter() - started, process_time() - processor
        if prefilter is None:
            best, name, pooled = indices, "all pairs", "1.000"
        else:
            candidates = topk_cosine(pool(query[:count]), pool(gallery), prefilter)[1]
            name, pooled = f"the nearest {prefilter}", f"{recall(candidates, best):.3f}"
        found, pairs = recall(indices[:count], best), len(used) * (prefilter or len(gallery))
        row = name, f"{len(used):,}", f"{pairs:,}", f"{seconds:.1f}", f"{processor:.1f}", f"{found:.3f}", pooled
        print(f"| {' | '.join(row)} |", flush=True)


def recall(indices: Tensor, best: Tensor) -> float:
    """The share of `best [Q, TOP]` that is in the same row of `indices`."""
    return (best.unsqueeze(2) == indices.unsqueeze(1)).any(2).double().mean().item()


def pool(maps: Tensor) -> Tensor:
    """The mean of each map's normalised locations `[M, C]`, the prefilter that was not taken."""
    return torch.cat([normalize(part.float(), dim=1).mean(dim=(2, 3)) for part in maps.split(1024)])
