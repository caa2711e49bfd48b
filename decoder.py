"""
The decoder: memory and text to next-token probabilities. DeepSeek-OCR's language model, and the autoencoder around it.

    [BOS] memory [prompt] [hybrid] | target            one sequence, causal attention, loss on the target only
          (B, M, D)         last K context tokens

B batch, T positions, D width, H heads, d head width, V vocabulary, E experts, k experts per token, M memory vectors.
Follows modeling_deepseekv2.py of DeepSeek-OCR, whose config.json makes it plain multi-head attention, not MLA.
"""
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

OBJECTIVES = {'reconstruction': 'context', 'lm': 'continuation'}     # an objective is a choice of target, nothing more

@dataclass
class DecoderConfig:
    """Sizes, named as in the released config.json. The defaults are DeepSeek-OCR's."""
    vocab_size: int = 129280
    hidden_size: int = 1280
    intermediate_size: int = 6848           # of the dense MLP
    moe_intermediate_size: int = 896        # of one expert
    num_hidden_layers: int = 12
    num_attention_heads: int = 10
    num_key_value_heads: int = 10
    n_routed_experts: int = 64
    n_shared_experts: int = 2               # a single MLP as wide as this many experts
    num_experts_per_tok: int = 6
    first_k_dense_replace: int = 1          # how many of the first layers are dense
    aux_loss_alpha: float = 0.001           # weight of the load-balancing loss
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False       # use the embedding as the output matrix
    bos_token_id: int = 0
    eos_token_id: int = 1                   # or a list of ids, each of which ends a text
    vision: object = None                   # encoders.VisionConfig

def rotate(x, cos, sin):
    """Rotate channels i and i + d/2 of x (B, H, T, d): half-split pairs as in Llama, not interleaved as in RoFormer."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

class Attention(nn.Module):
    """o(softmax(q k / sqrt(d)) v), causal, with q and k rotated by position: (B, T, D) -> (B, T, D)."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, D, self.head_dim = layer, config.hidden_size, config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(self, x, cos, sin, cache):
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)               # (B, H, T, d)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            past = cache.get(self.layer, (k[:, :, :0], v[:, :, :0]))
            k, v = cache[self.layer] = [torch.cat(pair, dim=2) for pair in zip(past, (k, v))]
        # A single new token attends to everything before it. Several at once come only while the cache is empty.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1, enable_gqa=k.shape[1] != q.shape[1])
        return self.o_proj(y.transpose(1, 2).flatten(2))

class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, dim, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

def grouped_linear(x, weight, ends):
    """x (rows, in), sorted by expert, times weight (E, out, in) -> (rows, out). Expert e's rows end before ends[e]."""
    # torch's kernel needs no GPU-to-CPU sync. It takes bf16, on the CPU also fp32, in rows of n x 16 bytes.
    dtypes = {'cuda': [torch.bfloat16], 'cpu': [torch.bfloat16, torch.float32]}.get(x.device.type, [])
    if x.dtype in dtypes and all(width * x.element_size() % 16 == 0 for width in weight.shape[1:]):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    bounds = [0] + ends.tolist()
    return torch.cat([x[a:b] @ w.T for a, b, w in zip(bounds, bounds[1:], weight)])

class MoE(nn.Module):
    """shared(x) + sum over the top k of p_e * expert_e(x); p = softmax(router(x)) in fp32, not renormalised over the k.
    The load-balancing loss of a sequence is alpha * sum_e (E * share of the choices that went to e) * (mean of p_e)."""

    def __init__(self, config):
        super().__init__()
        E, D, hidden = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.top_k, self.alpha = config.num_experts_per_tok, config.aux_loss_alpha
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ParameterDict({'gate_proj': torch.empty(E, hidden, D), 'up_proj': torch.empty(E, hidden, D),
                                         'down_proj': torch.empty(E, D, hidden)})
        self.shared_experts = MLP(D, hidden * config.n_shared_experts)

    def route(self, x):
        """(B, T, D) -> probabilities (B, T, E), the k largest (B, T, k) and their experts (B, T, k)."""
        with torch.autocast(x.device.type, enabled=False):
            probs = F.linear(x.float(), self.gate.weight.float()).softmax(dim=-1)
        return probs, *probs.topk(self.top_k, dim=-1)

    def forward(self, x):
        (B, T, D), k, E = x.shape, self.top_k, self.gate.out_features
        probs, top_p, top_e = self.route(x)
        count = torch.zeros_like(probs).scatter(2, top_e, 1.0).sum(dim=1)     # (B, E) tokens that chose each expert
        balance_loss = self.alpha * (count * (E / (T * k)) * probs.mean(dim=1)).sum(dim=1).mean()

        # Autocast does not reach the grouped kernel, so cast here.
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        gate, up, down = (self.experts[name].to(dtype) for name in ('gate_proj', 'up_proj', 'down_proj'))
        order = top_e.flatten().argsort(stable=True)                          # (BTk,) the choices, sorted by expert
        ends = count.sum(dim=0).cumsum(dim=0).to(torch.int32)                 # (E,)
        tokens = x.to(dtype).flatten(0, 1).index_select(0, order // k)        # (BTk, D) each token repeated k times
        hidden = F.silu(grouped_linear(tokens, gate, ends)) * grouped_linear(tokens, up, ends)
        outputs = grouped_linear(hidden, down, ends)                          # (BTk, D)
        outputs = outputs.index_select(0, order.argsort()).view(B, T, k, D)   # in the tokens' order again
        y = (outputs * top_p[..., None]).sum(dim=2)                           # (B, T, D) in fp32, as top_p is fp32
        return self.shared_experts(x) + y.type_as(x), balance_loss

class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (B, T, D) -> (B, T, D) and its load-balancing loss."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        dense = layer < config.first_k_dense_replace or config.n_routed_experts == 0
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)

    def forward(self, x, cos, sin, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        y = self.mlp(self.post_attention_layernorm(x))
        y, balance_loss = y if isinstance(self.mlp, MoE) else (y, 0.0)
        return x + y, balance_loss

class Decoder(nn.Module):
    """Embeddings (B, T, D) to hidden states (B, T, D), with embed_tokens before and lm_head after."""

    def __init__(self, config):
        super().__init__()
        self.config, self.grad_checkpoint = config, False         # True: recompute a block's activations in backward
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02 * (1280 / config.hidden_size) ** 0.5)         # 0.02 at DeepSeek-OCR's width

    def forward(self, x, cache=None):
        """x (B, T, D) -> hidden states after the final norm (B, T, D), and the sum of the load-balancing losses.
        cache: a dict that keeps each layer's keys and values (B, H, T, d). When it is not empty, T must be 1."""
        start = cache[0][0].shape[2] if cache else 0
        assert start == 0 or x.shape[1] == 1, f'{x.shape[1]} positions at once, after {start} in the cache'
        d = self.layers[0].self_attn.head_dim
        frequency = self.config.rope_theta ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)
        angle = torch.arange(start, start + x.shape[1], device=x.device)[:, None] * frequency               # (T, d / 2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)           # cast only now: positions need fp32
        balance_loss = 0.0
        for layer in self.layers:
            run = partial(checkpoint, layer, use_reentrant=False) if self.grad_checkpoint and self.training else layer
            x, layer_loss = run(x, cos, sin, cache)
            balance_loss = balance_loss + layer_loss
        return self.norm(x), balance_loss

    def logits(self, hidden):
        """(..., D) -> fp32 (..., V)"""
        return F.linear(hidden, (self.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight).float()

    def token_losses(self, hidden, target, rows=None):
        """hidden (B, T, D), target ids (B, T) -> cross-entropy in nats (B, T), whether argmax is correct (B, T)."""
        def losses(h, t):
            logits = self.logits(h)
            return F.cross_entropy(logits, t, reduction='none'), logits.argmax(dim=-1) == t

        # Only one chunk of half a GB of logits exists at any time: the backward pass computes them again.
        rows = rows or 2 ** 27 // self.config.vocab_size // 128 * 128                 # whole tiles of a GPU's products
        chunks = zip(hidden.flatten(0, 1).split(rows), target.flatten().split(rows))
        loss, hit = zip(*(checkpoint(losses, h, t, use_reentrant=False) for h, t in chunks))
        return torch.cat(loss).view(target.shape), torch.cat(hit).view(target.shape)

class Autoencoder(nn.Module):
    """An encoder in front of a decoder. The only place that knows the layout of the sequence. prompt: ids of the tokens
    after the memory. hybrid: how many of the last context tokens follow as tokens; they are in the memory too."""

    def __init__(self, encoder, decoder, objective='reconstruction', prompt=(), hybrid=0):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.objective, self.prompt, self.hybrid = objective, list(prompt), hybrid

    def prefix(self, batch):
        """Everything before the target, as embeddings: [BOS] memory [prompt] [hybrid] -> (B, P, D)."""
        embed, context = self.decoder.embed_tokens, batch['context']
        column = lambda token: embed(context.new_full((len(context), 1), token))         # (B, 1, D)
        bos, *prompt = (column(token) for token in [self.decoder.config.bos_token_id, *self.prompt])
        memory = self.encoder(batch, embed).to(bos.dtype)                     # under autocast it may be bf16
        assert memory.shape[::2] == bos.shape[::2], f'memory {tuple(memory.shape)}, not ({len(bos)}, M, {bos.shape[2]})'
        return torch.cat([bos, memory, *prompt, embed(context[:, context.shape[1] - self.hybrid:])], dim=1)

    def forward(self, batch):
        """batch -> losses in nats and hits (B, T), both per target token, and the load-balancing loss."""
        target = batch[OBJECTIVES[self.objective]]
        hidden, balance_loss = self.decoder(torch.cat([self.prefix(batch), self.decoder.embed_tokens(target)], dim=1))
        predicting = hidden[:, -target.shape[1] - 1:-1]                       # position i predicts token i + 1
        return *self.decoder.token_losses(predicting, target), balance_loss

    @torch.no_grad()
    def generate(self, batch, max_new_tokens, temperature=0.0):
        """Continue each row's prefix -> token ids (B, <= max_new_tokens): argmax at temperature 0, else sampled. A row
        that has reached EOS repeats it, and generation ends when all rows have."""
        x, tokens, cache = self.prefix(batch), [], {}
        eos = torch.tensor(self.decoder.config.eos_token_id, device=x.device).view(-1)
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        while len(tokens) < max_new_tokens and not done.all():
            logits = self.decoder.logits(self.decoder(x, cache)[0][:, -1])    # (B, V)
            token = torch.multinomial((logits / temperature).softmax(dim=-1), 1)[:, 0] if temperature \
                else logits.argmax(dim=-1)
            tokens.append(torch.where(done, eos[0], token))
            done = done | torch.isin(token, eos)
            x = self.decoder.embed_tokens(tokens[-1][:, None])
        return torch.stack(tokens, dim=1)
