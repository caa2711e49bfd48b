"""
Read a page: any image, any checkpoint with a vision encoder.

    python examples/read_page.py page.png --model deepseek-ai/DeepSeek-OCR
    python examples/read_page.py page.png --model results/reader           offline, in seconds

The image is prepared as in DeepSeek-OCR. results/reader has learned black DejaVu Sans on square
pages of 256 pixels, in the largest font that fits: any other page (another font or size, 800 x 300
pixels) it reads as nonsense, without a word of warning.
"""
import argparse
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval import pick_device, text_of, to_device
from load_deepseek import (add_flags, fetch, load, open_tensors, part_of, positive, read_json,
                           run_main)

def edit_distance(a, b):
    """The fewest characters to insert, delete or replace that turn a into b (Levenshtein)."""
    row = list(range(len(b) + 1))           # row[j]: from the letters of a so far to b[:j]
    for letter in a:
        above_left = row[0]
        row[0] += 1
        for j in range(1, len(row)):
            replaced = above_left + (letter != b[j - 1])
            above_left = row[j]
            row[j] = min(row[j] + 1, row[j - 1] + 1, replaced)
    return row[-1]

def open_image(path):
    """Any image file as RGB: upright, transparency on white, 16 bits as 8. Raises ValueError."""
    try:
        # Opened by its name, Pillow turns an uncompressed grey TIFF into noise.
        with open(path, 'rb') as file:
            image = Image.open(file)
            if getattr(image, 'n_frames', 1) > 1:
                print(f'{path}: read only the first of {image.n_frames} images', file=sys.stderr)
            # What comes after the pixels may be damaged. Damaged pixels are an OSError.
            with suppress(ValueError, SyntaxError, struct.error):
                image.load()
            with suppress(Exception):       # damaged metadata does not make the pixels unreadable
                image = ImageOps.exif_transpose(image)
            if image.mode in ('I', 'F'):
                raise ValueError(f'mode {image.mode} has no fixed range; convert it to 8 bits')
            if image.mode.startswith('I;16'):
                grey = np.asarray(image) / 257 + 0.5
                image = Image.fromarray(grey.astype(np.uint8))
            image = image.convert('RGBA')
            white = Image.new('RGBA', image.size, 'white')
            return Image.alpha_composite(white, image).convert('RGB')
    except Exception as e:                  # Pillow raises many kinds
        raise ValueError(f'{path}: not an image that can be read ({e})') from e

def to_square(image, size):
    """An image as DeepSeek-OCR wants it: stretched up to 640 pixels, above that padded with grey.
    Raises ValueError for one that would be less than a pixel wide."""
    if min(image.size) * size < max(image.size):
        raise ValueError(f'an image of {image.width} x {image.height} pixels is too narrow to read')
    if size <= 640:
        return image.resize((size, size))
    return ImageOps.pad(image, (size, size), color=(127, 127, 127))

@dataclass(kw_only=True)
class Flags:
    """model: a hub id, a folder or a run
    vision_mode: tiny, small, base, large or pixels a side (default: the model's page size)
    prompt: what to do with the page (default: "Free OCR."; of a run, its own prompt)
    max_new_tokens: tokens to read at most
    device: cpu, cuda, mps; auto is cuda if there is one"""
    model: str = 'deepseek-ai/DeepSeek-OCR'
    vision_mode: str = None
    prompt: str = None
    max_new_tokens: positive = 8192
    device: str = 'auto'

def main(argv=None):
    """The command line: prints what the model reads."""
    parser = argparse.ArgumentParser(description='Read a page.')
    parser.add_argument('page', help='image file')
    add_flags(parser, Flags)
    args = parser.parse_args(argv)
    image = open_image(args.page)
    device = pick_device(args.device)

    # the model, with the page size and the prompt of a run if it is one
    stored = open_tensors(args.model)
    if not any(part_of(name) == 'vision' for name in stored):
        raise ValueError(f'{args.model}: has no vision encoder, so it cannot read')
    run = read_json(fetch(args.model, '*.json') / 'config.json').get('run', {})
    settings = run.get('settings', {'vision_prompt': '\nFree OCR.'})
    if args.vision_mode is not None:
        settings['vision_mode'] = args.vision_mode
    if args.prompt is not None:             # the page takes the place of the tag
        prompt = args.prompt.replace('<image>', '').strip()
        settings['vision_prompt'] = f'\n{prompt}'.rstrip()
    dtype = torch.bfloat16 if device.type == 'cuda' else torch.float32
    model, tokenizer, _ = load(args.model, 'vision', 0, device=device, dtype=dtype, **settings)

    # the page
    page = to_square(image, model.encoder.image_size)
    pixels = torch.from_numpy(np.array(page)).permute(2, 0, 1)[None]        # (1, 3, S, S) uint8
    batch = {'context': torch.empty(1, 0, dtype=torch.long), 'image': pixels}
    ids = model.eval().generate(to_device(batch, device), args.max_new_tokens)[0].tolist()
    eos = np.atleast_1d(model.decoder.config.eos_token_id)
    print(text_of(ids, tokenizer, eos))
    if ids[-1] not in eos:
        print(f'stopped at --max_new_tokens {len(ids)}, before the end of the text',
              file=sys.stderr)

if __name__ == '__main__':
    run_main(main)
