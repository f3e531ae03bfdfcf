"""lib/cpu.py and what lib/attention.py makes of it: the same figures as PyTorch's own operators."""
import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import normal_video, tiny_gaze
from torch.testing import assert_close as close

import lib.attention as attention
import lib.cpu as cpu

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="PyTorch without oneDNN")


@pytest.fixture(autouse=True)
def everything_is_large_and_onednn_is_faster(monkeypatch):
    monkeypatch.setattr(cpu, "ONEDNN_IS_FASTER", HAS_ONEDNN)
    monkeypatch.setattr(cpu, "MIN_MULTIPLICATIONS", 0)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("N", [16, 24, 40])
@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (1, 1, 24), (0, 24), (24,)])
def test_output_and_gradients(shape, N, with_bias):
    torch.manual_seed(0)
    values = [torch.randn(shape), torch.randn(N, 24), torch.randn(N) if with_bias else None]
    results = []
    for function in (F.linear, cpu.linear):
        x, w, b = (None if v is None else v.clone().requires_grad_() for v in values)
        y = function(x, w, b)
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
        results.append([y, x.grad, w.grad] + ([b.grad] if with_bias else []))
    for got, want in zip(*reversed(results), strict=True):
        close(got, want)


def test_frozen_weights_and_frozen_input():
    x, w = torch.randn(6, 24), torch.randn(40, 24)
    for frozen in (0, 1):
        grads = []
        for function in (F.linear, cpu.linear):
            a, b = x.clone().requires_grad_(frozen != 0), w.clone().requires_grad_(frozen != 1)
            function(a, b).sum().backward()
            grads.append((a.grad, b.grad))
        (want_a, want_b), (got_a, got_b) = grads
        assert (got_a is None) == (frozen == 0) and (got_b is None) == (frozen == 1)
        close(got_b if frozen == 0 else got_a, want_b if frozen == 0 else want_a)


@needs_onednn
def test_a_second_derivative_is_refused():
    x, w = torch.randn(6, 24, requires_grad=True), torch.randn(40, 24)
    grad, = torch.autograd.grad(cpu.linear(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("change", [lambda w: w.T.contiguous().T, lambda w: F.pad(w, (0, 9))[:, :-9],
                                    lambda w: w.repeat(2, 1)[::2], lambda w: w.unsqueeze(1).expand(-1, 3, -1)[:, 1]])
def test_weights_that_are_not_contiguous(change):
    x, w = torch.randn(6, 24), change(torch.randn(40, 24))
    close(cpu.linear(x, w), F.linear(x, w))
    x = x.T.contiguous().T
    close(cpu.linear(x, w), F.linear(x, w))


@needs_onednn
def test_packed_weights():
    x, w = torch.randn(2, 10, 192), torch.randn(576, 192)
    packed = cpu.pack(w)
    assert packed.is_mkldnn
    close(cpu.linear(x, packed), F.linear(x, w), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # packed before: stays float32
        close(cpu.linear(x.bfloat16(), packed), F.linear(x.bfloat16(), w).float(), rtol=0.02, atol=0.3)
        assert not cpu.pack(w).is_mkldnn
    assert not cpu.pack(w.bfloat16()).is_mkldnn and not cpu.pack(w[:10]).is_mkldnn


@needs_onednn
def test_onednn_is_taken_where_it_is_faster(monkeypatch):
    ticks = itertools.accumulate(itertools.cycle([0, 3, 0, 1]))  # torch takes 3 seconds, oneDNN 1
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: next(ticks))
    assert cpu.onednn_gain() == 3
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert cpu.onednn_gain() == 0


@needs_onednn
def test_who_gets_it_and_how_to_switch_it_off(monkeypatch):
    calls, x, layer = [], torch.randn(6, 24), cpu.quicken(nn.Sequential(nn.Linear(24, 40)))
    monkeypatch.setattr(cpu, "onednn_linear", lambda *a: calls.append(a) or F.linear(*a))
    layer(x)
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.double()(x.double())
    layer.float()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    layer(x)
    assert len(calls) == 1


def queries_keys_values(n_queries, n_keys, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(2, 3, n, 8).to(dtype) for n in (n_queries, n_keys, n_keys)]


def assert_attends(got, q, k, v, mask):
    want = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    close(got.float(), want, **dict(rtol=0.02, atol=0.01) if q.dtype == torch.bfloat16 else {})


both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@both_types
@pytest.mark.parametrize("n_queries, n_keys", [(1, 30), (10, 30), (80, 300), (300, 300)])
@torch.no_grad()
def test_causal_attention(dtype, n_queries, n_keys):
    q, k, v = queries_keys_values(n_queries, n_keys, dtype)
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
    assert_attends(attention.causal_attention(q, k, v), q, k, v, mask)


@both_types
@pytest.mark.parametrize("n_tokens", [60, 300])
@torch.no_grad()
def test_block_causal_attention(dtype, n_tokens):
    q, k, v = queries_keys_values(n_tokens, n_tokens, dtype)
    keep = torch.rand(2, n_tokens) < 0.7
    keep[:, 0] = True
    ends = [20, 20, 45, n_tokens]
    end_of_token = torch.tensor([20] * 20 + [45] * 25 + [n_tokens] * (n_tokens - 45)).unsqueeze(1)
    mask = (torch.arange(n_tokens) < end_of_token) & keep[:, None, None]
    assert_attends(attention.BlockCausal(ends, q.device, keep)(q, k, v), q, k, v, mask)


def test_a_mask_made_for_inference_serves_training_too():
    attention.causal_mask.cache_clear()
    q, k, v = queries_keys_values(10, 30)
    with torch.inference_mode():
        attention.causal_attention(q, k, v)
    q.requires_grad_()
    attention.causal_attention(q, k, v).sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("past", [0, 5])
def test_causal_attention_has_the_same_gradients(past):
    values = queries_keys_values(80, past + 80)
    mask = torch.ones(80, past + 80, dtype=torch.bool).tril(past)
    results = []
    for function in (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
                     attention.causal_attention):
        q, k, v = (x.clone().requires_grad_() for x in values)
        y = function(q, k, v)
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
        results.append((y, q.grad, k.grad, v.grad))
    for got, want in zip(*reversed(results), strict=True):
        close(got, want, rtol=1e-4, atol=1e-5)


@needs_onednn
def test_training_has_the_same_gradients(monkeypatch):
    gaze, video = tiny_gaze(), normal_video(2)
    gazing = gaze.generate(video, gazing_ratio=0.5)
    gradients = []
    for enabled in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
        gaze.zero_grad()
        log_prob, task_loss = gaze(video, gazing)
        (log_prob.sum() + task_loss.sum()).backward()
        gradients.append([p.grad.clone() for p in gaze.parameters()])
    for got, want in zip(*gradients, strict=True):
        close(got, want, rtol=1e-3, atol=1e-4)


@needs_onednn
def test_generate_chooses_the_same(monkeypatch):
    """Wherever it does not: its choice is as good up to rounding (near ties)."""
    gaze, video = tiny_gaze(), normal_video(2)
    got = gaze.generate(video, gazing_ratio=0.5)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    want = gaze.generate(video, gazing_ratio=0.5)
    if not torch.equal(got["gazing_pos"], want["gazing_pos"]):
        close(gaze(video, got)[0], gaze(video, want)[0], rtol=1e-3, atol=1e-3)


@needs_onednn
def test_a_stream_does_not_follow_its_model():
    """Weights that change while a stream lives must not change it by halves."""
    gaze = tiny_gaze(hidden_size=192, intermediate_size=384)
    stream = gaze.stream(1, 0.5)
    own = {w.data_ptr() for w in gaze.parameters()}
    assert {w.is_mkldnn for joined in stream.weights for w in joined} == {True, False}
    assert not any(w.data_ptr() in own for joined in stream.weights for w in joined if not w.is_mkldnn)
