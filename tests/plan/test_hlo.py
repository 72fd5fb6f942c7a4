"""Exchanges read from HLO text: written out here, and as the compiler writes it for eight CPU devices."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.errors import QwenVLError
from qwenvl_jax.plan.hlo import KINDS, Exchange, device_groups, exchanges

PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))
LIST = "replica_groups={{0,1},{2,3},{4,5},{6,7}}"

PROGRAM = f"""\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}}

%all-reduce-scatter.1 (input: bf16[64]) -> bf16[32] {{
  %input = bf16[64]{{0:T(256)}} parameter(0)
  %all-reduce.9 = bf16[64]{{0:T(256)}} all-reduce(%input), channel_id=9, {LIST}, to_apply=%add
  ROOT %slice = bf16[32]{{0:T(256)}} slice(%all-reduce.9), slice={{[0:32]}}
}}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[]{{:T(128)}}, f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[8]{{0:T(8)}} get-tuple-element(%p), index=1
  %all-gather.1 = f32[16]{{0:T(8)}} all-gather(%v), channel_id=1, replica_groups=[4,2]<=[8], dimensions={{0}}
  %half = f32[8]{{0}} slice(%all-gather.1), slice={{[0:8]}}
  ROOT %out = (s32[], f32[8]{{0}}) tuple(%i, %half)
}}

%condition (q: (s32[], f32[8])) -> pred[] {{
  %q = (s32[], f32[8]{{0}}) parameter(0)
  %bound = s32[]{{:T(128)}} constant(5)
  %count = s32[] get-tuple-element(%q), index=0
  ROOT %lt = pred[] compare(%count, %bound), direction=LT
}}

%outer (r: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %r = (s32[], f32[8]{{0}}) parameter(0)
  ROOT %while.1 = (s32[], f32[8]{{0}}) while(%r), condition=%condition, body=%body
}}

%little (a: f32[8]) -> f32[8] {{
  ROOT %a = f32[8]{{0}} parameter(0)
}}

%much (b: f32[8]) -> f32[8] {{
  %b = f32[8]{{0}} parameter(0)
  ROOT %all-reduce.3 = f32[8]{{0}} all-reduce(%b), channel_id=3, {LIST}, to_apply=%add
}}

ENTRY %main (v: f32[8], w: bf16[64], flag: pred[]) -> f32[8] {{
  %v.1 = f32[8]{{0}} parameter(0)
  %w = bf16[64]{{0}} parameter(1)
  %flag = pred[] parameter(2)
  %zero = s32[] constant(0)
  %begun = (s32[], f32[8]{{0}}) tuple(%zero, %v.1)
  %while.2 = (s32[], f32[8]{{0}}) while(%begun), condition=%condition, body=%outer
  %scattered = bf16[32]{{0}} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.1
  %chosen = f32[8]{{0}} conditional(%flag, %v.1, %v.1), branch_computations={{%little, %much}}
  %moving = (f32[8]{{0}}, f32[8]{{0}}, u32[]) collective-permute-start(%v.1), source_target_pairs={{{{0,2}},{{2,0}}}}
  ROOT %moved = f32[8]{{0}} collective-permute-done(%moving)
}}
"""


def test_a_written_program():
    found = exchanges(PROGRAM)
    assert found.unknown_loops == 0
    assert found.counts == collections.Counter(
        {
            Exchange("all-gather", 32, PAIRS): 25,  # a loop in a loop, five times each
            Exchange("reduce-scatter", 64, PAIRS): 1,  # half of 128 bytes: each device keeps a part of the sum
            Exchange("all-reduce", 32, PAIRS): 1,  # of the branch that exchanges
            Exchange("collective-permute", 32, ((0, 2), (2, 0))): 1,
        }
    )


def test_device_groups_of_another_form_are_told():
    with pytest.raises(QwenVLError, match="in a form that is not known: channel_id=1, replica_groups=all"):
        device_groups("channel_id=1, replica_groups=all")


def test_what_sparse_cores_exchange_is_seen():
    """As libtpu writes it for TPU7x: in the computation of a custom call, which an asynchronous one wraps."""
    program = f"""\
%called (v: f32[8]) -> f32[16] {{
  %v = f32[8]{{0}} parameter(0)
  ROOT %all-gather.1 = f32[16]{{0}} all-gather(%v), channel_id=1, {LIST}, dimensions={{0}}
}}

%asynchronous (w: f32[8]) -> f32[16] {{
  %w = f32[8]{{0}} parameter(0)
  ROOT %offloaded = f32[16]{{0}} custom-call(%w), custom_call_target="x", called_computations={{%called}}
}}

ENTRY %main (u: f32[8]) -> f32[16] {{
  %u = f32[8]{{0}} parameter(0)
  %begun = ((f32[8]{{0}}), f32[16]{{0}}, u32[]{{:S(8)}}) async-start(%u), async_execution_thread="sparsecore", \
calls=%asynchronous
  ROOT %done = f32[16]{{0}} async-done(%begun)
}}
"""
    assert exchanges(program).counts == {Exchange("all-gather", 32, PAIRS): 1}


@pytest.mark.parametrize(("taken", "given"), [(8, 32), (32, 8)])
def test_a_ragged_exchange_counts_the_rows_of_one_device(taken, given):
    """One of its sides has room for all rows of all devices, should they come together."""
    program = f"""\
ENTRY %main (rows: bf16[8,4], out: bf16[8,4], n: s32[2]) -> bf16[8,4] {{
  %rows = bf16[{taken},4]{{1,0}} parameter(0)
  %out = bf16[{given},4]{{1,0}} parameter(1)
  %n = s32[2]{{0}} parameter(2)
  ROOT %moved = bf16[{given},4]{{1,0}} ragged-all-to-all(%rows, %out, %n, %n, %n, %n), channel_id=1, {LIST}
}}
"""
    assert exchanges(program).counts == {Exchange("ragged-all-to-all", 8 * 4 * 2 // 2, PAIRS): 1}


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    found = exchanges(PROGRAM.replace("direction=LT", "direction=NE"))
    assert found.unknown_loops == 2
    assert found.counts[Exchange("all-gather", 32, PAIRS)] == 1


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        (LIST, PAIRS),
        ("replica_groups=[4,2]<=[8]", PAIRS),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", PAIRS),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    ],
)
def test_device_groups(text, groups):
    assert device_groups(f"channel_id=1, {text}, use_global_device_ids=true") == groups


@pytest.mark.parametrize(
    ("groups", "axes"),
    [(PAIRS, (2,)), (((0, 4), (1, 5), (2, 6), (3, 7)), (0,)), (((0, 3), (4, 7)), (1, 2)), (((0,), (1,)), ())],
)
def test_axes_of_a_mesh(groups, axes):
    assert Exchange("all-reduce", 1, groups).axes((2, 2, 2)) == axes


def test_a_compiled_program():
    """Three layers, each with weights gathered along one axis and a sum along the other, and their gradients."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def layer(x, w):
        w = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
        return jax.lax.psum(jnp.tanh(x @ w), "tensor"), None

    def network(x, ws):
        return jax.lax.scan(layer, x, ws)[0]

    specs = (PartitionSpec("fsdp", None), PartitionSpec(None, "fsdp", None))
    mapped = jax.shard_map(network, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip([(8, 16), (3, 16, 16)], specs, strict=True)
    ]
    text = jax.jit(mapped).lower(*arguments).compile().as_text()
    sent = collections.Counter()
    for exchange, count in exchanges(text).counts.items():
        sent[exchange.kind, exchange.axes((4, 2))] += exchange.sent * count
    # A quarter of 16 x 16 numbers to three others; a sum of 2 x 16 numbers between two.
    assert sent == {("all-gather", (0,)): 3 * 3 * 4 * 16 * 4, ("all-reduce", (1,)): 3 * 2 * 16 * 4}


@pytest.mark.parametrize(
    ("kind", "target", "sent"),
    [
        ("ALL_REDUCE", "{1,2}x{0:3}", 4096),
        ("ALL_REDUCE", "{0:3}x{0:3}", 6144),
        ("ALL_GATHER", "{1,2}x{0:3}", 4096),
        ("REDUCE_SCATTER", "{0,1}x{0}", 2048),
        ("ALL_TO_ALL", "{0:3}x{0:3}", 3072),
        ("ONE_TO_ONE", "{1,2}x{0:3}", 4096),
    ],
)
def test_what_goes_to_other_slices(kind, target, sent):
    """As libtpu writes it for several slices; what goes to the host for another reason is none of it."""
    program = f"""\
ENTRY %main (v: f32[8,128]) -> () {{
  %v = f32[8,128]{{1,0}} parameter(0)
  %after-all.1 = token[] after-all()
  %send.1 = (f32[8,128]{{1,0:T(8,128)}}, u32[]{{:S(2)}}, token[]) send(%v, %after-all.1), channel_id=1, \
is_host_transfer=true, frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{target}",_xla_megascale_transfer_type="{kind}"}}
  %send.2 = (f32[8,128]{{1,0}}, u32[]{{:S(2)}}, token[]) send(%v, %after-all.1), channel_id=2, is_host_transfer=true
  ROOT %done = () tuple()
}}
"""
    (found,) = exchanges(program).counts
    assert found.between_slices and found.sent == sent and found.kind in KINDS
