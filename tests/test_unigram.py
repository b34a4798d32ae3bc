"""UMT5's tokenizer on tiny files made here, against transformers on the same files; Wan's cleaning."""

import hashlib
import html
import io
import json
import re
import sys

import ftfy
import numpy as np
import pytest
import sentencepiece
import transformers

from configs import base, selfforcing
from salt_jax import recipe, stages
from salt_jax.errors import InputError
from salt_jax.models.unigram import UnigramTokenizer, clean

LENGTH = 48
TEXT = [
  'A cat walks on the grass, realistic style, cinematic lighting.',
  'The camera slowly pans over a snowy mountain at sunrise; 4k & "sharp" <film>.',
  'Zwei schöne Vögel fliegen über den Fluß, ça va très bien, año nuevo.',
  '色调艳丽,过曝,静态,细节模糊不清,字幕,风格,作品,画作,画面,静止',
  'Кошка идёт по траве. 猫が草の上を歩く。 고양이가 걷는다. ١٢٣ שלום',
  'emoji 😀 🎬 and numbers 0123456789 + - * / = _ ( ) [ ] { } # @ ! ?',
]
PROMPTS = [
  'A cat walks on the grass.',
  '  two   spaces\tand\na line  ',
  'Zwei schöne Vögel',
  'e\u0301 combining, ﬁ ligature, ① circled, Ｆｕｌｌ width，comma',
  '色调艳丽，过曝，静态',
  '猫が草の上を歩く。 고양이 שלום ١٢٣',
  'emoji 😀🎬 👨‍👩‍👧 unseen 🦄 ☃',
  'fish &amp; chips &lt;tag&gt; &amp;quot;twice&amp;quot; &#39;x&#39;',
  'sÃ¼Ã¶ mojibake â€œquotesâ€\x9d',
  '<b> thrice escaped &amp;amp;amp; here',
  'zero\u200bwidth, nbsp\u00a0space, ideographic\u3000space, \u2003em, soft\u00adhyphen',
  'tab\x0bvertical \x1c separators \x85 next',
  '▁under ▁ bars _ _',
  'unknown ꙮ ɸ ƛ letters',
  'an end</s>in the text <pad> and <unk>',
  'escaped &lt;/s&gt; end',
  '.',
  'word ' * 200,
  'x' * 500,
  'exactly ' + 'a ' * 45,
]


def original_clean(text):
  """The cleaning by its description in wan.md 4.5, step by step."""
  text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  return re.sub(r'\s+', ' ', text).strip()


@pytest.fixture(scope='module', params=[False, True], ids=['unknown', 'bytes'])
def files(request, tmp_path_factory):
  """(folder of spiece.model, folder of tokenizer.json, transformers' tokenizer) of a tiny unigram model."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXT * 20),
    model_writer=model,
    vocab_size=500,
    hard_vocab_limit=False,
    byte_fallback=request.param,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    pad_piece='<pad>',
    num_threads=1,
    minloglevel=2,
  )
  spiece, saved = (tmp_path_factory.mktemp(name) for name in ('spiece', 'json'))
  (spiece / 'spiece.model').write_bytes(model.getvalue())
  transformers.T5Tokenizer.from_pretrained(str(spiece), extra_ids=0).save_pretrained(str(saved))
  return str(spiece), str(saved), oracle(saved / 'tokenizer.json', request.param)


def oracle(path, byte_fallback):
  """transformers' tokenizer; its own conversion forgets that a model spells unknown characters in bytes."""
  content = json.loads(path.read_text())
  content['model']['byte_fallback'] = byte_fallback
  path.write_text(json.dumps(content))
  names = {'pad_token': '<pad>', 'eos_token': '</s>', 'unk_token': '<unk>'}
  return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), **names)


@pytest.mark.parametrize('kind', [0, 1], ids=['spiece.model', 'tokenizer.json'])
def test_ids_are_those_of_transformers_behind_the_original_cleaning(files, kind):
  tokenize = UnigramTokenizer(files[kind], LENGTH)
  ids, mask = tokenize(PROMPTS)
  want = files[2](
    [original_clean(prompt) for prompt in PROMPTS],
    padding='max_length',
    truncation=True,
    max_length=LENGTH,
    return_tensors='np',
  )
  for prompt, got, expected in zip(PROMPTS, ids, want.input_ids, strict=True):
    assert got.tolist() == expected.tolist(), prompt
  np.testing.assert_array_equal(mask, want.attention_mask.astype(bool))
  assert (ids.dtype, mask.dtype, ids.shape) == (np.int32, bool, (len(PROMPTS), LENGTH))
  assert tokenize.size == len(files[2])


@pytest.mark.parametrize('kind', [0, 1])
def test_long_prompts_are_cut_with_the_end_and_short_ones_padded(files, kind):
  tokenize = UnigramTokenizer(files[kind], LENGTH)
  ids, mask = tokenize(['word ' * 200, 'a cat'])
  whole = UnigramTokenizer(files[kind], 2000)(['word ' * 200])[0][0]
  assert mask[0].all() and ids[0, -1] == 1 and (ids[0, :-1] == whole[: LENGTH - 1]).all()
  count = mask[1].sum()
  assert mask[1, :count].all() and ids[1, count - 1] == 1 and not ids[1, count:].any()
  ids, mask = tokenize.empty(2)
  assert ids[:, 0].tolist() == [1, 1] and not ids[:, 1:].any() and mask.sum(1).tolist() == [1, 1]
  assert ids[0].tolist() == files[2]('', padding='max_length', max_length=LENGTH).input_ids


def test_the_mask_counts_tokens_though_a_symbol_may_have_the_id_of_padding(files):
  ids, mask = UnigramTokenizer(files[0], LENGTH)(['a <pad> b'])
  at = ids[0].tolist().index(0)
  assert mask[0, at] and ids[0, at + 1] > 1


def test_tokenizer_json_comes_first(files, tmp_path):
  for folder, name in zip(files, ('spiece.model', 'tokenizer.json'), strict=False):
    (tmp_path / name).write_bytes(open(f'{folder}/{name}', 'rb').read())
  (tmp_path / 'spiece.model').write_bytes(b'not read')
  np.testing.assert_array_equal(
    UnigramTokenizer(str(tmp_path), LENGTH)(PROMPTS)[0],
    UnigramTokenizer(files[1], LENGTH)(PROMPTS)[0],
  )


def test_cleaning_is_the_original_s():
  for prompt in PROMPTS:
    assert clean(prompt) == original_clean(prompt)
  assert clean(' ，ﬁ\u00a0&amp;amp;\n x') == ',fi & x'


def test_the_negative_prompt_is_wan_s_to_the_byte():
  """Lengths and hashes of wan.md 5.6; cleaning turns its 27 full-width commas into ASCII."""
  digest = lambda text: hashlib.sha256(text.encode()).hexdigest()[:16]  # noqa: E731
  assert len(base.WAN_NEGATIVE) == 137 and base.WAN_NEGATIVE.count('，') == 27
  assert digest(base.WAN_NEGATIVE) == 'ce96e0324e4b54ce'
  assert digest(clean(base.WAN_NEGATIVE)) == '42811917cca5c2c7'
  assert selfforcing.get_config('1.3b').negative == base.WAN_NEGATIVE
  assert selfforcing.get_config('14b,i2v').negative == '镜头晃动，' + base.WAN_NEGATIVE
  assert 'negative' not in selfforcing.get_config('nano')


def real_config(folder, vocab, negative='a cat'):
  config = selfforcing.get_config('1.3b')
  config.text.vocab, config.negative = vocab, negative
  config.weights.tokenizer = folder
  return config


@pytest.mark.parametrize('kind', [0, 1])
def test_a_stage_of_a_real_size_reads_the_files(files, kind):
  config = real_config(files[kind], 512)
  rec = recipe.build(config)
  tokenize = stages.tokenizer(config, rec)
  assert tokenize.length == 512 and tokenize(['a cat'])[0].shape == (1, 512)
  np.testing.assert_array_equal(stages.negative(config, rec)['ids'], tokenize(['a cat'])[0])
  config.negative = ''
  np.testing.assert_array_equal(stages.negative(config, rec)['ids'], tokenize.empty(1)[0])


@pytest.mark.parametrize(
  'content, words',
  [
    (
      None,
      'tokenizer is not in .*put tokenizer.json or spiece.model there, or point --config.weights.tokenizer at',
    ),
    (
      {'spiece.model': b'garbage'},
      'spiece.model cannot be read as a tokenizer: copy or download it again.',
    ),
    (
      {'tokenizer.json': b'{"a": 1}'},
      'tokenizer.json cannot be read as a tokenizer: copy or download it again.',
    ),
  ],
)
def test_files_that_are_missing_or_damaged_are_named(tmp_path, content, words):
  for name, data in (content or {}).items():
    (tmp_path / name).write_bytes(data)
  config = real_config(str(tmp_path), 512)
  with pytest.raises(InputError, match=words) as error:
    stages.tokenizer(config, recipe.build(config))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('vocab', [100, 5000])
def test_a_vocabulary_of_another_size_than_the_encoder_s_is_refused(files, vocab):
  config = real_config(files[0], vocab)
  with pytest.raises(
    InputError, match=f'but text.vocab={vocab}: take the tokenizer of this encoder'
  ):
    stages.tokenizer(config, recipe.build(config))


def test_a_tokenizer_of_another_family_is_refused(tmp_path):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXT * 20),
    model_writer=model,
    vocab_size=300,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  (tmp_path / 'spiece.model').write_bytes(model.getvalue())
  with pytest.raises(InputError, match="gives </s> the id 2, and UMT5 1: take UMT5's tokenizer"):
    UnigramTokenizer(str(tmp_path), LENGTH)


@pytest.mark.parametrize('prompt', ['', ' \n', '&nbsp;', '&amp;#32;\u3000'])
def test_a_prompt_of_which_cleaning_leaves_nothing_is_refused(files, prompt):
  with pytest.raises(
    InputError, match='is empty once whitespace and HTML are cleaned; write a caption.'
  ) as error:
    UnigramTokenizer(files[0], LENGTH)(['a cat', prompt])
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('package, kind', [('ftfy', 0), ('sentencepiece', 0), ('tokenizers', 1)])
def test_a_missing_package_is_named(files, package, kind, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(
    InputError, match=rf"needs the package {package}: pip install 'salt_jax\[wan\]'"
  ):
    UnigramTokenizer(files[kind], LENGTH)
