"""What only a GPU can show; skipped where there is none."""
from functools import partial

import pytest
import torch
from conftest import golden_image, golden_model
from decoder import OBJECTIVES, grouped_linear
from encoders import ENCODERS
from eval import autocast, to_device
from train import make_optimizer, parse_args, train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA here')
DEVICE = torch.device('cuda')

def batch(B=2, T=64):
    ids = torch.randint(3, 512, (2, B, T), generator=torch.Generator().manual_seed(0))
    return {'context': ids[0], 'continuation': ids[1], 'image': torch.stack([golden_image(512, k) for k in range(B)])}

def logits(model, data):
    """Of the target positions, teacher-forced."""
    x = model.sequence(data, data[OBJECTIVES[model.objective]])
    return model.decoder.logits(model.decoder(x)[0])

@pytest.mark.parametrize('objective', OBJECTIVES)
@pytest.mark.parametrize('regime', ENCODERS)
def test_bf16_is_near_fp32_on_the_cpu(weights, regime, objective):
    settings = {'vision_mode': 'tiny'} if regime == 'vision' else {}
    model, data = golden_model(weights, regime, 64, objective, **settings).eval(), batch()
    with torch.no_grad():
        exact = logits(model, data)
        with autocast(DEVICE):
            close = logits(model.to(DEVICE), to_device(data, DEVICE)).cpu()
    error = (close - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.median() < 2e-2 and error.square().mean().sqrt() < 6e-2      # rounding sends a few tokens to other experts

@pytest.mark.parametrize('compiled', (False, True))
@pytest.mark.parametrize('regime', ENCODERS)
def test_a_gradient_for_every_parameter(weights, regime, compiled):
    settings = {'vision_mode': 'tiny'} if regime == 'vision' else {}
    model = golden_model(weights, regime, 64, **settings).to(DEVICE)
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    with autocast(DEVICE):
        losses, _, extra = forward(to_device(batch(), DEVICE))
    (losses.mean() + extra['balance_loss']).backward()
    for name, p in model.named_parameters():
        if p.requires_grad and not name.startswith('encoder.vision_model.embeddings.patch'):
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name

def test_the_kernel_is_the_loop():
    """The grouped kernel in bf16 and the loop that fp32 takes, forward and backward, with an expert that gets no row."""
    torch.manual_seed(0)
    ends = torch.tensor([30, 30, 96, 128], dtype=torch.int32, device=DEVICE)
    x, weight, grad = torch.randn(128, 64), torch.randn(4, 48, 64) / 8, torch.randn(128, 48)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [t.bfloat16().to(DEVICE, dtype).requires_grad_() for t in (x, weight)]
        y = grouped_linear(*leaves, ends)
        y.backward(grad.bfloat16().to(DEVICE, dtype))
        found.append([t.float() for t in (y, *(leaf.grad for leaf in leaves))])
    for ours, exact in zip(*found):
        assert (ours - exact).norm() / exact.norm() < 2e-2

@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] not in (9, 10),
                    reason="before Hopper torch's grouped product is a loop that reads the ends on the host")
def test_no_step_waits_for_the_device(weights):
    """A whole step without a synchronisation of the host."""
    model, data = golden_model(weights, 'meanpool', 2000).to(DEVICE), to_device(batch(T=2000), DEVICE)
    model.decoder.token_losses = partial(model.decoder.token_losses, rows=1000)
    optimizer = make_optimizer(model, 1e-4, parse_args(['--model', 'full']))
    for mode in ('default', 'error'):                         # the first time, kernels are loaded
        torch.cuda.set_sync_debug_mode(mode)
        try:
            train_step(model, optimizer, [data] * 2, 1.0, 1.0, DEVICE)
        finally:
            torch.cuda.set_sync_debug_mode('default')
