"""
The encoders: a context of T tokens becomes a memory of M vectors, as wide as the embeddings.

    encoder(batch, embed) -> memory (B, M, D)
        batch['context']: (B, T) token ids
        batch['image']:   (B, 3, S, S) pixels, if the encoder has an attribute image_size
        embed:            the decoder's own token embedding

    text              the embeddings of the last N tokens (truncation) or of the whole context
    meanpool          the mean embedding of each window
    conv1d_residual   a pyramid of residual convolutions, each of which halves the length
    vision            the context drawn as a page, then DeepSeek-OCR's encoder: SAM, CLIP, projector

To add an encoder, write a class with the constructor (config, context_length, *, settings) and
register it in ENCODERS under its --regime. config is a decoder.DecoderConfig. A setting's type is
bool, int, float or str, or one of these | None. It becomes a flag of train.py, whose help is the
line "name: help" of the docstring. config.json stores it, and eval.py's table shows it.

Three optional extras of an encoder:

    prompt                a text that the decoder reads after the memory
    loss                  a scalar that forward() sets; it is trained on, and logged
    start_from(decoder)   called once, if the encoder starts from random weights, to copy what it
                          wants of the decoder into parameters that the constructor has made

Embeddings carry no positions: an encoder that attends over them has to add its own.

B batch, T context tokens, M memory vectors, D decoder width, L a length, S page side in pixels, C
channels, H W height and width in patches, h vectors a side, n heads, d head width. References:
arXiv 2512.03643 (the compressors); DeepSeek-OCR's deepencoder.py, whose parameter names are kept.
"""
import inspect
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

class Text(nn.Module):
    """memory = embed(last N context tokens). At language modelling it is the bar for a memory of N
    vectors: as many positions, and no compression.

    text_context_tokens: how many, N; 0 is no context (default: the whole context)"""

    def __init__(self, config, context_length, *, text_context_tokens: int | None = None):
        super().__init__()
        self.n = text_context_tokens
        if self.n is None:
            self.n = context_length
        if not 0 <= self.n <= context_length:
            raise ValueError(f'text_context_tokens {self.n} is not between 0 and '
                             f'{context_length}, the context length')

    def forward(self, batch, embed):
        context = batch['context']
        T = context.shape[1]
        return embed(context[:, T - self.n:])                       # (B, N, D)

def learned(*shape):
    """Learned vectors (..., D), each of norm about 1."""
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)

def append(memory, vector):
    """memory (B, M, D) and vector (D,) or (B, 1, D) -> (B, M + 1, D)"""
    vector = vector.expand(len(memory), 1, -1)                      # (D,) is repeated for each row
    return torch.cat([memory, vector], dim=1)

class MeanPool(nn.Module):
    """memory_i = mean(embed(context[i * s : i * s + w])), then a mean of the tokens left over, then
    a separator: a learned vector that tells the decoder where vectors end and tokens begin.

    Embeddings are wide, so different sets of w tokens have clearly different means: the tokens can
    be recovered from a mean, but not their order. The decoder guesses that.

    compression_window_size: tokens in a window, w
    compression_stride: tokens from one window to the next, s (default: the window)"""

    def __init__(self, config, context_length, *, compression_window_size: int = 4,
                 compression_stride: int | None = None):
        super().__init__()
        w = compression_window_size
        s = compression_stride
        if s is None:
            s = w
        if not 1 <= w <= context_length or s < 1:
            raise ValueError(f'compression_window_size {w} with compression_stride {s} does not '
                             f'fit a context of {context_length} tokens')
        self.window = w
        self.stride = s
        self.separator = learned(config.hidden_size)

    def forward(self, batch, embed):
        x = embed(batch['context'])                                 # (B, T, D)
        w, s = self.window, self.stride
        windows = x.unfold(1, w, s)                                 # (B, windows, D, w)
        memory = windows.mean(dim=-1)                               # (B, windows, D)
        end = (memory.shape[1] - 1) * s + w                         # where the last window ends
        if end < x.shape[1]:
            memory = append(memory, x[:, end:].mean(dim=1, keepdim=True))
        return append(memory, self.separator)

class ResidualBlock(nn.Module):
    """Two convolutions, the second with stride 2, and a shortcut: x, average-pooled to that length.
    Each norm takes its mean and variance over all channels and positions."""

    def __init__(self, dim, kernel, gain):
        super().__init__()
        self.conv1 = nn.Conv1d(dim, dim, kernel, padding='same', bias=False)
        self.norm1 = nn.GroupNorm(1, dim)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(1, dim)
        nn.init.constant_(self.norm2.weight, gain)

    def forward(self, x):                                           # (B, D, L)
        y = F.gelu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))                               # (B, D, ceil(L / 2))
        return F.gelu(y + F.adaptive_avg_pool1d(x, y.shape[-1]))

class Conv1dResidual(nn.Module):
    """memory = residual blocks over the embeddings, as many as lead from T to the target length,
    then a separator.

    compression_target: number of vectors: T, T / 2, T / 4 and so on, rounded up (default: T / 4)
    conv_kernel: width of the first convolution of each block, odd
    conv_gain: initial weight of each block's last norm; at 0 a block starts as gelu(shortcut)"""

    def __init__(self, config, context_length, *, compression_target: int | None = None,
                 conv_kernel: int = 5, conv_gain: float = 1.0):
        super().__init__()
        lengths = [context_length]                    # lengths[i]: after i blocks
        while lengths[-1] > 1:
            lengths.append((lengths[-1] + 1) // 2)
        target = compression_target
        if target is None:
            two_blocks = min(2, len(lengths) - 1)     # a context of one token takes none
            target = lengths[two_blocks]
        if target not in lengths:
            raise ValueError(f'compression_target {target} is not one of {lengths}: each block '
                             'halves the length')
        if conv_kernel % 2 == 0 or conv_kernel < 1:
            raise ValueError(f'conv_kernel {conv_kernel} is not an odd positive number')
        self.pyramid = nn.Sequential()
        for _ in range(lengths.index(target)):
            self.pyramid.append(ResidualBlock(config.hidden_size, conv_kernel, conv_gain))
        self.separator = learned(config.hidden_size)

    def forward(self, batch, embed):
        x = embed(batch['context']).transpose(1, 2)                 # (B, D, T)
        x = self.pyramid(x).transpose(1, 2)                         # (B, M - 1, D)
        return append(x, self.separator)

# ---- vision: pixels -> SAM -> CLIP -> projector

@dataclass
class VisionConfig:
    """Sizes of the vision encoder. The defaults are DeepSeek-OCR's SAM ViT-B and CLIP ViT-L."""
    image_size: int = 1024                  # page side of SAM's tables; resized for other pages
    sam_width: int = 768
    sam_layers: int = 12
    sam_heads: int = 12
    sam_global: tuple = (2, 5, 8, 11)       # these layers see the whole page, the others windows
    clip_width: int = 1024
    clip_layers: int = 24
    clip_heads: int = 16

WINDOW = 14                                 # patches a side of SAM's windows
CLIP_GRID = 16                              # patches a side of CLIP's position table

def resize_positions(table, size):
    """Resize a square table of position vectors (1, old, old, C) to (1, size, size, C): bicubic
    with antialiasing, in fp32."""
    if table.shape[1] == size:
        return table
    x = table.float().permute(0, 3, 1, 2)                           # (1, C, h, h)
    x = F.interpolate(x, size, mode='bicubic', antialias=True)
    return x.permute(0, 2, 3, 1).to(table.dtype)

def relative_positions(table, size):
    """The vector of each offset i - j, for i and j from 0 to size - 1: (size, size, d). The table
    has 2 g - 1 rows, one for each offset from 1 - g to g - 1. It is resized if g is not size."""
    if table.shape[0] != 2 * size - 1:
        x = table.float().T[None]                                   # (1, d, 2 g - 1)
        x = F.interpolate(x, 2 * size - 1, mode='linear')
        table = x[0].T.to(table.dtype)
    i = torch.arange(size, device=table.device)
    offset = i[:, None] - i[None, :]
    return table[offset + size - 1]

class SAMAttention(nn.Module):
    """Attention with relative positions in two dimensions.

    The query at row i, column j scores the key at row r, column c with

        q . key / sqrt(d) + q . R_h[i - r] + q . R_w[j - c]

    For one query, q . R_h has only H values, one for each row of keys. So we append these H values
    to q, and to each key its row as a one-hot vector: their dot product picks the right value.
    Columns likewise. No bias of (HW x HW) is ever stored, and the fused kernel does the rest.
    """

    def __init__(self, dim, n_head, size):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size - 1, dim // n_head))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size - 1, dim // n_head))

    def forward(self, x):
        B, H, W, C = x.shape
        n, d = self.n_head, C // self.n_head
        qkv = self.qkv(x).view(B, H, W, 3, n, d)
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)                     # (B, n, H, W, d) each

        R_h = relative_positions(self.rel_pos_h, H).type_as(q)      # (H, H, d)
        R_w = relative_positions(self.rel_pos_w, W).type_as(q)      # (W, W, d)
        bias_h = torch.einsum('bnijd,ird->bnijr', q, R_h)           # (B, n, H, W, H)
        bias_w = torch.einsum('bnijd,jcd->bnijc', q, R_w)           # (B, n, H, W, W)
        # The key at (r, c) has row[..., r, c, :], one-hot at r, and column[..., r, c, :], at c.
        row = torch.eye(H, device=x.device, dtype=q.dtype)[:, None].expand(B, n, H, W, H)
        column = torch.eye(W, device=x.device, dtype=q.dtype).expand(B, n, H, W, W)

        q = q * d ** -0.5                     # only this part is scaled, the biases are not
        q = torch.cat([q, bias_h, bias_w], dim=-1)
        k = torch.cat([k, row, column], dim=-1)
        v = F.pad(v, (0, H + W))              # fused kernels want one width; cut off again below
        q = q.flatten(2, 3)                                         # (B, n, HW, d + H + W)
        k = k.flatten(2, 3)
        v = v.flatten(2, 3)
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        y = y[..., :d].transpose(1, 2)                              # (B, HW, n, d)
        return self.proj(y.reshape(B, H, W, C))

class SAMBlock(nn.Module):
    """A pre-norm transformer block whose attention sees windows of window x window patches, or the
    whole page if window is None. grid: patches a side of the pages that SAM was trained on."""

    def __init__(self, dim, n_head, window, grid):
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SAMAttention(dim, n_head, grid if window is None else window)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        # A ModuleDict only gives the parameters their released names: mlp.lin1, mlp.lin2.
        self.mlp = nn.ModuleDict({
            'lin1': nn.Linear(dim, 4 * dim),
            'lin2': nn.Linear(4 * dim, dim),
        })

    def attend(self, x):
        """Attention within each window: (B, H, W, C) -> (B, H, W, C)."""
        if self.window is None:
            return self.attn(x)
        B, H, W, C = x.shape
        w = self.window
        m = math.ceil(H / w)                  # windows a side; pages are square
        # Zeros fill the last windows, and patches attend to them: DeepSeek-OCR was trained so.
        right, below = m * w - W, m * w - H
        x = F.pad(x, (0, 0, 0, right, 0, below))                    # (B, mw, mw, C)
        x = x.view(B, m, w, m, w, C).transpose(2, 3)                # (B, m, m, w, w, C)
        x = self.attn(x.reshape(B * m * m, w, w, C))
        x = x.view(B, m, m, w, w, C).transpose(2, 3)                # (B, m, w, m, w, C)
        return x.reshape(B, m * w, m * w, C)[:, :H, :W]

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        y = F.gelu(self.mlp.lin1(self.norm2(x)))
        return x + self.mlp.lin2(y)

class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x):
        x = super().forward(x.permute(0, 2, 3, 1))
        return x.permute(0, 3, 1, 2)

class SAM(nn.Module):
    """Pixels (B, 3, S, S) to features (B, C, S / 64, S / 64): a ViT on patches of 16 pixels, a neck
    that narrows the channels, and two convolutions that halve the grid. v: a VisionConfig."""

    def __init__(self, v):
        super().__init__()
        grid = v.image_size // 16
        neck = v.clip_width // 4              # net_2 and net_3 double it, up to CLIP's width
        self.patch_embed = nn.ModuleDict({'proj': nn.Conv2d(3, v.sam_width, 16, stride=16)})
        self.pos_embed = nn.Parameter(torch.randn(1, grid, grid, v.sam_width) * 0.02)
        self.blocks = nn.Sequential()
        for i in range(v.sam_layers):
            window = None if i in v.sam_global else WINDOW
            self.blocks.append(SAMBlock(v.sam_width, v.sam_heads, window, grid))
        self.neck = nn.Sequential(
            nn.Conv2d(v.sam_width, neck, 1, bias=False),
            ChannelNorm(neck, eps=1e-6),
            nn.Conv2d(neck, neck, 3, padding=1, bias=False),
            ChannelNorm(neck, eps=1e-6),
        )
        self.net_2 = nn.Conv2d(neck, 2 * neck, 3, stride=2, padding=1, bias=False)
        self.net_3 = nn.Conv2d(2 * neck, 4 * neck, 3, stride=2, padding=1, bias=False)

    def forward(self, image):
        x = self.patch_embed.proj(image).permute(0, 2, 3, 1)        # (B, H, W, C), H = S / 16
        x = x + resize_positions(self.pos_embed, x.shape[1])
        x = self.blocks(x).permute(0, 3, 1, 2)                      # (B, C, H, W)
        return self.net_3(self.net_2(self.neck(x)))

class CLIPBlock(nn.Module):
    """A pre-norm transformer block with the quick GELU, x sigmoid(1.702 x)."""

    def __init__(self, dim, n_head):
        super().__init__()
        self.n_head = n_head
        self.layer_norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.self_attn = nn.ModuleDict({
            'qkv_proj': nn.Linear(dim, 3 * dim),
            'out_proj': nn.Linear(dim, dim),
        })
        self.layer_norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = nn.ModuleDict({
            'fc1': nn.Linear(dim, 4 * dim),
            'fc2': nn.Linear(4 * dim, dim),
        })

    def forward(self, x):                                           # (B, 1 + h * h, C)
        qkv = self.self_attn.qkv_proj(self.layer_norm1(x))
        qkv = qkv.unflatten(-1, (3, self.n_head, -1))               # (B, 1 + h * h, 3, n, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # (B, n, 1 + h * h, d) each
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.self_attn.out_proj(y.transpose(1, 2).flatten(2))
        y = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(y * torch.sigmoid(1.702 * y))

class CLIP(nn.Module):
    """A ViT whose patch embeddings are SAM's features: (B, C, h, h) -> (B, 1 + h * h, C). The class
    token comes first. There is no final norm. v: a VisionConfig."""

    def __init__(self, v):
        super().__init__()
        C = v.clip_width
        self.embeddings = nn.ModuleDict({
            'patch_embedding': nn.Conv2d(3, C, 14, stride=14, bias=False),
            'position_embedding': nn.Embedding(1 + CLIP_GRID ** 2, C),
        })
        # patch_embedding is not used, as SAM's features take its place. The checkpoint has it.
        self.embeddings.patch_embedding.requires_grad_(False)
        self.embeddings.class_embedding = nn.Parameter(torch.randn(C) * 0.02)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.02)
        self.pre_layrnorm = nn.LayerNorm(C, eps=1e-5)               # (sic)
        layers = nn.Sequential()
        for _ in range(v.clip_layers):
            layers.append(CLIPBlock(C, v.clip_heads))
        self.transformer = nn.ModuleDict({'layers': layers})

    def forward(self, features):
        B, C, h, _ = features.shape
        table = self.embeddings.position_embedding.weight           # (1 + 16 x 16, C)
        patches = table[1:].view(1, CLIP_GRID, CLIP_GRID, C)
        patches = resize_positions(patches, h).view(h * h, C)
        positions = torch.cat([table[:1], patches])                 # (1 + h * h, C)
        token = self.embeddings.class_embedding.expand(B, 1, C).type_as(features)
        x = torch.cat([token, features.flatten(2).transpose(1, 2)], dim=1)  # (B, 1 + h * h, C)
        return self.transformer.layers(self.pre_layrnorm(x + positions))

# Pixels a side, as DeepSeek-OCR names them.
VISION_MODES = {'tiny': 512, 'small': 640, 'base': 1024, 'large': 1280}

class Vision(nn.Module):
    """memory = projector([CLIP(SAM(page)), SAM(page)]), row by row, with a newline vector after
    each row and a separator at the end.

    SAM sees fine detail, within windows; CLIP then relates the whole page. A page of S x S pixels
    has h x h vectors, h = S / 64. The newlines tell the decoder where a row of them ends. So
    M = h (h + 1) + 1: 640 pixels make 10 x 10 vectors, and M = 111.

    vision_mode: tiny, small, base, large, or pixels a side (default: that of the model's SAM)
    vision_prompt: text that the decoder reads after the page"""

    def __init__(self, config, context_length, *, vision_mode: str | None = None,
                 vision_prompt: str = ''):
        super().__init__()
        v = config.vision or VisionConfig()
        mode = vision_mode
        if mode is None:
            mode = str(v.image_size)
        pixels = VISION_MODES.get(mode)
        if pixels is None and mode.isdecimal():
            pixels = int(mode)
        if not pixels or pixels % 64:
            raise ValueError(f'vision_mode {mode} is not one of {", ".join(VISION_MODES)} or a '
                             'multiple of 64 pixels')
        self.image_size = pixels
        self.prompt = vision_prompt
        self.sam_model = SAM(v)
        self.vision_model = CLIP(v)
        projector = nn.Linear(2 * v.clip_width, config.hidden_size)
        self.projector = nn.ModuleDict({'layers': projector})
        self.image_newline = learned(config.hidden_size)
        self.view_seperator = learned(config.hidden_size)           # (sic)

    def forward(self, batch, embed):
        image = (batch['image'].float() / 255 - 0.5) / 0.5          # 0..255 becomes -1..1
        sam = self.sam_model(image.type_as(self.image_newline))     # (B, C, h, h)
        B, C, h, _ = sam.shape
        clip = self.vision_model(sam)[:, 1:]                        # without the class token
        sam = sam.flatten(2).transpose(1, 2)                        # (B, h * h, C)
        x = self.projector.layers(torch.cat([clip, sam], dim=-1))   # (B, h * h, D)
        rows = append(x.reshape(B * h, h, -1), self.image_newline)  # (B h, h + 1, D)
        memory = rows.reshape(B, h * (h + 1), -1)
        return append(memory, self.view_seperator)

ENCODERS = {
    'text': Text,
    'meanpool': MeanPool,
    'conv1d_residual': Conv1dResidual,
    'vision': Vision,
}

def settings_of(cls):
    """The keyword-only parameters of a class's constructor: {name: inspect.Parameter}."""
    # eval_str: an annotation is a type, also where a file has "from __future__ import annotations"
    parameters = inspect.signature(cls, eval_str=True).parameters
    return {name: p for name, p in parameters.items() if p.kind == p.KEYWORD_ONLY}
