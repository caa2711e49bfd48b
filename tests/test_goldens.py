"""Every number of the authors' code that the golden files hold, at the tolerances that its own rounding allows."""
import hashlib

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDENS, close, golden_image, golden_model
from decoder import OBJECTIVES
from load_deepseek import released_tensors
import encoders
import json

LOSS_CASES = sorted(json.loads((GOLDENS / 'losses_tiny.json').read_text(encoding='utf-8'))['cases'])
# Two experts of nearly the same probability: other rounding may route a token otherwise.
NEAR_TIES = ('conv.t125.reconstruction.h100', 'vision.small.reconstruction.h100', 'meanpool.w7s7.reconstruction.h0',
             'meanpool.w9s9.reconstruction.h0', 'text.200.reconstruction')

# ------------------------------------------------------------------------------------------------------------- decoder

def test_decoder_layers_and_logits(weights, decoder_golden):
    g, _ = decoder_golden
    decoder = golden_model(weights, 'text').decoder.eval()
    seen = {}
    for i, layer in enumerate(decoder.layers):
        layer.self_attn.register_forward_hook(lambda m, a, out, i=i: seen.update({f'layer{i}.attn_out': out}))
        layer.mlp.register_forward_hook(lambda m, a, out, i=i: seen.update({f'layer{i}.mlp_out': out[0] if m_is_moe(m) else out}))
        layer.register_forward_hook(lambda m, a, out, i=i: seen.update({f'layer{i}.out': out[0]}))
        if m_is_moe(layer.mlp):
            layer.mlp.shared_experts.register_forward_hook(lambda m, a, out, i=i: seen.update({f'layer{i}.shared_out': out}))
    x = decoder.embed_tokens(g['input_ids'])
    close(x, g['embed.out'])
    hidden, _ = decoder(x)
    expected = {k[5:]: v for k, v in g.items() if k.startswith('eval.layer')}
    assert seen.keys() == expected.keys()
    for name in expected:
        close(seen[name], expected[name])
    close(hidden, g['eval.final_norm.out'])
    close(decoder.logits(hidden), g['eval.logits'])

def m_is_moe(module):
    return hasattr(module, 'experts')

def test_router_and_balance_loss(weights, decoder_golden):
    g, _ = decoder_golden
    decoder = golden_model(weights, 'text').decoder.train()
    routed, balance = {}, {}
    for i, layer in enumerate(decoder.layers):
        if m_is_moe(layer.mlp):
            layer.mlp.register_forward_hook(lambda m, a, out, i=i: routed.update({i: m.route(a[0])}))
            layer.mlp.register_forward_hook(lambda m, a, out, i=i: balance.update({i: out[1]}))
    _, total = decoder(decoder.embed_tokens(g['input_ids']))
    for i in (1, 2):
        probs, top_p, top_e = (t.flatten(0, 1) for t in routed[i])
        close(probs, g[f'router.layer{i}.probs'])
        top_e, by_expert = top_e.sort(dim=1)                                # the order of the k experts means nothing
        assert torch.equal(top_e, g[f'router.layer{i}.topk_idx'])
        close(top_p.gather(1, by_expert), g[f'router.layer{i}.topk_weight'])
        close(balance[i], g[f'train.aux_loss.layer{i}'], 1e-7)
    close(total, balance[1] + balance[2], 1e-8)

def test_loss(weights, decoder_golden):
    g, description = decoder_golden
    decoder = golden_model(weights, 'text').decoder
    hidden, _ = decoder(decoder.embed_tokens(g['input_ids']))
    target = g['labels'][:, 1:]
    kept = target != -100
    for chunk in (7, 1024):                                                 # the chunks must not show
        losses, hits = decoder.token_losses(hidden[:, :-1], target.clamp(min=0), chunk)
        assert losses[kept].mean().item() == pytest.approx(description['loss_eval_mode'], abs=1e-5)
        assert torch.equal(hits, decoder.logits(hidden[:, :-1]).argmax(-1) == target.clamp(min=0))

def test_greedy_generation(weights, decoder_golden):
    g, _ = decoder_golden
    model = golden_model(weights, 'text', context=19).eval()
    model.decoder.config.bos_token_id = g['gen.prompt'][0, 0].item()        # the golden prompt does not begin with the usual 0
    batch = {'context': g['gen.prompt'][:, 1:]}
    assert model.generate(batch, 16)[0].tolist() == g['gen.tokens'].tolist()
    ids = torch.cat([g['gen.prompt'], g['gen.tokens'][None]], dim=1)
    hidden, _ = model.decoder(model.decoder.embed_tokens(ids))
    close(model.decoder.logits(hidden)[0, 19:-1], g['gen.logits'])

# ------------------------------------------------------------------------------------------------------------- encoders

def batch_of(embeddings):
    """A batch and an embedding under which its context embeds to these vectors (B, T, D)."""
    B, T, D = embeddings.shape
    table = torch.nn.Embedding.from_pretrained(embeddings.reshape(B * T, D))
    return {'context': torch.arange(B * T).view(B, T)}, table

@pytest.mark.parametrize('w, s', [(4, 2), (5, 8), (7, 7), (9, 9)])
def test_meanpool(weights, compressor_golden, w, s):
    g, description = compressor_golden
    model = golden_model(weights, 'meanpool', 100, compression_window_size=w, compression_stride=s)
    memory = model.encoder(*batch_of(g['meanpool.in']))
    close(memory[:, :-1], g[f'meanpool.out.w{w}s{s}'], 1e-6)
    close(memory[:, -1], weights['meanpool.separator'].expand(2, -1), 0)
    positions = golden_model(weights, 'meanpool', 1000, compression_window_size=w, compression_stride=s) \
        .encoder(*batch_of(torch.zeros(1, 1000, 64))).shape[1]
    assert positions == description['meanpool'][f'w{w}s{s}']['tokens_for_1000_incl_separator']

@pytest.mark.parametrize('L', [2, 37, 100, 101])
@pytest.mark.parametrize('blocks', [1, 2, 3])
def test_conv1d_residual(weights, compressor_golden, L, blocks):
    g, description = compressor_golden
    expected = g[f'conv.out.L{L}.blocks{blocks}']
    if L > 2:
        memory = golden_model(weights, 'conv1d_residual', L, compression_target=expected.shape[1]).encoder(*batch_of(g[f'conv.in.L{L}']))
        close(memory[:, :-1], expected)
        close(memory[:, -1], weights['conv1d_residual.separator'].expand(2, -1), 0)
    else:                                                                   # a chain ends at 1; the block itself goes on
        x = g['conv.in.L2'].transpose(1, 2)
        for block in golden_model(weights, 'conv1d_residual', 100, compression_target=13).encoder.pyramid[:blocks]:
            x = block(x)
        close(x.transpose(1, 2), expected)
    assert expected.shape[1] == description['conv_out_lengths'][f'L{L}.blocks{blocks}']

def test_conv_block_inside(weights, compressor_golden):
    g, _ = compressor_golden
    block = golden_model(weights, 'conv1d_residual', 101, compression_target=51).encoder.pyramid[0]
    x = g['conv.in.L101'].transpose(1, 2)
    conv1 = block.conv1(x)
    norm1 = block.norm1(conv1)
    norm2 = block.norm2(block.conv2(F.gelu(norm1)))
    for ours, name in ((conv1, 'conv1'), (norm1, 'norm1'), (norm2, 'norm2'), (F.adaptive_avg_pool1d(x, 51), 'skip')):
        close(ours.transpose(1, 2), g[f'conv.mid.L101.{name}'])

def test_interpolated_positions(weights, vision_golden):
    g, _ = vision_golden
    for grid in (32, 40, 80):
        close(encoders.resize_positions(weights['model.sam_model.pos_embed'], grid)[:, ::8, ::8], g[f'interp.sam_pos.{grid}'])
    table = weights['model.vision_model.embeddings.position_embedding.weight']
    for grid in (8, 10, 20):
        ours = encoders.resize_positions(table[1:].view(1, 16, 16, -1), grid).flatten(1, 2)
        close(torch.cat([table[None, :1], ours], dim=1), g[f'interp.clip_pos.{grid}'])
    for L in (63, 79, 159):
        offsets = encoders.relative_positions(weights['model.sam_model.blocks.1.attn.rel_pos_h'], (L + 1) // 2)
        rows = torch.cat([offsets[0].flip(0), offsets[1:, 0]])              # from the most negative offset to the most positive
        close(rows, g[f'interp.rel_pos.{L}'])

@pytest.mark.parametrize('size', [512, 640, 1024, 1280])
def test_vision(weights, vision_golden, size):
    g, description = vision_golden
    image = golden_image(size)
    assert hashlib.sha256(image.numpy().tobytes()).hexdigest() == description['images'][str(size)]['sha256_of_uint8_CHW_bytes']
    vision = golden_model(weights, 'vision', vision_mode=str(size)).encoder.eval()
    seen = {}
    keep = lambda name, pick: lambda module, args, out: seen.update({name: pick(out)})
    for i, block in enumerate(vision.sam_model.blocks):
        block.register_forward_hook(keep(f'sam_block{i}', lambda out: out[:, ::8, ::8]))
    vision.sam_model.blocks[0].register_forward_pre_hook(lambda module, args: seen.update(sam_embed=args[0][:, ::8, ::8]))
    vision.sam_model.neck.register_forward_hook(keep('sam_neck', lambda out: out[:, :, ::8, ::8]))
    vision.sam_model.net_2.register_forward_hook(keep('sam_net2', lambda out: out[:, :, ::4, ::4]))
    vision.sam_model.register_forward_hook(keep('sam', lambda out: out))
    vision.vision_model.pre_layrnorm.register_forward_hook(keep('clip_pre', lambda out: out))
    for i, layer in enumerate(vision.vision_model.transformer.layers):
        layer.register_forward_hook(keep(f'clip_layer{i}', lambda out: out))
    vision.vision_model.register_forward_hook(keep('clip', lambda out: out))
    vision.projector.layers.register_forward_hook(keep('projector', lambda out: out))
    with torch.no_grad():
        tokens = vision({'image': image[None]}, None)
    assert tokens.shape[1] == description['images'][str(size)]['tokens'] == (size // 64) * (size // 64 + 1) + 1
    for name in [k.split('.')[2] for k in g if k.startswith(f'mid.{size}.')]:
        close(seen[name], g[f'mid.{size}.{name}'])
    for name in ('sam', 'clip', 'projector'):
        close(seen[name], g[f'out.{size}.{name}'])
    close(tokens[0], g[f'out.{size}.tokens'])

def test_vision_takes_a_batch(weights):
    vision = golden_model(weights, 'vision', vision_mode='tiny').encoder.eval()
    images = torch.stack([golden_image(512, k) for k in (0, 1)])
    with torch.no_grad():
        close(vision({'image': images}, None), torch.cat([vision({'image': images[k:k + 1]}, None) for k in (0, 1)]))

# --------------------------------------------------------------------------------------------------------------- losses

def model_and_batch(weights, g, case):
    """The model and batch of a loss case."""
    kind, settings, prompt = case['kind'], {}, ()
    context = g['context']
    if kind == 'meanpool':
        settings = {'compression_window_size': case['window_size'], 'compression_stride': case['stride']}
    elif kind == 'conv':
        settings = {'compression_target': case['compression_target']}
    elif kind == 'vision':
        settings = {'vision_mode': case['vision_mode']}
        prompt = [int(i) for i in case.get('vision_prompt', '').split()]
    elif case['objective'] == 'lm':
        settings = {'text_context_tokens': case['context_tokens_kept']}
    else:                                                                   # there the authors truncate the target as well
        context = context[:, 1000 - case['context_tokens_kept']:]
    model = golden_model(weights, {'conv': 'conv1d_residual'}.get(kind, kind), context.shape[1], case['objective'], prompt, case['hybrid'],
                         **settings)
    model.encoder.requires_grad_(case.get('train_encoder', True))
    batch = {'context': context, 'continuation': g['continuation']}
    if kind == 'vision':
        batch['image'] = torch.stack([golden_image(model.encoder.image_size, k) for k in (0, 1)])
    return model, batch

@pytest.mark.parametrize('name', LOSS_CASES)
def test_loss_and_gradients(weights, loss_golden, name):
    g, description = loss_golden
    case = description['cases'][name]
    tolerance = 1e-3 if name in NEAR_TIES else 1e-5
    model, batch = model_and_batch(weights, g, case)
    assert model.sequence(batch).shape[1] == case['first_target_index']
    model.train()
    losses, _, extra = model(batch)
    balance = extra['balance_loss']
    assert losses.shape[1] == case['target_tokens_per_sample']
    assert losses.mean().item() == pytest.approx(case['loss_train'], abs=tolerance)
    assert losses.mean(dim=1).tolist() == pytest.approx(case['loss_per_sample_eval'], abs=tolerance)
    assert balance.item() == pytest.approx(sum(case['aux_losses_train_by_moe_layer']), abs=tolerance / 100)
    first, last = case['first_target_index'] - 1, case['seq_len'] - 2
    hidden, _ = model.decoder(model.sequence(batch, batch[OBJECTIVES[case['objective']]]))
    if name not in NEAR_TIES:
        close(model.decoder.logits(hidden[:, [first, last]]), g[f'{name}.logits_first_last'])
    if 'grad_norms' not in case:
        return

    (losses.mean() + balance).backward()                                    # the authors' effective objective
    grads = gradients(model, name)
    norms = {k: v.norm().item() for k, v in grads.items()}
    released = lambda k: k.replace('meanpool_', 'meanpool.').replace('conv1d_residual_', 'conv1d_residual.')
    relative = 1e-3 if name in NEAR_TIES else 1e-4
    for k, norm in case['grad_norms'].items():
        assert norms[released(k)] == pytest.approx(norm, rel=relative, abs=1e-7), k
    total = sum(n ** 2 for n in norms.values()) ** 0.5
    assert total == pytest.approx(case['grad_norm_total_aux'], rel=relative)
    for k in [k for k in g if k.startswith(f'{name}.grad.')]:
        close(grads[released(k.split('.grad.')[1])], g[k], 1e-4 if name in NEAR_TIES else 1e-5)
    without = {released(k) for k in case['params_without_grad']}
    assert without <= {k for k, p in released_gradients(model).items() if p is None}

def regime_of(name):
    return {'conv': 'conv1d_residual'}.get(name.split('.')[0], name.split('.')[0])

def gradients(model, name):
    """{released name: gradient}, experts one by one."""
    return {k: v for k, v in released_gradients(model, regime_of(name)).items() if v is not None}

def released_gradients(model, regime='vision'):
    names = {p.data_ptr(): p.grad for p in model.parameters()}
    found = {}
    for k, view in released_tensors(model, regime).items():
        if '.experts.' in k and 'shared' not in k:
            e, part = int(k.split('.experts.')[1].split('.')[0]), k.split('.')[-2]
            experts = model.decoder.layers[int(k.split('.')[2])].mlp.experts
            gate, up = experts.gate_up_proj.grad.chunk(2, dim=1)
            found[k] = {'gate_proj': gate, 'up_proj': up, 'down_proj': experts.down_proj.grad}[part][e]
        else:
            found[k] = names[view.data_ptr()]
    return found

def test_gate_gradient_without_balance_loss(weights, loss_golden):
    g, description = loss_golden
    for name, case in description['cases'].items():
        if 'grad_norms_gate_no_aux' in case and name not in NEAR_TIES:
            model, batch = model_and_batch(weights, g, case)
            losses, _, _ = model(batch)
            losses.mean().backward()
            grads = gradients(model, name)
            for k, norm in case['grad_norms_gate_no_aux'].items():
                assert grads[k].norm().item() == pytest.approx(norm, rel=1e-4), (name, k)
            assert sum(v.norm().item() ** 2 for v in grads.values()) ** 0.5 == pytest.approx(case['grad_norm_total_no_aux'], rel=1e-4)
