"""One run: the schedule, the optimiser's trajectory, every regime and objective, resuming, and a fork's own encoder."""
import json
import math

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file
from conftest import golden_model, read_log, said
import encoders
import eval as evaluation
import train
from data import Batches, prepare
from load_deepseek import load, load_run, read_json, released_tensors, save, tokenizer_of

def run(corpus, out, *flags, steps=4):
    usual = '--batch_size 4 --log_steps 1 --context 32 --continuation 32 --eval_segments 8 --workers 0'.split()
    train.main(['--data', corpus, '--output_dir', str(out), *(['--steps', str(steps)] if steps else []), *usual, *flags])
    return read_log(out)

def losses(log):
    return [(line['step'], line['loss'], line['grad_norm']) for line in log if 'loss' in line]

def test_schedule(loss_golden):
    for name, expected in loss_golden[1]['lr_schedules'].items():
        if name.startswith('total'):
            steps, ratio, base = (float(part.lstrip('totalraiobse')) for part in name.split('_'))
            ours = [base * train.learning_rate_scale(i, int(steps), ratio) for i in range(len(expected))]
            assert ours == pytest.approx(expected, rel=1e-9, abs=1e-18), name

@pytest.mark.parametrize('name', ['meanpool_single_group', 'conv_two_groups'])
def test_trajectory(weights, loss_golden, name):
    """Six steps of two micro-batches, as the authors take them: there the balance loss is not divided by the accumulation, so it is doubled."""
    g, description = loss_golden
    case = description['trajectories'][name]
    regime, settings = ('meanpool', {'compression_window_size': 9}) if 'meanpool' in name else ('conv1d_residual', {'compression_target': 125})
    model = golden_model(weights, regime, 1000, 'lm', **settings).train()
    rates = (1e-3, 1e-3) if 'meanpool' in name else (1e-4, 1e-3)
    for layer in model.decoder.layers[1:]:
        layer.mlp.alpha *= 2
    args = train.parse_args(['--model', 'full', '--learning_rate', str(rates[1])])                            # all else as by default
    optimizer = train.make_optimizer(model, rates[0], args)
    for step, expected in enumerate(case['steps']):
        batches = [{key: g[f'traj.{short}{2 * step + a}'].long() for key, short in (('context', 'ctx'), ('continuation', 'cont'))}
                   for a in range(2)]
        scale = train.learning_rate_scale(step, 6, 0.34)
        report = train.train_step(model, optimizer, batches, scale, args.max_grad_norm, torch.device('cpu'))
        loss, norm = report['loss'], report['grad_norm']
        assert loss.item() == pytest.approx(sum(expected['micro_losses']) / 2, abs=1e-4)
        assert norm.item() == pytest.approx(expected['grad_norm_before_clip'], rel=1e-4)
        assert [group['lr'] for group in optimizer.param_groups] == pytest.approx(expected['lr'] * (2 // len(expected['lr'])), rel=1e-9)
    separator = 'meanpool_separator' if 'meanpool' in name else 'conv1d_residual_separator'
    assert (model.encoder.separator - g[f'traj.{name}.{separator}.after']).abs().max() < 1e-5
    assert (model.decoder.norm.weight - g[f'traj.{name}.model.norm.weight.after']).abs().max() < 1e-5
    model.eval()
    final = model({'context': g['context'], 'continuation': g['continuation']})[0].mean().item()
    assert final == pytest.approx(case['final_eval_loss_on_context_continuation'], abs=1e-4)

@pytest.mark.parametrize('objective', ['reconstruction', 'lm'])
@pytest.mark.parametrize('regime', encoders.ENCODERS)
def test_every_regime_trains_and_evaluates(corpus, tmp_path, capsys, regime, objective):
    small = {'vision': ('--vision_mode', '128', '--vision_prompt', 'Read:')}.get(regime, ())
    hybrid = () if regime == 'text' else ('--hybrid_text_tokens', '3')
    log = run(corpus, tmp_path / 'run', '--regime', regime, '--objective', objective, *small, *hybrid, steps=8)
    assert losses(log)[0][1] == pytest.approx(math.log(259), abs=1) and log[-1]['val_loss'] < losses(log)[0][1]
    assert f'val_ppl {log[-1]["val_ppl"]:.4g}' in capsys.readouterr().out
    evaluation.main([str(tmp_path / 'run'), '--segments', '10'])
    out = capsys.readouterr().out
    assert f'| {objective} |' in out and '--- original' in out

def test_the_step_is_no_longer_than_the_clipped_gradient(corpus):
    """With plain gradient descent the weights move by rate x max_grad_norm where the gradient is longer than that."""
    model, tokenizer, _ = load('tiny', 'meanpool', 32)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = torch.optim.SGD([{'params': list(model.parameters()), 'peak_lr': 0.5}])
    report = train.train_step(model, optimizer, [Batches(corpus, 'train', 4, tokenizer)[0]], 0.1, 0.02, torch.device('cpu'))
    moved = (torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm()
    assert report['grad_norm'] > 0.1 and moved == pytest.approx(0.5 * 0.1 * 0.02, rel=1e-2)

def test_the_defaults_are_those_of_the_paper():
    args = train.parse_args(['--model', 'full'])
    paper = dict(batch_size=8, gradient_accumulation_steps=6, learning_rate=1e-4, weight_decay=0.01, beta2=0.999, warmup_ratio=0.1,
                 max_grad_norm=1.0, context=1000, continuation=1000, eval_steps=500)
    assert {name: getattr(args, name) for name in paper} == paper
    assert train.parse_args(['--low_memory']).learning_rate == 5e-3
    assert train.parse_args(['--low_memory', '--learning_rate', '1']).learning_rate == 1
    model = nn.ModuleDict({'encoder': nn.Linear(2, 2), 'decoder': nn.Linear(2, 2)})
    for flags, name, value in ('--beta2 0.5', 'betas', (0.9, 0.5)), ('--low_memory', 'beta2_decay', -0.5):
        optimizer = train.make_optimizer(model, 1.0, train.parse_args([*flags.split(), '--weight_decay', '0.3']))
        assert all((group[name], group['weight_decay']) == (value, 0.3) for group in optimizer.param_groups)

class Noisy(encoders.Conv1dResidual):
    """Draws random numbers."""

    def forward(self, batch, embed):
        return torch.nn.functional.dropout(super().forward(batch, embed), training=self.training)

def test_resume_is_exact(corpus, tmp_path, capsys, monkeypatch):
    """Stopped in between and resumed, a run's losses are bit for bit those of a run that was not."""
    monkeypatch.setitem(encoders.ENCODERS, 'noisy', Noisy)
    flags = ('--regime', 'noisy', '--gradient_accumulation_steps', '2', '--eval_steps', '3')
    whole = run(corpus, tmp_path / 'whole', *flags, steps=9)

    step, parts = train.train_step, tmp_path / 'parts'
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return step(*args)
    monkeypatch.setattr(train, 'train_step', interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(corpus, parts, *flags, steps=9)
    monkeypatch.setattr(train, 'train_step', step)
    with open(parts / 'log.jsonl', 'a', encoding='utf-8') as f:
        f.write('{"step": 8, "loss": 0.0, "grad_norm": 0.0}\n{"step": 9, "lo')                     # beyond the last save, and cut short
    train.main(['--resume', str(parts)])
    log = read_log(parts)
    assert losses(log) == losses(whole) and log[-1]['val_loss'] == whole[-1]['val_loss']
    train.main(['--resume', str(parts)])                                                           # of a run that is at its end
    assert read_log(parts) == log
    assert capsys.readouterr().out.endswith('has its 9 steps; set more with --steps\n')
    for (name, a), (_, b) in zip(load_run(tmp_path / 'whole')[0].named_parameters(), load_run(parts)[0].named_parameters()):
        assert torch.equal(a, b), name
    (parts / 'log.jsonl').unlink()                                                                 # costs the log, not the run
    train.main(['--resume', str(parts), '--steps', '10'])
    assert losses(read_log(parts))[0][0] == 10

def test_what_a_resumed_run_may_change(corpus, tmp_path, capsys):
    """How long it runs, where and what it reports; nothing that changes what it learns."""
    other = tmp_path / 'other'
    prepare('pydoc', other, tokenizer_of('tiny'), 32, 32, train_segments=20, val_segments=4)
    out = tmp_path / 'a'
    run(corpus, out, '--gradient_accumulation_steps', '2', steps=2)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for flag in (f'data {other}', *('''seed 1, batch_size 8, gradient_accumulation_steps 1, learning_rate 0.1, encoder_lr 0.1, weight_decay 0.1,
            beta2 0.5, warmup_ratio 0.5, max_grad_norm 2, weights bf16, low_memory, no-train_encoder, model full, regime text, objective lm,
            output_dir elsewhere, context 16, continuation 16, hybrid_text_tokens 1, compression_window_size 8, compression_target 8'''.split(','))):
        flag = flag.strip()
        assert '--' + flag.split()[0].removeprefix('no-') in said(capsys, train.main, f'--resume {out} --steps 3 --{flag}'), flag
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    allowed = '--steps 4 --workers 1 --device cpu --no-compile --log_steps 2 --eval_steps 1 --eval_segments 4 --seed 0'
    train.main(['--resume', str(out), *allowed.split()])
    args = read_json(out / 'config.json')['run']['args']
    assert not {'workers', 'device', 'compile'} & set(args) and args['steps'] == 4                 # the machine's are not inherited
    assert train.parse_args(['--resume', str(out)]).workers is None and train.parse_args(['--model', str(out)]).device == 'auto'

def test_random_numbers_of_seeds_and_steps_do_not_meet(corpus, tmp_path, monkeypatch):
    """Nor do those of two processes."""
    seen, report = [], {'loss': torch.zeros(()), 'grad_norm': torch.zeros(())}
    monkeypatch.setattr(train, 'train_step', lambda *_: seen.append(torch.initial_seed()) or report)
    monkeypatch.setattr(train, 'DistributedDataParallel', lambda model, **_: model)
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(train.time, 'sleep', lambda seconds: None)
    for name in ('init_process_group', 'all_reduce', 'barrier', 'destroy_process_group'):
        monkeypatch.setattr(torch.distributed, name, lambda *_: None)
    for seed in range(3):
        for rank in '01':
            monkeypatch.setenv('RANK', rank)
            run(corpus, tmp_path / str(seed), '--seed', str(seed), '--eval_steps', '0', '--gradient_accumulation_steps', '2', steps=4)
    assert len(set(seen)) == 24

def test_stage_two_keeps_weights_and_settings(corpus, tmp_path):
    run(corpus, tmp_path / 'one', '--regime', 'meanpool', '--compression_window_size', '8', steps=2)
    run(corpus, tmp_path / 'two', '--model', str(tmp_path / 'one'), '--objective', 'lm', '--learning_rate', '0', '--steps', '1')
    one, two = load_run(tmp_path / 'one')[0], load_run(tmp_path / 'two')[0]
    assert two.objective == 'lm' and two.encoder.window == 8
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))

def test_learning_rates_and_freezing(corpus, tmp_path, capsys):
    def rate(out, *flags):
        run(corpus, tmp_path / out, *flags, steps=1)
        return capsys.readouterr().out.split('parameters at ')[1].split(',')[0]

    assert rate('a', '--regime', 'conv1d_residual') == '0.003'                                     # random weights: the main rate
    assert rate('b', '--regime', 'vision', '--vision_mode', '128', '--learning_rate', '1e-4') == '0.0001'
    config = read_json(tmp_path / 'b' / 'config.json')
    config['run']['pretrained_encoder'] = True                                                     # as if from the released weights
    (tmp_path / 'b' / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    assert rate('c', '--model', str(tmp_path / 'b')) == '1e-05'
    run(corpus, tmp_path / 'd', '--regime', 'conv1d_residual', '--no-train_encoder', '--learning_rate', '0.1', steps=1)
    run(corpus, tmp_path / 'e', '--regime', 'conv1d_residual', '--learning_rate', '0', steps=1)
    frozen, initial = load_run(tmp_path / 'd')[0], load_run(tmp_path / 'e')[0]
    assert all(torch.equal(a, b) for a, b in zip(frozen.encoder.parameters(), initial.encoder.parameters()))
    assert not torch.equal(frozen.decoder.norm.weight, initial.decoder.norm.weight)
    train.main(['--resume', str(tmp_path / 'd'), '--steps', '2'])
    resumed = load_run(tmp_path / 'd')[0]
    assert all(torch.equal(a, b) for a, b in zip(frozen.encoder.parameters(), resumed.encoder.parameters()))

def test_from_a_model_that_is_no_run(corpus, tmp_path, capsys):
    """One epoch, rounded up, at the paper's rate; the tokenizer comes along; what the log says of rate and speed fits together."""
    model, _, config = load('tiny', 'conv1d_residual', 32, conv_gain=0.5)
    config['run']['pretrained_encoder'] = True                                                      # as if it were a trained one
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / 'tokenizer.json').write_text('{}', encoding='utf-8')
    save(released_tensors(model, 'conv1d_residual'), config, tmp_path / 'model')
    assert 'a model, but no run' in said(capsys, train.main, ['--resume', str(tmp_path / 'model')])
    assert not hasattr(train.parse_args(['--model', str(tmp_path / 'model')]), 'conv_gain')         # of meanpool, the default
    flags = ('--model', str(tmp_path / 'model'), '--regime', 'conv1d_residual')
    log = run(corpus, tmp_path / 'run', *flags, '--encoder_lr', '7e-5', steps=None)
    assert [line['step'] for line in log] == [*range(1, 10), 9]                                     # 200 segments in 50 batches, 6 a step
    assert [line['lr'] for line in log[:-1]] == pytest.approx([1e-4 * train.learning_rate_scale(i, 9, 0.1) for i in range(9)])
    for line in log[:8]:
        assert line['tokens_per_s'] * line['minutes_left'] * 60 == pytest.approx(4 * 6 * 32 * (9 - line['step']))
    assert (tmp_path / 'run' / 'tokenizer.json').exists() and load_run(tmp_path / 'run')[2]['run']['settings']['conv_gain'] == 0.5
    capsys.readouterr()
    run(corpus, tmp_path / 'again', *flags, steps=1)
    assert 'parameters at 0.0001,' in capsys.readouterr().out                                       # a trained encoder, but no vision

class Stride(nn.Module):
    """A compressor as a fork would add it: every n-th embedding, times a learned scale.

    keep_every: n, 100% divided by what is kept"""

    def __init__(self, config, context_length, *, keep_every: int | None = 2, scaled: bool = True, bias: float = -1.0):
        super().__init__()
        self.keep_every = keep_every
        self.bias, self.scale = bias, nn.Parameter(torch.ones(config.hidden_size), requires_grad=scaled)

    def forward(self, batch, embed):
        return embed(batch['context'][:, ::self.keep_every]) * self.scale + self.bias

def test_a_new_encoder_is_a_class_and_a_line(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(encoders.ENCODERS, 'stride', Stride)
    assert 'n, 100% divided' in train.flags().format_help()
    run(corpus, tmp_path / 'run', '--regime', 'stride', '--keep_every', '8', steps=2)
    evaluation.main([str(tmp_path / 'run'), '--segments', '4'])
    assert 'keep_every 8, scaled True, bias -1.0 | 5 | 6.40 |' in capsys.readouterr().out                                  # BOS and 4 of 32 tokens
    model, _, config = load_run(tmp_path / 'run')
    assert config['run']['settings'] == {'keep_every': 8, 'scaled': True, 'bias': -1.0}
    assert not torch.equal(model.encoder.scale, torch.ones(128))
    assert 'stride.scale' in load_file(tmp_path / 'run' / 'model.safetensors')
    args = train.parse_args(['--model', str(tmp_path / 'run'), '--no-scaled', '--conv_gain', '0'])             # a setting may be 0
    assert (args.keep_every, args.scaled, args.conv_gain, args.bias) == (8, False, 0, -1.0)
    run(corpus, tmp_path / 'fixed', '--regime', 'stride', '--no-scaled', steps=2)                              # what an encoder froze stays so
    assert torch.equal(load_run(tmp_path / 'fixed')[0].encoder.scale, torch.ones(128))

class Queries(nn.Module):
    """Attention pooling, with a parameter that has its setting's name."""

    def __init__(self, config, context_length, *, queries: int = 4):
        super().__init__()
        self.queries = encoders.learned(queries, config.hidden_size)

    def forward(self, batch, embed):
        x = embed(batch['context'])
        return (self.queries @ x.transpose(1, 2)).softmax(dim=-1) @ x

def test_a_setting_may_share_its_name_with_a_parameter(monkeypatch):
    monkeypatch.setitem(encoders.ENCODERS, 'queries', Queries)
    monkeypatch.setattr(Queries, '__doc__', None)
    assert '--queries' in train.flags().format_help()          # a class may say nothing of itself
    model, _, config = load('tiny', 'queries', 32, queries=7)
    assert config['run']['settings'] == {'queries': 7} and model.sequence({'context': torch.zeros(2, 32, dtype=torch.long)}).shape == (2, 8, 128)
    monkeypatch.setattr(Queries, 'forward', lambda self, batch, embed: embed(batch['context']).mT)
    with pytest.raises(AssertionError, match=r'memory \(2, 128, 32\), not \(2, M, 128\)'):
        model.sequence({'context': torch.zeros(2, 32, dtype=torch.long)})

class Halved(encoders.MeanPool):
    """A setting that the constructor changes under its own name is stored as it was given."""

    def __init__(self, config, context_length, *, width: float = 8.0):
        super().__init__(config, context_length)
        self.width, self.loss = width / 2, 0.0                 # a loss may be a plain number

def test_a_changed_setting_is_stored_as_given_and_a_flag_is_no_setting(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(encoders.ENCODERS, 'halved', Halved)
    run(corpus, tmp_path / 'run', '--regime', 'halved', steps=1)
    train.main(['--resume', str(tmp_path / 'run'), '--steps', '2'])
    assert load_run(tmp_path / 'run')[2]['run']['settings'] == {'width': 8.0} and read_log(tmp_path / 'run')[0]['encoder_loss'] == 0
    monkeypatch.setattr(Halved, '__init__', lambda self, config, context_length, *, steps: None)
    assert said(capsys, train.main, '') == 'halved: its setting steps has the name of a flag (DEBUG=1 shows where)'

class Quantised(nn.Module):
    """Means of four, pulled towards a code, with a loss of its own; starts from the decoder's first layer."""

    def __init__(self, config, context_length):
        super().__init__()
        self.code = nn.Parameter(torch.ones(config.hidden_size))
        self.starts = nn.Parameter(torch.zeros(()), requires_grad=False)

    def start_from(self, decoder):
        self.starts += 1
        self.code.data.copy_(decoder.layers[0].input_layernorm.weight + 1)

    def forward(self, batch, embed):
        x = embed(batch['context']).unflatten(1, (-1, 4)).mean(dim=2)
        self.loss = 0.5 * (self.code - x.detach()).pow(2).mean()
        return x + self.code

def test_an_encoder_may_have_a_loss_and_start_from_the_decoder(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(encoders.ENCODERS, 'quantised', Quantised)
    log = run(corpus, tmp_path / 'one', '--regime', 'quantised', '--gradient_accumulation_steps', '2', steps=2)
    assert log[0]['encoder_loss'] == pytest.approx(2.0, abs=0.05)                                  # (2 - 0) squared, halved; embeddings are small
    model = load_run(tmp_path / 'one')[0]
    assert model.encoder.starts == 1 and not torch.equal(model.encoder.code, torch.full((128,), 2.0))
    run(corpus, tmp_path / 'two', '--model', str(tmp_path / 'one'), '--objective', 'lm', steps=1)   # it has one: it does not start again
    assert load_run(tmp_path / 'two')[0].encoder.starts == 1
    model, tokenizer, _ = load('tiny', 'quantised', 32)
    optimizer = torch.optim.SGD([{'params': [model.encoder.code], 'peak_lr': 0.0}])
    monkeypatch.setattr(optimizer, 'zero_grad', lambda set_to_none: None)
    batches = [Batches(corpus, 'train', 4, tokenizer)[i] for i in range(2)]
    train.train_step(model, optimizer, batches, 1.0, 1e9, torch.device('cpu'))
    found, model.encoder.code.grad = model.encoder.code.grad, None
    for batch in batches:
        losses, _, extra = model(batch)                                                            # divided by the accumulation, like the rest
        ((losses.mean() + extra['balance_loss'] + model.encoder.loss) / 2).backward()
    assert torch.allclose(found, model.encoder.code.grad, atol=1e-6)

def test_batch_n_is_a_function_of_seed_and_n(corpus):
    tokenizer = tokenizer_of('tiny')
    make = lambda seed=1: Batches(corpus, 'train', 16, tokenizer, seed=seed)
    a, b = make(), make()
    assert torch.equal(a[1000]['context'], b[1000]['context'])                                     # epochs later, asked for first
    assert not torch.equal(a[0]['context'], make(seed=2)[0]['context'])
    rows = [i for n in range(a.n * 2 // 16) for i in a.rows(n)]
    epoch, second = rows[:a.n], rows[a.n:]
    assert sorted(epoch) == sorted(second) == list(range(a.n)) and epoch != second
