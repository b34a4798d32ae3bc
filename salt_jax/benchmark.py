"""The videos of a prompt set, under the names that VBench looks for, and one record of how they were made.

  python -m salt_jax.evaluate --vbench=VBench_full_info.json --checkpoint=RUN_OR_FILE --output=runs/vbench --samples=5

writes `videos/PROMPT-INDEX.mp4` and `vbench.json`. With --extended=LONG.txt line i of it is generated, and prompt i of
the set names the file: no long prompt fits into a file name. A killed export goes on where it was; `launch/vbench.sh`
scores the folder in an environment of its own, because VBench's pins exclude ours.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from jaxtyping import PyTree

from salt_jax import cli, generate, hosts, sample, video
from salt_jax.errors import InputError

log = logging.getLogger('salt_jax.evaluate')

RECORD, VIDEOS, PARTIAL = 'vbench.json', 'videos', 'partial'
FLICKER = 'temporal_flickering'  # wants 25 samples, of which VBench's filter keeps the still ones
_LONGEST = 255  # bytes of a file name
_PATHS = ('checkpoint', 'prompts', 'extended')  # what a record may name differently


class Item(NamedTuple):
  """A prompt of the set.

  Attributes:
    name: the short prompt, which names the file.
    text: what is generated from.
    dimensions: of VBench; empty where the set does not say.
    samples: videos of it.
  """

  name: str
  text: str
  dimensions: tuple[str, ...] = ()
  samples: int = 1

  def file(self, index: int) -> str:
    return f'{self.name}-{index}.mp4'


def read_prompts(path: str, flag: str) -> list[tuple[str, tuple[str, ...]]]:
  """(prompt, dimensions) of a .txt with one a line, or of a .json: VBench's own, or a list of strings.

  Raises:
    InputError: no such file, another format, or nothing in it.
  """
  try:
    with open(path, encoding='utf-8') as file:
      text = file.read()
    found = _from_json(json.loads(text)) if path.endswith('.json') else _from_lines(text)
  except OSError as error:
    raise InputError(f'--{flag}={path} cannot be read ({error.strerror}).') from error
  except (ValueError, KeyError, TypeError) as error:
    raise InputError(
      f'--{flag}={path} is no prompt set: give a .txt with one prompt a line, or a .json as VBench_full_info.json.'
    ) from error
  if not found:
    raise InputError(f'--{flag}={path} holds no prompt: give one a line.')
  return found


def _from_lines(text: str):
  return [(line.strip(), ()) for line in text.splitlines() if line.strip()]


def _from_json(entries: list):
  if not isinstance(entries, list):
    raise ValueError('not a list')
  found = []
  for entry in entries:
    prompt = entry if isinstance(entry, str) else entry['prompt_en']
    dimensions = () if isinstance(entry, str) else tuple(entry.get('dimension', ()))
    if not isinstance(prompt, str) or not prompt.strip():
      raise ValueError('an empty prompt')
    found.append((prompt, dimensions))
  return found


def items(
  prompts: str, extended: str | None, samples: int, flicker_samples: int | None = None
) -> list[Item]:
  """The prompt set of the flags; a prompt that is in it twice is one item with all its dimensions.

  Raises:
    InputError: a file that cannot be read, sets of other lengths, or a prompt that can name no file.
  """
  short = read_prompts(prompts, 'vbench')
  long = [text for text, _ in read_prompts(extended, 'extended')] if extended else None
  if long is not None and len(long) != len(short):
    raise InputError(
      f'--extended={extended} has {len(long)} prompts, but --vbench={prompts} has {len(short)}: give one for each, in '
      'the same order.'
    )
  merged: dict[str, Item] = {}
  for number, (name, dimensions) in enumerate(short):
    item = merged.get(name, Item(name, long[number] if long else name))
    dimensions = tuple(dict.fromkeys(item.dimensions + dimensions))
    count = (flicker_samples or samples) if FLICKER in dimensions else samples
    merged[name] = item._replace(dimensions=dimensions, samples=count)
    _check_name(merged[name])
  return list(merged.values())


def _check_name(item: Item) -> None:
  file = item.file(item.samples - 1)
  start = ' '.join(item.name[:60].split())
  shown = f'the prompt "{start}{"…" if len(item.name) > 60 else ""}"'
  if any(mark in item.name for mark in '/\0\n\r'):
    raise InputError(
      f'{shown} holds a slash or a line break, so it can name no file: reword it in --vbench, and give the original '
      'by --extended.'
    )
  if len(os.fsencode(file)) > _LONGEST:
    raise InputError(
      f'{shown} makes a file name of {len(os.fsencode(file))} bytes, and {_LONGEST} are allowed: give short prompts by '
      '--vbench, and the long ones by --extended.'
    )


def _digest(lines: Iterable[bytes]) -> str:
  found = hashlib.sha256()
  for line in lines:
    found.update(line + b'\n')
  return found.hexdigest()


def hash_of_prompts(texts: Sequence[str]) -> str:
  """SHA-256 of the prompts in their order, one a line in UTF-8: the same for .txt and .json."""
  return _digest(text.encode() for text in texts)


def hash_of_network(params: PyTree) -> str:
  """SHA-256 of names, types, shapes and bits of all parameters, as they are sampled with."""
  return _digest(
    part
    for path, x in jax.tree_util.tree_leaves_with_path(params)
    for part in (
      f'{jax.tree_util.keystr(path)} {x.dtype} {x.shape}'.encode(),
      np.asarray(x).tobytes(),
    )
  )


def record(made: generate.Generator, wanted: Sequence[Item], args: flags.FlagValues) -> dict:
  """What the videos of a folder have in common; two folders with one record hold the same videos."""
  size = made.config.video
  return {
    'checkpoint': args.checkpoint,
    'prompts': args.vbench,
    'extended': args.extended,
    'networks': {name: hash_of_network(params) for name, params in made.networks.items()},
    'prompts_sha256': hash_of_prompts([item.name for item in wanted]),
    'texts_sha256': hash_of_prompts([item.text for item in wanted]),
    'seed': args.seed,
    'noise': 'clip number = index * prompts + number of the prompt',
    'sampler': made.protocol,
    'video': {name: size[name] for name in ('frames', 'height', 'width', 'fps')},
    'codec': {'name': 'libx264', 'crf': int(video.X264['crf']), 'pixels': 'yuv420p'},
    'items': [
      {'prompt': item.name, 'dimensions': list(item.dimensions), 'samples': item.samples}
      for item in wanted
    ],
  }


def expected(found: dict) -> dict[str, str]:
  """{file name: prompt} of all videos of a record."""
  wanted = [Item(e['prompt'], '', (), e['samples']) for e in found['items']]
  return {item.file(index): item.name for item in wanted for index in range(item.samples)}


def read_record(folder: str) -> dict:
  """The record of an export.

  Raises:
    InputError: there is none, or it is damaged.
  """
  path = os.path.join(folder, RECORD)
  try:
    with open(path, encoding='utf-8') as file:
      found = json.load(file)
    expected(found)
    return found
  except OSError as error:
    raise InputError(
      f'{folder} has no {RECORD}: pass a folder that salt_jax.evaluate --vbench has written.'
    ) from error
  except (ValueError, KeyError, TypeError) as error:
    raise InputError(f'{path} is damaged: export into another folder.') from error


def _present(folder: str) -> set[str]:
  place = os.path.join(folder, VIDEOS)
  return set(os.listdir(place)) if os.path.isdir(place) else set()


def check_complete(folder: str) -> dict:
  """The record of a folder that holds exactly its videos: VBench would pass over a missing one with a warning.

  Raises:
    InputError: videos are missing, or do not belong there.
  """
  found = read_record(folder)
  wanted, have = expected(found), _present(folder)
  _refuse_foreign(folder, have - wanted.keys())
  if missing := sorted(wanted.keys() - have):
    raise InputError(
      f'{folder} lacks {len(missing)} of {len(wanted)} videos, such as "{missing[0]}": run the export again, which '
      'goes on where it was.'
    )
  return found


def _refuse_foreign(folder: str, foreign: set[str]) -> None:
  if foreign:
    raise InputError(
      f'{folder}/{VIDEOS} holds "{min(foreign)}", which is not of this prompt set: export into another folder.'
    )


def _check_folder(folder: str, wanted: Sequence[Item]) -> None:
  """Refuses what is nobody's export, before anything is loaded."""
  cli.check_folder('output', os.path.join(folder, VIDEOS))
  have = _present(folder)
  _refuse_foreign(folder, have - {item.file(i) for item in wanted for i in range(item.samples)})
  if have and not os.path.isfile(os.path.join(folder, RECORD)):
    raise InputError(
      f'{folder} holds videos but no {RECORD}, so nobody knows how they were made: export into another folder.'
    )


def _check_record(folder: str, mine: dict) -> None:
  """Refuses to go on in another export's folder; the first process leaves the record."""
  path = os.path.join(folder, RECORD)
  if os.path.isfile(path):
    theirs, mine = read_record(folder), json.loads(json.dumps(mine))
    for key in dict.fromkeys([*mine, *theirs]):
      if key not in _PATHS and mine.get(key) != theirs.get(key):
        raise InputError(
          f'{folder} holds videos of another protocol ({_difference(key, theirs.get(key), mine.get(key))}): export '
          'into another folder.'
        )
  elif jax.process_index() == 0:
    temporary = f'{path}.{os.getpid()}.tmp'
    with open(temporary, 'w', encoding='utf-8') as file:
      json.dump(mine, file, indent=1, ensure_ascii=False)
    os.replace(temporary, path)


def _difference(key: str, theirs, mine) -> str:
  if isinstance(theirs, dict) and isinstance(mine, dict):
    inner = next(k for k in [*mine, *theirs] if mine.get(k) != theirs.get(k))
    return _difference(f'{key}.{inner}', theirs.get(inner), mine.get(inner))
  if isinstance(theirs, list):
    return f'{key} differ'
  return f'{key} is {theirs} there and {mine} here'


def export(args: flags.FlagValues) -> None:
  """Writes this process's share of the videos that are not there yet.

  Raises:
    InputError: flags, prompts or a folder that do not fit.
  """
  generate.check(args)
  for name in ('image', 'last_image'):
    if getattr(args, name):
      raise InputError(
        f"--{name} has no use with --vbench: VBench's prompts come without pictures."
      )
  wanted = items(args.vbench, args.extended, args.samples, args.flicker_samples)
  video.require_pyav('--vbench')
  _check_folder(args.output, wanted)
  texts = [item.text for item in wanted]
  with hosts.joined(args):
    made = sample.generator(args, texts, seed=args.seed, continues=False)
    _check_record(args.output, record(made, wanted, args))
    _write(made, wanted, args)


def _write(made: generate.Generator, wanted: Sequence[Item], args: flags.FlagValues) -> None:
  most = max(item.samples for item in wanted)
  files = {
    index * len(wanted) + number: (item.text, item.file(index))
    for index in range(most)
    for number, item in enumerate(wanted)
    if index < item.samples
  }
  have, numbers = _present(args.output), list(files)
  mine = [numbers[i] for i in generate.share(len(numbers))]
  todo = [(n, files[n][0]) for n in mine if files[n][1] not in have]
  log.info('%d of %d videos are there, %d are to be made here', len(have), len(files), len(todo))
  began = time.monotonic()
  for done, (number, clip) in enumerate(generate.clips(made, todo, args.batch), 1):
    partial = os.path.join(args.output, PARTIAL, f'{number}.mp4')
    video.write(partial, clip, made.config.video.fps)
    os.replace(partial, os.path.join(args.output, VIDEOS, files[number][1]))
    if done % 10 == 0 or done == len(todo):
      rest = (time.monotonic() - began) / done * (len(todo) - done)
      log.info('%d of %d videos, %.0f min to go', done, len(todo), rest / 60)
  with contextlib.suppress(OSError):  # another process is still at work there
    os.rmdir(os.path.join(args.output, PARTIAL))
  if len(_present(args.output)) == len(files):
    log.info('complete; launch/vbench.sh %s scores it', args.output)


def define_flags() -> None:
  flags.DEFINE_string(
    'vbench', None, 'Prompt set (.txt or .json) whose videos are written instead of a table.'
  )
  flags.DEFINE_string('extended', None, 'Longer form of each prompt, which is generated from.')
  flags.DEFINE_integer(
    'flicker_samples',
    None,
    f'Clips of a prompt of {FLICKER}: 25 for the static filter.',
    lower_bound=1,
  )
  generate.define_flags(5)
