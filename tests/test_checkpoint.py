"""The released format: names, shapes and strictness, both ways."""
import copy
import json
import os

import pytest
import torch
from conftest import GOLDENS, golden_model
from encoders import ENCODERS
from load_deepseek import PRESETS, load, load_run, read_json, released_tensors, save, sizes_from, tokenizer_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from decoder import Autoencoder, Block, Decoder, DecoderConfig, Gather

@pytest.mark.parametrize('regime', ENCODERS)
def test_load_gives_the_released_weights(released, weights, regime, capsys):
    model, tokenizer, config = load(str(released), regime, 1000)
    expected = golden_model(weights, regime)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        if regime == 'vision' or name.startswith('decoder'):
            assert torch.equal(ours, theirs), name
    said = capsys.readouterr().out
    assert ('skipped 112 tensors of another encoder' in said) == (regime != 'vision')
    assert ('starts from random weights' in said) == (regime in ('meanpool', 'conv1d_residual'))
    assert config['run']['pretrained_encoder'] == (regime == 'vision')
    assert config['vision_config'] == read_json(released / 'config.json')['vision_config']

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('regime', ENCODERS)
def test_load_save_load_is_bit_exact(released, tmp_path, regime, dtype):
    model, _, config = load(str(released), regime, 1000, 'lm', 5, dtype=dtype)
    save(released_tensors(model, config['run']['regime']), config, tmp_path / 'run', 17, released)
    again, tokenizer, config_again = load_run(tmp_path / 'run', dtype=dtype)
    assert tokenizer.to_str() == tokenizer_of(str(released)).to_str() and again.objective == 'lm' and again.hybrid == 5
    assert config_again['run'] == config['run']
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert a.dtype == b.dtype == dtype and torch.equal(a, b), name
    assert safe_open(tmp_path / 'run' / 'model.safetensors', 'pt').metadata() == {'format': 'pt', 'step': '17'}
    save(released_tensors(again, config_again['run']['regime']), config_again, tmp_path / 'twice', 17, tmp_path / 'run')
    for file in (tmp_path / 'run').glob('*.json'):
        assert file.read_bytes() == (tmp_path / 'twice' / file.name).read_bytes(), file.name
    once, twice = (load_file(tmp_path / name / 'model.safetensors') for name in ('run', 'twice'))     # its header has no fixed order
    assert once.keys() == twice.keys() and all(torch.equal(once[k], twice[k]) for k in once)

def test_export_is_the_released_checkpoint(released, tmp_path):
    """Loaded and saved in bf16, the vision model is every released tensor, bit by bit, under its name."""
    model, _, config = load(str(released), 'vision', 1000, dtype=torch.bfloat16)
    save(released_tensors(model, 'vision'), config, tmp_path / 'ocr', source=released)
    ours = load_file(tmp_path / 'ocr' / 'model.safetensors')
    theirs = {k: v for file in released.glob('*.safetensors') for k, v in load_file(file).items()}
    assert ours.keys() == theirs.keys()
    assert all(ours[k].dtype == torch.bfloat16 and torch.equal(ours[k], theirs[k]) for k in theirs)
    assert (tmp_path / 'ocr' / 'tokenizer.json').exists() and read_json(tmp_path / 'ocr' / 'config.json')['torch_dtype'] == 'bfloat16'

def test_a_run_of_a_preset_finds_its_tokenizer(tmp_path):
    for name, config in PRESETS.items():
        (tmp_path / 'config.json').write_text(json.dumps(config), encoding='utf-8')
        assert tokenizer_of(str(tmp_path)).to_str() == tokenizer_of(name).to_str()

def test_full_size_names_and_shapes():
    """What save would write for the vision model at full size is what DeepSeek-OCR's checkpoint holds: 2710 names, 6.67 GB in bf16."""
    sizes = sizes_from(read_json(GOLDENS / 'released_config.json'))
    with torch.device('meta'):
        model = Autoencoder(ENCODERS['vision'](sizes, 1000), Decoder(sizes))
    ours = {name: list(t.shape) for name, t in released_tensors(model, 'vision').items()}
    theirs = {k: v['shape'] for k, v in read_json(GOLDENS / 'deepseek_ocr_tensors.json')['tensors'].items()}
    assert ours == theirs
    assert len(ours) == 2710 and 2 * sum(t.numel() for t in released_tensors(model, 'vision').values()) == 6_672_212_480
    count = lambda part: sum(p.numel() for p in part.parameters())
    assert count(model.decoder) == 2_934_734_080 and count(model.encoder) == 401_369_600 + 2 * 1280
    for target, expected in ((500, 13_113_600), (125, 39_338_240), (32, 65_562_880)):
        with torch.device('meta'):
            assert count(ENCODERS['conv1d_residual'](sizes, 1000, compression_target=target)) == expected

def test_llama_is_the_same_decoder(tmp_path):
    """Dense layers, tied embeddings and shared key/value heads: as the untied model with these heads repeated, and bit-exact both ways."""
    config = dict(model_type='llama', hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, intermediate_size=64,
                  vocab_size=259, rms_norm_eps=1e-5, rope_theta=1e5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    sizes = sizes_from(config)
    assert (sizes.n_routed_experts, sizes.rope_theta, sizes.bos_token_id) == (0, 1e5, 1) and DecoderConfig().n_routed_experts == 64
    tied, full = Decoder(sizes), Decoder(sizes_from({**config, 'tie_word_embeddings': False, 'num_key_value_heads': None}))
    weights = {k: v.unflatten(0, (2, 8)).repeat_interleave(3, dim=0).flatten(0, 1) if 'k_proj' in k or 'v_proj' in k else v
               for k, v in tied.state_dict().items()}
    full.load_state_dict({**weights, 'lm_head.weight': 2 * weights['embed_tokens.weight']})
    x = torch.randn(2, 9, 48)
    assert torch.allclose(2 * tied.logits(tied(x)[0]), full.logits(full(x)[0]), atol=1e-5)
    save(released_tensors(Autoencoder(ENCODERS['text'](sizes, 8), tied), 'text'), {**config, 'tokenizer': 'bytes'}, tmp_path / 'llama')
    model, _, again = load(str(tmp_path / 'llama'), 'meanpool', 8)
    assert 'lm_head.weight' not in load_file(next((tmp_path / 'llama').glob('*.safetensors')))
    assert all(torch.equal(a, b) for a, b in zip(tied.parameters(), model.decoder.parameters(), strict=True))
    assert model({'context': torch.full((1, 8), 5)})[0].shape == (1, 8)

@pytest.mark.parametrize('regime', ['meanpool', 'vision'])
def test_a_wrong_tensor_is_named(released, regime):
    name = 'model.layers.1.mlp.experts.5.up_proj.weight'
    holder = next(p for p in released.glob('*.safetensors') if name in load_file(p))
    whole = {name: tensor.clone() for name, tensor in load_file(holder).items()}     # safetensors 0.5 maps the file
    for change, message in ((lambda t: t.pop(name), 'missing'), (lambda t: t.update({name: t[name][:, 1:].contiguous()}), '[48, 63]'),
                            (lambda t: t.update({name: t[name].to(torch.int8)}), 'torch.int8'),
                            (lambda t: t.update({'model.extra': torch.zeros(3)}), 'model.extra')):
        tensors = copy.copy(whole)
        change(tensors)
        save_file(tensors, holder)
        with pytest.raises(ValueError) as e:
            load(str(released), regime, 1000)
        assert message in str(e.value) and '\n' not in str(e.value) and ('extra' in message or name in str(e.value))

def test_broken_folders_are_refused(released, tmp_path):
    def refused(message, source=released, regime='vision', **settings):
        with pytest.raises(ValueError) as e:
            load(str(source), regime, 1000, **settings)
        assert message in str(e.value) and '\n' not in str(e.value), e.value

    refused('[1000, 500, 250, 125, 63, 32, 16, 8, 4, 2, 1]', regime='conv1d_residual', compression_target=111)
    config = read_json(released / 'config.json')
    (tmp_path / 'bare').mkdir()
    (tmp_path / 'bare' / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    refused('no weights', source=tmp_path / 'bare')
    for index in ('{"weight_map": {}}', '{"weight_map": null}', '{}'):
        (tmp_path / 'bare' / 'model.safetensors.index.json').write_text(index, encoding='utf-8')
        refused('no tensors in model.safetensors.index.json', source=tmp_path / 'bare')
    save_file({}, tmp_path / 'bare' / 'model.safetensors')
    refused("no tensors in ['model.safetensors']", source=tmp_path / 'bare')
    for file, size in (('model-00002-of-000002.safetensors', 1000), ('model-00002-of-000002.safetensors', 0)):
        with open(released / file, 'rb+') as f:
            f.truncate(size)
        refused(file)
    (released / 'model-00002-of-000002.safetensors').unlink()
    with pytest.raises(OSError, match='model-00002-of-000002.safetensors'):
        load(str(released), 'vision', 1000)
    (released / 'config.json').write_text('{', encoding='utf-8')
    refused('config.json')

def test_another_regime_from_a_run(tmp_path, capsys):
    """The decoder is kept, the other encoder left out with one line, and a new one that starts anew is said to."""
    model, _, config = load('tiny', 'conv1d_residual', 128)
    save(released_tensors(model, config['run']['regime']), config, tmp_path / 'conv')
    other, _, config = load(str(tmp_path / 'conv'), 'meanpool', 128)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and 'skipped 13 tensors of another encoder' in said[0] and 'has no meanpool encoder' in said[1]
    assert all(torch.equal(a, b) for a, b in zip(model.decoder.parameters(), other.decoder.parameters()))
    assert not config['run']['pretrained_encoder']
    load(str(tmp_path / 'conv'), 'vision', 128)
    assert 'has no vision encoder, so it starts from random weights' in capsys.readouterr().out
    with pytest.raises(ValueError, match='conv1d_residual.pyramid.2'):
        load(str(tmp_path / 'conv'), 'conv1d_residual', 128, compression_target=16)

def change_config(folder, change):
    (folder / 'config.json').write_text(json.dumps(change(read_json(folder / 'config.json'))), encoding='utf-8')

def test_each_tensor_is_read_from_its_own_file(released, tmp_path, capsys):
    """A stray file is not read; a name that the index gives to another file neither; model.safetensors comes before an old index."""
    expected = load(str(released), 'text', 1000)[0]
    name = 'model.norm.weight'
    same = lambda: all(torch.equal(a, b) for a, b in zip(expected.parameters(), load(str(released), 'text', 1000)[0].parameters(), strict=True))
    save_file({name: torch.zeros(64)}, released / 'zz_ema.safetensors')
    assert same()
    for file in released.glob('model-*'):                                    # both shards have the tensor, one of them an old one
        tensors = load_file(file)
        save_file({**tensors, name: tensors.get(name, torch.zeros(64, dtype=torch.bfloat16))}, file)
    assert same()
    model, _, config = load(str(released), 'text', 1000)
    torch.nn.init.ones_(model.decoder.norm.weight)
    save(released_tensors(model, 'text'), config, released)                  # beside the old shards and their index
    assert torch.equal(load(str(released), 'text', 1000)[0].decoder.norm.weight, torch.ones(64))

def test_tied_embeddings_and_tables(tmp_path):
    """An lm_head stored beside a tied embedding has to be equal; tables of angles are ignored; scales of another number format are not."""
    config = dict(model_type='llama', hidden_size=48, num_hidden_layers=1, num_attention_heads=6, intermediate_size=64, vocab_size=259,
                  tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, tokenizer='bytes')
    model = Autoencoder(ENCODERS['text'](sizes_from(config), 8), Decoder(sizes_from(config)))
    tensors = released_tensors(model, 'text')
    angles = {'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(4)}
    for head, extra, message in ((tensors['model.embed_tokens.weight'], angles, None), (torch.zeros(259, 48), {}, 'tied embeddings'),
                                 (tensors['model.embed_tokens.weight'], {'model.layers.0.mlp.up_proj.weight_scale_inv': torch.ones(1)}, 'scale_inv')):
        save({**tensors, 'lm_head.weight': head.clone(), **extra}, config, tmp_path)
        if message is None:
            again = load(str(tmp_path), 'text', 8)[0]
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        else:
            with pytest.raises(ValueError, match=message):
                load(str(tmp_path), 'text', 8)

def test_relatives(released, tmp_path):
    """Unlimited-OCR, whose attention is another, is refused by name at either level; DeepSeek-OCR 2 gives its decoder, but no vision."""
    original = (released / 'config.json').read_text(encoding='utf-8')
    in_language = lambda **new: lambda c: {**c, 'language_config': {**c['language_config'], **new}}
    for change, message in ((lambda c: {**c, 'model_type': 'unlimited-ocr'}, 'unlimited-ocr'), (in_language(sliding_window_size=128), 'sliding_window_size'),
                            (lambda c: {**c, 'sliding_window': 128}, 'sliding_window'), (in_language(bos_token_id=None), 'bos_token_id'),
                            (in_language(eos_token_id=None), 'eos_token_id'), (in_language(vocab_size=200), 'vocab_size 200'),
                            (in_language(bos_token_id=512), 'bos_token_id is not below'), (in_language(n_routed_experts=2), 'more than n_routed_experts')):
        (released / 'config.json').write_text(original, encoding='utf-8')
        change_config(released, change)
        with pytest.raises(ValueError, match=message):
            load(str(released), 'text', 1000)
    (released / 'config.json').write_text(original, encoding='utf-8')
    sam = read_json(released / 'config.json')['vision_config']['width']['sam_vit_b']
    change_config(released, lambda c: {**c, 'model_type': 'deepseek_vl_v2', 'vision_config': {'width': {'sam_vit_b': sam, 'qwen2-0-5b': {'dim': 896}}}})
    for file in list(released.glob('model-*')) + [released / 'model.safetensors.index.json']:
        tensors = load_file(file) if file.suffix == '.safetensors' else {}
        kept = {k: v for k, v in tensors.items() if 'vision_model' not in k and 'image_newline' not in k}
        if tensors:
            save_file({**kept, 'model.qwen2_model.layer': torch.ones(2)} if '00001' in file.name else kept, file)
    index = {k: file.name for file in sorted(released.glob('model-*')) for k in load_file(file)}
    (released / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}), encoding='utf-8')
    for regime in ('text', 'meanpool', 'conv1d_residual'):
        model = load(str(released), regime, 100)[0]
        assert model({'context': torch.full((1, 100), 5)})[0].isfinite().all()
    with pytest.raises(ValueError, match='vision encoder is not SAM and CLIP'):
        load(str(released), 'vision', 100)

class Shared(torch.nn.Module):
    """Two layers that are one."""

    def __init__(self, config, context_length):
        super().__init__()
        layer = torch.nn.Linear(config.hidden_size, config.hidden_size)
        self.layers = torch.nn.ModuleList([layer, layer])
        self.register_buffer('codebook', torch.randn(3))

    def forward(self, batch, embed):
        return self.layers[1](self.layers[0](embed(batch['context'])))

def test_a_shared_layer_is_saved_once(tmp_path, monkeypatch):
    monkeypatch.setitem(ENCODERS, 'shared', Shared)
    model, _, config = load('tiny', 'shared', 8)
    save(released_tensors(model, 'shared'), config, tmp_path)
    assert {k for k in load_file(tmp_path / 'model.safetensors') if 'shared.' in k} == {'shared.layers.0.weight', 'shared.layers.0.bias', 'shared.codebook'}
    again = load_run(tmp_path)[0].encoder
    assert again.layers[0] is again.layers[1] and torch.equal(again.codebook, model.encoder.codebook)
    assert torch.equal(again.layers[0].weight, model.encoder.layers[0].weight)

@pytest.mark.parametrize('umask', [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        model, _, config = load('tiny', 'text', 8)
        save(released_tensors(model, 'text'), config, tmp_path / 'run')
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / 'run').iterdir()} == {0o666 & ~umask}

def test_each_module_initialises_itself():
    """A block built alone, as an encoder of one's own would, has weights of the decoder's size; its gradient is that of plain indexing."""
    config = DecoderConfig(hidden_size=64, intermediate_size=64, moe_intermediate_size=48, num_attention_heads=2, num_key_value_heads=2,
                           n_routed_experts=4, num_experts_per_tok=2)
    torch.empty(10_000_000).fill_(1e30)                                      # whatever memory held before
    block = Block(config, 1)
    for p in block.parameters():
        assert p.dim() == 1 or p.std().item() == pytest.approx(0.02 * (1280 / 64) ** 0.5, rel=0.1)
    x, index = torch.randn(6, 5, dtype=torch.float64), torch.randperm(12)
    where, grad = index.argsort(), torch.randn(12, 5, dtype=torch.float64)
    grads = []
    for pick in (lambda x: Gather.apply(x, index // 2, where, 2), lambda x: x[index // 2]):
        leaf = x.clone().requires_grad_()
        y = pick(leaf)
        y.backward(grad)
        grads.append((y, leaf.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.allclose(grads[0][1], grads[1][1], atol=1e-12)
