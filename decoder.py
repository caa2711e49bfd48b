"""
The decoder: memory and text to next-token probabilities. DeepSeek-OCR's language model, and the
autoencoder around it.

    [BOS] memory [prompt] [hybrid] | target        one sequence, causal attention,
          (B, M, D)                                loss on the target only

hybrid: the last K context tokens once more, as plain tokens.

B batch, T positions, D width, n heads, d head width, V vocabulary, E experts, k experts a token,
M memory vectors. Follows modeling_deepseekv2.py of DeepSeek-OCR, whose config.json makes it plain
multi-head attention, not MLA.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# An objective is a choice of target and nothing else: to add one, add a line.
OBJECTIVES = {'reconstruction': 'context', 'lm': 'continuation'}

LOGITS_AT_ONCE = 2 ** 27                    # in fp32, half a GB

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

def initialize(module, width):
    """Draw all matrices of a module from a normal distribution. width: the decoder's D."""
    std = 0.02 * (1280 / width) ** 0.5      # 0.02 at DeepSeek-OCR's width of 1280
    for p in module.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=std)

def rotary(x, config, start=0):
    """cos and sin, both (T, d / 2), of the angles that rotate queries and keys at the positions of
    x (B, T, D). The first position is `start`."""
    d = config.hidden_size // config.num_attention_heads
    channels = torch.arange(0, d, 2, device=x.device, dtype=torch.float32)
    frequency = config.rope_theta ** (-channels / d)
    position = torch.arange(start, start + x.shape[1], device=x.device)
    angle = position[:, None] * frequency           # in fp32: bf16 cannot tell positions apart
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

def rotate(x, cos, sin):
    """Rotate x (B, n, T, d): channel i together with channel i + d / 2, as in Llama."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

class Attention(nn.Module):
    """o(softmax(q k / sqrt(d)) v), causal, q and k rotated by position: (B, T, D) -> (B, T, D)."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        D = config.hidden_size
        self.head_dim = D // config.num_attention_heads
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, kv_width, bias=False)
        self.v_proj = nn.Linear(D, kv_width, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)
        initialize(self, D)

    def forward(self, x, cos, sin, cache=None):
        B, T, D = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n, T, d)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if cache is not None:
            if self.layer in cache:
                past_k, past_v = cache[self.layer]
                k = torch.cat([past_k, k], dim=2)
                v = torch.cat([past_v, v], dim=2)
            cache[self.layer] = k, v
        is_causal = T > 1                     # T = 1: a single new token sees the whole past
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, D))

class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, dim, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        initialize(self, dim)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Gather(torch.autograd.Function):
    """y = x[index], in which each row of x comes k times. `where` lists the rows of y that copy
    x[0], then those that copy x[1], and so on. Backward sums the gradients of each k of them.
    Autograd would scatter instead, which on a GPU adds in a random order."""

    @staticmethod
    def forward(ctx, x, index, where, k):
        ctx.save_for_backward(where)
        ctx.k = k
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        where, = ctx.saved_tensors
        copies = grad.index_select(0, where).unflatten(0, (-1, ctx.k))  # (rows of x, k, width)
        return copies.sum(dim=1), None, None, None

def grouped_linear(x, weight, ends):
    """x (rows, in), sorted by expert, times weight (E, out, in) -> (rows, out). The rows of expert
    e end before ends[e]."""
    # F.grouped_mm needs no host-device sync. It takes bf16, and on a CPU fp32. A row of `in` or
    # `out` numbers has to be a multiple of 16 bytes.
    _, n_out, n_in = weight.shape
    is_aligned = n_out * x.element_size() % 16 == 0 and n_in * x.element_size() % 16 == 0
    if is_aligned and (x.dtype == torch.bfloat16 or x.device.type == 'cpu'):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    parts = x.tensor_split(ends.tolist()[:-1])
    return torch.cat([part @ w.T for part, w in zip(parts, weight)])

class MoE(nn.Module):
    """shared(x) + sum over the top k of p_e * expert_e(x), with p = softmax(router(x)) in fp32, not
    renormalised over the k.

    The load-balancing loss of a sequence is alpha * E * sum_e (share_e * mean(p_e)). share_e is the
    share of its choices that went to expert e. The loss is least when all are chosen equally."""

    def __init__(self, config):
        super().__init__()
        E, D, hidden = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.top_k = config.num_experts_per_tok
        self.alpha = config.aux_loss_alpha
        self.gate = nn.Linear(D, E, bias=False)                     # the router, as released
        # All experts in one tensor; gate and up together, as both multiply the same rows.
        self.experts = nn.ParameterDict({
            'gate_up_proj': torch.empty(E, 2 * hidden, D),
            'down_proj': torch.empty(E, D, hidden),
        })
        self.shared_experts = MLP(D, hidden * config.n_shared_experts)
        initialize(self, D)

    def route(self, x):
        """(B, T, D) -> probabilities (B, T, E), the k largest and their experts, both (B, T, k)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.gate.weight.float())
            probs = logits.softmax(dim=-1)
        top_p, top_e = probs.topk(self.top_k, dim=-1)
        return probs, top_p, top_e

    def forward(self, x):
        B, T, D = x.shape
        k, E = self.top_k, self.gate.out_features
        probs, top_p, top_e = self.route(x)

        chosen = torch.zeros_like(probs).scatter(2, top_e, 1.0)     # (B, T, E), 1 for k experts
        count = chosen.sum(dim=1)                                   # (B, E)
        share = count / (T * k)
        sequence_loss = E * (share * probs.mean(dim=1)).sum(dim=1)  # (B,)
        balance_loss = self.alpha * sequence_loss.mean()

        # Each token makes k choices: choice c is of token c // k. Sorted by expert they make rows:
        # row r holds choice choice_of_row[r], and choice c is in row row_of_choice[c].
        choice_of_row = top_e.flatten().argsort(stable=True)        # (BTk,)
        token_of_row = choice_of_row // k
        rows = torch.arange(len(choice_of_row), device=x.device)
        row_of_choice = torch.empty_like(rows).scatter_(0, choice_of_row, rows)     # the inverse
        ends = count.sum(dim=0).cumsum(dim=0).to(torch.int32)       # (E,): where rows of e end

        # Autocast ignores grouped_mm: cast by hand to the dtype that it gave the shared experts.
        shared = self.shared_experts(x)
        gate_up_proj = self.experts.gate_up_proj.type_as(shared)
        down_proj = self.experts.down_proj.type_as(shared)
        x = x.type_as(shared).flatten(0, 1)                         # (BT, D)
        tokens = Gather.apply(x, token_of_row, row_of_choice, k)    # (BTk, D), by expert
        gate, up = grouped_linear(tokens, gate_up_proj, ends).chunk(2, dim=-1)
        outputs = grouped_linear(F.silu(gate) * up, down_proj, ends)  # (BTk, D)
        outputs = Gather.apply(outputs, row_of_choice, choice_of_row, 1)    # by token again
        weighted = outputs.view(B, T, k, D) * top_p[..., None]              # fp32, as top_p is
        return shared + weighted.sum(dim=2).type_as(shared), balance_loss

class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (B, T, D) -> (B, T, D) and the load-balancing
    loss, 0 if the layer is dense."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.is_dense = layer < config.first_k_dense_replace or config.n_routed_experts == 0
        if self.is_dense:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = MoE(config)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        y = self.post_attention_layernorm(x)
        if self.is_dense:
            return x + self.mlp(y), x.new_zeros(())
        y, balance_loss = self.mlp(y)
        return x + y, balance_loss

class Decoder(nn.Module):
    """Embeddings (B, T, D) to hidden states (B, T, D); embed_tokens comes before, lm_head after."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False        # True: recompute activations in the backward pass
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList()
        for layer in range(config.num_hidden_layers):
            self.layers.append(Block(config, layer))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        initialize(self.embed_tokens, config.hidden_size)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            initialize(self.lm_head, config.hidden_size)

    def forward(self, x, cache=None):
        """x (B, T, D) -> hidden states after the final norm (B, T, D), and the sum of the
        load-balancing losses. cache: {layer: (keys, values)}, both (B, n, past, d). If it is not
        empty, T must be 1."""
        T = x.shape[1]
        start = 0
        if cache:
            keys, _ = cache[0]              # of the first layer
            start = keys.shape[2]
            assert T == 1, f'{T} positions at once, after {start} in the cache'
        cos, sin = rotary(x, self.config, start)
        balance_loss = torch.zeros((), device=x.device)
        for layer in self.layers:
            if self.grad_checkpoint and self.training:
                x, layer_loss = checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x, layer_loss = layer(x, cos, sin, cache)
            balance_loss = balance_loss + layer_loss
        return self.norm(x), balance_loss

    def logits(self, hidden):
        """(..., D) -> fp32 (..., V)"""
        output = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(hidden, output.weight).float()

    def token_losses(self, hidden, target, rows=None):
        """hidden (B, T, D), target ids (B, T) -> cross-entropy in nats and whether argmax is right,
        both (B, T). rows: how many positions at once (default: logits of half a GB)."""
        def losses(hidden, target):
            logits = self.logits(hidden)
            loss = F.cross_entropy(logits, target, reduction='none')
            return loss, logits.argmax(dim=-1) == target

        hidden = hidden.flatten(0, 1)
        if rows is None:
            rows = max(LOGITS_AT_ONCE // self.config.vocab_size, 1)
        if torch.compiler.is_compiling():
            rows = len(hidden)              # compiled, chunks save nothing: all logits are kept
        loss, hit = [], []
        for h, t in zip(hidden.split(rows), target.flatten().split(rows)):
            # The logits are not kept: the backward pass computes them again.
            chunk_loss, chunk_hit = checkpoint(losses, h, t, use_reentrant=False)
            loss.append(chunk_loss)
            hit.append(chunk_hit)
        return torch.cat(loss).view(target.shape), torch.cat(hit).view(target.shape)

class Autoencoder(nn.Module):
    """An encoder in front of a decoder. The only place that knows the layout of the sequence.
    prompt: ids of the tokens after the memory. hybrid: K, how many of the last context tokens
    follow as plain tokens; they are in the memory too."""

    def __init__(self, encoder, decoder, objective='reconstruction', prompt=(), hybrid=0):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.objective = objective
        self.prompt = list(prompt)
        self.hybrid = hybrid

    def sequence(self, batch, target=None):
        """[BOS] memory [prompt] [hybrid] | target, as embeddings (B, positions, D). The target may
        be left out."""
        context = batch['context']
        B, T = context.shape
        ids = []
        for token in (self.decoder.config.bos_token_id, *self.prompt):
            ids.append(context.new_full((B, 1), token))
        ids.append(context[:, T - self.hybrid:])
        if target is not None:
            ids.append(target)
        # One lookup for all ids, as each lookup makes a gradient as large as the whole table.
        x = self.decoder.embed_tokens(torch.cat(ids, dim=1))
        memory = self.encoder(batch, self.decoder.embed_tokens)
        memory = memory.to(x.dtype)                                 # under autocast it may be bf16
        assert memory.shape[0] == B and memory.shape[2] == x.shape[2], \
            f'memory {tuple(memory.shape)}, not ({B}, M, {x.shape[2]})'
        return torch.cat([x[:, :1], memory, x[:, 1:]], dim=1)

    def forward(self, batch):
        """batch -> losses in nats and hits of the target tokens, both (B, T), and a dict of the
        other losses to train on: the load-balancing loss and, if it has one, the encoder's.

        The target's tokens are predicted from the true ones before them (teacher forcing). So even
        without a memory the decoder guesses the easy ones. Only what it cannot guess has to be in
        the memory."""
        target = batch[OBJECTIVES[self.objective]]
        hidden, balance_loss = self.decoder(self.sequence(batch, target))
        before = hidden.shape[1] - target.shape[1] - 1      # this position predicts target[:, 0]
        losses, hits = self.decoder.token_losses(hidden[:, before:-1], target)
        extra = {'balance_loss': balance_loss}
        if hasattr(self.encoder, 'loss'):
            extra['encoder_loss'] = torch.as_tensor(self.encoder.loss, device=losses.device)
        return losses, hits, extra

    @torch.no_grad()
    def generate(self, batch, max_new_tokens):
        """Continue each row greedily -> token ids (B, at most max_new_tokens). A row that has
        reached EOS repeats it, and generation ends when all rows have."""
        x = self.sequence(batch)
        eos = torch.tensor(self.decoder.config.eos_token_id, device=x.device)
        eos = eos.view(-1)                  # one id or several
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        tokens, cache = [], {}
        while len(tokens) < max_new_tokens and not done.all():
            hidden, _ = self.decoder(x, cache)
            token = self.decoder.logits(hidden[:, -1]).argmax(dim=-1)  # (B,)
            token = torch.where(done, eos[0], token)
            tokens.append(token)
            done |= torch.isin(token, eos)
            x = self.decoder.embed_tokens(token[:, None])
        return torch.stack(tokens, dim=1)
