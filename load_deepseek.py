r"""
The released checkpoint format, both ways, and its tokenizer.

    model, tokenizer, config = load('deepseek-ai/DeepSeek-OCR', 'meanpool', 1000)
    model, tokenizer, config = load_run('out/vision')

A checkpoint is a folder: config.json, safetensors with DeepSeek-OCR's tensor names, tokenizer.json.
Our runs add "run" to config.json (which encoder, its settings, the lengths), and the tensors of
their encoders:

    here                                           in the file
    decoder.layers.3.mlp.experts.gate_up_proj[7]   model.layers.3.mlp.experts.7.gate_proj.weight and
                                                   model.layers.3.mlp.experts.7.up_proj.weight
    decoder.lm_head.weight                         lm_head.weight
    decoder.<name>, and encoder.<name> of vision   model.<name>
    encoder.<name> of any other encoder            <regime>.<name>

To write a run's weights in bf16, for whatever opens DeepSeek-OCR:

    model, _, config = load_run('out/vision', dtype=torch.bfloat16)
    save(released_tensors(model, 'vision'), config, 'out/ocr', source='out/vision')
"""
import argparse
import copy
import json
import os
import re
import shutil
import sys
import typing
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import huggingface_hub
import safetensors.torch
import tokenizers
import torch
from tokenizers import decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from decoder import Autoencoder, Decoder, DecoderConfig
from encoders import ENCODERS, VisionConfig, settings_of

# Models without weights, as the config.json that they would have. The rest is as in DeepSeek-OCR.
PRESETS = {
    'full': {'tokenizer': 'bytes', 'n_routed_experts': 64},     # without it, it would be dense
    'tiny': {
        'tokenizer': 'bytes',
        'language_config': {
            'vocab_size': 259,
            'hidden_size': 128,
            'intermediate_size': 352,
            'moe_intermediate_size': 96,
            'num_hidden_layers': 4,
            'num_attention_heads': 4,
            'n_routed_experts': 8,
            'n_shared_experts': 1,
            'num_experts_per_tok': 2,
        },
        'vision_config': {
            'image_size': 256,
            'width': {
                'sam_vit_b': {'width': 96, 'layers': 4, 'heads': 3, 'global_attn_indexes': [1, 3]},
                'clip-l-14-224': {'width': 128, 'layers': 4, 'heads': 4},
            },
        },
    },
}

# What config.json may ask of the decoder, besides null. Anything else would silently be wrong.
SUPPORTED = {
    'model_type': ['deepseek_v2', 'deepseek_vl_v2', 'DeepseekOCR', 'DeepseekOCR2', 'deepseek_ocr2',
                   'llama', 'mistral'],
    'hidden_act': ['silu'],
    'sliding_window': [],
    'sliding_window_size': [],
    'rope_type': ['default'],
    'type': ['default'],
    'factor': [1],
    'partial_rotary_factor': [1],
    'topk_method': ['greedy'],
    'scoring_func': ['softmax'],
    'norm_topk_prob': [False],
    'routed_scaling_factor': [1],
}

# ---- the command line

def run_main(main):
    """Call main(). A ValueError, OSError or ImportError is taken for a user's mistake. Like Ctrl-C
    it ends in one line on stderr and exit code 1. DEBUG=1 in the environment keeps a traceback."""
    sys.stdout.reconfigure(errors='replace')        # '?' for what a console cannot show
    try:
        main()
    except (ValueError, OSError, ImportError, KeyboardInterrupt) as e:
        if os.environ.get('DEBUG'):
            raise
        message = ' '.join(str(e).split()) or type(e).__name__
        sys.exit(f'{message} (DEBUG=1 shows where)')

def positive(text):
    """A whole number of at least 1. As the annotation of a setting it is argparse's type=."""
    if int(text) < 1:
        raise ValueError
    return int(text)

def add_flags(parser, cls, choices={}, **how):
    """Make each setting of a class a flag of an argparse parser: with the annotation as type, the
    default, and as help the line "name: help" of the docstring. `how` replaces these."""
    for name, setting in settings_of(cls).items():
        line = re.search(rf'\b{name}: (.*)', cls.__doc__ or '')
        text = line[1] if line else ''
        if setting.default not in (None, ''):
            text = f'{text} (default: {setting.default})'
        flag = {'help': text.replace('%', '%%'), 'default': setting.default, **how}
        kind = setting.annotation
        if typing.get_args(kind):           # int | None is int here
            kind = typing.get_args(kind)[0]
        if kind is bool:
            flag['action'] = argparse.BooleanOptionalAction
        else:
            flag |= {'type': kind, 'choices': choices.get(name)}
        parser.add_argument(f'--{name}', **flag)

# ---- tokenizers

def read_json(path):
    """The JSON object in a file, as a dict. Raises ValueError or OSError."""
    try:
        return dict(json.loads(Path(path).read_bytes()))
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f'{path}: no JSON object ({e})') from e

@lru_cache
def fetch(source, pattern):
    """The folder of a checkpoint: `source`, or the local copy of the hub's files that match.
    Raises ValueError."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=pattern))
    except (ValueError, OSError) as e:
        raise ValueError(f'{source}: no such folder, and the hub says: {e}') from e

def tokenizer_of(source):
    """The tokenizer of a preset or a checkpoint: its tokenizer.json or, if config.json says so,
    bytes, with ids 3 to 258 after BOS, EOS and PAD. Raises ValueError or OSError."""
    if source not in PRESETS:
        folder = fetch(source, '*.json')
        if read_json(folder / 'config.json').get('tokenizer') != 'bytes':
            path = folder / 'tokenizer.json'
            try:
                return tokenizers.Tokenizer.from_file(str(path))
            except Exception as e:          # the library raises nothing narrower
                raise ValueError(f'{path}: {e}') from e
    # Byte-level BPE writes a byte as a character: a printable one as itself, others from U+0100 on.
    vocab = {'<bos>': 0, '<eos>': 1, '<pad>': 2}
    printable = ByteLevel.alphabet()
    next_other = 0x100
    for byte in range(256):
        character = chr(byte)
        if character not in printable:
            character = chr(next_other)
            next_other += 1
        vocab[character] = 3 + byte
    tokenizer = tokenizers.Tokenizer(BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer

# ---- config.json

def sizes_from(config):
    """config.json, as a dict, to a DecoderConfig with its VisionConfig. Raises ValueError for what
    the decoder does not do."""
    language = dict(config.get('language_config', config))
    language |= language.get('rope_scaling') or {}
    language |= language.get('rope_parameters') or {}       # transformers 5 has rope_theta in here
    for name, values in SUPPORTED.items():
        for value in (config.get(name), language.get(name)):
            if value is not None and value not in values:
                raise ValueError(f'{name} {value!r} is not supported')

    sizes = DecoderConfig()
    sizes.n_routed_experts = 0                              # a dense model does not mention them
    for field in fields(DecoderConfig):
        value = language.get(field.name)
        if field.name == 'eos_token_id' and isinstance(value, list):
            sizes.eos_token_id = value                      # ids, each of which ends a text
        elif value is not None:
            setattr(sizes, field.name, field.type(value))
        elif field.name in language and 'token_id' in field.name:   # null: no default fits
            raise ValueError(f'{field.name} is null')
    if language.get('num_key_value_heads') is None:
        sizes.num_key_value_heads = sizes.num_attention_heads
    head_dim = sizes.hidden_size // sizes.num_attention_heads
    if head_dim % 2 != 0 or head_dim * sizes.num_attention_heads != sizes.hidden_size:
        raise ValueError('the heads do not divide hidden_size into even parts')
    if sizes.num_attention_heads % sizes.num_key_value_heads != 0:
        raise ValueError('the heads do not divide into groups of keys and values')
    if language.get('head_dim') not in (None, head_dim):
        raise ValueError(f'head_dim {language["head_dim"]} is not {head_dim}')
    if not 0 <= sizes.bos_token_id < sizes.vocab_size:
        raise ValueError('bos_token_id is not below vocab_size, or is negative')
    if 0 < sizes.n_routed_experts < sizes.num_experts_per_tok:
        raise ValueError('num_experts_per_tok is more than n_routed_experts')

    vision = config.get('vision_config') or {}
    width = vision.get('width')
    if isinstance(width, dict) and 'clip-l-14-224' in width:        # DeepSeek-OCR 2 has no CLIP
        sam, clip = width['sam_vit_b'], width['clip-l-14-224']
        sizes.vision = VisionConfig(
            image_size=vision['image_size'],
            sam_width=sam['width'],
            sam_layers=sam['layers'],
            sam_heads=sam['heads'],
            sam_global=tuple(sam['global_attn_indexes']),
            clip_width=clip['width'],
            clip_layers=clip['layers'],
            clip_heads=clip['heads'],
        )
    return sizes

# ---- tensors

def open_tensors(source):
    """The tensors of a checkpoint: {name: the open safetensors file that has it}. They are those of
    model.safetensors or else of the index's files, each from the file that the index names.
    Raises ValueError or OSError."""
    fetch(source, '*.json')                 # the index
    folder = fetch(source, '*.safetensors')
    index = folder / 'model.safetensors.index.json'
    if (folder / 'model.safetensors').exists():
        file_of = {}
        files = ['model.safetensors']
    elif index.exists():
        file_of = read_json(index).get('weight_map') or {}
        files = sorted(set(file_of.values()))
    else:
        raise ValueError(f'{folder}: no model.safetensors, so no weights')
    stored = {}
    for path in files:
        try:
            file = safetensors.safe_open(folder / path, 'pt')
        except safetensors.SafetensorError as e:
            raise ValueError(f'{folder / path}: truncated or not a safetensors file ({e})') from e
        for name in file.keys():
            # What an index does not list is taken too, so that fill() sees what is unexpected.
            if file_of.get(name, path) == path:
                stored[name] = file
    if not stored:
        raise ValueError(f'{folder}: no tensors in {files or index.name}')
    return stored

def part_of(name):
    """Which part of a model a released tensor belongs to: a regime, 'decoder', or None for what a
    file may have but the model does not need."""
    if name.startswith('model.qwen2_model.') or name.endswith('rotary_emb.inv_freq'):
        return None                         # DeepSeek-OCR 2's encoder; a table that rotary() makes
    if name.startswith(('model.sam_model.', 'model.vision_model.', 'model.projector.',
                        'model.image_newline', 'model.view_seperator')):
        return 'vision'
    prefix = name.split('.', 1)[0]
    return prefix if prefix in ENCODERS else 'decoder'

def released_tensors(model, regime):
    """{released name: tensor} of an Autoencoder: views of its parameters, experts one by one."""
    tensors = {}
    # A parameter that an added encoder uses twice is listed, and stored, once.
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        p = p.detach()
        part, rest = name.split('.', 1)
        if part == 'encoder' and regime != 'vision':
            tensors[f'{regime}.{rest}'] = p
        elif rest == 'lm_head.weight':
            tensors[rest] = p
        elif '.experts.' in rest:
            layer, ours = rest.split('.experts.')
            kinds = ['gate_proj', 'up_proj'] if ours == 'gate_up_proj' else ['down_proj']
            for e, expert in enumerate(p):
                for kind, matrix in zip(kinds, expert.chunk(len(kinds))):
                    tensors[f'model.{layer}.experts.{e}.{kind}.weight'] = matrix
        else:
            tensors[f'model.{rest}'] = p
    return tensors

def fill(model, regime, stored, source):
    """Copy the tensors of open_tensors() into a model. Those of another encoder are skipped. Raises
    ValueError for a tensor that is missing, unexpected or of another shape or kind."""
    needed = released_tensors(model, regime)
    skipped = [name for name in stored if part_of(name) not in ('decoder', regime)]
    if skipped:
        print(f'{source}: skipped {len(skipped)} tensors of another encoder ({min(skipped)} ...)')
    for name in stored:
        if name == 'lm_head.weight' and name not in needed:         # the tied embedding once more
            tied = 'model.embed_tokens.weight'
            if tied not in stored:
                raise ValueError(f'{source}: tensor {tied} is missing')
            if not torch.equal(stored[name].get_tensor(name), stored[tied].get_tensor(tied)):
                raise ValueError(f'{source}: tied embeddings, but {name} is not {tied}')
        elif name not in needed and name not in skipped:
            raise ValueError(f'{source}: tensor {name} is not one that {regime} needs')
    for name, tensor in needed.items():
        if name not in stored:
            raise ValueError(f'{source}: tensor {name} is missing')
        found = stored[name].get_tensor(name)
        same_kind = found.is_floating_point() == tensor.is_floating_point()
        if found.shape != tensor.shape or not same_kind:
            raise ValueError(f'{source}: tensor {name} is {found.dtype} {list(found.shape)}, '
                             f'{regime} needs {tensor.dtype} {list(tensor.shape)}')
        tensor.copy_(found)                 # a view, so this fills the model

# ---- models

def load(source, regime, context, objective='reconstruction', hybrid=0, device='cpu',
         dtype=torch.float32, **settings):
    """Build an Autoencoder -> model, tokenizer, config.

    source: a preset, a folder or a hub id. context: how many context tokens. settings: keywords of
    the encoder's class. config is config.json with these choices as "run". An encoder that the
    checkpoint does not have starts from random weights. Raises ValueError or OSError for what does
    not exist or does not fit."""
    # the settings
    if regime not in ENCODERS:
        raise ValueError(f'{source}: its encoder, {regime}, is not registered in ENCODERS; use the '
                         'script that registers it')
    known = settings_of(ENCODERS[regime])
    for name in settings:
        if name not in known:
            raise ValueError(f'--{name}: not a setting of {regime}, which has '
                             f'{", ".join(known) or "none"}')
    if not 0 <= hybrid <= context:
        raise ValueError(f'--hybrid_text_tokens {hybrid}: not between 0 and {context}')

    # config.json, the files, the decoder, the tokenizer
    if source in PRESETS:
        config = copy.deepcopy(PRESETS[source])
        stored = {}
    else:
        config = read_json(fetch(source, '*.json') / 'config.json')
        stored = open_tensors(source)
    try:
        sizes = sizes_from(config)
        # If weights will be read, build on the meta device, which takes neither memory nor time.
        with torch.device('meta' if stored else device):
            decoder = Decoder(sizes).to(dtype)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise ValueError(f'{source}: config.json describes no model ({e})') from e
    if regime == 'vision' and 'vision_config' in config and sizes.vision is None:
        raise ValueError(f'{source}: its vision encoder is not SAM and CLIP, as DeepSeek-OCR has')
    tokenizer = tokenizer_of(source)
    largest_id = max(tokenizer.get_vocab().values())
    if largest_id >= sizes.vocab_size:
        raise ValueError(f'{source}: the tokenizer has ids up to {largest_id}, beyond the '
                         f'vocab_size {sizes.vocab_size}')

    # the model
    with torch.device(device):
        encoder = ENCODERS[regime](sizes, context, **settings).to(dtype)
    prompt = tokenizer.encode(getattr(encoder, 'prompt', ''), add_special_tokens=False)
    model = Autoencoder(encoder, decoder, objective, prompt.ids, hybrid)

    # the weights
    has_encoder = any(part_of(name) == regime for name in stored)
    if stored:
        decoder.to_empty(device=device)
        # The ModuleDict gives names the same prefix as in the model, 'decoder.'
        in_the_file = model if has_encoder else torch.nn.ModuleDict({'decoder': decoder})
        fill(in_the_file, regime, stored, source)
    if not has_encoder and hasattr(encoder, 'start_from'):
        encoder.start_from(decoder)
    elif stored and not has_encoder and list(encoder.parameters()):
        print(f'{source}: has no {regime} encoder, so it starts from random weights')

    # what save() stores of these choices
    run = config.get('run', {})
    config['run'] = {
        **run,
        'regime': regime,
        'context': context,
        'objective': objective,
        'hybrid': hybrid,
        'settings': {name: settings.get(name, p.default) for name, p in known.items()},
        # True only if the released weights had it; not if a run began it at random
        'pretrained_encoder': has_encoder and run.get('pretrained_encoder', True),
    }
    return model, tokenizer, config

def load_run(folder, device='cpu', dtype=torch.float32):
    """load() with the choices that a run was made with. Raises ValueError or OSError."""
    run = read_json(fetch(folder, '*.json') / 'config.json').get('run')
    try:
        choices = {name: run[name] for name in ('regime', 'context', 'objective', 'hybrid')}
        settings = {**run['settings']}
    except (TypeError, KeyError) as e:
        raise ValueError(f'{folder}: no run of train.py; a plain model goes to --model') from e
    return load(folder, device=device, dtype=dtype, **choices, **settings)

# ---- saving

def write_atomic(path, write):
    """Have write(path) fill a temporary file, flush it to disk and rename it, so that `path` is
    always whole."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        write(temporary)
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

def save(tensors, config, folder, step=0, source=None):
    """Write released_tensors(), in their own dtype, and load()'s config as a checkpoint folder. The
    weights carry the step and are renamed last: a folder with model.safetensors is a whole save.
    source: the folder whose tokenizer is copied. Raises OSError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    dtype = next(iter(tensors.values())).dtype
    config = {**config, 'torch_dtype': str(dtype).removeprefix('torch.')}

    def write_weights(path):
        metadata = {'format': 'pt', 'step': str(step)}
        safetensors.torch.save_file(tensors, path, metadata)
        shutil.copymode(folder / 'config.json', path)       # safetensors makes the file private

    if source is not None and Path(source) != folder:
        for file in Path(source).glob('*token*.json'):
            content = file.read_bytes()
            write_atomic(folder / file.name, lambda path: path.write_bytes(content))
    text = json.dumps(config, indent=1)
    write_atomic(folder / 'config.json', lambda path: path.write_text(text, encoding='utf-8'))
    write_atomic(folder / 'model.safetensors', write_weights)
