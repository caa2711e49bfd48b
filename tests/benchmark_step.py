"""
Seconds of a forward and backward pass, ours and in two plainer ways, taken in turn; medians of five.

    python tests/benchmark_step.py
    python tests/benchmark_step.py cuda                       # DeepSeek-OCR's size, 4 sequences, bf16 autocast
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python tests/benchmark_step.py        # glibc keeps its memory

Two sequences of 1114 positions with the loss on the last 1000, fp32; width 512, 4 layers, 8 heads, a dense MLP of 2048, 64
experts of 224 of which 6 a token, a vocabulary of 8192. "loop" is ours, but with one product per expert instead of the
grouped kernel. "plain" is structured as the authors' code: tokens repeated and picked by masks, a matrix of attention
weights, logits of all positions. All three must have the same loss (on a GPU within 2%, as bf16 rounds).
"""
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import decoder                                                # noqa: E402

DEVICE = torch.device(sys.argv[1] if len(sys.argv) > 1 else 'cpu')
GPU = DEVICE.type == 'cuda'
B, T, TARGETS = 4 if GPU else 2, 1114, 1000

def loop(x, weight, ends):
    bounds = [0] + ends.tolist()
    return torch.cat([x[a:b] @ w.T for a, b, w in zip(bounds, bounds[1:], weight)])

def plain_moe(self, x):
    probs, top_p, top_e = self.route(x)
    E, choices = probs.shape[-1], top_e.flatten()
    count = torch.zeros_like(probs).scatter(2, top_e, 1.0).sum(dim=1)
    balance_loss = self.alpha * (count * (E / (T * self.top_k)) * probs.mean(dim=1)).sum(dim=1).mean()
    rows = x.flatten(0, 1).repeat_interleave(self.top_k, dim=0)
    out = None
    for e, (gate_up, down) in enumerate(zip(self.experts.gate_up_proj, self.experts.down_proj)):
        gate, up = gate_up.chunk(2)
        mine = rows[choices == e]
        y = (F.silu(mine @ gate.T) * (mine @ up.T)) @ down.T
        out = torch.empty(len(rows), y.shape[1], dtype=y.dtype, device=y.device) if out is None else out
        out[choices == e] = y
    y = (out.view(*top_p.shape, -1) * top_p[..., None]).sum(dim=2)
    return self.shared_experts(x) + y, balance_loss

def plain_attention(q, k, v, **_):
    mask = torch.full((T, T), -torch.inf, device=q.device).triu(1)
    return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + mask).softmax(dim=-1) @ v

def seconds(model, ids, target, all_logits=False):
    start = time.perf_counter()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
        hidden, balance_loss = model(model.embed_tokens(ids))
        if all_logits:
            loss = F.cross_entropy(model.logits(hidden)[:, -TARGETS - 1:-1].flatten(0, 1), target.flatten())
        else:
            loss = model.token_losses(hidden[:, -TARGETS - 1:-1], target)[0].mean()
    (loss + balance_loss).backward()
    model.zero_grad()
    loss = loss.item()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start, loss

def forward_flops(model, positions, targets):
    """FLOPs of a forward pass over a sequence: 2 per weight and position that uses it (logits at the targets only), and causal
    attention, in which a position sees half of the others."""
    c, share = model.config, model.config.num_experts_per_tok / model.config.n_routed_experts
    weights = sum(p.numel() * (share if p.dim() == 3 else 1) for p in model.layers.parameters())        # 3 dims: experts
    attention = c.num_hidden_layers * c.hidden_size * positions
    return 2 * (positions * (weights + attention) + targets * c.hidden_size * c.vocab_size)

def main():
    torch.manual_seed(0)
    small = dict(vocab_size=8192, hidden_size=512, intermediate_size=2048, moe_intermediate_size=224, num_hidden_layers=4,
                 num_attention_heads=8, num_key_value_heads=8)
    with DEVICE:
        model = decoder.Decoder(decoder.DecoderConfig(**{} if GPU else small))
        V = model.config.vocab_size
        data = torch.randint(0, V, (B, T)), torch.randint(0, V, (B, TARGETS))
    gflop = 3 * B * forward_flops(model, T, TARGETS) / 1e9
    square, times, losses = torch.randn(2048, 2048, device=DEVICE), {'ours': [], 'loop': [], 'plain': []}, {}
    rates = []
    for _ in range(6):
        start = time.perf_counter()
        (square @ square).sum().item()
        rates.append(2 * 2048 ** 3 / 1e9 / (time.perf_counter() - start))
        took, losses['ours'] = seconds(model, *data)
        times['ours'].append(took)
        with patch.object(decoder, 'grouped_linear', loop):
            took, losses['loop'] = seconds(model, *data)
            times['loop'].append(took)
        with patch.object(decoder.MoE, 'forward', plain_moe), patch.object(F, 'scaled_dot_product_attention', plain_attention):
            took, losses['plain'] = seconds(model, *data, all_logits=True)
            times['plain'].append(took)
    assert max(losses.values()) - min(losses.values()) < (0.02 * losses['ours'] if GPU else 1e-4), losses
    median = lambda values: sorted(values[1:])[2]             # the first of the six warms up
    print(f'torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads, fp32 matrix products of 2048 x 2048 at {median(rates):.0f} GFLOP/s')
    for name, values in times.items():
        took = median(values)
        print(f'{name:6s} {took:.2f} s ({min(values[1:]):.2f} to {max(values[1:]):.2f}), {gflop / took:.0f} GFLOP/s, {median(times["plain"]) / took:.2f} times as fast as plain')

if __name__ == '__main__':
    main()
