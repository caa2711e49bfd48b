"""examples/read_page.py: any image is read upright, on white and in 8 bits, and nothing is lost in silence."""
import io
import random
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import ROOT, said
from decoder import Autoencoder
from load_deepseek import load, released_tensors, run_main, save, tokenizer_of
import read_page as example

TOKENIZER = tokenizer_of('tiny')

# --------------------------------------------------------------------------------------------------------------- images

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5                    # (6, 8), no two rows or columns alike

def opened(image, path, **options):
    image.save(path, **options)
    return np.asarray(example.open_image(path))

def test_transparency_is_laid_on_white(tmp_path):
    """RGBA, LA, a palette with a transparent colour or with a table of alphas, a grey or a colour that is transparent."""
    alpha = np.where(np.arange(8) < 4, 0, 255).astype(np.uint8)[None].repeat(6, axis=0)
    black = np.zeros((6, 8, 3), np.uint8)
    expected = np.where(alpha[..., None] > 0, 0, 255).repeat(3, axis=2)
    rgba = Image.fromarray(np.dstack([black, alpha]))
    assert (opened(rgba, tmp_path / 'rgba.png') == expected).all()
    assert (opened(rgba, tmp_path / 'rgba.webp', lossless=True, exact=True) == expected).all()
    assert (opened(rgba, tmp_path / 'rgba.tif') == expected).all()
    assert (opened(Image.fromarray(np.dstack([black[..., 0], alpha])), tmp_path / 'la.png') == expected).all()
    indices = Image.fromarray((alpha > 0).astype(np.uint8)).convert('P')
    indices.putpalette([0, 0, 0, 0, 0, 0])
    assert (opened(indices, tmp_path / 'p.png', transparency=0) == expected).all()
    assert (opened(indices, tmp_path / 'p.gif', transparency=0) == expected).all()
    assert (opened(indices, tmp_path / 'alphas.png', transparency=bytes([0, 255])) == expected).all()
    half = opened(Image.fromarray(np.dstack([black, np.full((6, 8), 128, np.uint8)])), tmp_path / 'half.png')
    assert (half == 127).all()
    grey = np.where(alpha > 0, 0, 7).astype(np.uint8)
    assert (opened(Image.fromarray(grey), tmp_path / 'l.png', transparency=7) == expected).all()
    assert (opened(Image.fromarray(grey).convert('RGB'), tmp_path / 'rgb.png', transparency=(7, 7, 7)) == expected).all()

def test_other_modes(tmp_path):
    """CMYK, one bit and grey as they look; 16 bits scaled to 8; what has no range of its own is refused."""
    grey = np.dstack([GREY] * 3)
    assert (opened(Image.fromarray(GREY), tmp_path / 'l.png') == grey).all()
    bits = Image.fromarray((GREY > 100).astype(np.uint8) * 255).convert('1')
    assert (opened(bits, tmp_path / 'bits.png') == np.where(grey > 100, 255, 0)).all()
    assert (opened(bits, tmp_path / 'bits.tif') == np.where(grey > 100, 255, 0)).all()
    cmyk = opened(Image.fromarray(grey).convert('CMYK'), tmp_path / 'cmyk.tif')
    assert abs(cmyk.astype(int) - grey).max() <= 1
    for name in ('a.png', 'a.tif'):
        assert (opened(Image.fromarray(GREY.astype(np.uint16) * 257), tmp_path / name) == grey).all(), name
    deep = np.array([[0, 128, 129, 255, 256, 40_000, 65_279, 65_535]], np.uint16)
    assert opened(Image.fromarray(deep), tmp_path / 'b.png')[0, :, 0].tolist() == [round(v / 257) for v in deep[0].tolist()]
    big = Image.frombytes('I;16B', (8, 1), deep.astype('>u2').tobytes())
    assert opened(big, tmp_path / 'big.tif')[0, :, 0].tolist() == [round(v / 257) for v in deep[0].tolist()]
    for mode, dtype in (('I', np.int32), ('F', np.float32)):
        Image.fromarray(GREY.astype(dtype)).save(tmp_path / f'{mode}.tif')
        with pytest.raises(ValueError, match=f'{mode}.tif: not an image that can be read .*mode {mode}') as e:
            example.open_image(tmp_path / f'{mode}.tif')
        assert '\n' not in str(e.value)

@pytest.mark.parametrize('name', ['a.png', 'a.jpg', 'a.webp', 'a.tif'])
def test_the_orientation_is_obeyed(tmp_path, name):
    """All eight, in each format: what is opened looks as the picture that was turned."""
    turns = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
             6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: lambda x: np.rot90(x)}
    picture = np.dstack([np.kron(GREY, np.ones((16, 16), np.uint8))] * 3)
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        options = {'a.webp': {'lossless': True}, 'a.jpg': {'quality': 100}}.get(name, {})
        found = opened(Image.fromarray(picture), tmp_path / name, exif=exif, **options).astype(int)
        assert found.shape == turn(picture).shape and abs(found - turn(picture)).max() <= (3 if name == 'a.jpg' else 0), orientation
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    exif[0x112] = 6
    if name in ('a.png', 'a.tif'):
        assert (opened(deep, tmp_path / name, exif=exif)[..., 0] == np.rot90(GREY, -1)).all()

def chunk(kind, content):
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

def test_damaged_metadata_costs_no_pixel(tmp_path):
    """Bad chunks behind a PNG's pixels, an EXIF that is cut short: the pixels are those of the file without it."""
    picture = np.dstack([GREY] * 3)
    Image.fromarray(picture).save(tmp_path / 'a.png')
    raw = (tmp_path / 'a.png').read_bytes()
    end = raw.index(b'IEND') - 4
    for bad in (chunk(b'tRNS', b'\0'), chunk(b'tEXt', b''), chunk(b'eXIf', b'Exif\0\0II*\0\xff\xff'), chunk(b'zTXt', b'a\0\0broken'),
                chunk(b'pHYs', b'\0'), chunk(b'gAMA', b''), chunk(b'acTL', b'\0')):
        (tmp_path / 'b.png').write_bytes(raw[:end] + bad + raw[end:])
        assert (np.asarray(example.open_image(tmp_path / 'b.png')) == picture).all(), bad
    Image.fromarray(picture).save(tmp_path / 'a.jpg', quality=100)
    expected, raw = np.asarray(Image.open(tmp_path / 'a.jpg')), (tmp_path / 'a.jpg').read_bytes()
    rational = b'II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x01\0\0\0\x1a\x01\x0a\0\x01\0\0\0\x32\0\0\0\0\0\0\0'      # points beyond the end
    for exif in (b'', b'II', b'II*\0\x08\0\0\0\xff\xff', rational, b'MM\0*' + b'\xff' * 30):
        body = b'Exif\0\0' + exif
        (tmp_path / 'b.jpg').write_bytes(raw[:2] + b'\xff\xe1' + struct.pack('>H', len(body) + 2) + body + raw[2:])
        assert (np.asarray(example.open_image(tmp_path / 'b.jpg')) == expected).all(), exif

def test_pixels_that_are_not_there_are_refused(tmp_path):
    """A page that is cut short, or damaged, is not read as if it were grey or black."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ('a.png', 'a.jpg', 'a.tif', 'a.webp', 'a.gif', 'a.bmp'):
        picture.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for share in (0.02, 0.5, 0.9):
            (tmp_path / name).write_bytes(whole[:int(share * len(whole))])
            with pytest.raises(ValueError, match=f'{name}: not an image that can be read') as e:
                example.open_image(tmp_path / name)
            assert '\n' not in str(e.value)
    picture.save(tmp_path / 'a.png')
    whole = bytearray((tmp_path / 'a.png').read_bytes())
    whole[whole.index(b'IDAT') + 3000] ^= 255
    (tmp_path / 'a.png').write_bytes(whole)
    with pytest.raises(ValueError, match='a.png: not an image'):
        example.open_image(tmp_path / 'a.png')

@pytest.mark.parametrize('name', ['a.gif', 'a.tif', 'a.png', 'a.webp'])
def test_of_several_frames_the_first_is_read_and_one_line_says_so(tmp_path, capsys, name):
    frames = [Image.new('RGB', (64, 64), color) for color in ('red', 'lime', 'blue')]
    options = {'a.webp': {'lossless': True}}.get(name, {})
    page = opened(frames[0], tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert (page == [255, 0, 0]).all()
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and f'{name}: read only the first of 3 images' in error
    assert opened(frames[1], tmp_path / name).shape == (64, 64, 3) and not capsys.readouterr().err

# ------------------------------------------------------------------------------------------------------- reading a page

def read_page(released, tmp_path, monkeypatch, ids=(5, 6, 1), *flags, mode=('--vision_mode', 'tiny')):
    """What eval.py --image does with a model that generates these ids; returns the prompt's ids and the tokens asked for."""
    seen = {}

    def generate(self, batch, max_new_tokens):
        seen.update(prompt=self.prompt, tokens=max_new_tokens, image=batch['image'])
        return torch.tensor([list(ids)[:max_new_tokens]])
    monkeypatch.setattr(Autoencoder, 'generate', generate)
    if not (tmp_path / 'page.png').exists():
        Image.new('RGB', (30, 30), 'white').save(tmp_path / 'page.png')
    example.main([str(tmp_path / 'page.png'), '--model', str(released), *mode, *flags])
    return seen

@pytest.mark.parametrize('prompt', ['Free OCR.', '<image>\nFree OCR. ', '<image>Free OCR.', 'Free OCR.<image>'])
def test_the_page_takes_the_place_of_the_image_tag(released, tmp_path, monkeypatch, prompt):
    seen = read_page(released, tmp_path, monkeypatch, (5, 6, 1), '--prompt', prompt)
    assert seen['prompt'] == tokenizer_of(str(released)).encode('\nFree OCR.').ids

def test_a_run_reads_pages_of_its_own_size_with_its_own_prompt(tmp_path, monkeypatch):
    model, _, config = load('tiny', 'vision', 32, vision_mode='128', vision_prompt='Read.')
    run = tmp_path / 'run'
    save(released_tensors(model, 'vision'), config, run)
    for flags, side, prompt in (((), 128, 'Read.'), (('--vision_mode', '64', '--prompt', ''), 64, '')):
        seen = read_page(run, tmp_path, monkeypatch, (5, 6, 1), *flags, mode=())
        assert seen['image'].shape == (1, 3, side, side) and seen['prompt'] == TOKENIZER.encode(prompt).ids

def test_a_text_that_ends_at_max_new_tokens_says_so(released, tmp_path, monkeypatch, capsys):
    tokenizer = tokenizer_of(str(released))
    ids = tokenizer.encode('abcdef').ids
    assert read_page(released, tmp_path, monkeypatch, ids + [1])['tokens'] == 8192              # as the original does
    found = capsys.readouterr()
    assert found.out == 'abcdef\n' and found.err == ''
    read_page(released, tmp_path, monkeypatch, ids + [1], '--max_new_tokens', '4')
    found = capsys.readouterr()
    assert found.out == 'abcd\n' and found.err.count('\n') == 1 and '--max_new_tokens 4' in found.err
    read_page(released, tmp_path, monkeypatch, ids[:3] + [1], '--max_new_tokens', '4')           # ends just there
    assert capsys.readouterr().err == ''

@pytest.mark.parametrize('encoding, shown', [('cp1252', 'caf\xe9 ???'), ('ascii', 'caf? ???'), ('utf-8', 'caf\xe9 \u4e2d\u6587\u2192')])
def test_a_console_that_cannot_show_a_letter_shows_a_question_mark(monkeypatch, encoding, shown):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(raw, encoding=encoding))
    run_main(lambda: print('caf\xe9 \u4e2d\u6587\u2192'))
    sys.stdout.flush()
    assert raw.getvalue() == (shown + '\n').encode(encoding)

@pytest.mark.parametrize('mode, vectors', [('tiny', 73), ('small', 111), ('base', 273), ('large', 421)])
def test_reading_a_page(released, tmp_path, monkeypatch, mode, vectors):
    """[BOS], the image's vectors, the prompt's tokens; the small squares stretch the page, the large ones pad it with grey."""
    Image.new('RGB', (200, 100), (255, 0, 0)).save(tmp_path / 'page.png')
    seen, sequence = {}, Autoencoder.sequence

    def spy(self, batch):
        x = sequence(self, batch)
        seen.update(batch=batch, prompt=self.prompt, positions=x.shape[1])
        return x
    monkeypatch.setattr(Autoencoder, 'sequence', spy)
    example.main([str(tmp_path / 'page.png'), '--model', str(released), '--vision_mode', mode, '--max_new_tokens', '5', '--prompt', 'Free OCR. '])
    S = {'tiny': 512, 'small': 640, 'base': 1024, 'large': 1280}[mode]
    image = seen['batch']['image'][0].permute(1, 2, 0)
    assert image.shape == (S, S, 3) and seen['batch']['context'].shape == (1, 0)
    assert seen['prompt'] == tokenizer_of(str(released)).encode('\nFree OCR.').ids and seen['positions'] == 1 + vectors + len(seen['prompt'])
    assert image[S // 2, S // 2].tolist() == [255, 0, 0]
    assert image[2, S // 2].tolist() == ([255, 0, 0] if S <= 640 else [127, 127, 127])

def test_a_page_that_cannot_be_read(released, tmp_path, capsys):
    (tmp_path / 'empty.png').write_bytes(b'')
    (tmp_path / 'text.png').write_text('no image')
    Image.new('1', (30_000, 30_000)).save(tmp_path / 'huge.png')
    Image.new('1', (30, 30)).save(tmp_path / 'good.png')
    Image.new('1', (3000, 1)).save(tmp_path / 'line.png')
    for file, message, *flags in (('empty.png', 'empty.png: not an image'), ('text.png', 'text.png: not an image'), ('huge.png', 'huge.png: not an image'),
                                  ('missing.png', 'missing.png: not an image'), ('good.png', 'vision_mode 100', '--vision_mode', '100'),
                                  ('line.png', '3000 x 1 pixels is too narrow', '--vision_mode', 'base')):
        assert message in said(capsys, example.main, [str(tmp_path / file), '--model', str(released), *flags])
    model, _, config = load('tiny', 'meanpool', 8)
    save(released_tensors(model, 'meanpool'), config, tmp_path / 'run')
    assert 'has no vision encoder' in said(capsys, example.main, [str(tmp_path / 'good.png'), '--model', str(tmp_path / 'run')])

def test_edit_distance():
    rng = random.Random(0)

    def by_definition(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(by_definition(a[1:], b) + 1, by_definition(a, b[1:]) + 1, by_definition(a[1:], b[1:]) + (a[0] != b[0]))
    for _ in range(60):
        a, b = (''.join(rng.choices('abc', k=rng.randrange(6))) for _ in range(2))
        assert example.edit_distance(a, b) == by_definition(a, b), (a, b)
    assert example.edit_distance('kitten', 'sitting') == 3
