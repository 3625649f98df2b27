"""Peers from other projects' packages: what they are given, and what is said where a package is missing.

The packages themselves run on GPUs only, so functions with their signatures stand in for them here; on a GPU
the bench checks a result against the reference before it times a peer of packed weights.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lab import peers
from lab.contract import Rand
from lab.dispatch import select
from lab.formats import FORMATS
from lab.harness import bench, ops_bench
from lab.harness.shapes import Point
from lab.ops import find
from lab.records import card, schema


def pretend(monkeypatch, name, **contents):
    """A package's module of this name."""
    for i in range(name.count(".") + 1):
        part = ".".join(name.split(".")[: i + 1])
        if part not in sys.modules:
            monkeypatch.setitem(sys.modules, part, ModuleType(part))
    vars(sys.modules[name]).update(contents)


def rotated(q, k, cos, sin):
    """LigerRopeFunction.apply: q and k [batch, heads, 1, head_dim], cos and sin [batch, 1, head_dim]; in
    place on contiguous [batch, 1, heads, head_dim], as its kernel works."""
    found = []
    for x in (q, k):
        memory = x.transpose(1, 2)
        assert memory.is_contiguous() and cos.shape == sin.shape == (x.shape[0], 1, x.shape[3])
        a, b = memory.float().chunk(2, -1)
        half = cos.shape[-1] // 2  # the other half is the same again
        c, s = cos[:, :, None, :half], sin[:, :, None, :half]
        memory.copy_(torch.cat((a * c - b * s, b * c + a * s), -1))
        found.append(memory.transpose(1, 2))
    return *found, cos, sin


def test_ligers_rope_rotates_as_the_op_does(monkeypatch):
    pretend(monkeypatch, "liger_kernel.ops.rope", LigerRopeFunction=SimpleNamespace(apply=rotated))
    op = find("rope")
    args = op.inputs(Rand("cpu", torch.bfloat16), batch=3, q_heads=4, kv_heads=2, head_dim=64)
    before = [x.clone() for x in args[:2]]
    (call,) = peers.LIGER_ROPE.make([args])
    for found, wanted in zip(call(), op.reference(*args)):
        assert torch.allclose(found.double(), wanted, rtol=1e-2, atol=2e-2)
    assert all(torch.equal(x, old) for x, old in zip(args, before)), "the op's own q and k stay"
    assert peers.LIGER_ROPE in op.peers and not peers.LIGER_ROPE.takes(op.bound(*(x.float() for x in args)))


class A16Wn:
    """gemlite.helper.A16Wn: weight = (code - zero) * scale."""

    def __init__(self, device):
        self.device = device

    def from_weights(self, W_q, scales, zeros, W_nbits, group_size, bias=None):
        assert W_q.dtype == torch.uint8 and W_nbits == 4 and scales.shape == zeros.shape
        grouped = W_q.float().unflatten(1, (-1, group_size))
        w = ((grouped - zeros.float()[..., None]) * scales.float()[..., None]).flatten(1)
        return lambda x: (x.float() @ w.t()).to(x.dtype)


def test_gemlite_multiplies_the_packed_weights(monkeypatch):
    pretend(monkeypatch, "gemlite.helper", A16Wn=A16Wn)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    point = Point("linear", None, 2, None, {"n": 64, "k": 256}, format="int4-g128")
    rig = ops_bench.Rig("cpu", {"torch": select("torch", "cpu")}, None)
    bound = ops_bench.BoundPoint(find("linear"), point, torch.bfloat16, rig)
    assert "gemlite" in bound.peers and bound.checked("gemlite") < 2 * bound.checked("torch")
    assert set(bound.peers) <= {p.name for p in find("linear").peers} and "int4-g128" in FORMATS


class PagedDecode:
    """flashinfer.BatchDecodeWithPagedKVCacheWrapper: caches [pages, kv_heads, page_size, head_dim] ("HND"); a
    sequence's pages are indices[indptr[i]:indptr[i + 1]], the last of which has last_page_len tokens."""

    made = []

    def __init__(self, workspace, layout, use_tensor_cores):
        assert workspace.dtype == torch.uint8 and layout == "HND"
        self.made.append(use_tensor_cores)

    def plan(self, indptr, indices, last_page_len, q_heads, kv_heads, head_dim, page_size, **options):
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        self.pages, self.last, self.page_size = (indptr.tolist(), indices), last_page_len.tolist(), page_size
        self.shape, self.scale = (len(self.last), q_heads, head_dim), options["sm_scale"]
        assert (options["q_data_type"], options["kv_data_type"]) == (torch.bfloat16, torch.bfloat16)

    def run(self, q, caches, out):
        assert q.shape == out.shape == self.shape and q.is_contiguous()
        (starts, indices), (k_cache, v_cache) = self.pages, caches
        for i, last in enumerate(self.last):
            own = indices[starts[i] : starts[i + 1]].long()
            length = (len(own) - 1) * self.page_size + last
            k, v = (c[own].transpose(0, 1).flatten(1, 2)[:, :length].float() for c in (k_cache, v_cache))
            query = q[i].float().unflatten(0, (k.shape[0], -1))
            out[i] = (torch.softmax(query @ k.transpose(1, 2) * self.scale, -1) @ v).flatten(0, 1)
        return out


@pytest.mark.parametrize("number, tensor_cores", [(0, False), (1, True)])
def test_flashinfer_reads_the_same_pages(number, tensor_cores, monkeypatch):
    pretend(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=PagedDecode)
    op = find("decode_attention")
    sizes = dict(lengths=[37, 37], q_heads=8, kv_heads=2, head_dim=64, page_size=16)
    args = op.with_workspace(*op.inputs(Rand("cpu", torch.bfloat16), **sizes))
    (call,) = peers.FLASHINFER[number].make([args])
    (wanted,) = op.reference(*args)
    assert torch.allclose(call().double(), wanted, rtol=1e-2, atol=2e-2)
    assert PagedDecode.made[-1] == tensor_cores


@pytest.mark.parametrize("name", ("flashinfer", "gemlite", "liger_kernel"))
def test_a_peer_without_its_package_is_left_out_with_a_reason(name, monkeypatch):
    declared = [
        p for op in map(find, ("decode_attention", "linear", "rmsnorm", "rope", "silu_mul")) for p in op.peers
    ]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [p for p in declared if p.module == name] and not any(p.installed for p in declared if p.module)
    env = schema.Env("r", "before", "cuda", peers={name: "not installed"})
    (line,) = bench.left_out(SimpleNamespace(of_kind=lambda kind: [env]))
    assert f"peers left out: {card.PEERS[name]}" in line
    env.peers = {name: "1.0"}
    assert bench.left_out(SimpleNamespace(of_kind=lambda kind: [env])) == []
