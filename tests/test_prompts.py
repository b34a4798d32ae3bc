"""Files of prompts, their mistakes by line, and negative prompts of their own on the way to guidance."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax import clips, data, prompts, recipe, stages, step
from salt_jax.errors import InputError
from salt_jax.models.text import WordTokenizer
from salt_jax.prompts import Entry
from salt_jax.store import Store
from tests import tiny_config

WORDS = WordTokenizer(clips.NANO_WORDS, 8)


def write(folder, name, content):
  path = folder / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


@pytest.mark.parametrize(
  'name, content',
  [
    ('p.txt', 'a, "b"\n猫\u2028x \n'),
    ('p.txt', '\ufeffa, "b"\r\n猫\u2028x'),
    ('p.jsonl', '"a, \\"b\\""\n{"prompt": "猫\\u2028x", "width": 3}\n'),
    ('p.JSONL', '{"prompt": " a, \\"b\\" ", "negative": null}\n"猫\u2028x"'),
    ('p.csv', 'id,prompt\n1,"a, ""b"""\n2,猫\u2028x\n'),
    ('p.csv', 'prompt,negative\r\n"a, ""b""",\r\n猫\u2028x,\r\n'),
  ],
)
def test_every_format_gives_the_same_prompts(tmp_path, name, content):
  assert prompts.read(write(tmp_path, name, content)) == [Entry('a, "b"'), Entry('猫\u2028x')]


@pytest.mark.parametrize(
  'name, content',
  [
    ('p.jsonl', '{"prompt": "a", "negative": "b,c"}\n{"prompt": "d"}\n'),
    ('p.csv', 'negative,prompt\n"b,c",a\n,d\n'),
  ],
)
def test_negative_prompts_belong_to_their_line(tmp_path, name, content):
  assert prompts.read(write(tmp_path, name, content)) == [Entry('a', 'b,c'), Entry('d')]


@pytest.mark.parametrize(
  'name, content',
  [
    ('p.jsonl', '{"prompt": "a", "image": "x/1.png"}\n{"prompt": "d", "image": "/y.png"}\n"e"'),
    ('p.csv', 'image,prompt\nx/1.png,a\n/y.png,d\n,e\n'),
  ],
)
def test_pictures_are_found_from_the_folder_of_the_file(tmp_path, name, content):
  first = str(tmp_path / 'x' / '1.png')
  wanted = [Entry('a', None, first), Entry('d', None, '/y.png'), Entry('e')]
  assert prompts.read(write(tmp_path, name, content)) == wanted


def test_what_text_to_video_does_not_read_may_be_of_any_type(tmp_path):
  lines = (
    '{"prompt": "a bag", "image": ["x.png"]}\n{"prompt": "a dress", "last_image": {"bytes": ""}}'
  )
  rows, _ = data.tokenized(write(tmp_path, 'p.jsonl', lines), WORDS)
  assert len(rows) == 2


@pytest.mark.parametrize(
  'name, content, sentence',
  [
    ('p.txt', None, 'is missing: write one prompt a line there.'),
    ('p.txt', '', 'is empty: write one prompt a line.'),
    ('p.csv', '', 'is empty: write one prompt a line.'),
    ('p.csv', 'prompt\n', 'is empty: write one prompt a line.'),
    ('p.txt', b'\xff\xfe\x00', 'is not UTF-8 text: save it as UTF-8.'),
    ('p.txt', 'a\n \nb\n', 'line 2 of prompt file'),
    ('p.jsonl', '"a"\n{"prompt": "b"\n', 'line 2 of prompt file .* is not JSON: write a string or'),
    ('p.jsonl', '"a"\n\n"b"\n', 'line 2 of prompt file .* is not JSON'),
    ('p.jsonl', '"a"\n{"text": "b"}\n', 'line 2 of prompt file .* has no "prompt": add it.'),
    ('p.jsonl', '"a"\n3\n', 'line 2 of prompt file .*: "prompt" must be a string.'),
    (
      'p.jsonl',
      '{"prompt": "a", "negative": 3}\n',
      'line 1 of prompt file .*: "negative" must be a string.',
    ),
    (
      'p.jsonl',
      '"a"\n{"prompt": " "}\n',
      'line 2 of prompt file .* is empty: remove it or fill it.',
    ),
    ('p.csv', 'text,id\nb,1\n', 'has no column "prompt" but text, id: name it in the first line.'),
    (
      'p.csv',
      'prompt,id\na,1\nb, c,2\n',
      'line 3 of prompt file .* does not have the 2 fields of its header',
    ),
    (
      'p.csv',
      'prompt,id\na,1\nb\n',
      'line 3 of prompt file .* does not have the 2 fields of its header',
    ),
    ('p.csv', 'prompt,id\n"a,1\n', 'line 2 of prompt file .* is not CSV .*: mend its quotes.'),
    ('p.csv', 'prompt,id\na,1\n"",2\n', 'line 3 of prompt file .* is empty: remove it or fill it.'),
  ],
)
def test_bad_lines_are_named_by_their_number(tmp_path, name, content, sentence):
  path = str(tmp_path / name) if content is None else write(tmp_path, name, content)
  with pytest.raises(InputError, match=sentence) as error:
    prompts.read(path)
  assert '\n' not in str(error.value) and name in str(error.value)


def test_a_prompt_that_cannot_be_tokenised_is_found_at_the_start(tmp_path):
  path = write(tmp_path, 'p.txt', 'a red bag moves left\na purple bag moves left\n')
  with pytest.raises(InputError, match="'purple'"):
    data.tokenized(path, WORDS)


def test_batches_carry_a_file_s_negative_prompts(tmp_path):
  lines = [
    {'prompt': 'a red bag moves left', 'negative': 'a blue bag'},
    {'prompt': 'a blue bag moves up'},
    {'prompt': 'a green dress moves down', 'negative': 'moves'},
  ]
  path = write(tmp_path, 'p.jsonl', '\n'.join(json.dumps(line) for line in lines))
  for batch in itertools.islice(data.token_batches(data.tokenized(path, WORDS), data.Feed(3)), 3):
    np.testing.assert_array_equal(
      batch['ids'], WORDS([lines[r]['prompt'] for r in batch['row']])[0]
    )
    np.testing.assert_array_equal(
      batch['has_negative'], ['negative' in lines[r] for r in batch['row']]
    )
    for i, row in enumerate(batch['row']):
      ids, mask = WORDS([lines[row].get('negative', 'a')])
      at = [i] if 'negative' in lines[row] else []
      np.testing.assert_array_equal(batch['negative_ids'][at], ids[: len(at)])
      np.testing.assert_array_equal(batch['negative_mask'][at], mask[: len(at)])
  assert 'has_negative' not in next(
    data.token_batches(data.tokenized(write(tmp_path, 'q.txt', 'a bag'), WORDS), data.Feed(1))
  )


def test_guidance_takes_a_line_s_own_negative_prompt_and_the_shared_one_otherwise():
  shared = {'ids': jnp.array([[7, 1, 0]]), 'mask': jnp.array([[True, True, False]])}
  batch = {
    'has_negative': jnp.array([False, True]),
    'negative_ids': jnp.array([[0, 0, 0], [5, 6, 1]]),
    'negative_mask': jnp.array([[False] * 3, [True] * 3]),
  }
  got = step.negatives({'negative': shared}, batch, 2)
  assert got['ids'].tolist() == [[7, 1, 0], [5, 6, 1]]
  assert got['mask'].tolist() == [[True, True, False], [True, True, True]]
  assert step.negatives({'negative': shared}, {}, 2)['ids'].tolist() == [[7, 1, 0]] * 2
  rows = step.negatives(
    {'negative': {'text': jnp.ones((1, 3, 4))}}, batch | {'negative_text': jnp.zeros((2, 3, 4))}, 2
  )
  assert rows['text'].sum((1, 2)).tolist() == [12, 0]


def test_a_stage_reads_its_prompts_from_a_file(tmp_path):
  """Trajectories of the teacher too are made from the file, not from nano's captions."""
  folder = tiny_config.write_weights(str(tmp_path / 'weights'))
  config = tiny_config.stage('ode', folder)
  config.pairs.update(count=8, steps=4, batch=8)
  config.data = dict(kind='prompts', path=write(tmp_path, 'p.txt', 'a red bag moves left\n'))
  rec = recipe.build(config)
  stages.build(config, rec, str(tmp_path / 'run'))
  records = Store(str(tmp_path / 'run' / 'pairs'))
  ids, _ = stages.tokenizer(config, rec)(['a red bag moves left'])
  assert all((records[row]['ids'] == ids[0]).all() for row in range(8))
