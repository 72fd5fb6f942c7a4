"""What the compiler writes of memory, and when it is all there."""

from qwenvl_jax.plan.dump import assigned, assigned_bytes, sent_bytes

NAME = "module_0000.jit_step.cl_1"
BUFFERS = """\
BufferAssignment:
allocation 0: size 4, color 8, page 0, thread-local:
 value: <1 x @8> (size=4,offset=0): u32[]{:S(8)}
allocation 1: size 1000, page 0, parameter 3, shape |f32[250]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 200, page 0, parameter 1, shape |f32[50]| at ShapeIndex {}:
allocation 3: size 30, page 0, maybe-live-out:
allocation 4: size 7, page 0, constant:
allocation 5: size 5000, page 0, preallocated-temp:
 value: <2 y @0> (size=5000,offset=0): f32[1250]
allocation 6: size 600, color 1, page 0, preallocated-temp:
allocation 7: size 70000, color 5, page 0, preallocated-temp:
"""


def test_memory_of_a_program_is_read_once_it_is_written(tmp_path):
    """Of the fast memory (color 1) nothing counts; color 5 is the host's."""
    assert not assigned(tmp_path)
    (tmp_path / f"{NAME}.after_optimizations.txt").write_text("HloModule jit_step\n")
    (tmp_path / f"{NAME}.after_optimizations-buffer-assignment.txt").write_text(BUFFERS)
    assert not assigned(tmp_path)
    (tmp_path / f"{NAME}.after_optimizations_after_buffer_assignment.txt").write_text("HloModule")
    assert not assigned(tmp_path)
    (tmp_path / f"{NAME}.after_optimizations_after_buffer_assignment.txt").write_text("HloModule jit_step\n")
    assert assigned(tmp_path)
    assert assigned_bytes(tmp_path) == {
        "arguments": 1200,
        "temporaries": 5000,
        "outputs": 1030,
        "aliased": 1000,
        "host": 70000,
    }


def test_what_is_sent_is_named_by_axes_and_kind(tmp_path):
    program = """\
ENTRY %main (v: f32[8]) -> f32[16] {
  %v = f32[8]{0} parameter(0)
  ROOT %all-gather.1 = f32[16]{0} all-gather(%v), replica_groups=[2,2]<=[4], dimensions={0}
}
"""
    assert sent_bytes(tmp_path, (1, 2, 1, 1, 2)) == {"sent": None, "across": None, "unknown_loops": 0}
    (tmp_path / f"{NAME}.after_optimizations.txt").write_text(program)
    found = {"sent": {"tensor all-gather": 32}, "across": 0, "unknown_loops": 0}
    assert sent_bytes(tmp_path, (1, 2, 1, 1, 2)) == found
    send = """\
  %send.1 = (f32[8]{0}, u32[], token[]) send(%v, %after), frontend_attributes={_xla_host_transfer_handler_name=\
"xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:1}",_xla_megascale_transfer_type="ALL_REDUCE"}
"""
    (tmp_path / f"{NAME}.after_optimizations.txt").write_text(program.replace("  ROOT", send + "  ROOT"))
    assert sent_bytes(tmp_path, (2, 1, 1, 1, 2), slices=2) == {
        "sent": {"data all-reduce": 32, "tensor all-gather": 32},
        "across": 32,
        "unknown_loops": 0,
    }
