"""An estimate of what a kernel takes, from its machine code: a change shows before it is timed.

Of the search that is a tile of similarities, `[BM, BN]`, of the other kernels a pair of maps with all channels. A
multiprocessor takes at least as long as its tensor cores need for the product, and as its four schedulers need to issue
the instructions, one a cycle each. Both arms of a branch count, but what an append branches past; stalls do not count:
it is no measurement.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .assembly import TENSOR_CORE, disassembled
from .launches import Recorder

KERNELS = ("_forward_kernel", "_probe_gradient_kernel", "_gallery_gradient_kernel", "_append_kernel")
SCHEDULERS = 4  # of a multiprocessor
RARE_ARM = 64  # instructions of an arm that is taken rarely, at most
# Products of half precision that a multiprocessor's tensor cores add in a cycle, dense: whitepapers of A100, H100, B200
PRODUCTS_A_CYCLE = {"sm_80": 1024, "sm_90": 2048, "sm_100": 4096}


@dataclass(frozen=True)
class Estimate:
    """Of one tile, or one pair of maps."""

    tensor_cycles: int
    issue_cycles: int
    instructions: int  # of a warp
    barriers: int
    bytes: int  # of maps or embeddings that are read; what stays on the chip is not


def estimate(recorder: Recorder, cubin: bytes, arch: str) -> Estimate:
    """Estimate a recorded launch that was compiled for `arch`, one of `PRODUCTS_A_CYCLE`."""
    sizes: dict[str, Any] = {**(recorder.arguments or {}), **recorder.constants}
    name, warps = recorder.kernel.__name__, recorder.options["num_warps"]
    share = 1.0  # of an accumulator in a tile or pair
    if name == "_append_kernel":
        tile, length, step = (sizes["BM"], sizes["BN"]), sizes["D"], sizes["BD"]
        operand, read = sizes["p_rows"], (sizes["BM"] + sizes["BN"]) * length
    elif name == "_forward_kernel":
        pairs = sizes.get("BK", 1)
        tile, length, step = (pairs * sizes["BR"], sizes["BS"]), sizes["C"], sizes["BC"]
        operand, read, share = sizes["p_gallery"], (pairs * sizes["BR"] + sizes["BS"]) * length, 1 / pairs
    else:
        operand = sizes.get("p_probe", sizes["p_gallery"])
        of_gallery = name == "_gallery_gradient_kernel"
        tile = (sizes["BR" if of_gallery else "BS"], sizes["BC"])
        length = step = sizes["BS" if of_gallery else "BR"]
        read, share = length * sizes["BC"], -(-sizes["C"] // sizes["BC"])
    operand = getattr(operand, "base", operand)  # of a descriptor
    turns = -(-length // step)
    products = tile[0] * tile[1] * length
    if operand.element_size() == 4:  # tf32 at half the rate, three products where one loses digits
        products *= 6 if sizes["PRECISION"] == "tf32x3" else 2
    whole, *loops = loop_counts(disassembled(cubin))
    if name == "_append_kernel":
        counts = _add(whole, loops[-1], turns - 1)
    elif turns > 1 and len(loops) > 1:
        counts = _add(loops[-2], loops[-1], turns - 1)
    else:
        counts = loops[-1]
    return Estimate(
        tensor_cycles=round(share * products / PRODUCTS_A_CYCLE[arch]),
        issue_cycles=round(share * counts[0] * warps / SCHEDULERS),
        instructions=round(share * counts[0]),
        barriers=round(share * counts[1]),
        bytes=round(share * read * operand.element_size()),
    )


def _add(first: tuple[float, float], second: tuple[float, float], times: float) -> tuple[float, float]:
    return first[0] + times * second[0], first[1] + times * second[1]


def loop_counts(sass: str) -> list[tuple[float, float]]:
    """Instructions and barriers of a kernel, then of each loop around its products, outermost first."""
    names, labels, jumps = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)(.*)", line):
            if target := re.search(r"\((\.L_x_\d+)\)", found[2]):
                jumps.append((len(names), target[1]))
            names.append(found[1])
    branches = [(number, labels[target]) for number, target in jumps if names[number] == "BRA" and target in labels]
    rare = set()  # atomics and stores that threads branch past
    for number, end in branches:
        arm = range(number + 1, end)
        if len(arm) <= RARE_ARM and {"ATOMG", "STG"} & {names[each] for each in arm}:
            rare.update(arm)
    loops = {(first, number + 1) for number, first in branches if first <= number}
    around = [(first, end) for first, end in loops if any(name in TENSOR_CORE for name in names[first:end])]
    spans = [(0, len(names)), *sorted(around, key=lambda span: span[0] - span[1])]
    return [
        (sum(number not in rare for number in range(first, end)), names[first:end].count("BAR")) for first, end in spans
    ]
