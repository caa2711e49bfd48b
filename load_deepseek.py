"""
The released checkpoint format, both ways, and its tokenizer.

    model, tokenizer, config = load('deepseek-ai/DeepSeek-OCR', 'meanpool', 1000, compression_window_size=4)
    python load_deepseek.py out/vision --export out/ocr      # a run's weights in bf16, for whatever opens DeepSeek-OCR

A checkpoint is a folder: config.json, safetensors files with DeepSeek-OCR's tensor names, tokenizer.json. Our own runs
add "run" to config.json (which encoder, its settings, the lengths) and the tensors of their encoders:

    here                                          in the file
    decoder.layers.3.mlp.experts.up_proj[7]       model.layers.3.mlp.experts.7.up_proj.weight (stacked only here)
    decoder.lm_head.weight                        lm_head.weight
    decoder.<name>, and encoder.<name> of vision  model.<name>
    encoder.<name> of any other encoder           <regime>.<name>
"""
import argparse
import copy
import json
import os
import re
from dataclasses import fields
from pathlib import Path

import huggingface_hub
import safetensors.torch
import tiktoken
import torch

from decoder import Autoencoder, Decoder, DecoderConfig
from encoders import ENCODERS, VisionConfig, settings_of
from render import check, explain, run_main

# Models without weights, as the config.json that they would have. What is not here is as in DeepSeek-OCR.
PRESETS = {'full': {'tokenizer': 'bytes', 'n_routed_experts': 64}, 'tiny': {
    'tokenizer': 'bytes', 'language_config': dict(
        vocab_size=259, hidden_size=128, intermediate_size=352, moe_intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2),
    'vision_config': {'image_size': 256, 'width': {
        'sam_vit_b': {'width': 96, 'layers': 4, 'heads': 3, 'global_attn_indexes': [1, 3]},
        'clip-l-14-224': {'width': 128, 'layers': 4, 'heads': 4}}}}}
VISION = ('model.sam_model.', 'model.vision_model.', 'model.projector.', 'model.image_newline', 'model.view_seperator')
# What config.json may ask of the decoder. A checkpoint that asks for anything else is refused.
SUPPORTED = {
    'model_type': ('deepseek_v2', 'deepseek_vl_v2', 'DeepseekOCR', 'llama', 'mistral'), 'hidden_act': ('silu',),
    'attention_bias': (False,), 'mlp_bias': (False,), 'attention_dropout': (0,), 'pretraining_tp': (1,),
    'sliding_window': (), 'rope_type': ('default',), 'type': ('default',), 'factor': (1,), 'use_mla': (False,),
    'partial_rotary_factor': (1,), 'topk_method': ('greedy',), 'scoring_func': ('softmax',), 'norm_topk_prob': (False,),
    'routed_scaling_factor': (1,), 'moe_layer_freq': (1,)}

# tokenizer.json splits text in passes. DeepSeek's: digits, runs of Chinese or kana (K), the rest; SmolLM2's: single
# digits, the rest as in GPT-2. One pattern does it all here, so no part of it may match across the cut of an earlier
# pass. The last one of DeepSeek takes what no pass matches (controls, joiners), because tiktoken would drop it.
PATTERNS = {'deepseek': '|'.join([
    r'\p{N}{1,3}', r'[K]+', r'[!"#$%&\'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+',
    r'[^\r\n\p{L}\p{P}\p{S}]?[[\p{L}\p{M}]--[K]]+', r' ?[[\p{P}\p{S}]--[K]]+[\r\n]*', r'\s*[\r\n]+',
    r'\s+(?![^\s\p{N}K])', r'\s+', r'[^\s\p{L}\p{M}\p{N}\p{P}\p{S}K]+(?![[\p{L}\p{M}]--[K]])',
]).replace('K', r'\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff'),
    'smollm2': r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"}

def read_json(path):
    """A file with a JSON object, as a dict. Raises ValueError."""
    with explain(f'{path}: cannot be read as a JSON object'):
        return {**json.loads(Path(path).read_bytes())}

def fetch(source):
    """The folder of a checkpoint: `source` itself, or a copy from the model hub. Raises ValueError."""
    if Path(source).is_dir():
        return Path(source)
    with explain(f'{source}: no such folder (check the spelling), and not found on the hub'):
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=['*.json', '*.safetensors', '*.py']))

def load_tokenizer(path):
    """tokenizer.json of DeepSeek-OCR (the V3 family) or SmolLM2 as a tiktoken.Encoding with the same ids. The rank of a
    merge is the id of the token it makes, so the vocabulary alone defines the encoding. encode_ordinary reads a special
    string in a text, like <image>, as plain text; Hugging Face does not. Raises ValueError."""
    spec = read_json(path)
    with explain(f'{path}: not a tokenizer of the DeepSeek-V3 family or of SmolLM2'):
        cuts = json.dumps(spec['pre_tokenizer'])
        name = 'deepseek' if r'"\\p{N}{1,3}"' in cuts else 'smollm2' if '"individual_digits": true' in cuts else 'other'
        special = {token['content']: token['id'] for token in spec['added_tokens']}
        # Byte-level BPE writes bytes as characters: printable ones as themselves, the others from U+0100 on.
        others = [b for b in range(256) if b == ord(' ') or not chr(b).isprintable()]
        byte = {chr(b): b for b in range(256)} | {chr(256 + i): b for i, b in enumerate(others)}
        vocab = {token: i for token, i in spec['model']['vocab'].items() if token not in special}
        ranks = {bytes(byte[c] for c in token): i for token, i in vocab.items()}
        return tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens=special)

def tokenizer_of(source):
    """The tokenizer of a preset or checkpoint: its tokenizer.json, or bytes, ids 3 to 258 after BOS, EOS and PAD."""
    if source in PRESETS or read_json(fetch(source) / 'config.json').get('tokenizer') == 'bytes':
        ranks, special = {bytes([b]): 3 + b for b in range(256)}, {'<bos>': 0, '<eos>': 1, '<pad>': 2}
        return tiktoken.Encoding('bytes', pat_str=r'(?s:.)', mergeable_ranks=ranks, special_tokens=special)
    return load_tokenizer(fetch(source) / 'tokenizer.json')

def sizes_from(config):
    """config.json, as a dict, to a DecoderConfig with its VisionConfig. Raises ValueError for what is not SUPPORTED."""
    language = config.get('language_config', config)
    language = {**language, **(language.get('rope_scaling') or {}), **(language.get('rope_parameters') or {})}
    given = {f: language[f.name] for f in fields(DecoderConfig) if language.get(f.name) is not None}
    sizes = DecoderConfig(**{f.name: value if isinstance(value, list) else f.type(value) for f, value in given.items()})
    sizes.n_routed_experts = language.get('n_routed_experts') or 0            # a dense model does not say
    sizes.num_key_value_heads = language.get('num_key_value_heads') or sizes.num_attention_heads
    for name, values in {**SUPPORTED, 'head_dim': (sizes.hidden_size // sizes.num_attention_heads,)}.items():
        check(language.get(name) in (None, *values), f'config.json: {name} {language.get(name)!r} is not supported')
    check(sizes.bos_token_id < sizes.vocab_size, 'config.json: bos_token_id is too large')
    check(not 0 < sizes.n_routed_experts < sizes.num_experts_per_tok, 'config.json: num_experts_per_tok is too large')
    if (vision := config.get('vision_config')) is not None:
        sam, clip = vision['width']['sam_vit_b'], vision['width']['clip-l-14-224']
        sizes.vision = VisionConfig(
            vision['image_size'], sam['width'], sam['layers'], sam['heads'], tuple(sam['global_attn_indexes']),
            clip['width'] // 4, clip['width'], clip['layers'], clip['heads'], 4 * clip['width'])
    return sizes

def open_tensors(folder):
    """The tensors of a folder, or of its index if it has one: {name: the open safetensors file}. Raises ValueError."""
    index, shards, stored = folder / 'model.safetensors.index.json', folder.glob('*.safetensors'), {}
    names = read_json(index)['weight_map'].values() if index.exists() else (path.name for path in shards)
    for path in sorted({folder / name for name in names}):
        with explain(f'{path}: missing, truncated or not a safetensors file'):
            file = safetensors.safe_open(path, 'pt')
            stored.update(dict.fromkeys(file.keys(), file))
    check(stored, f'{folder}: no *.safetensors, so no weights')
    return stored

def released_tensors(model, regime):
    """{released name: tensor} of an Autoencoder: views of its own parameters, experts one by one."""
    tensors, prefix = {}, {'decoder': 'model', 'encoder': 'model' if regime == 'vision' else regime}
    for name, p in model.state_dict().items():
        part, rest = name.split('.', 1)
        name = rest if name == 'decoder.lm_head.weight' else f'{prefix[part]}.{rest}'
        if part == 'decoder' and '.experts.' in name:
            tensors |= {name.replace('experts.', f'experts.{e}.') + '.weight': expert for e, expert in enumerate(p)}
        else:
            tensors[name] = p
    return tensors

def fill(model, regime, stored, device, source):
    """Copy the tensors of open_tensors() into a model whose decoder is on the meta device and goes to `device`. Those
    of another encoder are skipped. Raises ValueError for a tensor that is missing, unexpected or of another shape."""
    expected = {name: list(tensor.shape) for name, tensor in released_tensors(model, regime).items()}
    others = tuple(f'{name}.' for name in ENCODERS if name != regime) + (VISION if regime != 'vision' else ())
    skipped = {name for name in stored if name.startswith(others)}
    if skipped:
        print(f'{source}: skipped {len(skipped)} tensors of another encoder ({min(skipped)} ...)')
    for name in sorted(expected.keys() | stored.keys() - skipped):
        found = stored[name].get_slice(name).get_shape() if name in stored else 'missing'
        needed = expected.get(name, 'no such tensor')
        check(found == needed, f'{source}: tensor {name} is {found}, {regime} needs {needed}')
    model.decoder.to_empty(device=device)
    for name, tensor in released_tensors(model, regime).items():              # again, since the decoder has moved
        tensor.copy_(stored[name].get_tensor(name))

def load(source, regime, context, objective='reconstruction', hybrid=0, device='cpu', dtype=torch.float32, **settings):
    """Build an Autoencoder from a preset, a folder or a hub id -> model, tokenizer, config with these choices as "run".
    context: tokens in a segment. settings: keywords of the encoder's class; None is its default. An encoder that the
    checkpoint does not have starts from random weights. Raises ValueError or OSError for what does not exist or fit."""
    config = copy.deepcopy(PRESETS[source]) if source in PRESETS else read_json(fetch(source) / 'config.json')
    stored = {} if source in PRESETS else open_tensors(fetch(source))
    run, known = config.get('run', {}), settings_of(ENCODERS[regime])
    settings = {name: value for name, value in settings.items() if value is not None}
    for name in settings.keys() - known.keys():
        raise ValueError(f'--{name}: not a setting of {regime}, which has {", ".join(known) or "none"}')
    most = context if objective == 'lm' else max(context - 1, 0)
    check(0 <= hybrid <= most, f'--hybrid_text_tokens {hybrid}: must leave some of the {context} context tokens')
    with explain(f'{source}: config.json does not describe a model'), torch.device('meta' if stored else device):
        sizes = sizes_from(config)
        decoder = Decoder(sizes).to(dtype)     # on meta: no memory and no random numbers for what will be read
    with torch.device(device):                 # the checkpoint may not have this encoder
        encoder = ENCODERS[regime](sizes, context, **settings).to(dtype)
    tokenizer, prompt = tokenizer_of(source), getattr(encoder, 'prompt', '')
    for special in set(re.findall(r'<\|.*?\|>', prompt)) - tokenizer.special_tokens_set:
        raise ValueError(f'--vision_prompt: the tokenizer has no {special}')
    model = Autoencoder(encoder, decoder, objective, tokenizer.encode(prompt, allowed_special='all'), hybrid)

    has_encoder = any(name.startswith(VISION if regime == 'vision' else f'{regime}.') for name in stored)
    if stored:
        fill(model if has_encoder else torch.nn.ModuleDict({'decoder': decoder}), regime, stored, device, source)
    if stored and not has_encoder and list(encoder.parameters()):
        print(f'{source}: has no {regime} encoder, so it starts from random weights')
    for name, p in known.items():
        value = getattr(encoder, name, None)   # the resolved value of a default of None
        settings[name] = value if isinstance(value, (int, float, str)) else settings.get(name, p.default)
    run = {**run, 'regime': regime, 'context': context, 'objective': objective, 'hybrid': hybrid, 'settings': settings,
           'pretrained_encoder': has_encoder and run.get('pretrained_encoder', True)}
    return model, tokenizer, {**config, 'run': run}

def load_run(folder, device='cpu', dtype=torch.float32):
    """load() with the choices that a run was made with."""
    with explain(f'{folder}: not a run of train.py; a plain model goes to --model'):
        run = read_json(fetch(folder) / 'config.json')['run']
        choices = {**run['settings'], **{name: run[name] for name in ('regime', 'context', 'objective', 'hybrid')}}
    check(run['regime'] in ENCODERS, f'{folder}: its encoder, {run["regime"]}, is not registered in encoders.py')
    return load(folder, device=device, dtype=dtype, **choices)

def write_atomic(path, write):
    """Have write(path) fill a temporary file, flush it to disk and rename it, so that `path` is always whole."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        with explain(f'{path}: cannot be written'):
            write(temporary)
            with open(temporary, 'rb+') as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

def save(tensors, config, folder, step=0, source=None):
    """Write released_tensors(), in their own dtype, and load()'s config as a checkpoint folder. The weights are renamed
    last and carry the step. Tokenizer and code are copied from the folder `source`. Raises ValueError or OSError."""
    folder = Path(folder)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for file in [*Path(source).glob('*token*.json'), *Path(source).glob('*.py')] if source else []:
        write_atomic(folder / file.name, lambda path: path.write_bytes(file.read_bytes()))
    write_atomic(folder / 'config.json', lambda path: path.write_text(json.dumps(config, indent=1), encoding='utf-8'))
    write_atomic(folder / 'model.safetensors',
                 lambda path: safetensors.torch.save_file(tensors, path, {'format': 'pt', 'step': str(step)}))

def main(argv=None):
    """The command line: a run's weights in bf16, in a new folder."""
    parser = argparse.ArgumentParser(description="Write a run's weights in bf16, with DeepSeek-OCR's names.")
    parser.add_argument('run', help='folder of a run')
    parser.add_argument('--export', required=True, metavar='DIR', help='new folder for the checkpoint')
    args = parser.parse_args(argv)
    check(not Path(args.export).exists(), f'{args.export}: exists already')
    model, _, config = load_run(args.run, dtype=torch.bfloat16)
    save(released_tensors(model, config['run']['regime']), config, args.export, source=args.run)
    print(f'{args.export}: written in bf16')

if __name__ == '__main__':
    run_main(main)
