"""
The released checkpoint format, both ways, and its tokenizer.

    model, tokenizer, config = load('deepseek-ai/DeepSeek-OCR', 'meanpool', 1000, compression_window_size=4)
    python load_deepseek.py out/vision --export out/ocr      # a run's weights in bf16, for whatever opens DeepSeek-OCR

A checkpoint is a folder: config.json, safetensors files under DeepSeek-OCR's tensor names, tokenizer.json. A run
of ours adds "run" to config.json (which encoder, its settings, the lengths) and the tensors of our own encoders:

    here                                          there
    decoder.layers.3.mlp.experts.up_proj[7]       model.layers.3.mlp.experts.7.up_proj.weight  (stacked here only)
    decoder.lm_head.weight                        lm_head.weight
    decoder.<name>, and encoder.<name> of vision  model.<name>
    encoder.<name> of any other encoder           <regime>.<name>
"""
import argparse
import importlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import huggingface_hub
import safetensors.torch
import tiktoken
import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from decoder import Autoencoder, Decoder, DecoderConfig
from encoders import ENCODERS, VisionConfig, settings_of

# Models without weights, as the config.json they would have; what it leaves out is as in DeepSeek-OCR.
PRESETS = {'full': {}, 'tiny': {
    'language_config': dict(
        vocab_size=259, hidden_size=128, intermediate_size=352, moe_intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2),
    'vision_config': {'image_size': 256, 'width': {
        'sam_vit_b': {'width': 96, 'layers': 4, 'heads': 3, 'global_attn_indexes': [1, 3]},
        'clip-l-14-224': {'width': 128, 'layers': 4, 'heads': 4}}}}}
VISION = ('model.sam_model.', 'model.vision_model.', 'model.projector.', 'model.image_newline', 'model.view_seperator')

# tokenizer.json cuts text in passes. DeepSeek's: digits, runs of Chinese or kana (K), the rest; SmolLM2's: single
# digits, the rest as GPT-2. As one pattern, what a later pass would take must stop where an earlier one has cut; and
# DeepSeek's last alternative takes what no pass matches (controls, joiners), because tiktoken would drop it.
PATTERNS = {'deepseek': '|'.join([
    r'\p{N}{1,3}', r'[K]+', r'[!"#$%&\'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+',
    r'[^\r\n\p{L}\p{P}\p{S}]?[[\p{L}\p{M}]--[K]]+', r' ?[[\p{P}\p{S}]--[K]]+[\r\n]*', r'\s*[\r\n]+',
    r'\s+(?![^\s\p{N}K])', r'\s+', r'[^\s\p{L}\p{M}\p{N}\p{P}\p{S}K]+(?![[\p{L}\p{M}]--[K]])',
]).replace('K', r'\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff'),
    'smollm2': r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"}


def read_json(path):
    """A JSON file that must be there. Raises SystemExit."""
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        raise SystemExit(f'{path}: cannot be read ({e})')


def optional(name):
    """A module that not everybody needs. Raises SystemExit with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise SystemExit(f'this takes {name}: pip install {name.split(".")[0]}')


def load_tokenizer(path):
    """tokenizer.json of DeepSeek-OCR (the V3 family) or SmolLM2 as a tiktoken.Encoding with the same ids.

    A merge's rank is the id that it makes, so the vocabulary alone defines the encoding. encode_ordinary takes a
    special string in a text, like <image>, for plain text; Hugging Face's would not. SystemExit for another family.
    """
    spec = read_json(path)
    cuts = json.dumps(spec.get('pre_tokenizer'))
    name = 'deepseek' if r'"\\p{N}{1,3}"' in cuts else 'smollm2' if '"individual_digits": true' in cuts else None
    if name is None:
        raise SystemExit(f'{path}: not a tokenizer of the DeepSeek-V3 family or of SmolLM2')
    special = {token['content']: token['id'] for token in spec['added_tokens']}
    # Byte-level BPE spells bytes as printable characters: printable ones as themselves, the others from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    ranks = {bytes(byte[c] for c in token): i for token, i in spec['model']['vocab'].items() if token not in special}
    return tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens=special)


def tokenizer_of(source):
    """The tokenizer of a checkpoint. Presets, and runs from one, have bytes: ids 3 to 258, behind bos, eos, pad."""
    if source in PRESETS or read_json(fetch(source) / 'config.json').get('run', {}).get('tokenizer') == 'bytes':
        return tiktoken.Encoding('bytes', pat_str=r'(?s:.)', mergeable_ranks={bytes([b]): 3 + b for b in range(256)},
                                 special_tokens={'<bos>': 0, '<eos>': 1, '<pad>': 2})
    return load_tokenizer(fetch(source) / 'tokenizer.json')


def fetch(source):
    """The checkpoint's folder: `source` itself, or what the model hub has under that name. Raises SystemExit."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=['*.json', '*.safetensors', '*.py']))
    except Exception as e:                     # the hub's client raises whatever its transport does
        raise SystemExit(f'{source}: no such folder, and not to be had from the model hub ({type(e).__name__})')


def shape_of(name, stored, default):
    """A tensor's shape as a list, without reading it; `default` if it is not among open_tensors()."""
    return stored[name].get_slice(name).get_shape() if name in stored else default


def sizes_from(config, stored=()):
    """config.json to a DecoderConfig with its VisionConfig. What config.json is silent or stale about (SAM's neck,
    CLIP's MLP) follows from the shapes of open_tensors()."""
    language = config.get('language_config', config)
    sizes = DecoderConfig(**{f.name: language[f.name] for f in fields(DecoderConfig) if f.name in language})
    if language.get('model_type') == 'llama':  # the same decoder without experts
        sizes.n_routed_experts = 0
    if 'vision_config' in config:
        sam, clip = (config['vision_config']['width'][name] for name in ('sam_vit_b', 'clip-l-14-224'))
        neck, _, _, _ = shape_of('model.sam_model.neck.0.weight', stored, [clip['width'] // 4, 0, 0, 0])
        mlp, _ = shape_of('model.vision_model.transformer.layers.0.mlp.fc1.weight', stored, [4 * clip['width'], 0])
        sizes.vision = VisionConfig(
            config['vision_config']['image_size'], sam['width'], sam['layers'], sam['heads'],
            tuple(sam['global_attn_indexes']), neck, clip['width'], clip['layers'], clip['heads'], mlp)
    return sizes


def open_tensors(folder):
    """The tensors of a folder, those of its index if there is one: {name: the open safetensors file that holds it}."""
    index, files, stored = folder / 'model.safetensors.index.json', folder.glob('*.safetensors'), {}
    if index.exists():
        files = {folder / name for name in read_json(index)['weight_map'].values()}
    for path in sorted(files):
        try:
            file = safetensors.safe_open(path, 'pt')
        except (OSError, safetensors.SafetensorError) as e:
            raise SystemExit(f'{path}: missing, truncated or no safetensors file ({e})')
        stored.update(dict.fromkeys(file.keys(), file))
    if not stored:
        raise SystemExit(f'{folder}: no *.safetensors, so no weights')
    return stored


def released_tensors(model, regime):
    """{released name: tensor} of an Autoencoder: views of its own parameters and buffers, experts one by one."""
    tensors = {}
    for name, p in model.state_dict().items():
        part, rest = name.split('.', 1)
        p = p.full_tensor().cpu() if isinstance(p, DTensor) else p            # shards are put together, in a copy
        if part == 'encoder':
            tensors[f'model.{rest}' if regime == 'vision' else f'{regime}.{rest}'] = p
        elif '.experts.' in rest:
            for e, expert in enumerate(p):
                tensors[f'model.{rest.replace("experts.", f"experts.{e}.")}.weight'] = expert
        else:
            tensors[rest if rest.startswith('lm_head') else f'model.{rest}'] = p
    return tensors


def fill(model, regime, stored, device, source):
    """Read the tensors of a model, whose decoder is on the meta device, straight into place: the decoder's to `device`.

    stored: of open_tensors(). source: what messages call it. Strict: a missing, unexpected or misshapen tensor is a
    SystemExit that names it. Those of another registered encoder are left out.
    """
    wanted = {name: list(tensor.shape) for name, tensor in released_tensors(model, regime).items()}
    other = tuple(f'{name}.' for name in ENCODERS if name != regime) + (VISION if regime != 'vision' else ())
    skipped = {name for name in stored if name not in wanted and name.startswith(other)}
    if skipped:
        print(f'{source}: left out {len(skipped)} tensors of another encoder ({min(skipped)} ...)')
    for name in sorted(wanted.keys() | stored.keys() - skipped):
        if (has := shape_of(name, stored, 'missing')) != (wants := wanted.get(name, 'none')):
            raise SystemExit(f'{source}: tensor {name} is {has}, regime {regime} wants {wants}')
    model.decoder.to_empty(device=device)
    for name, tensor in released_tensors(model, regime).items():              # views anew: the others were of no memory
        tensor.copy_(stored[name].get_tensor(name))


def load(source, regime, context, objective='reconstruction', hybrid=0, device='cpu', dtype=torch.float32, **settings):
    """Build an Autoencoder from a preset's name, a folder or a hub id -> (model, tokenizer, config).

    context: tokens a segment. settings: keywords of the encoder's class; None means its default. config: config.json
    with these choices under "run". Weights that the checkpoint has are read by fill(); an encoder that it does not have
    starts from random ones. Raises SystemExit for what does not exist or fit.
    """
    folder = None if source in PRESETS else fetch(source)
    config, stored = (read_json(folder / 'config.json'), open_tensors(folder)) if folder else (PRESETS[source], {})
    if regime not in ENCODERS:
        raise SystemExit(f'--regime {regime}: not one of {", ".join(ENCODERS)}')
    run, known = config.get('run', {}), settings_of(ENCODERS[regime])
    settings = {name: value for name, value in settings.items() if value is not None}
    for name in settings.keys() - known.keys():
        raise SystemExit(f'--{name}: no setting of regime {regime}, which has {", ".join(known) or "none"}')
    if not 0 <= hybrid <= context:
        raise SystemExit(f'--hybrid_text_tokens {hybrid}: not between 0 and the context length {context}')
    sizes = sizes_from(config, stored)
    with torch.device('meta' if stored else device):              # no memory and no random numbers for what is read
        decoder = Decoder(sizes).to(dtype)
    try:
        with torch.device(device):                                # but the checkpoint may not have this encoder
            encoder = ENCODERS[regime](sizes, context, **settings).to(dtype)
    except ValueError as e:
        raise SystemExit(f'--regime {regime}: {e}')
    tokenizer = tokenizer_of(source)
    prompt = getattr(encoder, 'prompt', '')
    for special in set(re.findall(r'<\|.*?\|>', prompt)) - tokenizer.special_tokens_set:
        raise SystemExit(f'--vision_prompt: the tokenizer has no {special}')
    model = Autoencoder(encoder, decoder, objective, tokenizer.encode(prompt, allowed_special='all'), hybrid)

    has_encoder = any(name.startswith(VISION if regime == 'vision' else f'{regime}.') for name in stored)
    if stored:
        fill(model if has_encoder else nn.ModuleDict({'decoder': decoder}), regime, stored, device, source)
    if stored and not has_encoder and next(encoder.parameters(), None) is not None:
        print(f'{source}: no {regime} encoder there, so it starts anew')
    for name, p in known.items():
        value = getattr(encoder, name, None)                      # what a default of None has come to
        settings[name] = value if isinstance(value, (int, float, str)) else settings.get(name, p.default)
    run = {**run, 'regime': regime, 'context': context, 'objective': objective, 'hybrid': hybrid, 'settings': settings,
           'tokenizer': tokenizer.name, 'pretrained_encoder': has_encoder and run.get('pretrained_encoder', True)}
    return model, tokenizer, {**config, 'run': run}


def load_run(folder, device='cpu', dtype=torch.float32):
    """load() with the choices that a run was made with."""
    run = read_json(fetch(folder) / 'config.json').get('run')
    if run is None:
        raise SystemExit(f'{folder}: a checkpoint, but not a run of train.py')
    choices = {key: run[key] for key in ('regime', 'context', 'objective', 'hybrid')}
    return load(folder, device=device, dtype=dtype, **choices, **run['settings'])


@contextmanager
def writing(path):
    """Around what writes a file or folder: a full disk, a forbidden place, an unknown format become a SystemExit."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as e:         # as each library puts it
        raise SystemExit(f'{path}: cannot be written ({e})')


def write_aside(path, write):
    """Have write(path) fill a temporary file, flush it to disk, rename it: readers see the old file or the new."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        with writing(path):
            write(temporary)
            with open(temporary, 'rb+') as f:
                os.fsync(f.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(tensors, config, folder, step=0, source=None):
    """Write released_tensors(), in the dtype that they have, and load()'s config as a checkpoint folder.

    The file of weights is named after the step, so that the index, written last, goes from one whole checkpoint to the
    next in a single rename. The tokenizer and the modelling code of the folder `source` are copied along. Raises
    SystemExit where it cannot write.
    """
    folder, name = Path(folder), f'model-{step:08d}.safetensors'
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    index = {'metadata': {'total_size': sum(t.nbytes for t in tensors.values()), 'step': step},
             'weight_map': dict.fromkeys(tensors, name)}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file in [*Path(source).glob('*token*.json'), *Path(source).glob('*.py')] if source else []:
            shutil.copyfile(file, folder / file.name)
    write_aside(folder / name, lambda path: safetensors.torch.save_file(tensors, path, {'format': 'pt'}))
    for file, content in (('config.json', config), ('model.safetensors.index.json', index)):
        write_aside(folder / file, lambda path: path.write_text(json.dumps(content, indent=1), encoding='utf-8'))


def main(argv=None):
    """The command line: load_run() and save() in bf16, into a folder that must not exist yet. Raises SystemExit."""
    parser = argparse.ArgumentParser(description="Write a run's weights in bf16 under DeepSeek-OCR's names.")
    parser.add_argument('run', help='folder of a run')
    parser.add_argument('--export', required=True, metavar='DIR', help='new folder for the checkpoint')
    args = parser.parse_args(argv)
    if Path(args.export).exists():
        raise SystemExit(f'{args.export}: exists already')
    model, _, config = load_run(args.run, dtype=torch.bfloat16)
    save(released_tensors(model, config['run']['regime']), config, args.export, source=args.run)
    print(f'{args.export}: written in bf16')


if __name__ == '__main__':
    main()
