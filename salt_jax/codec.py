"""Videos to latents and back, part by part: a whole video of a real size would hold several activations of 6 GB.

Between parts the causal convolutions carry their last two frames on, so a video in parts is the whole video but for the
order of float32 sums. Where a single latent frame is large, it is besides split over this process's devices: each
convolution fetches its neighbours' edges, and the one attention, over a whole frame, gathers keys and values. Nothing
is approximated, as it would be in tiles that are decoded by themselves.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, PyTree, UInt8

from salt_jax.models import vae
from salt_jax.recipe import Recipe
from salt_jax.sharding import over_local_devices, over_space, replicated
from salt_jax.step import to_bytes, to_unit

# Latent positions in a part: one frame of 480x832 has 6,240, all of a nano clip 1,344.
POSITIONS = 2**13


def latents_at_once(rows: int, columns: int) -> int:
  """Latent frames in a part; at least one."""
  return max(1, POSITIONS // (rows * columns))


def split(
  clips: int, rows: int, columns: int, devices: Sequence[jax.Device] | None = None
) -> NamedSharding | None:
  """How clips `[b t h w c]` with latents of so many rows and columns lie; None leaves them where they are.

  Args:
    clips: how many there are.
    rows, columns: of a latent frame.
    devices: others than this process's.
  """
  devices = jax.local_devices() if devices is None else devices
  if latents_at_once(rows, columns) > 1 or len(devices) == 1:
    return None
  return over_space(clips, rows, columns, devices)


def _mesh_of(where: NamedSharding | None):
  """A caller may have set a mesh of its own."""
  return contextlib.nullcontext() if where is None else jax.set_mesh(where.mesh)


def _lying(tree: PyTree, where: NamedSharding | None) -> PyTree:
  return tree if where is None else jax.lax.with_sharding_constraint(tree, where)


@functools.partial(jax.jit, static_argnames=('cfg', 'first', 'where'), donate_argnames='features')
def decode_part(params, latents, features, cfg, first, where=None):
  """The program of `decode_next`: uint8 frames of some latents, and what the decoder carries on."""
  pixels, features = vae.decode_chunk(params, latents, features, cfg, first)
  return _lying((to_bytes(pixels), features), where)


@functools.partial(jax.jit, static_argnames=('cfg', 'first', 'where'), donate_argnames='features')
def _encode_part(params, pixels, features, cfg, first, where=None):
  return _lying(vae.encode_chunk(params, pixels, features, cfg, first), where)


def _grouped(run: Callable, params: PyTree, clips: Array, where: NamedSharding | None) -> list:
  """`run(params, clips)` of all clips, or of as many at once as the devices are split between."""
  if where is None:
    return [run(params, clips)]
  params = jax.device_put(params, replicated(where.mesh))
  size = where.mesh.shape['clips'] if where.spec[0] else 1
  groups = [clips[at : at + size] for at in range(0, len(clips), size)]
  return [run(params, jax.device_put(group, where)) for group in groups]


def decode(
  params: PyTree, latents: Float[Array, 'b f h w z'], cfg: vae.VAEConfig, part: int = 0
) -> UInt8[np.ndarray, 'b t h w 3']:
  """Video in uint8, quantised on the device.

  Args:
    params: of the VAE.
    latents: normalised; all clips are decoded at once where they lie, but large ones one by one over the devices.
    cfg: sizes.
    part: latent frames at once, by default what `latents_at_once` says.
  """

  def run(params, latents):
    return decode_next(params, latents, {}, cfg, True, part)[0]

  where = split(len(latents), *latents.shape[2:4])
  return np.concatenate(_grouped(run, params, latents, where))


def decode_next(
  params: PyTree,
  latents: Float[Array, 'b f h w z'],
  features: PyTree,
  cfg: vae.VAEConfig,
  first: bool,
  part: int = 0,
) -> tuple[UInt8[np.ndarray, 'b t h w 3'], PyTree]:
  """The next frames of a video, and the features for those behind them; arguments as for `decode`.

  Args:
    features: what the call before returned; it is donated. For the first call {}.
    first: whether the video begins here.
  """
  part = part or latents_at_once(*latents.shape[2:4])
  where, parts = split(len(latents), *latents.shape[2:4]), []
  if where is not None:
    params, latents = jax.device_put((params, latents), (replicated(where.mesh), where))
  for start in range(0, latents.shape[1], part):
    begins = first and start == 0
    with _mesh_of(where):  # the slice, too, lies there
      some = latents[:, start : start + part]
      pixels, features = decode_part(params, some, features, cfg, begins, where)
    parts.append(np.asarray(pixels))
  return np.concatenate(parts, axis=1), features


def _encode(
  params: PyTree, clips: Array, cfg: vae.VAEConfig, parts: Callable[[Array], Iterator[Array]]
) -> Float[Array, 'b f h w z']:
  """Normalised latents of videos that come in parts: 1 + 4n frames, then 4n each, pixels in [-1, 1]."""
  where = split(len(clips), clips.shape[2] // cfg.space, clips.shape[3] // cfg.space)

  def run(params, clips):
    features, made = {}, []
    for number, pixels in enumerate(parts(clips)):
      with _mesh_of(where):
        latents, features = _encode_part(params, pixels, features, cfg, number == 0, where)
      made.append(latents)
    return jnp.concatenate(made, axis=1)

  return jnp.concatenate(_grouped(run, params, clips, where))


def encode(
  params: PyTree, video: UInt8[Array, 'b t h w 3'], cfg: vae.VAEConfig, part: int = 0
) -> Float[Array, 'b f h w z']:
  """Normalised latents of a uint8 video of 1 + 4n frames; `part`, and where clips are encoded, as for `decode`.

  Raises:
    InputError: another number of frames, or sides that are not multiples of 8.
  """

  def parts(video):
    return (to_unit(video[:, a:b]) for a, b in spans(video.shape, cfg, part))

  return _encode(params, video, cfg, parts)


def encode_known(
  params: PyTree,
  images: UInt8[Array, 'b k h w 3'] | Float[Array, 'b k h w 3'],
  frames: int,
  cfg: vae.VAEConfig,
  part: int = 0,
) -> Float[Array, 'b f h w z']:
  """Normalised latents of a video that is mid-grey but for its first frame, or first and last (wan.md 5.5).

  Args:
    params: of the VAE.
    images: the frames that are known, of levels 0 .. 255.
    frames: of the video.
    cfg, part: as for `decode`.
  """

  def parts(images):
    shape = images.shape[0], frames, *images.shape[2:]
    for start, end in spans(shape, cfg, part):
      first, last = images[:, : start == 0], images[:, 1:] if end == frames else images[:, :0]
      count = end - start - first.shape[1] - last.shape[1]
      grey = jnp.zeros((shape[0], count, *shape[2:]), jnp.float32)
      yield jnp.concatenate([to_unit(first), grey, to_unit(last)], axis=1)

  return _encode(params, images, cfg, parts)


def spans(shape: tuple[int, ...], cfg: vae.VAEConfig, part: int = 0) -> Iterator[tuple[int, int]]:
  """Frames (from, to) of the parts that a video `[b t h w 3]` is encoded in."""
  _, frames, height, width, _ = shape
  part = part or latents_at_once(height // cfg.space, width // cfg.space)
  start, end = 0, 1 + cfg.time * (part - 1)
  while start < frames:
    yield start, min(end, frames)
    start, end = end, end + cfg.time * part


def decoder(
  rec: Recipe, params: PyTree
) -> Callable[[Float[Array, 'b f h w c']], UInt8[np.ndarray, 'b t h w 3']]:
  """Latents to uint8 video, one clip at a time, on each of this process's devices if they share the clips evenly."""
  devices = jax.local_device_count()

  def run(latents):
    size = 1 if len(latents) % devices else devices
    groups = (latents[at : at + size] for at in range(0, len(latents), size))
    lying = (over_local_devices(group) if size > 1 else group for group in groups)
    return np.concatenate([decode(params, group, rec.vae) for group in lying])

  return run
