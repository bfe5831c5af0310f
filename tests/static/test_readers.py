"""Readers of kernels: what their loops carry, which memory needs a barrier, which loops are around products."""

from __future__ import annotations

import textwrap

import pytest

pytest.importorskip("triton")

from . import barriers, estimate, loop_carries

ALIAS = """
def kernel(p_index, p_out, count, FLAG: tl.constexpr):
    i_next = tl.load(p_index)
    i_now = i_next
    total = 0
    for i in range(0, count):
        total += i_now
        scratch = total * 2
        tl.store(p_out + i, scratch)
        if FLAG:
            unused = i
        i_now = i_next
        i_next = tl.load(p_index + i)
    for i in tl.static_range(2):
        total += i
    while total > 0:
        total -= i_now
    tl.store(p_out, total)
"""
# The loop of this kernel as Triton 3.7 lowers it: `i_now`, an alias at the loop's entry, is not carried.
TTIR = """
module {
  tt.func public @kernel(%p_index: !tt.ptr<i64>, %p_out: !tt.ptr<i64>, %count: i32) attributes {noinline = false} {
    %i_next = tt.load %p_index : !tt.ptr<i64>
    %2:2 = scf.for %i = %c0 to %count step %c1 iter_args(%i_next_1 = %i_next, %total = %c0_i64) -> (i64, i64)  : i32 {
      scf.yield %i_next_9, %total_8 : i64, i64
    }
    %3 = scf.while (%total_2 = %2#1) : (i64) -> i64 {
      scf.condition(%4) %total_2 : i64
    } do {
    ^bb0(%total_3: i64):
      scf.yield %5 : i64
    }
    tt.return
  }
  tt.func private @helper() {
    scf.for %j = %c0 to %c1 step %c1 iter_args(%other = %c0) -> (i32)  : i32 {
    }
  }
}
"""


def test_an_alias_at_loop_entry_is_found() -> None:
    found = loop_carries.carried_in_source(textwrap.dedent(ALIAS), {"FLAG": True})
    source = [found[line] for line in sorted(found)]
    assert source == [{"i_next", "i_now", "total"}, {"total"}]
    ttir = loop_carries.carried_in_ttir(TTIR)
    assert ttir == [{"i_next", "total"}, {"total"}]
    assert [wanted - got for wanted, got in zip(source, ttir, strict=True)] == [{"i_now"}, set()]


def test_constants_decide_which_branches_count() -> None:
    code = """
    def kernel(p_out, count, WIDE: tl.constexpr):
        last = 0
        for i in range(0, count):
            if WIDE:
                tl.store(p_out, last)
            last = i
    """
    (wide,) = loop_carries.carried_in_source(textwrap.dedent(code), {"WIDE": True}).values()
    (narrow,) = loop_carries.carried_in_source(textwrap.dedent(code), {"WIDE": False}).values()
    (unknown,) = loop_carries.carried_in_source(textwrap.dedent(code), {}).values()
    assert (wide, narrow, unknown) == ({"last"}, set(), {"last"})


def ptx(*body: str) -> str:
    """A kernel with two pointers, `%rd1` and `%rd2` offset by what the second holds, and an integer."""
    head = [
        ".visible .entry kernel(",
        "	.param .u64 .ptr .global .align 1 kernel_param_0,",
        "	.param .u64 .ptr .global .align 1 kernel_param_1,",
        "	.param .u32 kernel_param_2",
        ")",
        "{",
        "	ld.param.b64 	%rd1, [kernel_param_0];",
        "	ld.param.b64 	%rd2, [kernel_param_1];",
        "	ld.param.b32 	%r1, [kernel_param_2];",
        "	mul.wide.s32 	%rd3, %r1, 4;",
        "	add.s64 	%rd4, %rd1, %rd3;",
    ]
    return "\n".join([*head, *(f"	{line}" for line in body), "	ret;", "}"])


LOAD, STORE, OTHER, COPY = (
    "@%p1 ld.global.b32 { %r2 }, [ %rd4 + 0 ];",
    "@%p1 st.global.b32 [ %rd4 + 0 ], { %r2 };",
    "st.global.v2.b32 [ %rd2 + 0 ], { %r2, %r3 };",
    "cp.async.cg.shared.global [ %r8 + 0 ], [ %rd4 + 0 ], 0x10, %r9;",
)


@pytest.mark.parametrize(
    ("body", "shared", "unguarded"),
    [
        ([LOAD, OTHER], set(), set()),
        ([COPY, STORE], {0}, {0}),
        ([LOAD, STORE, OTHER], {0}, {0}),
        ([LOAD, "bar.sync 	0;", STORE], {0}, set()),
        ([STORE, "bar.sync 	0;", LOAD], {0}, set()),
        (["$L__BB0_1:", LOAD, "bar.sync 	0;", STORE, "@%p2 bra 	$L__BB0_1;"], {0}, {0}),  # of the next turn
        (["$L__BB0_1:", LOAD, "bar.sync 	0;", STORE, "bar.sync 	0;", "@%p2 bra 	$L__BB0_1;"], {0}, set()),
        (
            [STORE, "@%p2 bra 	$L__BB0_1;", "bar.sync 	0;", "$L__BB0_1:", LOAD],
            {0},
            {0},
        ),  # a way round the barrier
        ([STORE, "bra.uni 	$L__BB0_1;", LOAD, "$L__BB0_1:", OTHER], {0}, set()),  # never reached
    ],
)
def test_hand_overs_without_a_barrier_are_found(body: list[str], shared: set[int], unguarded: set[int]) -> None:
    found = barriers.hand_overs(ptx(*body))
    assert (found.shared, found.unguarded) == (shared, unguarded)


def test_a_loaded_value_makes_no_pointer() -> None:
    """An id that is loaded through one argument is an offset of another."""
    body = [
        "ld.global.b64 	{ %rd5 }, [ %rd2 + 0 ];",
        "add.s64 	%rd6, %rd1, %rd5;",
        "st.global.b32 [ %rd6 + 0 ], { %r2 };",
    ]
    assert barriers.hand_overs(ptx(*body)).shared == set()


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0030*/              @P0  BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   FADD R4, R4, R4 ;
        /*0050*/              @P1  BRA `(.L_x_2) ;
        /*0060*/             @!P2  BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
"""


def test_loops_around_products_are_counted_outermost_first() -> None:
    """Instructions and barriers: of the kernel, of the loop of tiles, of that of products; one without is left out."""
    assert estimate.loop_counts(SASS) == [(8, 1), (6, 1), (2, 0)]
