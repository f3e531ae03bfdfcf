"""linear.py and what attention.py makes of it: the same figures as PyTorch's own operators."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import normal_video, tiny_gaze
from torch.testing import assert_close as close

import attention
import linear

needs_onednn = pytest.mark.skipif(not linear.HERE, reason="a processor without AVX-512, or PyTorch without oneDNN")


@pytest.fixture(autouse=True)
def nothing_too_small(monkeypatch):
    monkeypatch.setattr(linear, "SMALL", 0)
    monkeypatch.setattr(attention, "FEW", 0)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (1, 1, 24), (0, 24)])
def test_output_and_gradients(shape, with_bias):
    torch.manual_seed(0)
    values = [torch.randn(shape), torch.randn(40, 24), torch.randn(40) if with_bias else None]
    results = []
    for function in (F.linear, linear.linear):
        x, w, b = (None if v is None else v.clone().requires_grad_() for v in values)
        y = function(x, w, b)
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
        results.append([y, x.grad, w.grad] + ([b.grad] if with_bias else []))
    for got, want in zip(*reversed(results), strict=True):
        close(got, want)


def test_frozen_weights_and_frozen_input():
    x, w = torch.randn(6, 24), torch.randn(40, 24)
    for frozen in (0, 1):
        a, b = x.clone().requires_grad_(frozen != 0), w.clone().requires_grad_(frozen != 1)
        linear.linear(a, b).sum().backward()
        assert (a.grad is None) == (frozen == 0) and (b.grad is None) == (frozen == 1)


@pytest.mark.parametrize("change", [lambda w: w.T.contiguous().T, lambda w: F.pad(w, (0, 9))[:, :-9],
                                    lambda w: w.repeat(2, 1)[::2], lambda w: w.unsqueeze(1).expand(-1, 3, -1)[:, 1]])
def test_weights_that_are_not_contiguous(change):
    x, w = torch.randn(6, 24), change(torch.randn(40, 24))
    close(linear.linear(x, w), F.linear(x, w))
    x = x.T.contiguous().T
    close(linear.linear(x, w), F.linear(x, w))


@needs_onednn
def test_packed_weights():
    x, w = torch.randn(2, 10, 192), torch.randn(576, 192)
    packed = linear.pack(w)
    assert packed.is_mkldnn
    close(linear.linear(x, packed), F.linear(x, w), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # packed before: stays float32
        close(linear.linear(x.bfloat16(), packed), F.linear(x.bfloat16(), w).float(), rtol=0.02, atol=0.3)
        assert not linear.pack(w).is_mkldnn
    assert not linear.pack(w.bfloat16()).is_mkldnn and not linear.pack(w[:10]).is_mkldnn


@needs_onednn
def test_who_gets_it_and_how_to_switch_it_off(monkeypatch):
    calls, x, layer = [], torch.randn(6, 24), linear.quicken(nn.Sequential(nn.Linear(24, 40)))
    monkeypatch.setattr(linear, "onednn", lambda *a: calls.append(a) or F.linear(*a))
    layer(x)
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.double()(x.double())
    layer.float()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    layer(x)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "keep", "causal"])
def test_attention_by_head(dtype, kind):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8) for n in (14, 30, 30))
    keep = torch.rand(2, 30) < 0.7 if kind == "keep" else None
    mask = torch.ones(14, 30, dtype=torch.bool).tril(16) if kind == "causal" else keep
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None] if kind == "keep" else mask)
    got = attention.attend_by_head(*(x.to(dtype) for x in (q, k, v)), keep, kind == "causal")
    tolerance = dict(rtol=0.02, atol=0.03) if dtype == torch.bfloat16 else {}
    close(got.float(), want, **tolerance)
    if kind != "plain":  # the functions that use it
        called = attention.causal_attention if kind == "causal" else attention.block_causal_attention
        rest = () if kind == "causal" else ([30], keep)
        q = q if kind == "causal" else torch.cat([q, q, q], dim=2)[:, :, :30]
        with torch.no_grad():
            got = called(*(x.to(dtype) for x in (q, k, v)), *rest)
        close(got.float(), called(q, k, v, *rest), **tolerance)


@pytest.mark.parametrize("past", [0, 5])
def test_causal_attention_has_the_same_gradients(past):
    torch.manual_seed(0)
    L = 600  # more than two parts
    values = [torch.randn(2, 2, n, 8) for n in (L, past + L, past + L)]
    mask = torch.ones(L, past + L, dtype=torch.bool).tril(past)
    results = []
    for function in (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
                     attention.CausalByHead.apply):
        q, k, v = (x.clone().requires_grad_() for x in values)
        y = function(q, k, v)
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
        results.append((y, q.grad, k.grad, v.grad))
    for got, want in zip(*reversed(results), strict=True):
        close(got, want, rtol=1e-4, atol=1e-5)


@needs_onednn
def test_training_has_the_same_gradients(monkeypatch):
    gaze, video = tiny_gaze(), normal_video(2)
    gazing, used = gaze.generate(video, gazing_ratio=0.5), []
    apply = attention.CausalByHead.apply
    monkeypatch.setattr(attention.CausalByHead, "apply", lambda *a: used.append(1) or apply(*a))
    gradients = []
    for enabled in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
        gaze.zero_grad()
        log_prob, task_loss = gaze(video, gazing)
        (log_prob.sum() + task_loss.sum()).backward()
        gradients.append([p.grad.clone() for p in gaze.parameters()])
        assert len(used) == gaze.config.num_layers - 1  # the last layer has a mask; the second time none more
    for got, want in zip(*gradients, strict=True):
        close(got, want, rtol=1e-3, atol=1e-4)


def test_generate_chooses_the_same(monkeypatch):
    gaze, video = tiny_gaze(), normal_video(2)
    got = gaze.generate(video, gazing_ratio=0.5)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert torch.equal(got["gazing_pos"], gaze.generate(video, gazing_ratio=0.5)["gazing_pos"])
