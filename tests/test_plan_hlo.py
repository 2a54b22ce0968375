# ruff: noqa: E501  (lines of compiled programs are as long as they are)
"""Reading compiled programs: what is counted is what was asked for, compiled here and in recorded lines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umm_jax.plan import hlo


def compiled(function, *arrays) -> hlo.Program:
    return hlo.parse(jax.jit(function).lower(*arrays).compile().as_text())


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_a_loop_counts_as_often_as_it_turns(layers):
    def run(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    found = compiled(run, jnp.zeros((8, 16)), jnp.zeros((layers, 16, 16)))
    assert found.flops == layers * 2 * 8 * 16 * 16 and not found.unknown_loops


def test_loops_within_loops():
    def inner(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: x @ w, x)

    def run(x, w):
        return jax.lax.scan(lambda x, w: (inner(x, w), None), x, w)[0]

    found = compiled(run, jnp.zeros((4, 8)), jnp.zeros((3, 8, 8)))
    assert found.flops == 3 * 5 * 2 * 4 * 8 * 8


def test_a_loop_without_a_bound_is_named_and_counted_once():
    def run(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 3.0, lambda x: x @ w, x)

    found = compiled(run, jnp.zeros((4, 8)), jnp.zeros((8, 8)))
    assert found.flops == 2 * 4 * 8 * 8 and len(found.unknown_loops) == 1


@pytest.mark.parametrize(
    "stride, padding, dilation, groups",
    [(1, "VALID", 1, 1), (1, "SAME", 1, 1), (2, "SAME", 1, 1), (1, "SAME", 2, 1), (1, "SAME", 1, 4)],
)
def test_a_convolution_is_what_is_multiplied_without_padding(stride, padding, dilation, groups):
    x, w = jnp.zeros((2, 9, 10, 8)), jnp.zeros((3, 3, 8 // groups, 12))
    ones = jax.lax.conv_general_dilated(
        jnp.ones((1, 9, 10, 1)),
        jnp.ones((3, 3, 1, 1)),
        (stride, stride),
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

    def run(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            padding,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    text = jax.jit(run).lower(x, w).as_text("hlo")
    assert hlo.parse(text).flops == 2 * int(ones.sum()) * 2 * (8 // groups) * 12


RECORDED = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/somebody/try.py"
2 "/home/somebody/umm_jax/models/layers.py"

FunctionNames
1 "<module>"
2 "call"

FileLocations
1 {file_name_id=1 function_name_id=1 line=28 end_line=28 column=19 end_column=19}
2 {file_name_id=2 function_name_id=2 line=122 end_line=122 column=38 end_column=38}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%fused (p0: bf16[8,16], p1: bf16[16,32]) -> bf16[8,32] {
  %p0 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %dot.1 = bf16[8,32]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf, metadata={op_name="jit(step)/dot_general" stack_frame_id=2}
}

%cond (c: (u32[], bf16[8,16], bf16[16,32], bf16[8,32])) -> pred[] {
  %n = u32[]{:T(128)} constant(40)
  %c = (u32[]{:T(128)}, bf16[8,16]{1,0}, bf16[16,32]{1,0}, /*index=3*/bf16[8,32]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (b: (u32[], bf16[8,16], bf16[16,32], bf16[8,32])) -> (u32[], bf16[8,16], bf16[16,32], bf16[8,32]) {
  %b = (u32[]{:T(128)}, bf16[8,16]{1,0}, bf16[16,32]{1,0}, /*index=3*/bf16[8,32]{1,0}) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%b), index=1
  %w = bf16[16,32]{1,0} get-tuple-element(%b), index=2
  %g = bf16[16,32]{1,0} all-gather(%w), channel_id=7, replica_groups=[4,4]<=[8,2]T(1,0), dimensions={0}, metadata={op_name="jit(step)/a \\"quoted (name)\\"" stack_frame_id=2}
  %fusion.1 = bf16[8,32]{1,0} fusion(%x, %g), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/dot_general"}, backend_config={"window_config":{"estimated_cycles":"1868"}}
  %one = u32[] constant(1)
  %i0 = u32[]{:T(128)} get-tuple-element(%b), index=0
  %i1 = u32[]{:T(128)} add(%i0, %one)
  ROOT %out = (u32[], bf16[8,16], bf16[16,32], bf16[8,32]) tuple(%i1, %x, %w, %fusion.1)
}

ENTRY %main (a: (u32[], bf16[8,16], bf16[16,32], bf16[8,32])) -> (u32[], bf16[8,16], bf16[16,32], bf16[8,32]) {
  %a = (u32[], bf16[8,16]{1,0}, bf16[16,32]{1,0}, bf16[8,32]{1,0}) parameter(0)
  %kernel = f32[4] custom-call(%a), custom_call_target="tpu_custom_call"
  ROOT %loop = (u32[], bf16[8,16], bf16[16,32], bf16[8,32]) while(%a), condition=%cond, body=%body
}
"""


def test_what_a_tpu_program_says():
    program = hlo.parse(RECORDED)
    assert program.executed["body"] == program.executed["fused"] == 40
    assert program.flops == 40 * 2 * 8 * 16 * 32
    assert program.cycles == 40 * 1868 and program.cycles_by_name() == {"jit(step)/dot_general": 40 * 1868}
    assert program.custom_calls() == {"tpu_custom_call": 1}
    (gather,) = program.collectives()
    assert (gather.kind, gather.count, gather.bytes) == ("all-gather", 40, 16 * 32 * 2)
    assert gather.moved == 16 * 32 * 2 * 3 // 4
    assert gather.source == "umm_jax/models/layers.py:122"
    # [8, 2] turned round: devices of equal parity, in order.
    assert gather.groups.tolist() == [[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]]
    weight = program.computations["fused"].by_name["p1"].arrays[0]
    assert weight == hlo.Array("bf16", (16, 32), space=1) and weight.bytes == 1024


@pytest.mark.parametrize(
    "kind, size, devices, moved",
    [("all-reduce", 800, 4, 1200), ("reduce-scatter", 800, 4, 600), ("collective-permute", 800, 2, 800)],
)
def test_bytes_round_a_ring(kind, size, devices, moved):
    assert hlo._moved(kind, size, devices) == moved


def test_sizes_of_element_types():
    assert [hlo.bits(t) for t in ("f32", "bf16", "s4", "f8e4m3fn", "pred")] == [32, 16, 4, 8, 8]
    assert hlo.Array("s4", (3,)).bytes == 2


def test_what_is_no_program():
    with pytest.raises(hlo.Unreadable, match="no entry"):
        hlo.parse("HloModule nothing\n")


def test_a_step_counts_what_matrices_cost():
    """Forward, and two products backward for each."""
    w, x = np.zeros((32, 32), np.float32), np.zeros((4, 32), np.float32)
    found = compiled(jax.grad(lambda w: jnp.sum(jnp.tanh(jnp.asarray(x) @ w @ w))), w)
    assert found.flops == 2 * 4 * 32 * 32 * (2 + 3)


@pytest.mark.parametrize(
    "said, groups",
    [
        ("mesh['axis_0'=2,'axis_1'=3] {'axis_0'}", [[0, 3], [1, 4], [2, 5]]),
        ("mesh['axis_0'=2,'axis_1'=3] {'axis_1','axis_0'}", [[0, 3, 1, 4, 2, 5]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ],
)
def test_every_way_to_write_who_acts_together(said, groups):
    line = f"  %x = f32[8]{{0}} all-reduce(%y), channel_id=1, replica_groups={said}, to_apply=%add"
    assert hlo._groups(hlo._instruction(line)).tolist() == groups
