"""What the tests share: the golden files (outputs of the authors' code at a tiny size) and a model with the golden weights."""
import json
import multiprocessing
import os
import sys
import threading
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'                           # no test may wait for a network
os.environ['OMP_NUM_THREADS'] = '1'                          # several threads crawl where another program has a core
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'results'), str(ROOT / 'examples')]

from data import prepare                                      # noqa: E402
from decoder import Autoencoder, Decoder, DecoderConfig      # noqa: E402
from encoders import ENCODERS, VisionConfig                   # noqa: E402
from load_deepseek import released_tensors, run_main, tokenizer_of      # noqa: E402

tqdm.set_lock(threading.RLock())                             # its own is shared with forks, and a killed one would keep it for ever

GOLDENS = Path(__file__).parent / 'goldens'
WEIGHTS = ('model.', 'lm_head.', 'conv1d_residual_', 'meanpool_')

def golden(name):
    """(tensors, description) of one golden file; its bf16 weights are exact, so fp32 holds them."""
    tensors = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in load_file(GOLDENS / f'{name}_tiny.safetensors').items()}
    return tensors, json.loads((GOLDENS / f'{name}_tiny.json').read_text(encoding='utf-8'))

def fork(target, *args):
    """A started process that runs target(*args); a new interpreter would spend seconds on importing torch. POSIX only."""
    process = multiprocessing.get_context('fork').Process(target=target, args=args, daemon=True)        # a test that fails leaves none
    process.start()
    return process

@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    """All but test_cuda.py are about the CPU, also where there is a GPU; random weights are the same in each run."""
    if request.module.__name__ != 'test_cuda':
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    monkeypatch.delenv('DEBUG', raising=False)
    torch.manual_seed(0)                                     # no test passes or fails by chance

def byte_tokenizer(id_of):
    """Bytes as tokens, like the tiny models', with ids of a test's choice."""
    vocab = tokenizer_of('tiny').get_vocab()
    tokenizer = Tokenizer(BPE({c: id_of(i - 3) for c, i in vocab.items() if i > 2}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer

@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    """Python's manual in segments of 32 + 32 bytes."""
    folder = tmp_path_factory.mktemp('data') / 'pydoc'
    prepare('pydoc', folder, tokenizer_of('tiny'), 32, 32, train_segments=200, val_segments=24)
    return str(folder)

def read_log(out):
    return [json.loads(line) for line in (out / 'log.jsonl').read_text(encoding='utf-8').splitlines()]

@pytest.fixture(scope='session')
def decoder_golden():
    return golden('decoder')

@pytest.fixture(scope='session')
def vision_golden():
    return golden('sam_clip')

@pytest.fixture(scope='session')
def compressor_golden():
    return golden('compressors')

@pytest.fixture(scope='session')
def loss_golden():
    return golden('losses')

@pytest.fixture(scope='session')
def weights(decoder_golden, vision_golden, compressor_golden):
    """All golden weights under our names for them in a checkpoint."""
    found = {}
    for tensors, _ in (decoder_golden, vision_golden, compressor_golden):
        found.update({k: v for k, v in tensors.items() if k.startswith(WEIGHTS)})
    rename = [('conv1d_residual_pyramid.', 'conv1d_residual.pyramid.'), ('conv1d_residual_separator', 'conv1d_residual.separator'),
              ('meanpool_separator', 'meanpool.separator')]
    for old, new in rename:
        found = {k.replace(old, new): v for k, v in found.items()}
    return found

@pytest.fixture
def released(tmp_path, weights):
    """A folder like DeepSeek-OCR's at the golden sizes: its config.json but smaller, its tensor names, a tokenizer of its kind."""
    config = json.loads((GOLDENS / 'released_config.json').read_text(encoding='utf-8'))
    small = dict(hidden_size=64, intermediate_size=176, moe_intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=3, vocab_size=512)
    config['language_config'].update(small)
    config.update(small)
    config['vision_config']['width'] = {
        'sam_vit_b': {'downsample_channels': [32, 64], 'global_attn_indexes': [1, 3], 'heads': 4, 'layers': 4, 'width': 48},
        'clip-l-14-224': {'heads': 4, 'image_size': 224, 'layers': 3, 'patch_size': 14, 'width': 64}}
    folder = tmp_path / 'DeepSeek-OCR'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    tokens = ['<bos>', '<eos>', '<pad>', *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:3])
    tokenizer.save(str(folder / 'tokenizer.json'))
    tensors = {k: v.bfloat16().contiguous() for k, v in weights.items() if k.startswith(('model.', 'lm_head.'))}
    names = sorted(tensors)
    files = {'model-00001-of-000002.safetensors': names[::2], 'model-00002-of-000002.safetensors': names[1::2]}
    for file, part in files.items():
        save_file({k: tensors[k] for k in part}, folder / file)
    index = {'weight_map': {k: file for file, part in files.items() for k in part}}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index), encoding='utf-8')
    return folder

def golden_config():
    """The sizes of the golden files."""
    return DecoderConfig(vocab_size=512, hidden_size=64, intermediate_size=176, moe_intermediate_size=48, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=3,
                         vision=VisionConfig(sam_width=48, sam_layers=4, sam_heads=4, sam_global=(1, 3), clip_width=64,
                                             clip_layers=3, clip_heads=4))

def golden_model(weights, regime, context=1000, objective='reconstruction', prompt=(), hybrid=0, **settings):
    """An Autoencoder of ours with the golden weights."""
    config = golden_config()
    model = Autoencoder(ENCODERS[regime](config, context, **settings), Decoder(config), objective, prompt, hybrid)
    for name, tensor in released_tensors(model, regime).items():
        assert tensor.shape == weights[name].shape, name
        tensor.copy_(weights[name])
    return model

def golden_image(size, k=0):
    """The image that the golden files define by a formula: uint8 (3, size, size)."""
    c, y, x = torch.meshgrid(torch.arange(3), torch.arange(size), torch.arange(size), indexing='ij')
    pixels = y * (3 + c + k) + x * (5 + 2 * c) + ((x * y) >> (5 + c)) + ((y // (29 + k)) ^ (x // 41)) * 37
    return (pixels & 255).to(torch.uint8)

def said(capsys, main, argv):
    """The one line that a user reads after a mistake on the command line, which ends with a code other than 0."""
    with pytest.raises(SystemExit) as e:
        run_main(lambda: main(argv.split() if isinstance(argv, str) else argv))
    error = capsys.readouterr().err.strip()
    line = error.split('\n')[-1] if isinstance(e.value.code, int) else e.value.code           # argparse, and run_main
    assert e.value.code not in (0, None) and '\n' not in line and 'Traceback' not in error, line
    return line

def close(ours, golden, tolerance=1e-5):
    worst = (ours - golden).abs().max().item()
    assert worst <= tolerance, f'differs by {worst:.2e}, more than {tolerance}'
