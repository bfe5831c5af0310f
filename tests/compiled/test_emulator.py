"""The emulator computes what PTX says, and reports what a GPU would not: small kernels in PTX, by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .launch import EmulationError, Kernel, can_build
from .ptx import UnknownInstruction

INFINITY, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def compiler() -> None:
    if not can_build():
        pytest.skip("needs a g++ that compiles runtime.h")


def kernel(body: str, num_warps: int = 1, shared_bytes: int = 0) -> Kernel:
    """A kernel of two tensors.

    It starts with the thread in %r1, four bytes for which are at %rd1 in the first tensor and at %rd2 in the second.
    """
    text = f"""
.visible .entry test(
    .param .u64 .ptr .global .align 1 test_param_0,
    .param .u64 .ptr .global .align 1 test_param_1
)
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<40>;
    .reg .b64 %rd<20>;
    ld.param.b64 %rd3, [test_param_0];
    ld.param.b64 %rd4, [test_param_1];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd1, %r1, 4, %rd3;
    mad.wide.u32 %rd2, %r1, 4, %rd4;
{body}
    ret;
}}
"""
    return Kernel(text, num_warps, shared_bytes)


def run(body: str, given: Tensor, num_warps: int = 1, shared_bytes: int = 0) -> Tensor:
    out = torch.full_like(given, 7)
    kernel(body, num_warps, shared_bytes)([1], given, out)
    return out


def of_each(*instructions: str) -> str:
    """Apply instructions from %r2 to %r3 to each thread's value in turn, and keep the results one after the other."""
    kept = "st.global.b32 [%rd2], %r3; add.s64 %rd2, %rd2, 128;"
    return "ld.global.b32 %r2, [%rd1];\n" + "\n".join(f"{each} {kept}" for each in instructions)


def results(values: Tensor, *instructions: str) -> Tensor:
    """Results `[instructions, 32]` of `values [n <= 32]`, as bits."""
    given = torch.zeros(32, dtype=values.dtype)
    given[: len(values)] = values
    out = torch.full((len(instructions), 32), 7, dtype=torch.int32)
    kernel(of_each(*instructions))([1], given, out)
    return out[:, : len(values)]


def test_floats_are_converted_as_torch_does() -> None:
    bits = [0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x00000001, 0x80000000, 0x477FF000, 0x33000001]
    values = torch.tensor(bits, dtype=torch.int64).int().view(torch.float32)
    values = torch.cat([values, torch.tensor([INFINITY, -INFINITY, 1 / 3, -1e-7, 65504.0, 65519.9])])
    to_bfloat, to_half, both, tf32 = results(
        values,
        "cvt.rn.bf16.f32 %rs1, %r2; cvt.f32.bf16 %r3, %rs1;",
        "cvt.rn.f16.f32 %rs1, %r2; cvt.f32.f16 %r3, %rs1;",
        "neg.f32 %r4, %r2; cvt.rn.bf16x2.f32 %r3, %r4, %r2;",
        "cvt.rna.tf32.f32 %r3, %r2;",
    ).view(torch.float32)
    assert torch.equal(to_bfloat, values.bfloat16().float())
    assert torch.equal(to_half, values.half().float())
    low, high = both.view(torch.bfloat16).view(-1, 2).T
    assert torch.equal(low, values.bfloat16())
    assert torch.equal(high, -values.bfloat16())
    finite = values.isfinite() & (values.abs() > 1e-30) & (values.abs() < 1e30)
    assert (tf32.view(torch.int32) & 0x1FFF == 0)[finite].all()
    assert ((tf32 - values).abs() <= 2.0**-11 * values.abs())[finite].all()
    assert tf32[1].item() == 1 + 2.0**-8


def test_floats_are_compared_as_ptx_does() -> None:
    values = torch.tensor([1.0, -1.0, 0.0, -0.0, NAN, INFINITY])
    select = "selp.b32 %r3, 1, 0, %p1;"
    names = ("eq", "ne", "lt", "ge", "equ", "neu", "ltu", "geu", "num", "nan")
    found = results(values, *(f"setp.{name}.f32 %p1, %r2, 0f00000000; {select}" for name in names)).bool()
    is_nan = values.isnan()
    ordered = [values == 0, (values != 0) & ~is_nan, values < 0, values >= 0]
    assert torch.equal(found, torch.stack([*ordered, *(each | is_nan for each in ordered), ~is_nan, is_nan]))
    least, most, least_or_nan, absolute = results(
        values,
        "min.f32 %r3, %r2, 0f80000000;", "max.f32 %r3, %r2, 0f80000000;", "min.NaN.f32 %r3, 0f00000000, %r2;",
        "abs.f32 %r3, %r2;",
    )  # fmt: skip
    minus_zero = torch.tensor(-0.0).view(torch.int32)
    assert torch.equal(least[[2, 3, 4]], minus_zero.expand(3))
    assert torch.equal(most[1:5], torch.tensor([-0.0, 0.0, -0.0, -0.0]).view(torch.int32))
    assert least_or_nan[4] == 0x7FFFFFFF
    assert absolute[3] == 0


def test_integers() -> None:
    values = torch.tensor([0, 1, -1, 7, -7, 2**31 - 1, -(2**31), 0x12345678], dtype=torch.int32)
    numbers = values.tolist()
    cases: dict[str, Callable[[int], int]] = {
        "shl.b32 %r3, %r2, 32;": lambda x: 0,
        "shr.s32 %r3, %r2, 40;": lambda x: -(x < 0),
        "shr.u32 %r3, %r2, 28;": lambda x: x % 2**32 >> 28,
        "div.s32 %r3, %r2, 2;": lambda x: int(x / 2),
        "rem.s32 %r3, %r2, 4;": lambda x: abs(x) % 4 * (-1 if x < 0 else 1),
        "bfe.u32 %r3, %r2, 4, 8;": lambda x: x % 2**32 >> 4 & 255,
        "bfe.s32 %r3, %r2, 28, 4;": lambda x: x >> 28,
        "popc.b32 %r3, %r2;": lambda x: (x % 2**32).bit_count(),
        "clz.b32 %r3, %r2;": lambda x: 32 - (x % 2**32).bit_length(),
        "mul.hi.s32 %r3, %r2, %r2;": lambda x: x * x >> 32,
        "mad.wide.s32 %rd5, %r2, -3, 5; shr.s64 %rd5, %rd5, 1; cvt.u32.u64 %r3, %rd5;": lambda x: 5 - 3 * x >> 1,
        "mul.wide.u32 %rd5, %r2, 3; mov.b64 {_, %r3}, %rd5;": lambda x: x % 2**32 * 3 >> 32,
        "prmt.b32 %r3, %r2, 0, 0x0123;": lambda x: int.from_bytes((x % 2**32).to_bytes(4, "little"), "big"),
        "cvt.s8.s32 %rs1, %r2; cvt.s32.s16 %r3, %rs1;": lambda x: (x + 128) % 256 - 128,
        "mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};": lambda x: x << 16 | x % 2**32 >> 16,
        "cvt.rn.f32.s32 %r3, %r2; cvt.rzi.s32.f32 %r3, %r3;": lambda x: min(int(torch.tensor(x).float()), 2**31 - 1),
    }
    found = results(values, *cases)
    for instructions, function, row in zip(cases, cases.values(), found, strict=True):
        wanted = [(function(x) + 2**31) % 2**32 - 2**31 for x in numbers]
        assert row.tolist() == wanted, instructions


def test_lanes_exchange_values() -> None:
    values = torch.arange(32, dtype=torch.int32)
    found = results(
        values,
        "shfl.sync.bfly.b32 %r3, %r2, 5, 31, -1;", "shfl.sync.up.b32 %r3, %r2, 4, 0, -1;",
        "shfl.sync.down.b32 %r3, %r2, 3, 0x181f, -1;", "shfl.sync.idx.b32 %r3, %r2, 9, 31, -1;",
        "redux.sync.add.s32 %r3, %r2, -1;",
    )  # fmt: skip
    down = torch.where(values % 8 < 5, values + 3, values)
    up = torch.where(values < 4, values, values - 4)
    assert torch.equal(found, torch.stack([values ^ 5, up, down, values * 0 + 9, values * 0 + 496]))


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_products_are_those_of_torch(kind: str) -> None:
    """With operands laid out as the PTX ISA says: of mma.m16n8k16 and .m16n8k8."""
    length = 8 if kind == "tf32" else 16
    left, right, sums = torch.randn(16, length), torch.randn(length, 8), torch.randn(16, 8)
    group, inside = torch.arange(32) // 4, torch.arange(32) % 4
    row, other_row = group, group + 8
    if kind == "tf32":
        left, right = ((each.view(torch.int32) & -0x2000).view(torch.float32) for each in (left, right))
        parts = [left[row, inside], left[other_row, inside], left[row, inside + 4], left[other_row, inside + 4]]
        parts += [right[inside, group], right[inside + 4, group]]
        registers = [part.view(torch.int32) + 0x1FFF for part in parts]  # bits that do not count
    else:
        dtype = torch.float16 if kind == "f16" else torch.bfloat16
        left, right = left.to(dtype), right.to(dtype)
        pair = 2 * inside[:, None] + torch.arange(2)
        parts = [left[row[:, None], pair], left[other_row[:, None], pair]]
        parts += [left[row[:, None], pair + 8], left[other_row[:, None], pair + 8]]
        parts += [right[pair, group[:, None]], right[pair + 8, group[:, None]]]
        registers = [part.contiguous().view(torch.int32).flatten() for part in parts]
    places = [(row, 2 * inside), (row, 2 * inside + 1), (other_row, 2 * inside), (other_row, 2 * inside + 1)]
    registers += [sums[place].view(torch.int32) for place in places]
    loads = "".join(f"ld.global.b32 %r{10 + i}, [%rd1+{128 * i}];\n" for i in range(10))
    d, a, b, c = "%r20, %r21, %r22, %r23", "%r10, %r11, %r12, %r13", "%r14, %r15", "%r16, %r17, %r18, %r19"
    product = f"mma.sync.aligned.m16n8k{length}.row.col.f32.{kind}.{kind}.f32 {{{d}}}, {{{a}}}, {{{b}}}, {{{c}}};\n"
    stores = "".join(f"st.global.b32 [%rd2+{128 * i}], %r{20 + i};\n" for i in range(4))
    found = run(loads + product + stores, torch.stack(registers)).view(torch.float32)
    expected = left.double() @ right.double() + sums
    got = torch.empty(16, 8)
    for place, values in zip(places, found, strict=False):
        got[place] = values
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_matrices_are_loaded_from_shared_memory(transposed: str) -> None:
    body = f"""
    ld.global.b32 %r2, [%rd1];
    shl.b32 %r3, %r1, 2;
    st.shared.b32 [%r3], %r2;
    bar.sync 0;
    and.b32 %r4, %r1, 7;
    shl.b32 %r4, %r4, 4;
    ldmatrix.sync.aligned.m8n8.x1{transposed}.shared.b16 {{%r5}}, [%r4];
    st.global.b32 [%rd2], %r5;
    """
    values = torch.arange(64, dtype=torch.int16)
    found = run(body, values.view(torch.int32), shared_bytes=128).view(torch.int16).view(8, 8)
    assert torch.equal(found, values.view(8, 8).T if transposed else values.view(8, 8))


def test_lanes_that_branch_apart_meet_again() -> None:
    """Each loops as often as its number says, in inline assembly whose names are used twice; then all add up."""
    loop = """
    {
        .reg .pred %more;
        .reg .b32 %left;
        mov.b32 %left, %r1;
$AGAIN:
        setp.eq.s32 %more, %left, 0;
        @%more bra $DONE;
        add.s32 %r3, %r3, 1;
        sub.s32 %left, %left, 1;
        bra $AGAIN;
$DONE:
    }
    """
    body = f"mov.b32 %r3, 0;\n{loop}{loop}redux.sync.add.s32 %r4, %r3, -1;\nst.global.b32 [%rd2], %r4;"
    assert run(body, torch.zeros(32, dtype=torch.int32)).eq(2 * 496).all()
    # the same across instructions of the warp, which end the code that a lane runs by itself
    body = """
    mov.b32 %r3, 0;
$TOP:
    bar.warp.sync -1;
    add.s32 %r3, %r3, 1;
    setp.lt.s32 %p1, %r3, 5;
    @%p1 bra $TOP;
    setp.lt.s32 %p2, %r1, 16;
    @%p2 bra $LOW;
    atom.global.gpu.acq_rel.add.u32 %r4, [%rd4], %r3;
    bra.uni $END;
$LOW:
    atom.global.gpu.relaxed.max.s32 %r4, [%rd4+4], %r1;
$END:
    """
    given = torch.zeros(32, dtype=torch.int32)
    assert run(body, given)[:3].tolist() == [7 + 16 * 5, 15, 7]


# --- what it reports


def test_accesses_outside_of_tensors_are_reported() -> None:
    given = torch.zeros(40, dtype=torch.int32)
    body = "ld.global.b32 %r2, [%rd1+%d];\nst.global.b32 [%rd2], %r2;"
    assert run(body.replace("%d", "32"), given)[:32].eq(0).all()
    with pytest.raises(
        EmulationError, match=r"thread 31 of program .* accesses 4 bytes outside .* byte 160 of one of 160\n.*ld.global"
    ):
        run(body.replace("%d", "36"), given)
    with pytest.raises(EmulationError, match="is not aligned"):
        run("ld.global.v2.b32 {%r2, %r3}, [%rd1+8];", given)
    with pytest.raises(EmulationError, match="accesses shared memory at byte 128 of 128"):
        run("mov.b32 %r3, 64;\nld.shared.b32 %r2, [%r3+64];", given, 1, 128)


EXCHANGE = """
    shl.b32 %r3, %r1, 2;
    ld.global.b32 %r2, [%rd1];
    st.shared.b32 [%r3], %r2;
    bar.sync 0;
    xor.b32 %r4, %r3, 128;
    ld.shared.b32 %r5, [%r4];
    bar.sync 0;
    st.shared.b32 [%r3], 5;
    st.global.b32 [%rd2], %r5;
"""


def test_a_missing_barrier_is_reported() -> None:
    given = torch.arange(64, dtype=torch.int32)
    assert torch.equal(run(EXCHANGE, given, 2, 256), given ^ 32)
    start, middle, end = EXCHANGE.split("bar.sync 0;")
    with pytest.raises(EmulationError, match=r"thread 32 .* writes shared memory at byte 128, which another warp"):
        run(f"{start}{middle}bar.sync 0;{end}", given, 2, 256)
    with pytest.raises(EmulationError, match=r"thread 32 .* reads shared memory at byte 0, which another warp"):
        run(f"{start}bar.sync 0;{middle}{end}", given, 2, 256)


def test_a_copy_that_is_not_waited_for_is_reported() -> None:
    body = """
    shl.b32 %r3, %r1, 2;
    cp.async.ca.shared.global [ %r3 + 0 ], [ %rd1 + 0 ], 0x4;
    cp.async.commit_group;
    mov.b32 %r5, 0;
    cp.async.ca.shared.global [ %r3 + 128 ], [ %rd1 + 0 ], 0x4, %r5;
    cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.b32 %r4, [%r3];
    st.global.b32 [%rd2], %r4;
    """
    given = torch.arange(32, dtype=torch.int32)
    assert torch.equal(run(body, given, 1, 256), given)
    with pytest.raises(EmulationError, match="where a copy is not waited for"):
        run(body.replace("wait_group 1", "wait_group 2"), given, 1, 256)
    with pytest.raises(EmulationError, match="where a copy is not waited for"):
        run(body.replace("[%r3];", "[%r3+128];"), given, 1, 256)
    zeros = run(body.replace("[%r3];", "[%r3+128];").replace("wait_group 1", "wait_group 0"), given, 1, 256)
    assert zeros.eq(0).all()


@pytest.mark.parametrize("instruction", ["shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;", "bar.sync 0;"])
def test_threads_that_wait_in_vain_are_reported(instruction: str) -> None:
    body = f"setp.lt.s32 %p1, %r1, 16;\n@%p1 bra $END;\n{instruction}\nbra.uni $END2;\n$END:\nbar.warp.sync -1;\n$END2:"
    with pytest.raises(EmulationError, match=r"thread 16 of .* waits for other threads"):
        run(body, torch.zeros(32))


@pytest.mark.parametrize(
    "instruction",
    ["sin.approx.f32 %r2, %r3;", "add.f64 %rd5, %rd5, %rd5;", "ld.global.L2::other.b32 %r2, [%rd1];", "bar.sync 1;"],
)
def test_an_unknown_instruction_is_quoted(instruction: str) -> None:
    with pytest.raises(UnknownInstruction, match="line 16: " + instruction.replace("[", r"\[")):
        kernel(instruction)
