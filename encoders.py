"""
The encoders: a context of T tokens to a memory of M vectors, each as wide as the decoder's embeddings.

    encoder(batch, embed) -> memory (B, M, D)      batch['context'] (B, T) token ids; batch['image'] (B, 3, S, S) pixels
                                                   if the encoder has an image_size; embed: the decoder's own embedding
    text             the embeddings of the last N tokens: truncation, or the whole context
    meanpool         the mean embedding of each window
    conv1d_residual  a pyramid of residual convolutions, each of which halves the length
    vision           the context drawn as a page and read by DeepSeek-OCR's encoder: page -> SAM -> CLIP -> projector

To add an encoder, write a class with the constructor (config, context_length, *, settings) and register it in ENCODERS
under its --regime. config is the decoder.DecoderConfig: config.hidden_size is D. Embeddings carry no positions, so
attention over them sees a bag of words unless you add some. A setting is annotated as bool, int, float or str, or as
one of them or None. It is a flag of train.py, whose help is the line "name: help" of the class's docstring. config.json
stores for each setting the encoder's attribute of that name if it is a number or a string (then a default of None is
stored resolved), else the value that was passed. Encoders may share settings, but a setting must not have the name of
another flag. The text of an attribute `prompt` is read after the memory.

B batch, T context tokens, M memory vectors, D decoder width, S page side in pixels, C channels, H W height and width in
patches, h vectors a side, n heads, d head width. References: arXiv 2512.03643 (the compressors) and deepencoder.py of
DeepSeek-OCR, whose parameter names (net_2, pre_layrnorm) are those of the released tensors.
"""
import inspect
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

class Text(nn.Module):
    """memory = embed(last N context tokens), the yardstick: 0 is no context, all of them the whole context.

    text_context_tokens: N (default: the whole context)"""

    def __init__(self, config, context_length, *, text_context_tokens: int | None = None):
        super().__init__()
        self.text_context_tokens = N = context_length if text_context_tokens is None else text_context_tokens
        if not 0 <= N <= context_length:
            raise ValueError(f'text_context_tokens {N} is not between 0 and the context length {context_length}')

    def forward(self, batch, embed):
        context = batch['context']
        return embed(context[:, context.shape[1] - self.text_context_tokens:])

def learned(*shape):
    """Learned vectors (..., D), each of norm about 1."""
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)

def append(memory, vector):
    """(B, M, D), (D,) or (B, 1, D) -> (B, M + 1, D)"""
    return torch.cat([memory, vector.expand(len(memory), 1, -1)], dim=1)

class MeanPool(nn.Module):
    """memory_i = mean(embed(context[i s : i s + w])), then one mean of the tokens left over, then a separator:
    a learned vector that tells the decoder where vectors end and tokens begin, as in DeepSeek-OCR.

    compression_window_size: tokens in a window, w
    compression_stride: from one window to the next, s (default: the window); a longer one skips tokens"""

    def __init__(self, config, context_length, *, compression_window_size: int = 4,
                 compression_stride: int | None = None):
        super().__init__()
        self.compression_window_size = w = compression_window_size
        # Not named compression_stride: so config.json keeps None, and a run with another window has its own stride.
        self.stride = s = w if compression_stride is None else compression_stride
        if not 1 <= w <= context_length or s < 1:
            raise ValueError(f'window {w} with stride {s} does not fit a context of {context_length} tokens')
        self.separator = learned(config.hidden_size)

    def forward(self, batch, embed):
        x, w, s = embed(batch['context']), self.compression_window_size, self.stride
        memory = x.unfold(1, w, s).mean(dim=-1)                                 # (B, windows, D)
        rest = x[:, (memory.shape[1] - 1) * s + w:]
        if rest.shape[1]:
            memory = append(memory, rest.mean(dim=1, keepdim=True))
        return append(memory, self.separator)

class ResidualBlock(nn.Module):
    """y = gelu(norm(conv_2(gelu(norm(conv_1(x))))) + pool(x)): (B, D, L) -> (B, D, ceil(L / 2)); conv_2 has stride 2.
    GroupNorm with one group: its mean and variance are those of all channels and positions."""

    def __init__(self, dim, kernel, gain):
        super().__init__()
        self.conv1 = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, bias=False)
        self.norm1 = nn.GroupNorm(1, dim)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(1, dim)
        nn.init.constant_(self.norm2.weight, gain)

    def forward(self, x):
        y = self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x)))))
        return F.gelu(y + F.adaptive_avg_pool1d(x, y.shape[-1]))

class Conv1dResidual(nn.Module):
    """memory = residual blocks over the embeddings, as many as it takes from T to the target, then a separator.

    compression_target: number of vectors: T, T / 2, T / 4 and so on, rounded up (default: T / 4)
    conv_kernel: width of the first convolution of each block, odd
    conv_gain: initial weight of each block's last norm; at 0 a block starts as gelu of a mean and learns sooner"""

    def __init__(self, config, context_length, *, compression_target: int | None = None, conv_kernel: int = 5,
                 conv_gain: float = 1.0):
        super().__init__()
        chain = [-(-context_length // 2 ** k) for k in range((context_length - 1).bit_length() + 1)]     # rounded up
        self.compression_target = chain[:3][-1] if compression_target is None else compression_target
        if self.compression_target not in chain:
            raise ValueError(f'compression_target {compression_target} is not one of {chain}: blocks halve the length')
        if conv_kernel % 2 == 0 or conv_kernel < 1:
            raise ValueError(f'conv_kernel {conv_kernel} is not an odd positive number')
        n = chain.index(self.compression_target)
        self.pyramid = nn.Sequential(*(ResidualBlock(config.hidden_size, conv_kernel, conv_gain) for _ in range(n)))
        self.separator = learned(config.hidden_size)

    def forward(self, batch, embed):
        x = self.pyramid(embed(batch['context']).transpose(1, 2))               # (B, D, M - 1)
        return append(x.transpose(1, 2), self.separator)

@dataclass
class VisionConfig:
    """Sizes of the vision encoder. The defaults are DeepSeek-OCR's SAM ViT-B and CLIP ViT-L."""
    image_size: int = 1024                  # page size of SAM's position tables; for other pages they are interpolated
    sam_width: int = 768
    sam_layers: int = 12
    sam_heads: int = 12
    sam_global: tuple = (2, 5, 8, 11)       # these layers attend over the whole page, the others within windows
    sam_neck: int = 256
    clip_width: int = 1024
    clip_layers: int = 24
    clip_heads: int = 16
    clip_mlp: int = 4096

WINDOW, CLIP_GRID = 14, 16                # patches on a side: of SAM's windows, and of CLIP's position table

def resize_positions(table, size):
    """Resize a square table of position vectors (1, h, h, C) to (1, size, size, C): antialiased bicubic, in fp32."""
    if table.shape[1] == size:
        return table
    x = F.interpolate(table.float().permute(0, 3, 1, 2), (size, size), mode='bicubic', antialias=True)
    return x.permute(0, 2, 3, 1).to(table.dtype)

def relative_positions(table, size):
    """Rows i - j of a table (2h - 1, d) of relative positions, resized to 2 size - 1 rows: (size, size, d)."""
    if table.shape[0] != 2 * size - 1:
        table = F.interpolate(table.float().T[None], 2 * size - 1, mode='linear')[0].T.to(table.dtype)
    i = torch.arange(size, device=table.device)
    return table[i[:, None] - i[None, :] + size - 1]

class SAMAttention(nn.Module):
    """softmax(q k / sqrt(d) + q R_h + q R_w) v, with R_h and R_w the vectors of the vertical and horizontal offsets.

    The naive form adds a bias to the score of the query at row i, column j and the key at row k, column l:
        score = q . key / sqrt(d) + q . R_h[i - k] + q . R_w[j - l]
    For one query, q R_h has only H values, one for each row of keys. So we append these to q, and to each key its row
    as a one-hot vector, whose dot product picks the right value. Columns likewise. No (HW x HW) bias is ever stored.
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
        q, k, v = self.qkv(x).view(B, H, W, 3, self.n_head, -1).permute(3, 0, 4, 1, 2, 5)       # (B, n, H, W, d) each
        d = q.shape[-1]
        bias_h = torch.einsum('bnhwd,hkd->bnhwk', q, relative_positions(self.rel_pos_h, H).type_as(q))
        bias_w = torch.einsum('bnhwd,wkd->bnhwk', q, relative_positions(self.rel_pos_w, W).type_as(q))
        row = torch.eye(H, device=x.device, dtype=q.dtype)[:, None, :].expand(B, self.n_head, H, W, H)
        col = torch.eye(W, device=x.device, dtype=q.dtype)[None, :, :].expand(B, self.n_head, H, W, W)
        q = torch.cat([q * d ** -0.5, bias_h.type_as(q), bias_w.type_as(q)], dim=-1).flatten(2, 3)  # (B, n, HW, d+H+W)
        k = torch.cat([k, row, col], dim=-1).flatten(2, 3)
        v = F.pad(v, (0, H + W)).flatten(2, 3)                                # fused kernels need one width for all
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :d]
        return self.proj(y.transpose(1, 2).reshape(B, H, W, C))

class SAMBlock(nn.Module):
    """A pre-norm transformer block: attention within windows of window x window patches; window 0 is the whole page."""

    def __init__(self, dim, n_head, window, grid):
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SAMAttention(dim, n_head, window or grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({'lin1': nn.Linear(dim, 4 * dim), 'lin2': nn.Linear(4 * dim, dim)})

    def forward(self, x):
        B, H, W, C = x.shape                                                    # H = W, as pages are square
        w = self.window or H
        n = -(-H // w)                                                          # windows a side
        y = F.pad(self.norm1(x), (0, 0, 0, n * w - W, 0, n * w - H))            # attention sees the padding as well
        y = y.view(B, n, w, n, w, C).transpose(2, 3).reshape(-1, w, w, C)       # (B n n, w, w, C), one row per window
        y = self.attn(y).view(B, n, n, w, w, C).transpose(2, 3).reshape(B, n * w, n * w, C)
        x = x + y[:, :H, :W]
        return x + self.mlp.lin2(F.gelu(self.mlp.lin1(self.norm2(x))))

class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

class SAM(nn.Module):
    """Pixels (B, 3, S, S) to features (B, C, S/64, S/64): a ViT on patches of 16 pixels, a neck, and two halvings."""

    def __init__(self, v):
        super().__init__()
        grid = v.image_size // 16
        self.patch_embed = nn.ModuleDict({'proj': nn.Conv2d(3, v.sam_width, 16, stride=16)})
        self.pos_embed = nn.Parameter(torch.randn(1, grid, grid, v.sam_width) * 0.02)
        self.blocks = nn.Sequential(*(SAMBlock(v.sam_width, v.sam_heads, 0 if i in v.sam_global else WINDOW, grid)
                                      for i in range(v.sam_layers)))
        conv = lambda a, b, size, **k: nn.Conv2d(a, b, size, bias=False, **k)
        self.neck = nn.Sequential(conv(v.sam_width, v.sam_neck, 1), ChannelNorm(v.sam_neck, eps=1e-6),
                                  conv(v.sam_neck, v.sam_neck, 3, padding=1), ChannelNorm(v.sam_neck, eps=1e-6))
        self.net_2 = conv(v.sam_neck, v.clip_width // 2, 3, stride=2, padding=1)
        self.net_3 = conv(v.clip_width // 2, v.clip_width, 3, stride=2, padding=1)

    def forward(self, image):
        x = self.patch_embed.proj(image).permute(0, 2, 3, 1)                    # (B, H, W, C), H = W = S / 16
        x = self.blocks(x + resize_positions(self.pos_embed, x.shape[1]))
        return self.net_3(self.net_2(self.neck(x.permute(0, 3, 1, 2))))

class CLIPBlock(nn.Module):
    """A pre-norm transformer block with the quick GELU, x sigmoid(1.702 x)."""

    def __init__(self, dim, n_head, hidden):
        super().__init__()
        self.n_head = n_head
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim, eps=1e-5), nn.LayerNorm(dim, eps=1e-5)
        self.self_attn = nn.ModuleDict({'qkv_proj': nn.Linear(dim, 3 * dim), 'out_proj': nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({'fc1': nn.Linear(dim, hidden), 'fc2': nn.Linear(hidden, dim)})

    def forward(self, x):                                                       # (B, 1 + HW, C)
        qkv = self.self_attn.qkv_proj(self.layer_norm1(x)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.self_attn.out_proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))
        y = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(y * torch.sigmoid(1.702 * y))

class CLIP(nn.Module):
    """SAM's features (B, C, h, h), used as patch embeddings -> (B, 1 + h h, C), class token first, no final norm."""

    def __init__(self, v):
        super().__init__()
        C = v.clip_width
        self.embeddings = nn.ModuleDict({                             # the first is unused, but in the checkpoint
            'patch_embedding': nn.Conv2d(3, C, 14, stride=14, bias=False).requires_grad_(False),
            'position_embedding': nn.Embedding(1 + CLIP_GRID ** 2, C)})
        self.embeddings.class_embedding = nn.Parameter(torch.randn(C) * 0.02)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.02)
        self.pre_layrnorm = nn.LayerNorm(C, eps=1e-5)                           # (sic)
        blocks = (CLIPBlock(C, v.clip_heads, v.clip_mlp) for _ in range(v.clip_layers))
        self.transformer = nn.ModuleDict({'layers': nn.Sequential(*blocks)})

    def forward(self, features):
        B, C, h, _ = features.shape
        table = self.embeddings.position_embedding.weight                     # class position, then 16 x 16 patches
        patches = resize_positions(table[1:].view(1, CLIP_GRID, CLIP_GRID, C), h).view(-1, C)
        token = self.embeddings.class_embedding.expand(B, 1, C).type_as(features)
        x = torch.cat([token, features.flatten(2).transpose(1, 2)], dim=1) + torch.cat([table[:1], patches])
        return self.transformer.layers(self.pre_layrnorm(x))

VISION_MODES = {'tiny': 512, 'small': 640, 'base': 1024, 'large': 1280}      # pixels a side, as DeepSeek-OCR names them

class Vision(nn.Module):
    """memory = rows of projector([CLIP(SAM(page)), SAM(page)]), a newline vector after each row, then a separator.

    A page of S x S pixels has h x h vectors, h = S / 64, so M = h (h + 1) + 1: 640 pixels make 10 x 10, M = 111.
    vision_mode: tiny, small, base, large, or pixels on a side (default: the page size of the model's SAM)
    vision_prompt: text that the decoder reads after the page"""

    def __init__(self, config, context_length, *, vision_mode: str | None = None, vision_prompt: str = ''):
        super().__init__()
        v = config.vision or VisionConfig()
        mode = str(v.image_size) if vision_mode is None else vision_mode
        self.image_size = VISION_MODES.get(mode) or (int(mode) if mode.isdecimal() else 0)
        if self.image_size == 0 or self.image_size % 64:
            raise ValueError(f'vision_mode {mode} is not one of {", ".join(VISION_MODES)} or a multiple of 64 pixels')
        self.vision_mode, self.prompt = mode, vision_prompt
        self.sam_model = SAM(v)
        self.vision_model = CLIP(v)
        self.projector = nn.ModuleDict({'layers': nn.Linear(2 * v.clip_width, config.hidden_size)})
        self.image_newline = learned(config.hidden_size)
        self.view_seperator = learned(config.hidden_size)                       # (sic)

    def forward(self, batch, embed):
        image = (batch['image'].float() / 255 - 0.5) / 0.5                     # bytes, 0 to 255, become -1 to 1
        sam = self.sam_model(image.type_as(self.image_newline))                 # (B, C, h, h)
        B, C, h, _ = sam.shape
        clip = self.vision_model(sam)[:, 1:]                                    # (B, h h, C), without the class token
        x = self.projector.layers(torch.cat([clip, sam.flatten(2).transpose(1, 2)], dim=-1))    # (B, h h, D)
        rows = append(x.reshape(B * h, h, -1), self.image_newline)              # (B h, h + 1, D)
        return append(rows.reshape(B, h * (h + 1), -1), self.view_seperator)

ENCODERS = {'text': Text, 'meanpool': MeanPool, 'conv1d_residual': Conv1dResidual, 'vision': Vision}

def settings_of(encoder_class):
    """The settings of an encoder's class: {name: inspect.Parameter with its type and default}."""
    return {name: p for name, p in inspect.signature(encoder_class).parameters.items() if p.kind == p.KEYWORD_ONLY}
