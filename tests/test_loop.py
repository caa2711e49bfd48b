"""The loop's promises: what it counts, what it skips, what it shares among processes, what a kill cannot hurt."""
import os
import socket
import time
from functools import partial

import pytest
import torch
import train
from conftest import fork, read_log
from decoder import Autoencoder, Block
from memory import estimate, hollow, hollow_batch, step_as_on_cuda
from load_deepseek import load, load_run
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

FLAGS = ('--regime conv1d_residual --batch_size 4 --gradient_accumulation_steps 2 --log_steps 1 --eval_segments 24 --workers 0 '
         '--context 32 --continuation 32').split()

def test_a_gradient_that_is_not_finite_ends_the_run(corpus, tmp_path, monkeypatch):
    """At the next report, which need not be its own step; what was saved before stays, and can be resumed."""
    forward, calls = Autoencoder.forward, [0]

    def poisoned(self, batch):
        losses, hits, extra = forward(self, batch)
        calls[0] += self.training
        return losses * (float('nan') if self.training and calls[0] == 9 else 1.0), hits, extra               # step 5 of two each
    monkeypatch.setattr(Autoencoder, 'forward', poisoned)
    flags = [*FLAGS, '--data', corpus, '--output_dir', str(tmp_path / 'a'), '--steps', '9', '--log_steps', '2', '--eval_steps', '4']
    with pytest.raises(ValueError, match='step 6: the gradient is not finite'):
        train.main(flags)
    monkeypatch.undo()
    assert [line['step'] for line in read_log(tmp_path / 'a') if 'loss' in line] == [1, 2, 4, 6]
    assert all(torch.isfinite(p).all() for p in load_run(tmp_path / 'a')[0].parameters())
    assert safe_open(tmp_path / 'a' / 'model.safetensors', 'pt').metadata()['step'] == '4'
    train.main(['--resume', str(tmp_path / 'a')])
    log = read_log(tmp_path / 'a')
    assert [line['step'] for line in log if 'loss' in line] == [1, 2, 4, 6, 8, 9] and log[-1]['val_loss'] < 6

@pytest.mark.parametrize('regime, steps', [('conv1d_residual', 10), ('vision', 2)])
def test_two_processes_train_as_one(corpus, tmp_path, regime, steps):
    """Each takes two micro-batches a step. And one process may go on with what two have saved."""
    flags = [*FLAGS, '--data', corpus, *f'--regime {regime} --steps {steps} --eval_steps {steps // 2} --gradient_accumulation_steps 4'.split()]
    flags += ['--vision_mode', '64'] * (regime == 'vision')

    def rank(rank, port, *flags):
        os.environ.update(WORLD_SIZE='2', RANK=str(rank), MASTER_ADDR='localhost', MASTER_PORT=port)      # as torchrun does
        train.main([*flags])
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = str(s.getsockname()[1])
    both = [fork(rank, r, port, *flags, '--output_dir', str(tmp_path / 'two')) for r in range(2)]
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    train.main([*flags, '--output_dir', str(tmp_path / 'one')])
    for name in ('one', 'two'):
        train.main(['--resume', str(tmp_path / name), '--steps', str(steps + 2)])
        log, expected = read_log(tmp_path / name), read_log(tmp_path / 'one')
        assert len(log) == len(expected) == steps + 5 + (regime == 'vision')
        for a, b in zip(log, expected):
            for key in {'loss', 'val_loss', 'grad_norm'} & a.keys():
                assert a[key] == pytest.approx(b[key], abs=1e-5)

@pytest.mark.parametrize('regime', ['meanpool', 'vision'])
def test_no_step_reads_a_number_back(regime):
    """In bf16 a step works on tensors without content: nothing in it makes the host wait for a value."""
    settings = {'vision_mode': '64'} if regime == 'vision' else {}
    model, _, _ = load('tiny', regime, 128, 'lm', hybrid=3, device='meta', **settings)
    model.decoder.token_losses = partial(model.decoder.token_losses, rows=100)
    with FakeTensorMode():
        hollow(model)
        step_as_on_cuda(model, train.make_optimizer(model, 1e-4, train.parse_args(['--model', 'full'])), hollow_batch(2, 128, 128, 64), micro_batches=2)

@pytest.mark.parametrize('micro_batches', [1, 2])
def test_estimated_memory(micro_batches):
    """A product with 1000 x 1000 numbers in fp32: weights, two moments, gradient, and one more of it while two are added."""
    class Product(torch.nn.Linear):
        def forward(self, batch):
            return super().forward(batch['x']), None, {}

    with FakeTensorMode():
        model = Product(1000, 1000, bias=False)
        optimizer = torch.optim.AdamW([{'params': model.parameters(), 'peak_lr': 1e-4}], fused=True)
        found = estimate(model, optimizer, {'x': torch.empty(10, 1000)}, micro_batches, dtype=None)
    assert 0 <= found - (3 + micro_batches) * 4e6 < 5 * 4e4       # and a few activations

def test_recomputing_activations_changes_nothing():
    grads = []
    for again in (False, True):
        torch.manual_seed(0)
        model, _, _ = load('tiny', 'meanpool', 32)
        model.decoder.grad_checkpoint = again
        losses, _, extra = model({'context': torch.arange(64).view(2, 32) + 3})
        (losses.mean() + extra['balance_loss']).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))

@pytest.mark.parametrize('flags', [('--low_memory',), ('--low_memory', '--weights', 'bf16', '--max_grad_norm', '0.02')])
def test_small_card_recipe_learns_and_resumes(corpus, tmp_path, monkeypatch, flags):
    """The last: with gradients as small as those of the full model."""
    again = []
    monkeypatch.setattr('decoder.checkpoint', lambda layer, *args, **kwargs: again.append(layer) or checkpoint(layer, *args, **kwargs))
    train.main(FLAGS + ['--data', corpus, '--output_dir', str(tmp_path / 'a'), '--steps', '5', '--gradient_accumulation_steps', '1', *flags])
    assert sum(isinstance(layer, Block) for layer in again) == 5 * 4                             # its activations are computed twice
    assert read_log(tmp_path / 'a')[-1]['val_loss'] < read_log(tmp_path / 'a')[0]['loss'] - 0.3
    assert load_run(tmp_path / 'a')[2]['torch_dtype'] == ('bfloat16' if 'bf16' in flags else 'float32')
    train.main(['--resume', str(tmp_path / 'a'), '--steps', '6'])
    assert read_log(tmp_path / 'a')[-1]['step'] == 6
    rate = lambda *more: train.parse_args(['--model', str(tmp_path / 'a'), *more]).learning_rate
    assert rate() == 5e-3 and rate('--no-low_memory') == 1e-4                                    # that of AdamW again

def test_killed_and_resumed_is_the_same_run(corpus, tmp_path):
    """kill -9 somewhere behind the first save; then --resume ends as the run that was left alone."""
    flags = [*FLAGS, '--data', corpus, '--steps', '12', '--eval_steps', '3']
    train.main([*flags, '--output_dir', str(tmp_path / 'whole')])
    process = fork(train.main, [*flags, '--output_dir', str(tmp_path / 'killed')])
    until = time.time() + 60
    while not (tmp_path / 'killed' / 'model.safetensors').exists() and time.time() < until:
        time.sleep(0.01)
    process.kill()
    process.join()
    train.main(['--resume', str(tmp_path / 'killed')])
    key = lambda out: [(line['step'], line.get('loss'), line.get('val_loss')) for line in read_log(out)]
    assert key(tmp_path / 'killed') == key(tmp_path / 'whole')
    for out in ('killed', 'whole'):
        names = sorted(p.name for p in (tmp_path / out).iterdir())
        assert names == ['config.json', 'lock', 'log.jsonl', 'model.safetensors', 'optimizer-00000012.pt']

def test_a_full_disk_leaves_the_old_checkpoint(corpus, tmp_path, monkeypatch):
    train.main(FLAGS + ['--data', corpus, '--output_dir', str(tmp_path / 'a'), '--steps', '2'])
    before = {name: (tmp_path / 'a' / name).read_bytes() for name in ('log.jsonl', 'model.safetensors', 'optimizer-00000002.pt')}

    def full(path, *_, **__):
        path.write_bytes(b'half of it')
        raise OSError(28, 'No space left on device')
    for write in ('pathlib.Path.write_text', 'torch.save', 'safetensors.torch.save_file'):        # the log comes first, the weights last
        monkeypatch.setattr(write, full if 'Path' in write else lambda content, path, *_: full(path))
        with pytest.raises(OSError, match='No space left'):
            train.main(['--resume', str(tmp_path / 'a'), '--steps', '4'])
        monkeypatch.undo()
        assert not list((tmp_path / 'a').glob('*.tmp'))
        for name, content in before.items():
            after = (tmp_path / 'a' / name).read_bytes()
            assert after == content or name == 'log.jsonl' and after.startswith(content)
    train.main(['--resume', str(tmp_path / 'a'), '--steps', '4'])

def test_generation_with_the_cache_is_generation_without():
    model, _, _ = load('tiny', 'meanpool', 32)
    model.eval()
    batch = {'context': torch.arange(96).view(3, 32) + 3}
    cached = model.generate(batch, 40)
    with torch.no_grad():
        x, ids = model.sequence(batch), []
        for _ in range(40):
            ids.append(model.decoder.logits(model.decoder(x)[0][:, -1]).argmax(-1))
            x = torch.cat([x, model.decoder.embed_tokens(ids[-1][:, None])], dim=1)
        expected = torch.stack(ids, dim=1)
    for i, (row, alone) in enumerate(zip(cached, expected)):
        end = (alone == 1).nonzero()[0].item() + 1 if (alone == 1).any() else 40
        assert row[:end].tolist() == alone[:end].tolist() and (row[end:] == 1).all()
        assert row[:end].tolist() == model.generate({'context': batch['context'][i:i + 1]}, 40)[0].tolist()
    cache = {}
    model.decoder(torch.zeros(1, 4, 128), cache)
    with pytest.raises(AssertionError, match='2 positions at once, after 4'):
        model.decoder(torch.zeros(1, 2, 128), cache)

def test_each_position_sees_itself_and_those_before_it():
    """Also of two: what follows a position changes nothing there, and what precedes it does."""
    model, _, _ = load('tiny', 'text', 8)
    decoder = model.decoder.eval()
    for T in (1, 2, 3, 9):
        x = torch.randn(1, T, 128)
        with torch.no_grad():
            hidden = decoder(x)[0]
            for t in range(T):
                other = x.clone()
                other[0, t] += torch.randn(128)
                change = (decoder(other)[0] - hidden).abs().amax(dim=2)[0]
                assert (change[:t] < 1e-5).all() and (change[t:] > 1e-4).all(), (T, t, change)
