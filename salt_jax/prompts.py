"""Files of prompts: text with one a line, JSON lines, or CSV."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from salt_jax.errors import InputError


class Entry(NamedTuple):
  """A prompt, what guidance steers away from if not from the config's negative prompt, and files it names."""

  prompt: str
  negative: str | None = None
  image: object = None
  last_image: object = None
  video: object = None


FIELDS = Entry._fields[1:]


def read(path: str) -> list[Entry]:
  """Reads prompts by the file's suffix.

  `.jsonl` has on each line a string, or an object with `prompt` and, if wanted, `negative`, `image`, `last_image` and
  `video`; `.csv` a header with a column `prompt` and, if wanted, these; any other file one prompt a line. What else
  stands in an object or a row is not read. Pictures and videos are found from the file's own folder, or anywhere by a
  whole path; a value of another type is left as it stands, because whoever wants none does not read it.

  Raises:
    InputError: the file is missing, not UTF-8 text, or holds no prompt; or a line is empty or wrong, by its number.
  """
  if not path:
    raise InputError('no prompt file is named: give one of one prompt a line as data.path.')
  if not os.path.isfile(path):
    raise InputError(f'prompt file {path} is missing: write one prompt a line there.')
  with open(path, 'rb') as file:
    content = file.read()
  try:
    text = content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise InputError(f'prompt file {path} is not UTF-8 text: save it as UTF-8.') from error
  suffix = os.path.splitext(path)[1].lower()
  lines = {'.jsonl': _json_lines, '.csv': _csv_rows}.get(suffix, _plain)
  entries = [_checked(path, *line) for line in lines(text, path)]
  if not entries:
    raise InputError(f'prompt file {path} is empty: write one prompt a line.')
  return entries


# Number in the file, prompt, and the others of `FIELDS`, as they stand there.
Line = tuple[int, object, list]


def _plain(text: str, path: str) -> Iterator[Line]:
  del path
  for number, line in enumerate(_lines(text), 1):
    yield number, line, [None] * len(FIELDS)


def _lines(text: str) -> list[str]:
  """Lines as editors count them: only line ends divide, unlike `str.splitlines`."""
  lines = text.replace('\r\n', '\n').replace('\r', '\n').split('\n')
  return lines[:-1] if lines[-1] == '' else lines


def _json_lines(text: str, path: str) -> Iterator[Line]:
  for number, line in enumerate(_lines(text), 1):
    try:
      item = json.loads(line)
    except ValueError as error:
      raise InputError(
        f'line {number} of prompt file {path} is not JSON: write a string or {{"prompt": "..."}}.'
      ) from error
    fields = item if isinstance(item, dict) else {'prompt': item}
    if 'prompt' not in fields:
      raise InputError(f'line {number} of prompt file {path} has no "prompt": add it.')
    yield number, fields['prompt'], [fields.get(name) for name in FIELDS]


def _csv_rows(text: str, path: str) -> Iterator[Line]:
  reader = csv.DictReader(io.StringIO(text, newline=''), strict=True)
  header = _guarded(lambda: reader.fieldnames or [], reader, path)
  if header and 'prompt' not in header:
    raise InputError(
      f'prompt file {path} has no column "prompt" but {", ".join(header)}: name it in the first line.'
    )
  while (row := _guarded(lambda: next(reader, None), reader, path)) is not None:
    if None in row or None in row.values():
      raise InputError(
        f'line {reader.reader.line_num} of prompt file {path} does not have the {len(header)} fields of its header: '
        'quote texts that hold commas.'
      )
    yield reader.reader.line_num, row['prompt'], [row.get(name) or None for name in FIELDS]


def _guarded(read_on: Callable, reader: csv.DictReader, path: str):
  try:
    return read_on()
  except csv.Error as error:
    raise InputError(
      f'line {reader.reader.line_num} of prompt file {path} is not CSV ({error}): mend its quotes.'
    ) from error


def _checked(path: str, number: int, prompt: object, others: list) -> Entry:
  negative, *named = others
  for name, value in (('prompt', prompt), ('negative', negative)):
    if not isinstance(value, str if name == 'prompt' else str | None):
      raise InputError(f'line {number} of prompt file {path}: "{name}" must be a string.')
  if not prompt.strip():
    raise InputError(f'line {number} of prompt file {path} is empty: remove it or fill it.')
  return Entry(prompt.strip(), negative, *(_found(os.path.dirname(path), x) for x in named))


def _found(folder: str, file: object) -> object:
  if isinstance(file, str):
    return os.path.join(folder, file) if file else None
  return file
