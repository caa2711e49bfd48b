"""What every registered encoder must do, and the settings that each refuses."""
import inspect

import pytest
import torch
from conftest import golden_config
from encoders import ENCODERS, VISION_MODES, CLIPBlock, learned, settings_of
from load_deepseek import PRESETS, load

def tiny_batch(model, B=2, T=128):
    ids = torch.randint(3, 259, (B, T), generator=torch.Generator().manual_seed(0))
    batch = {'context': ids, 'continuation': ids.flip(1)}
    if S := getattr(model.encoder, 'image_size', None):
        batch['image'] = torch.randint(0, 256, (B, 3, S, S), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return batch

@pytest.mark.parametrize('hybrid', [0, 13])
@pytest.mark.parametrize('objective', ['reconstruction', 'lm'])
@pytest.mark.parametrize('regime', ENCODERS)
def test_a_gradient_reaches_every_parameter(regime, objective, hybrid):
    torch.manual_seed(0)
    model, _, config = load('tiny', regime, 128, objective, hybrid)
    batch = tiny_batch(model)
    losses, hits, extra = model(batch)
    assert losses.shape == hits.shape == (2, 128)
    assert 5 < losses.mean().item() < 6.5                                   # ln 259 = 5.56: from scratch all tokens are alike
    (losses.mean() + sum(extra.values())).backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None}
    assert unused == {n for n, p in model.named_parameters() if not p.requires_grad}        # several processes wait for every gradient
    assert unused == ({'encoder.vision_model.embeddings.patch_embedding.weight'} if regime == 'vision' else set())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert set(config['run']['settings']) == set(settings_of(ENCODERS[regime]))

@pytest.mark.parametrize('regime', ENCODERS)
def test_each_row_is_encoded_by_itself(regime):
    model, _, _ = load('tiny', regime, 128)
    batch = tiny_batch(model, B=3)
    both = model.sequence(batch)
    for i in range(3):
        one = model.sequence({k: v[i:i + 1] for k, v in batch.items()})
        assert (both[i] - one[0]).abs().max() < 1e-5

@pytest.mark.parametrize('pixels, vectors', [(128, 7), (192, 13), (256, 21), (320, 31)])
def test_tiny_pages(pixels, vectors):
    model, _, _ = load('tiny', 'vision', 128, vision_mode=str(pixels))
    assert model.sequence(tiny_batch(model)).shape[1] == 1 + vectors

def test_a_pyramid_of_gain_0_starts_as_mean_pooling():
    """Each block is then gelu(mean of two), and the convolutions still get a gradient, through the gain."""
    encoder = ENCODERS['conv1d_residual'](golden_config(), 16, compression_target=4, conv_gain=0.0)
    x = torch.randn(2, 16, golden_config().hidden_size, generator=torch.Generator().manual_seed(0))
    memory = encoder({'context': None}, lambda ids: x)
    pairs = lambda x: torch.nn.functional.gelu(x.unflatten(1, (-1, 2)).mean(2))
    torch.testing.assert_close(memory[:, :-1], pairs(pairs(x)))
    memory.sum().backward()
    assert all(block.norm2.weight.grad.abs().min() > 0 for block in encoder.pyramid)

def test_clip_block_by_its_formula():
    """With weights of a size at which the 1.702 of the quick GELU shows."""
    torch.manual_seed(0)
    C, n, x = 16, 4, torch.randn(2, 5, 16)
    block = CLIPBlock(C, n).requires_grad_(False)
    for p in block.parameters():
        p.normal_(std=0.7)
    norm = lambda y, layer: (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias
    q, k, v = (norm(x, block.layer_norm1) @ block.self_attn.qkv_proj.weight.T + block.self_attn.qkv_proj.bias).chunk(3, dim=-1)
    heads = []
    for h in range(n):
        q_h, k_h, v_h = (t[..., h * C // n:(h + 1) * C // n] for t in (q, k, v))
        heads.append((q_h @ k_h.mT / (C // n) ** 0.5).softmax(-1) @ v_h)
    y = x + torch.cat(heads, dim=-1) @ block.self_attn.out_proj.weight.T + block.self_attn.out_proj.bias
    z = norm(y, block.layer_norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    expected = y + (z / (1 + (-1.702 * z).exp())) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    assert expected.std() > 5 and (block(x) - expected).abs().max() < 1e-4

def test_random_weights_have_the_size_of_what_they_are_added_to():
    """Learned vectors are as long as embeddings are in the decoder of this width; CLIP's positions have its own std."""
    vision = ENCODERS['vision'](golden_config(), 16)
    for p in (vision.vision_model.embeddings.class_embedding, vision.vision_model.embeddings.position_embedding.weight):
        assert p.std().item() == pytest.approx(0.02, rel=0.3)
    assert learned(9, 1280).norm(dim=1).tolist() == pytest.approx([1] * 9, rel=0.15)

def test_settings_are_the_keywords():
    for encoder in ENCODERS.values():
        for setting in settings_of(encoder).values():
            assert setting.annotation in (bool, int, float, str, int | None, str | None) and setting.default is not inspect.Parameter.empty
    assert set(PRESETS) == {'tiny', 'full'}
    assert VISION_MODES == {'tiny': 512, 'small': 640, 'base': 1024, 'large': 1280}
